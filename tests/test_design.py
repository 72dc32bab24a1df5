import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from researchkit.core.errors import InputError
from researchkit.core.notebook import Parameter
from researchkit.run.design import KEYS, axis_values, design, read_sweep

KINDS = {"int": 0, "float": 0.0, "str": "", "bool": False}
DECLARED = {p.name: p for p in [Parameter("profile", "str", "cpu"), Parameter("n", "int", 1), Parameter("x", "float", 0.5), Parameter("flag", "bool", False), Parameter("word", "str", "a"),
                                Parameter("seeds", "list[int]", [0]), Parameter("rates", "list[float]", [0.1]), Parameter("words", "list[str]", ["a"])]}
whole, real = st.integers(-10**9, 10**9), st.floats(allow_nan=False, allow_infinity=False)
word = st.text("abcdefghijklmnopqrstuvwxyzäß-_./ ", min_size=1).map(str.strip).filter(bool)
lists = dict(min_size=1, max_size=6)


def axis(name, values):
    return axis_values(DECLARED[name], values)


def unique(values) -> list:
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


# One axis

@given(st.lists(whole, **lists))
def test_whole_numbers_mean_the_same_however_they_are_given(values):
    text = ",".join(map(str, values))
    for given in (values, tuple(values), np.array(values), text, f"[{text}]", text.replace(",", " , "), iter(values), list(map(str, values)), [np.int64(v) for v in values]):
        assert axis("n", given) == unique(values)
    assert axis("seeds", text) == axis("seed" + "s", values) == [[v] for v in unique(values)]
    assert axis("x", text) == unique(map(float, values)) and all(type(v) is float for v in axis("x", text))


@given(st.lists(real, **lists))
def test_real_numbers_mean_the_same_however_they_are_given(values):
    text = ",".join(map(repr, values))
    for given in (values, np.array(values), text, [np.float64(v) for v in values]):
        assert axis("x", given) == unique(values)
    assert axis("rates", values) == [[v] for v in unique(values)]


@given(st.lists(word, **lists))
def test_words(values):
    assert axis("word", values) == axis("word", ",".join(values)) == unique(values)
    assert axis("word", [np.str_(v) for v in values]) == unique(values)
    assert all(type(v) is str for v in axis("word", np.array(values)))


def test_truth_values():
    for given in ([True, False], "true,false", "1,0", "True, False", "[true, false]", np.array([True, False]), ["true", "false"]):
        assert axis("flag", given) == [True, False]
    assert axis("flag", True) == [True] and axis("flag", "true,1,True") == [True]


@given(st.lists(st.lists(whole, max_size=3), **lists))
def test_lists_of_lists(values):
    assert axis("seeds", values) == axis("seeds", json.dumps(values)) == axis("seeds", [tuple(v) for v in values]) == unique(values)


@pytest.mark.parametrize("given", [np.array([[1, 2], [3, 4]]), [np.array([1, 2]), np.array([3, 4])], [[np.int64(1), np.int64(2)], (np.int32(3), 4)]])
def test_lists_of_numpy(given):
    assert axis("seeds", given) == [[1, 2], [3, 4]] and all(type(v) is int for value in axis("seeds", given) for v in value)


@given(whole, st.integers(-50, 50), st.integers(-5, 5).filter(bool))
def test_ranges(low, length, step):
    high = low + length
    wanted = list(range(low, high, step))
    if wanted:
        assert axis("n", f"{low}:{high}:{step}") == axis("n", range(low, high, step)) == wanted
    else:
        with pytest.raises(InputError, match="axis n has no values"):
            axis("n", f"{low}:{high}:{step}")


def test_texts():
    assert axis("n", "0:3, 7, 10:6:-2") == [0, 1, 2, 7, 10, 8]
    assert axis("x", "linspace(0,1,3), 7,geomspace(1, 100, 3)") == pytest.approx([0, 0.5, 1, 7, 10, 100])
    assert axis("word", "0:3,linspace(0,1,3)") == ["0:3", "linspace(0,1,3)"]
    assert axis("x", "1e-3") == [0.001] and axis("x", 2) == [2.0] and axis("rates", "linspace(0,1,2)") == [[0.0], [1.0]]
    assert axis("n", "1,,2,") == [1, 2]


@pytest.mark.parametrize("name,given,message", [
    ("n", "", "axis n has no values"), ("n", [], "no values"), ("x", "linspace(0,1,0)", "no values"), ("n", "[]", "no values"), ("n", "[1, 2", "not a list"), ("n", "0:5:0", "step of '0:5:0' is 0"),
    ("x", "0.1:0.5", "linspace"), ("x", "lin(0,1,2)", "unknown function 'lin'"), ("x", "linspace(0,1)", r"linspace\(0,1\) cannot be computed"), ("x", "geomspace(0,1,3)", "cannot be computed"),
    ("x", "linspace(a,b,3)", "cannot be computed"), ("x", "linspace()", "cannot be computed"), ("x", "linspace(0,1,-1)", "cannot be computed"), ("x", "linspace(0,1,n=3)", "cannot be computed"),
    ("x", "uniform(0,1), 2", "stands alone"), ("n", "linspace(0,1,3)", "takes int"), ("n", 1.5, "takes int"), ("n", True, "takes int"), ("n", "x", "takes int"), ("n", [None], "takes int"),
    ("x", float("nan"), "takes float"), ("x", "inf", "takes float"), ("x", np.array([np.nan]), "takes float"), ("flag", "maybe", "takes bool"), ("flag", 2, "takes bool"), ("word", 3, "takes str"),
    ("seeds", [["a"]], "takes list"), ("n", [[1]], "takes int"), ("x", "uniform(1,0)", "axis x"), ("x", "loguniform(0,1)", "axis x"), ("n", "randint(5,5)", "axis n"),
    ("x", "uniform(0)", "cannot be computed"), ("x", "uniform('a','b')", "cannot be computed"), ("x", "uniform(nan,1)", "cannot be computed"), ("x", "linspace(0,1,2)(3)", "takes float")])
def test_axes_that_are_refused(name, given, message):
    with pytest.raises(InputError, match=message) as e:
        axis(name, given)
    assert "\n" not in str(e.value)


@given(st.sampled_from(list(DECLARED)), st.one_of(st.text(max_size=20), st.text("0123456789:,()[]. -elinspacegomuf", max_size=24), st.none(), st.booleans(), real, st.lists(st.one_of(st.none(), real, st.text(max_size=3)), max_size=3)))
def test_any_axis_is_read_or_refused_in_one_line(name, given):
    try:
        found = axis(name, given)
    except InputError as e:
        assert "\n" not in str(e).strip() or "\n" in str(given)
    else:
        assert hasattr(found, "rvs") or found and axis(name, found) == found


# Designs

axes = st.fixed_dictionaries({}, optional={"n": st.lists(whole, **lists), "x": st.lists(real, **lists), "flag": st.lists(st.booleans(), **lists), "word": st.lists(word, **lists)})


@given(axes)
def test_a_grid_is_every_combination_once(grid):
    runs = design(DECLARED, grid)
    size = int(np.prod([len(unique(v)) for v in grid.values()]))
    assert len(runs) == size == len({repr(r) for r in runs})
    assert all(set(r) == set(grid) and list(r) == [n for n in DECLARED if n in r] for r in runs)
    if grid:
        last = list(grid)[-1]
        assert [r[last] for r in runs[:len(unique(grid[last]))]] == unique(grid[last])


@given(axes, st.integers(1, 5), st.integers(0, 3))
def test_zipped_axes_advance_together(grid, count, more):
    grid.pop("n", None)
    zipped = {"n": list(range(count)), "rates": [[float(i)] for i in range(count)]}
    runs = design(DECLARED, grid, zipped)
    assert len(runs) == count * len(design(DECLARED, grid)) and all(r["rates"] == [float(r["n"])] for r in runs)
    if more:
        with pytest.raises(InputError, match=f"n has {count + more}, rates has {count}"):
            design(DECLARED, grid, zipped | {"n": list(range(count + more))})


@pytest.mark.parametrize("n,x", [([1, 1, 2], [0.1, 0.2, 0.3]), ([1, 1, 2], [0.1, 0.2, 0.2]), ("1,1,2", "0.1,0.2,0.2")])
def test_zipped_axes_may_repeat_a_value(n, x):
    runs = design(DECLARED, zipped={"n": n, "x": x})
    assert [(r["n"], r["x"]) for r in runs[:2]] == [(1, 0.1), (1, 0.2)] and len(runs) == 3


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_draws_from_lists_are_without_replacement(sample, seed):
    grid = {"n": list(range(5)), "word": ["a", "b", "c"]}
    runs = design(DECLARED, grid, sample=sample, sample_seed=seed)
    assert len(runs) == min(sample, 15) and len({repr(r) for r in runs}) == len(runs)
    assert runs == design(DECLARED, grid, sample=sample, sample_seed=seed)
    assert all(r in design(DECLARED, grid) for r in runs)


@given(st.integers(1, 20), st.integers(0, 1000))
def test_draws_from_distributions(sample, seed):
    objects = {"x": stats.uniform(1, 2), "rates": stats.loguniform(1e-4, 1e-1), "n": stats.randint(3, 9)}
    texts = {"x": "uniform(1,3)", "rates": "loguniform(1e-4,1e-1)", "n": "randint(3,9)"}
    runs = design(DECLARED, objects, sample=sample, sample_seed=seed)
    assert runs == design(DECLARED, texts, sample=sample, sample_seed=seed) and len(runs) == sample
    assert all(1 <= r["x"] <= 3 and 1e-4 <= r["rates"][0] <= 1e-1 and r["n"] in range(3, 9) and type(r["n"]) is int and type(r["x"]) is float for r in runs)


def test_another_seed_draws_others():
    assert design(DECLARED, {"x": "uniform(0,1)"}, sample=5) != design(DECLARED, {"x": "uniform(0,1)"}, sample=5, sample_seed=1)


def test_draws_keep_zipped_axes_together():
    runs = design(DECLARED, {"word": ["a", "b"]}, {"n": [1, 2, 3], "x": [0.1, 0.2, 0.3]}, sample=4)
    assert len(runs) == 4 and all(r["x"] == r["n"] / 10 or abs(r["x"] - r["n"] / 10) < 1e-12 for r in runs)


def test_seed_stands_for_seeds():
    assert design(DECLARED, {"seed": "0:3"}) == design(DECLARED, {"seeds": [[0], [1], [2]]}) == [{"seeds": [i]} for i in range(3)]
    assert design(DECLARED, params={"seed": "3"}) == design(DECLARED, params={"seeds": [3]}) == [{"seeds": [3]}]
    assert design(DECLARED, params={"seed": 3}) == [{"seeds": [3]}]


def test_fixed_parameters_are_in_every_run():
    assert design(DECLARED, {"n": [1, 2]}, params={"x": "3", "seeds": "1,2"}) == [{"n": n, "x": 3.0, "seeds": [1, 2]} for n in (1, 2)]
    assert design(DECLARED) == [{}] and design({}) == [{}]


def test_settings_count_once():
    assert len(design(DECLARED, {"x": [0, 0.0, "0"]})) == 1
    assert len(design(DECLARED, {"n": "randint(0,3)"}, sample=50)) == 3


@pytest.mark.parametrize("options,message", [
    (dict(grid={"m": [1]}), "unknown parameter 'm'"), (dict(zipped={"m": [1]}), "unknown parameter"), (dict(params={"m": 1}), "unknown parameter"), (dict(grid={"n": [1]}, params={"n": 1}), "n is given twice"),
    (dict(grid={"n": [1]}, zipped={"n": [1]}), "n is given twice"), (dict(grid={"seed": [1], "seeds": [2]}), "seeds is given twice"), (dict(grid={"seed": [1]}, params={"seeds": "2"}), "seeds is given twice"),
    (dict(params={"seed": "1", "seeds": "2"}), "seeds is given twice"), (dict(grid={"x": "uniform(0,1)"}), "--sample"), (dict(zipped={"x": "uniform(0,1)"}, sample=2), "cannot be a distribution"),
    (dict(grid={"n": [1]}, sample=0), "from 1 on"), (dict(sample=True), "from 1 on"), (dict(sample=2.0), "from 1 on"), (dict(grid={"n": "uniform(0,1)"}, sample=2), "takes int"),
    (dict(grid={"x": stats.uniform(0, -1)}, sample=2), "x"), (dict(grid={1: [2]}), "unknown parameter"), (dict(params={True: 2}), "unknown parameter"), (dict(grid={"x": [0, 1]}, sample=2, sample_seed=-1), "sample_seed")])
def test_designs_that_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        design(DECLARED, **options)


# Files

def file(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file(tmp_path):
    told = {"paper": "one", "profile": "smoke", "params": {"x": 1}, "grid": {"n": [1, 2], "x": "geomspace(1,10,2)"}, "zip": {"word": "a,b"}, "sample": 3, "sample_seed": 1, "out": "there", "jobs": 2,
            "scheduler": "tcp://a:1", "resources": {"GPU": 1}, "timeout": 1.5, "keep": "none"}
    assert read_sweep(file(tmp_path, yaml.safe_dump(told))) == told and set(told) == set(KEYS)
    assert read_sweep(file(tmp_path, "paper: one\ntimeout: 3")) == {"paper": "one", "timeout": 3}


@pytest.mark.parametrize("text,message", [
    ("", "is a mapping with the keys"), ("- 1", "is a mapping"), ("grid: {n: [1]}", "'paper' is missing"), ("paper: one\ngird: {}", "unknown key 'gird'.*grid"), ("paper: one\n1: 2", "unknown key '1'"),
    ("paper: 3", "paper is not of type str: 3"), ("paper: one\ngrid: [1]", "grid is not of type dict"), ("paper: one\nsample: true", "sample is not of type int"), ("paper: one\nsample: 1.5", "sample is not of type int"),
    ("paper: one\ntimeout: soon", "timeout is not of type int or float"), ("paper: one\n\tx: {", "s.yaml:2: not YAML"), ("paper: [", "not YAML"), (b"paper: \xff\xfe", "not YAML"), ("paper: one\nkeep: null", "keep is not of type str"),
    ("paper: !!python/object:os.system x", "not YAML")])
def test_files_that_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as e:
        read_sweep(file(tmp_path, text))
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_sweep(tmp_path / "none.yaml")
