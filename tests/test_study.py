import html.parser
import json
import math

import jsonschema
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from researchkit.core.errors import InputError, RecordError
from researchkit.core.notebook import MARKS, MIME
from researchkit.core.study import (RECORD_SCHEMA, VERDICTS, Criterion, Study, all_of, between, choose, claims_html, claims_text, equivalent, exact,
                                    greater, less, mean_interval, measured_text, monotone, not_tested, rank_correlation, ratio, select,
                                    validate_record)

A, B = [0.91, 0.93, 0.90, 0.95], [0.80, 0.86, 0.85, 0.84]


def table(**methods) -> pd.DataFrame:
    return pd.DataFrame([dict(method=m, seed=s, acc=v) for m, values in methods.items() for s, v in enumerate(values)])


def expect(verdict, low, high, above, measured):
    assert verdict == ("reproduced" if low > above else "partly" if measured > above else "not reproduced")


values = st.lists(st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 6)), min_size=3, max_size=9)


@given(values)
def test_the_t_interval_is_scipys(x):
    low, high = mean_interval(x)
    if np.ptp(x) == 0:
        assert low == high == x[0]
    else:
        ci = stats.ttest_1samp(x, 0).confidence_interval(0.95)
        assert np.allclose((low, high), ci, rtol=1e-9, atol=1e-9)


def test_ten_units_take_the_bca_bootstrap_and_it_is_repeatable():
    x = np.random.default_rng(3).gamma(2, size=25)
    ci = stats.bootstrap((x,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    assert mean_interval(x) == mean_interval(x) == (ci.low, ci.high) == mean_interval(x, "bootstrap")
    assert mean_interval(x[:9]) == mean_interval(x[:9], "t") != mean_interval(x[:9], "bootstrap")
    assert mean_interval(x, "t", 0.99)[0] < mean_interval(x, "t", 0.95)[0]


def test_the_bootstrap_survives_almost_equal_values():
    low, high = mean_interval([0.0] * 11 + [1.0])
    assert 0 <= low <= 1 / 12 <= high <= 1 and not math.isnan(low)
    assert mean_interval([2.0] * 12) == (2.0, 2.0)


def test_interval_refuses():
    with pytest.raises(InputError, match="at least two units, not 1"):
        mean_interval([1.0])
    with pytest.raises(InputError, match="unknown interval 'z'"):
        mean_interval([1, 2], "z")


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.08, 0.2])
def test_greater_and_less_against_the_paired_t_interval(margin):
    rows = table(A=A, B=B)
    ci = stats.ttest_rel(A, B).confidence_interval()
    measured = np.mean(np.subtract(A, B))
    for o in (greater("acc", "A", "B", margin).evaluate(rows), less("acc", "B", "A", margin).evaluate(rows)):
        assert np.allclose(o.interval, ci) and np.isclose(o.measured, measured) and o.units == 4
        expect(o.verdict, *ci, margin, measured)
    assert greater("acc", "B", "A").evaluate(rows).verdict == "not reproduced"


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=8), st.floats(-1, 1), st.randoms())
def test_a_verdict_does_not_depend_on_the_order_of_rows(pairs, margin, random):
    rows = table(A=[a for a, _ in pairs], B=[b for _, b in pairs])
    shuffled = rows.sample(frac=1, random_state=random.randrange(2**16))
    o, p = (greater("acc", "A", "B", margin).evaluate(r) for r in (rows, shuffled))
    assert o == p and o.verdict in VERDICTS
    if o.verdict == "reproduced":
        assert o.interval[0] > margin and greater("acc", "B", "A", -margin).evaluate(rows).verdict == "not reproduced"


def test_rows_are_averaged_within_a_unit_first():
    rows = pd.concat([table(A=A, B=B), pd.DataFrame([dict(method="A", seed=0, acc=0.91)] * 50)])
    assert np.isclose(greater("acc", "A", "B").evaluate(rows).measured, np.mean(A) - np.mean(B))


def test_dictionaries_where_and_pairs_pick_rows():
    rows = pd.DataFrame([dict(model=m, task=t, seed=s, loss=s + 10 * (m == "big") + 0.1 * s * (t == "x"))
                         for m in ("big", "small") for t in ("x", "y") for s in range(4)])
    o = greater("loss", {"model": "big"}, {"model": "small"}, where={"task": "x"}, pair=("task", "seed"), margin=9).evaluate(rows)
    assert (o.verdict, o.measured, o.units) == ("reproduced", 10.0, 4)
    assert greater("loss", "big", "small", by="model", pair=("task", "seed")).evaluate(rows).units == 8
    assert select(rows, "loss", where={"task": ["x", "y"], "model": "big"}).size == 4


def test_equivalent_needs_the_whole_interval_inside():
    rows = table(A=A, B=B, C=[a + d for a, d in zip(A, (0.001, -0.001, 0.002, 0.0))])
    d = np.subtract(A, B)
    ci = stats.ttest_1samp(d, 0).confidence_interval()
    assert equivalent("acc", "A", "C", 0.01).evaluate(rows).verdict == "reproduced"
    assert equivalent("acc", "A", "B", max(map(abs, ci)) + 1e-6).evaluate(rows).verdict == "reproduced"
    assert equivalent("acc", "A", "B", max(map(abs, ci)) - 1e-6).evaluate(rows).verdict == "partly"
    assert equivalent("acc", "A", "B", abs(d.mean()) - 1e-6).evaluate(rows).verdict == "not reproduced"
    with pytest.raises(InputError, match="margin above 0"):
        equivalent("acc", "A", "B", 0)


def test_ratio_is_judged_on_logarithms():
    rows = table(A=A, B=B)
    logs = np.log(A) - np.log(B)
    ci = np.exp(stats.ttest_1samp(logs, 0).confidence_interval())
    o = ratio("acc", "A", "B", at_least=1.05).evaluate(rows)
    assert np.isclose(o.measured, stats.gmean(np.divide(A, B))) and np.allclose(o.interval, ci)
    expect(o.verdict, *ci, 1.05, o.measured)
    assert ratio("acc", "A", "B", at_most=ci[1] + 1e-6, at_least=ci[0] - 1e-6).evaluate(rows).verdict == "reproduced"
    assert ratio("acc", "A", "B", at_most=ci[1] - 1e-6).evaluate(rows).verdict == "partly"
    assert ratio("acc", "A", "B", at_most=1.0).evaluate(rows).verdict == "not reproduced"
    with pytest.raises(InputError, match="positive"):
        ratio("acc", "A", "B", at_most=1).evaluate(table(A=[1, 2, -3.0], B=[1, 1, 1]))
    with pytest.raises(InputError, match="at_most"):
        ratio("acc", "A", "B")


def test_ratio_refuses_a_single_row_that_is_not_positive():
    rows = pd.concat([table(A=A, B=B), pd.DataFrame([dict(method="A", seed=0, acc=-0.1)])])
    with pytest.raises(InputError, match="positive"):
        ratio("acc", "A", "B", at_least=1).evaluate(rows)


@pytest.mark.parametrize("bounds", [dict(at_most=0.0), dict(at_least=-1.0)])
def test_ratio_refuses_bounds_that_are_not_positive(bounds):
    with pytest.raises(InputError, match="positive|above 0"):
        ratio("acc", "A", "B", **bounds)


def test_closed_bounds_are_closed():
    rows = table(A=[1.0] * 4, B=[1.0] * 4)
    assert between("acc", 0.9, 1.0, a="A").evaluate(rows).verdict == "reproduced"
    assert between("acc", 1.0, 2.0, a="A").evaluate(rows).verdict == "reproduced"
    assert ratio("acc", "A", "B", at_most=1.0).evaluate(rows).verdict == "reproduced"
    assert greater("acc", "A", "B").evaluate(rows).verdict == "not reproduced"


def test_between():
    rows = table(A=A, B=B)
    ci = stats.ttest_1samp(A, 0).confidence_interval()
    assert between("acc", ci.low - 1e-6, ci.high + 1e-6, a="A").evaluate(rows).verdict == "reproduced"
    assert between("acc", ci.low + 1e-6, a="A").evaluate(rows).verdict == "partly"
    assert between("acc", high=0.5, a="A").evaluate(rows).verdict == "not reproduced"
    with pytest.raises(InputError, match="low < high"):
        between("acc", 1, 1)


def test_monotone_takes_bonferronis_confidence_and_reports_the_worst_step():
    levels = {"1": [0.1, 0.2, 0.15, 0.12], "2": [0.2, 0.31, 0.24, 0.24], "3": [0.22, 0.35, 0.25, 0.26], "4": [0.5, 0.6, 0.55, 0.52]}
    rows = table(**levels)
    steps = [np.subtract(levels[b], levels[a]) for a, b in ("12", "23", "34")]
    cis = [stats.ttest_1samp(d, 0).confidence_interval(1 - 0.05 / 3) for d in steps]
    o = monotone("acc", list("1234")).evaluate(rows)
    worst = min(range(3), key=lambda i: (cis[i].low > 0, steps[i].mean()))
    assert np.allclose(o.interval, cis[worst]) and np.isclose(o.measured, steps[worst].mean())
    assert o.verdict == ("reproduced" if all(ci.low > 0 for ci in cis) else "partly") and "2 to 3" in o.note
    assert monotone("acc", list("4321"), increasing=False).evaluate(rows).verdict == o.verdict
    assert monotone("acc", list("1324")).evaluate(rows).verdict == "not reproduced"
    assert monotone("acc", list("14"), margin=1).evaluate(rows).verdict == "not reproduced"
    with pytest.raises(InputError, match="two levels"):
        monotone("acc", ["1"])


def test_rank_correlation_against_an_independent_bootstrap():
    rng = np.random.default_rng(5)
    x = rng.normal(size=14)
    y = x + rng.normal(scale=0.4, size=14)
    rows = pd.DataFrame([dict(task=f"t{i:02d}", seed=s, x=x[i], y=y[i] + (s - 1) * 0.1) for i in range(14) for s in range(3)])
    o = rank_correlation("x", "y", at_least=0.3).evaluate(rows)
    assert np.isclose(o.measured, stats.spearmanr(x, y).statistic) and o.units == 14
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(1999):
        i = generator.integers(14, size=14)
        rx, ry = stats.rankdata(x[i]), stats.rankdata(y[i])
        draws.append(np.corrcoef(rx, ry)[0, 1])
    assert np.allclose(o.interval, np.nanquantile(draws, [0.025, 0.975]))
    expect(o.verdict, *o.interval, 0.3, o.measured)
    assert rank_correlation("x", "y", at_least=0.999).evaluate(rows).verdict == "not reproduced"
    assert rank_correlation("x", "y").evaluate(rows[rows.task < "t04"]).verdict == "not tested"
    with pytest.warns(stats.ConstantInputWarning):
        assert rank_correlation("x", "z").evaluate(rows.assign(z=1.0)).verdict == "void"


def test_exact():
    rows = table(A=[1.0, 1.0, 0.5], B=[0.2, 0.3, 0.1])
    o = exact("acc", at_most=1).evaluate(rows)
    assert (o.verdict, o.measured, o.interval, o.units) == ("reproduced", 1.0, None, 6)
    o = exact("acc", equals=1.0, a="A").evaluate(rows)
    assert (o.verdict, o.measured, o.note) == ("not reproduced", 0.5, "1 of 3 rows fail")
    assert exact("acc", at_least=0.5, a="A").evaluate(rows[rows.seed == 2]).verdict == "reproduced"
    assert exact("same", equals=True).evaluate(pd.DataFrame([dict(same=True, seed=0)])).verdict == "reproduced"
    assert exact("what", equals="x").evaluate(pd.DataFrame([dict(what="x"), dict(what="y")])).measured is None
    with pytest.raises(InputError, match="equals"):
        exact("acc")
    with pytest.raises(InputError, match="no acc"):
        exact("acc", at_most=1, a="Z").evaluate(rows)


def test_all_of_is_the_worst_part():
    rows = table(A=A, B=B)
    good, fair, bad = greater("acc", "A", "B"), greater("acc", "A", "B", 0.08), greater("acc", "B", "A")
    assert fair.evaluate(rows).verdict == "partly"
    for parts, verdict in (((good,), "reproduced"), ((good, fair), "partly"), ((fair, bad, good), "not reproduced"), ((good, not_tested("x")), "not tested")):
        o = all_of(*parts).evaluate(rows)
        assert o.verdict == verdict and ("decided by" in o.note or verdict == "reproduced")
    assert all_of(good, fair).evaluate(rows).measured == fair.evaluate(rows).measured
    for nothing in ((), (good, "x")):
        with pytest.raises(InputError, match="criteria"):
            all_of(*nothing)


def test_a_failed_precondition_makes_the_verdict_void():
    rows = table(A=A, B=B)
    held, failed = between("acc", 0.8, 1, a="A"), between("acc", 0.99, 1, a="A")
    for criterion in (greater, less):
        assert criterion("acc", "A", "B", requires=failed).evaluate(rows).verdict == "void"
        assert criterion("acc", "A", "B", requires=held).evaluate(rows) == criterion("acc", "A", "B").evaluate(rows)
    o = exact("acc", at_most=1, requires=failed).evaluate(rows)
    assert o.verdict == "void" and "precondition failed" in o.note and "0.923" in o.note
    assert all_of(greater("acc", "A", "B"), requires=failed).evaluate(rows).verdict == "void"
    assert greater("acc", "A", "B", requires=not_tested("x")).evaluate(rows).verdict == "not tested"
    assert monotone("acc", ["B", "A"], requires=failed).evaluate(rows).verdict == "void"
    assert rank_correlation("acc", "acc", units=("method", "seed"), requires=failed).evaluate(rows).verdict == "void"
    assert equivalent("acc", "A", "B", 1, requires=failed).evaluate(rows).verdict == ratio("acc", "A", "B", at_least=1, requires=failed).evaluate(rows).verdict


def test_a_failed_precondition_does_not_need_the_rows_it_spared():
    o = greater("acc", "A", "never run", requires=between("acc", 0.99, 1, a="A")).evaluate(table(A=A))
    assert o.verdict == "void"


def test_fewer_than_three_seeds_make_no_verdict():
    for n in (1, 2):
        rows = table(A=A[:n], B=B[:n])
        o = greater("acc", "A", "B").evaluate(rows)
        assert o.verdict == "not tested" and "fewer than three" in o.note and np.isclose(o.measured, np.mean(A[:n]) - np.mean(B[:n]))
        assert monotone("acc", ["B", "A"]).evaluate(rows).verdict == between("acc", 0, 1).evaluate(rows).verdict == "not tested"
        assert exact("acc", at_most=1).evaluate(rows).verdict == "reproduced"
    tasks = pd.DataFrame([dict(method=m, task=t, seed=s, acc=t + (m == "A") + s / 10) for m in "AB" for t in range(8) for s in range(2)])
    assert greater("acc", "A", "B", pair=("task", "seed")).evaluate(tasks).verdict == "not tested"


def test_seeds_of_other_methods_do_not_count():
    rows = pd.DataFrame([dict(method=m, task=t, seed=s, acc=t + (m == "A") + s / 10) for m in "AB" for t in range(8) for s in range(2)])
    others = pd.DataFrame([dict(method="C", task=0, seed=s, acc=0.0) for s in range(9)])
    assert greater("acc", "A", "B", pair=("task", "seed")).evaluate(pd.concat([rows, others])).verdict == "not tested"


def test_what_is_not_paired_or_not_logged_is_refused():
    rows = table(A=A, B=B[:3])
    with pytest.raises(InputError, match=r"not paired; units on one side only: \[3\]"):
        greater("acc", "A", "B").evaluate(rows)
    with pytest.raises(InputError, match="no rows with method='Z'; there are: A, B"):
        greater("acc", "A", "Z").evaluate(rows)
    with pytest.raises(InputError, match="unknown column 'loss'"):
        less("loss", "A", "B").evaluate(rows)
    with pytest.raises(InputError, match="no acc was logged for A"):
        greater("acc", "A", "B").evaluate(rows.assign(acc=rows.acc.where(rows.method == "B")))
    with pytest.raises(TypeError):
        greater("acc", "A", "B", nonsense=1)


def study(profile="cpu", seeds=(0, 1, 2), **more):
    s = Study(paper="example", profile=profile, seeds=seeds, params={"n": 1})
    for i in seeds:
        s.log(method="A", seed=i, acc=A[i], **more)
        s.log(method="B", seed=i, acc=B[i])
    return s


def concluded(s):
    s.conclude()
    return s.record


def test_the_record_is_valid_json_of_its_schema(capsys):
    s = study()
    s.claim("C1", "A is better", "+4.3 points", greater("acc", "A", "B"))
    s.claim("C2", "open interval", "x", between("acc", low=0.5, a="A"))
    s.claim("C3", "later", "x", not_tested("needs a GPU"))
    s.tolerance(acc=0.02, seconds=None, loss=("rel", 0.1))
    record = concluded(s)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    jsonschema.Draft202012Validator.check_schema(RECORD_SCHEMA)
    assert validate_record(record) is record
    assert [c["verdict"] for c in record["claims"]] == ["reproduced", "reproduced", "not tested"]
    assert record["tolerances"] == {"acc": ["abs", 0.02], "seconds": None, "loss": ["rel", 0.1]}
    assert record["params"] == {"n": 1} and record["seeds"] == [0, 1, 2] and len(record["rows"]) == 6
    assert record["versions"]["numpy"] == np.__version__ and record["hardware"]["cores"] >= 1
    assert record["peak_rss_bytes"] > 1e7 and record["wall_seconds"] >= 0 <= record["cpu_seconds"]
    for key in record:
        with pytest.raises(RecordError):
            validate_record({k: v for k, v in record.items() if k != key})
    for change in (dict(schema=2), dict(schema="1"), dict(profile="gpu"), dict(extra=1), dict(rows=[{"a": [1]}]), dict(claims=[{}])):
        with pytest.raises(RecordError, match="^mine: "):
            validate_record(record | change, "mine")
    with pytest.raises(RecordError, match="update researchkit"):
        validate_record(record | {"schema": 2})
    for other in (None, [], "x", 3):
        with pytest.raises(RecordError):
            validate_record(other)


def test_a_smoke_run_is_computed_and_not_judged():
    s = study("smoke")
    s.claim("C1", "A is better", "x", greater("acc", "A", "B"))
    s.claim("C2", "never", "x", not_tested("needs a GPU"))
    one, two = concluded(s)["claims"]
    assert one["verdict"] == two["verdict"] == "not tested"
    assert one["measured"] > 0 and one["interval"] and one["note"] == "a smoke run is not judged" and two["note"] == "needs a GPU"


def test_a_claim_that_names_rows_that_are_not_there():
    s = study()
    s.claim("C1", "x", "x", greater("acc", "A", "Z"))
    with pytest.raises(InputError, match="^claim C1: no rows with method='Z'"):
        s.conclude()


def test_claims_are_unique_and_have_criteria():
    s = study()
    s.claim("C1", "x", "x", exact("acc", at_most=1))
    with pytest.raises(InputError, match="C1 was stated before"):
        s.claim("C1", "x", "x", exact("acc", at_most=1))
    with pytest.raises(InputError, match="must be a criterion, not bool"):
        s.claim("C2", "x", "x", True)
    with pytest.raises(TypeError):
        Criterion().text()


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), [1], {}, np.zeros(2), 1j, object()])
def test_rows_hold_scalars_and_finite_numbers(value):
    with pytest.raises(InputError, match="finite numbers"):
        study().log(method="A", acc=value)


def test_scalars_of_other_libraries_are_logged_as_pythons():
    torch = pytest.importorskip("torch")
    s = Study(paper="example", params={})
    s.log(a=np.float32(0.5), b=np.int64(3), c=np.bool_(True), d=torch.tensor(2.0), e=torch.tensor(4), f=np.str_("x"), g=None, h=np.array(1.5))
    assert list(map(type, concluded(s)["rows"][0].values())) == [float, int, bool, float, int, str, type(None), float]


def test_extend_takes_rows_and_frames():
    s = Study(paper="example", params={})
    s.extend([dict(a=1), dict(a=2)])
    s.extend(pd.DataFrame([dict(a=3, b=0.5), dict(a=4)]))
    assert concluded(s)["rows"] == [{"a": 1}, {"a": 2}, {"a": 3, "b": 0.5}, {"a": 4}]


@pytest.mark.parametrize("value", [-1, ("rel", -0.1), ("relative", 1), ("rel",), ("rel", 1, 2), math.nan])
def test_tolerances_that_are_refused(value):
    with pytest.raises(InputError, match="tolerance of acc"):
        study().tolerance(acc=value)


def test_profiles():
    assert choose("cpu", smoke=1, cpu=2) == 2
    with pytest.raises(InputError, match="no 'full' profile; it has: smoke, cpu"):
        choose("full", smoke=1, cpu=2)
    for make in (lambda: choose("gpu", cpu=1), lambda: Study("example", "gpu")):
        with pytest.raises(InputError, match="unknown profile 'gpu'"):
            make()


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20), st.sampled_from(VERDICTS))
def test_the_html_table_escapes(text, verdict):
    nasty = f"<script>alert(1)</script>&\"' {text}"
    claim = dict(id=nasty, statement=nasty, paper=nasty, measured=0.5, interval=[0.4, 0.6], criterion=nasty, verdict=verdict, units=3, note=nasty)
    page = Tags(claims_html([claim, claim | {"note": ""}]))
    assert set(page.tags) == {"style", "table", "thead", "tr", "th", "tbody", "td", "b", "br", "small", "span"}
    assert page.text.count(nasty) == 9 and page.text.count(f"{MARKS[verdict]} {verdict}") == 2
    assert nasty in claims_text([claim])


def test_measured_text():
    claim = dict(measured=0.12345, interval=[-1.5, 2345.6])
    assert measured_text(claim) == "0.123 [-1.5, 2,346]"
    assert measured_text(dict(measured=None, interval=None)) == "—"
    assert measured_text(dict(measured=2, interval=None)) == "2"


def test_the_record_is_a_display_output(capsys):
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    try:
        InteractiveShell.instance()
        with capture_output() as captured:
            record = concluded(study())
    finally:
        InteractiveShell.clear_instance()
    (output,) = captured.outputs
    assert output.data[MIME] == record and output.data["text/html"].startswith("<style>") and "text/plain" in output.data
