"Prescriptive analytics: closed forms, invariants, hostile constraints, the checker's limits, and a language model from a folder."
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn.base import clone
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from researchkit.core.errors import DataError
from researchkit.science.prescriptive_analytics import (
    CORRUPTIONS, Actionability, Change, CounterfactualSearch, FrameCodec, HubGenerator, NarrativeRejected, NoCounterfactualFound, Plan, StudentSCM, Term,
    anchor_rule, auc_interval, build_prompt, check_plan, corrected_t, corrupt, diabetes_task, exact_shapley, load_table, narrate, newcombe, rossi_task,
    student_task, verify_narrative, what_if)

pytestmark = pytest.mark.usefixtures("one_thread")


def frame(n=200, seed=0):
    rng = np.random.default_rng(seed)
    X = pd.DataFrame({"a": rng.normal(size=n), "k": rng.integers(0, 20, n), "b": rng.normal(size=n), "kind": rng.choice(["p", "q", "r"], n),
                      "flag": pd.Categorical(rng.choice(["no", "yes"], n), categories=["no", "yes"])}, index=[f"id{i}" for i in range(n)])
    score = X.a + 0.15 * (X.k - 10) + X.a * X.b + (X.kind == "p") - (X.flag == "yes") + rng.normal(size=n) * 0.5
    return X, (score > 0.2).astype(int)


@pytest.fixture(scope="module")
def world():
    "A frame with five kinds of columns, a forest on it, and the cases at risk."
    X, y = frame()
    encode = make_column_transformer((OneHotEncoder(drop="if_binary"), make_column_selector(dtype_exclude=np.number)), remainder="passthrough")
    model = make_pipeline(encode, RandomForestClassifier(15, min_samples_leaf=4, random_state=0)).fit(X, y)
    return X, y, model, X[model.predict_proba(X)[:, 1] >= 0.5]


STUDENT = student_task(StudentSCM(0).sample(50)).glossary
PLAN = Plan("student-4711", (Change("attendance", 42, 65), Change("tutoring", "no", "yes")), 0.712, 0.434)


# ---- Shapley values

def brute_shapley(predict, x, background):
    "The definition, coalition by coalition."
    d, phi = len(x), np.zeros(len(x))

    def v(S):
        rows = background.copy()
        rows[:, list(S)] = x[list(S)]
        return predict(rows).mean()

    for j in range(d):
        for size in range(d):
            for S in combinations([i for i in range(d) if i != j], size):
                phi[j] += math.factorial(size) * math.factorial(d - size - 1) / math.factorial(d) * (v((*S, j)) - v(S))
    return phi


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4))
def test_shapley_is_its_definition(seed, d, B):
    rng = np.random.default_rng(seed)
    x, b, M = rng.normal(size=(2, d)), rng.normal(size=(B, d)), rng.normal(size=(d, d))
    f = lambda X: np.sin((X @ M * X).sum(axis=1))  # noqa: E731
    for batch in (1, 7, 2**17):
        phi = exact_shapley(f, x, b, batch=batch)
        np.testing.assert_allclose(phi, [brute_shapley(f, row, b) for row in x], atol=1e-12)
    np.testing.assert_allclose(phi.sum(axis=1), f(x) - f(b).mean(), atol=1e-10)


def test_shapley_symmetry_linearity_and_frames(world):
    X, _, model, _ = world
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(3, 1)), 4, axis=1)
    phi = exact_shapley(lambda Z: np.prod(Z, axis=1), x, np.repeat(rng.normal(size=(5, 1)), 4, axis=1))
    np.testing.assert_allclose(phi, np.repeat(phi[:, :1], 4, axis=1), atol=1e-12)
    f = lambda Z: model.predict_proba(Z)[:, 1]  # noqa: E731
    phi = exact_shapley(f, X.iloc[:3], X.iloc[50:60])
    np.testing.assert_allclose(phi.sum(axis=1), f(X.iloc[:3]) - f(X.iloc[50:60]).mean(), atol=1e-10)


def test_shapley_refuses_bad_input():
    f = lambda X: X.sum(axis=1)  # noqa: E731
    with pytest.raises(ValueError, match="13 features.*sampling"):
        exact_shapley(f, np.zeros((1, 13)), np.zeros((2, 13)))
    with pytest.raises(ValueError, match="background row"):
        exact_shapley(f, np.zeros((1, 3)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="one number per row"):
        exact_shapley(lambda X: X, np.zeros((1, 3)), np.zeros((2, 3)))
    with pytest.raises(TypeError, match="both"):
        exact_shapley(f, pd.DataFrame(np.zeros((1, 3))), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="same columns"):
        exact_shapley(f, pd.DataFrame({"a": [1.0]}), pd.DataFrame({"b": [1.0]}))


# ---- frames, rules, curves

def test_codec_round_trip_and_errors():
    X, _ = frame()
    X["yes"] = X.a > 0
    codec = FrameCodec(X, ["k"])
    pd.testing.assert_frame_equal(codec.decode(codec.encode(X)), X.reset_index(drop=True))
    assert list(codec.is_categorical) == [False, True, False, True, True, True]
    with pytest.raises(ValueError, match="unknown category 'z'"):
        codec.encode(X.assign(kind="z"))
    with pytest.raises(ValueError, match="columns missing: flag"):
        codec.encode(X.drop(columns="flag"))
    with pytest.raises(TypeError, match="DataFrame"):
        codec.encode(X.to_numpy())


def test_anchor_finds_the_rule_and_covers_its_case(world):
    X, _, model, _ = world
    rule = anchor_rule(lambda f: ((f.flag == "yes") & (f.a > np.median(X.a))).to_numpy(), X[(X.flag == "yes") & (X.a > 1)].iloc[[0]], X, random_state=0)
    assert rule.met and {c.feature for c in rule.conditions} == {"a", "flag"} and rule.precision >= 0.95
    case = X.iloc[[5]]
    rule = anchor_rule(model.predict, case, X, max_terms=2, n_samples=60, random_state=0)
    assert all(c.holds(case).all() for c in rule.conditions) and len(rule.conditions) <= 2
    assert rule.coverage == np.logical_and.reduce([c.holds(X) for c in rule.conditions]).mean()
    assert not anchor_rule(lambda f: np.arange(len(f)) % 2, case, X, max_terms=1, n_samples=60, random_state=0).met
    assert str(rule) == str(anchor_rule(model.predict, case, X, max_terms=2, n_samples=60, random_state=0))
    with pytest.raises(ValueError, match="one row"):
        anchor_rule(model.predict, X.iloc[:2], X)
    with pytest.raises(ValueError, match="precision"):
        anchor_rule(model.predict, case, X, precision=2)


def test_what_if_is_the_prediction_on_edited_rows(world):
    X, _, model, _ = world
    f = lambda Z: model.predict_proba(Z)[:, 1]  # noqa: E731
    curve = what_if(f, X.iloc[:3], "flag", ["no", "yes"])
    edited = X.iloc[:3].assign(flag=pd.Categorical(["yes"] * 3, categories=["no", "yes"]))
    np.testing.assert_allclose(curve[curve.value == "yes"].prediction, f(edited))
    assert list(curve.case.unique()) == list(X.index[:3])
    with pytest.raises(KeyError, match="not a column"):
        what_if(f, X, "zzz", [1])


# ---- counterfactuals

@st.composite
def constraints(draw):
    "Random actions on the frame; at least one is mutable."
    actions = [Actionability("a", direction=draw(st.sampled_from(["both", "increase", "decrease"])), step=draw(st.sampled_from([None, 0.1, 0.5])),
                             low=draw(st.sampled_from([None, -1.0, 0.5])))]
    if draw(st.booleans()):
        actions.append(Actionability("k", direction=draw(st.sampled_from(["both", "decrease"])), step=draw(st.sampled_from([None, 1, 3])), high=draw(st.sampled_from([None, 12]))))
    if draw(st.booleans()):
        actions.append(Actionability("kind", categories=draw(st.sampled_from([None, ("q",), ("q", "r")]))))
    actions.append(Actionability("flag", mutable=draw(st.booleans())))
    return actions


@settings(max_examples=12)
@given(constraints(), st.integers(0, 1000))
def test_plans_obey_any_constraints(world, actions, seed):
    X, _, model, cases = world
    cases = cases.sample(8, random_state=seed)
    search = CounterfactualSearch(model, actions, generations=3, population=12, random_state=seed).fit(X)
    plans = search.generate(cases, skip_infeasible=True)
    everything = plans + search.single_change(cases) + search.nearest(cases) + search.random_changes(cases, 2)
    for plan in everything:
        assert check_plan(plan, cases.loc[[plan.case]], actions, X) == []
        assert search.risk(plan.apply(cases.loc[[plan.case]]))[0] == pytest.approx(plan.risk_after, abs=1e-12)
    for plan in plans:
        row = cases.loc[[plan.case]]
        assert plan.risk_after <= 0.48 and plan.changes
        for change in plan.changes:  # minimal: no change can be spared
            assert search.risk(replace(plan, changes=tuple(c for c in plan.changes if c != change)).apply(row))[0] > 0.48
    assert {p.case for p in plans} | set(search.infeasible_) == set(cases.index)
    for case in cases.index:
        own = [p.changes for p in plans if p.case == case]
        assert len(own) == len(set(own)) <= 3


def test_linear_model_has_the_closed_form():
    X, y = frame()
    X = X[["a", "b"]]
    model = LogisticRegression().fit(X, y)
    search = CounterfactualSearch(model, [Actionability("a", low=-15, high=15, step=0.2)], n_counterfactuals=1, generations=4, random_state=0).fit(X)
    cases = X[model.predict_proba(X)[:, 1] >= 0.5].head(10)
    goal = math.log(0.48 / 0.52)
    for plan, z in zip(search.generate(cases), model.decision_function(cases)):
        steps = math.ceil((z - goal) / (model.coef_[0, 0] * 0.2) - 1e-9)
        assert plan.changes[0].new == pytest.approx(plan.changes[0].old - 0.2 * steps)
    assert [p.changes[0].new for p in search.single_change(cases)] == pytest.approx([p.changes[0].new for p in search.generate(cases)])


def test_same_seed_same_plans_and_inputs_untouched(world):
    X, _, model, cases = world
    before = X.copy(), cases.copy()
    search = CounterfactualSearch(model, [Actionability("a"), Actionability("kind")], generations=3, population=12, random_state=1)
    first, second = (clone(search).set_params(estimator=model).fit(X).generate(cases.head(5), skip_infeasible=True) for _ in range(2))
    assert first and first == second
    pd.testing.assert_frame_equal(X, before[0])
    pd.testing.assert_frame_equal(cases, before[1])


def test_text_labels_and_native_categories():
    X, y = frame()
    X["kind"] = X.kind.astype("category")
    labels = np.where(y == 1, "bad", "good")
    model = HistGradientBoostingClassifier(max_iter=15, random_state=0).fit(X, labels)
    search = CounterfactualSearch(model, [Actionability("k"), Actionability("kind")], desired="good", generations=3, population=12, random_state=0).fit(X)
    cases = X[search.risk(X) >= 0.5].head(5)
    np.testing.assert_allclose(search.risk(cases), model.predict_proba(cases)[:, 0])
    for plan in search.generate(cases, skip_infeasible=True):
        assert model.predict(plan.apply(cases.loc[[plan.case]])) == "good"
        assert all(isinstance(c.new, (int, str)) for c in plan.changes)


def test_missing_values_stay_where_they_are():
    X, y = frame()
    X["kind"] = X.kind.where(X.a < 0.8)
    X.loc[X.k > 14, "b"] = np.nan
    codec = FrameCodec(X)
    pd.testing.assert_frame_equal(codec.decode(codec.encode(X)), X.reset_index(drop=True))
    X["kind"] = X.kind.astype("category")
    model = HistGradientBoostingClassifier(max_iter=15, random_state=0).fit(X, y)
    search = CounterfactualSearch(model, [Actionability("a"), Actionability("k")], generations=3, population=12, random_state=0).fit(X)
    cases = X[search.risk(X) >= 0.5]
    cases = cases[cases.isna().any(axis=1)].head(6)
    plans = search.generate(cases, skip_infeasible=True)
    assert plans
    for plan in plans + search.single_change(cases) + search.nearest(cases) + search.random_changes(cases, 1):
        assert {c.feature for c in plan.changes} <= {"a", "k"} and search.risk(plan.apply(cases.loc[[plan.case]]))[0] == pytest.approx(plan.risk_after)


def test_scale_falls_back(world):
    X, y, *_ = world
    X = X[["a"]].assign(rare=np.r_[np.zeros(190), np.ones(10)], fixed=1.0)
    search = CounterfactualSearch(LogisticRegression().fit(X, y), [Actionability("a")]).fit(X)
    np.testing.assert_allclose(search.scale_, [np.median(abs(X.a - X.a.median())), X.rare.std(ddof=0), 1.0])


def test_search_errors(world):
    X, _, model, cases = world
    a = Actionability("a")
    safe = X[model.predict_proba(X)[:, 1] < 0.5]
    for actions, error, text in (([Actionability("zzz")], KeyError, "not a column"), ([], ValueError, "actionable"), ([Actionability("a", mutable=False)], ValueError, "actionable"),
                                 ([Actionability("kind", categories=("z",))], ValueError, "unknown categories"), ([Actionability("kind", direction="increase")], ValueError, "categories"),
                                 ([Actionability("k", step=0.5)], ValueError, "whole number")):
        with pytest.raises(error, match=text):
            CounterfactualSearch(model, actions).fit(X)
    for options, text in ((dict(desired=7), "desired"), (dict(threshold=1.5), "threshold"), (dict(margin=0.5), "margin"), (dict(population=2), "population"), (dict(proximity=-1), "negative")):
        with pytest.raises(ValueError, match=text):
            CounterfactualSearch(model, [a], **options).fit(X)
    search = CounterfactualSearch(model, [a], generations=2, population=8, random_state=0).fit(X)
    with pytest.raises(ValueError, match="not at risk"):
        search.generate(safe.head(2))
    assert search.generate(safe.head(1), skip_safe=True)[0].changes == ()
    with pytest.raises(ValueError, match="unique"):
        search.generate(pd.concat([cases.head(1)] * 2))
    with pytest.raises(ValueError, match="missing value"):
        search.generate(cases.head(1).assign(a=np.nan))
    assert search.generate(cases.head(0)) == []
    stuck = CounterfactualSearch(model, [Actionability("a", direction="increase", high=-99)], generations=2, population=8, random_state=0).fit(X)
    with pytest.raises(NoCounterfactualFound, match="lowest risk") as caught:
        stuck.generate(cases.head(2))
    assert caught.value.best == pytest.approx(dict(zip(cases.index, model.predict_proba(cases.head(2))[:, 1])))
    assert stuck.generate(cases.head(2), skip_infeasible=True) == [] and set(stuck.infeasible_) == set(cases.index[:2])
    for bad in (dict(direction="up"), dict(step=0), dict(low=2, high=1), dict(categories=("x",), low=1)):
        with pytest.raises(ValueError):
            Actionability("a", **bad)


def test_diversity_spreads_the_plans(world):
    X, _, model, cases = world
    gaps = []
    for weight in (0.0, 5.0):
        search = CounterfactualSearch(model, [Actionability(n) for n in X.columns], diversity=weight, generations=8, population=32, random_state=0).fit(X)
        plans = search.generate(cases.head(10))
        Z = {case: search.codec_.encode(pd.concat([p.apply(cases.loc[[case]]) for p in plans if p.case == case])) for case in cases.index[:10]}
        gaps.append(np.mean([search.distance(z[:, None], z[None]).mean() for z in Z.values()]))
    assert gaps[1] > gaps[0]


# ---- the simulator

def test_interventions():
    scm = StudentSCM(3)
    with pytest.raises(ValueError, match="sample"):
        scm.risk()
    X, risk = scm.sample(300), scm.risk()
    pd.testing.assert_frame_equal(X, StudentSCM(3).sample(300))
    observed = [Plan(i, tuple(Change(f, X[f].iloc[i], X[f].iloc[i]) for f in X.columns if f != "completed"), 0, 0) for i in range(300)]
    np.testing.assert_allclose(scm.intervene(observed), risk, atol=1e-12)
    for feature in scm.noncausal:
        assert scm.intervene(Plan(4, (Change(feature, 0, 99),), 0, 0)) == risk[4]
    for feature, new in (("attendance", 100), ("early", 10), ("tutoring", "yes")):
        assert (scm.intervene([Plan(i, (Change(feature, 0, new),), 0, 0) for i in range(300)]) <= risk + 1e-12).all()
    frame_, _ = scm._solve(scm._do([Plan(4, (Change("attendance", 0, 100),), 0, 0)]))
    assert frame_.logins.iloc[4] >= X.logins.iloc[4] and frame_.early.iloc[4] == X.early.iloc[4] and frame_.drop(index=4).equals(X.drop(columns="completed").drop(index=4))
    assert abs((X.completed == "no").mean() - risk.mean()) < 0.08
    for bad, text in ((Plan(999, (), 0, 0), "not among"), (Plan(0, (Change("zzz", 0, 1),), 0, 0), "unknown feature")):
        with pytest.raises(ValueError, match=text):
            scm.intervene(bad)
    with pytest.raises(ValueError, match="one plan"):
        scm.intervene([Plan(0, (), 0, 0)] * 2)
    with pytest.raises(ValueError, match="at least 1"):
        scm.sample(0)


# ---- prompts carry only the changes

def test_nothing_else_of_the_person_is_sent():
    X = StudentSCM(1).sample(30)
    seen = []

    def spy(messages):
        seen.append(messages)
        return "no"

    for i in range(30):
        plan = Plan(f"ID-{i:05d}-Jane", (Change("attendance", int(X.attendance.iloc[i]), 100), Change("logins", 3, 7)), 0.6123, 0.4321)
        with pytest.warns(UserWarning, match="template is used"):
            narrate(plan, STUDENT, generator=spy, retries=1)
    for messages in seen:
        assert [m["role"] for m in messages[:2]] == ["system", "user"] and len(messages) in (2, 4)
        text = " ".join(m["content"] for m in messages)
        allowed = {"120", "3", "7", "100"} | {str(v) for v in X.attendance}
        assert not any(secret in text for secret in ("ID-", "Jane", "0.61", "0.43", "61 %", "43 %"))
        assert set("".join(ch if ch.isdigit() else " " for ch in text).split()) <= allowed
        for key, term in STUDENT.items():
            if key not in ("attendance", "logins"):
                assert f" {term.name}" not in text.lower()


def test_prompt_errors():
    with pytest.raises(KeyError, match="glossary"):
        build_prompt(PLAN, {"attendance": STUDENT["attendance"]})
    with pytest.raises(ValueError, match="immutable"):
        build_prompt(Plan(0, (Change("age", 20, 19),), 1, 0), STUDENT)
    with pytest.raises(ValueError, match="both read '5'"):
        build_prompt(Plan(0, (Change("x", 5.1, 5.2),), 1, 0), {"x": Term("x")})
    with pytest.raises(ValueError, match="changes nothing"):
        build_prompt(Plan(0, (), 0.1, 0.1), STUDENT)


# ---- the checker

RIGHT = ["Raise attendance from 42 % to 65 % and change tutoring from none to weekly. This is the model's estimate.",
         "The model estimates this.\n1. Attendance: 42% → 65%\n2. Tutoring: none → weekly",
         "Your attendance should rise by 23 percentage points to 65 per cent; move tutoring to weekly. It is the model’s estimate, and nobody can promise more.",
         "Take weekly tutoring instead of none tutoring. Increase attendance to 65.0 percent. That lowers the risk from 71 % to 43 %, the model predicts.",
         "These 2 changes come from the model's estimate: attendance, now 42 %, to 65 %, and tutoring to weekly."]
WRONG = {"attendance from 65 % to 42 %, tutoring to weekly, says the model's estimate.": "stands as",
         "Lower attendance to 65 %, tutoring to weekly, says the model's estimate.": "wrong direction",
         "Attendance from 42 % to 75 %, tutoring to weekly, says the model's estimate.": "not in the plan",
         "Attendance to 65 hours, tutoring to weekly, says the model's estimate.": "unit hours",
         "Attendance to 65 %, says the model's estimate.": "does not mention tutoring",
         "Attendance to 65 %, tutoring from weekly to none, says the model's estimate.": "stands where",
         "More attendance, tutoring to weekly, says the model's estimate.": "is missing",
         "Attendance to 65 %, tutoring to weekly, says the model's estimate, given your age.": "age, which is immutable",
         "Attendance to 65 %, tutoring to weekly, forum clicks too, says the model's estimate.": "does not change",
         "Attendance to 65 %, tutoring to weekly, says the model's estimate. No problem. You will surely pass.": "promises",
         "Attendance to 65 %, tutoring to weekly, says the model's estimate. The risk rises from 71 % to 43 %.": "wrong direction",
         "Attendance to 65 %, tutoring to weekly, says the model's estimate. The risk falls from 71 % to 33 %.": "not in the plan",
         "Attendance to 65 %, tutoring to weekly.": "model's estimate"}


@pytest.mark.parametrize("text", RIGHT)
def test_right_texts_pass(text):
    assert verify_narrative(text, PLAN, STUDENT).problems == ()


@pytest.mark.parametrize("text", WRONG)
def test_wrong_texts_are_caught(text):
    report = verify_narrative(text, PLAN, STUDENT)
    assert not report.ok and any(WRONG[text] in p for p in report.problems), report


def test_known_limits_of_the_checker():
    text = str(narrate(PLAN, STUDENT))
    assert not verify_narrative(text.replace("65 %", "sixty-five percent"), PLAN, STUDENT).ok  # right, and rejected
    assert verify_narrative(text + " That is sixty percent.", PLAN, STUDENT).ok  # wrong, and not seen
    assert not verify_narrative(text.replace("65 %", "65,0 %"), PLAN, STUDENT).ok  # decimal comma
    assert verify_narrative(text + " Your time in the gym counts too.", PLAN, STUDENT).ok  # not a name of the glossary


def test_seven_corruptions_on_all_sources():
    plans = [(STUDENT, PLAN), (STUDENT, Plan(1, (Change("early", 2, 5), Change("clicks", 4, 10)), 0.9, 0.4)),
             (diabetes_task().glossary, Plan(2, (Change("bmi", 32.1, 27.6), Change("s3", 38.0, 46.0), Change("s5", 4.8598, 4.3598)), 0.81, 0.44))]
    pytest.importorskip("lifelines")
    plans.append((rossi_task().glossary, Plan(3, (Change("fin", "no", "yes"), Change("paro", "yes", "no")), 0.4, 0.2)))
    for glossary, plan in plans:
        text = narrate(plan, glossary)
        assert verify_narrative(text, plan, glossary).ok
        for kind in CORRUPTIONS:
            for seed in range(6):
                spoiled = corrupt(text, plan, glossary, kind, seed)
                if spoiled is not None and spoiled != text:
                    assert not verify_narrative(spoiled, plan, glossary).ok, (kind, spoiled)
    with pytest.raises(ValueError, match="corruption"):
        corrupt("x", PLAN, STUDENT, "typo")


@settings(max_examples=40)
@given(st.integers(0, 100), st.integers(0, 100), st.floats(0.5, 1), st.floats(0, 0.48))
def test_template_passes_for_any_numbers(old, new, before, after):
    if old != new:
        plan = Plan(0, (Change("attendance", old, new), Change("early", 3, 4)), before, after)
        assert verify_narrative(narrate(plan, STUDENT), plan, STUDENT).ok


def test_narrate_retries_falls_back_or_raises():
    answers = iter(["bad", RIGHT[0]])
    seen = []
    text = narrate(PLAN, STUDENT, generator=lambda m: seen.append(m) or next(answers))
    assert text == RIGHT[0] and text.source == "generator" and len(text.attempts) == 2
    assert "does not mention attendance" in seen[1][-1]["content"] and len(seen[0]) == 2
    with pytest.warns(UserWarning, match="all 3 texts.*template is used"):
        text = narrate(PLAN, STUDENT, generator=lambda m: "bad")
    assert text.source == "fallback" and text == narrate(PLAN, STUDENT) and not text.attempts[0][1].ok
    with pytest.raises(NarrativeRejected, match="all 1 texts") as caught:
        narrate(PLAN, STUDENT, generator=lambda m: "bad", retries=0, on_failure="raise")
    assert caught.value.attempts[0][0] == "bad"
    with pytest.raises(TypeError, match="must return a string"):
        narrate(PLAN, STUDENT, generator=lambda m: 1)
    for bad in (dict(on_failure="shrug"), dict(retries=-1)):
        with pytest.raises(ValueError):
            narrate(PLAN, STUDENT, **bad)
    assert narrate(Plan(0, (), 0.1, 0.1), STUDENT, generator=lambda m: 1 / 0).source == "template"
    assert not verify_narrative(RIGHT[0], PLAN, STUDENT, max_words=5).ok
    with pytest.raises(TypeError):
        verify_narrative(None, PLAN, STUDENT)


# ---- a language model from a folder

def tiny_llama(folder, template=None, context=512):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<unk>", "</s>", *"raise attendance from 42 to 65 % tutoring the model estimate you will pass".split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                                 max_position_embeddings=context, bos_token_id=None, eos_token_id=1, pad_token_id=1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}model"])
def test_language_model_from_a_folder(tmp_path, template):
    import torch

    generator = HubGenerator(tiny_llama(tmp_path, template), device="cpu", dtype=torch.float32, max_new_tokens=6)
    prompt = build_prompt(PLAN, STUDENT)
    text = generator(prompt)
    assert isinstance(text, str) and text == generator(prompt) and len(text.split()) <= 6  # greedy: twice the same
    with pytest.warns(UserWarning, match="template is used"):
        told = narrate(PLAN, STUDENT, generator=generator, retries=1)
    assert told.source == "fallback" and told.attempts[0][0] == text
    with pytest.raises(NarrativeRejected):
        narrate(PLAN, STUDENT, generator=generator, retries=0, on_failure="raise")
    assert isinstance(HubGenerator(tmp_path, device="cpu", dtype="bfloat16", max_new_tokens=2, do_sample=True, temperature=0.7)(prompt), str)


def test_language_model_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        HubGenerator(tmp_path / "nothing-here")
    small = HubGenerator(tiny_llama(tmp_path, context=32), device="cpu")
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        small(build_prompt(PLAN, STUDENT))


# ---- data and intervals

def test_tasks_and_tables(tmp_path):
    pytest.importorskip("lifelines")
    diabetes, rossi = diabetes_task(), rossi_task()
    assert len(diabetes.X) == 442 and diabetes.y.mean() == pytest.approx(0.4, abs=0.005) and len(rossi.X) == 432 and rossi.y.sum() == 114
    fin = rossi.X.fin == "yes"
    assert (rossi.y[fin].sum(), fin.sum(), rossi.y[~fin].sum(), (~fin).sum()) == (48, 216, 66, 216)
    for task in (diabetes, rossi):
        assert set(task.glossary) == set(task.X.columns) and {a.name for a in task.actions} == {k for k, t in task.glossary.items() if t.mutable}
    X, y = frame(60)
    X = X.rename(columns={"a": "first_test", "b": "second_test"})
    X.assign(outcome=np.where(y == 1, "fail", "pass")).assign(kind=lambda f: f.kind.where(f.first_test < 1)).to_csv(tmp_path / "t.csv", index=False, sep=";")
    table = load_table(tmp_path / "t.csv", "outcome", "fail", ["k", "flag"])
    assert (table.y == y).all() and table.X.kind.isin(["p", "q", "r", "missing"]).all() and [a.name for a in table.actions] == ["k", "flag"]
    model = HistGradientBoostingClassifier(max_iter=10, min_samples_leaf=5).fit(table.X, table.y)
    search = CounterfactualSearch(model, table.actions, generations=3, population=8, random_state=0).fit(table.X)
    for plan in search.generate(table.X[search.risk(table.X) >= 0.5].head(5), skip_infeasible=True):
        assert narrate(plan, table.glossary).source == "template"
    for args, text in ((("no.csv", "outcome", "fail", ["k"]), "cannot read"), (("t.csv", "zzz", "fail", ["k"]), "unknown column"),
                       (("t.csv", "outcome", "maybe", ["k"]), "must take the value"), (("t.csv", "outcome", "fail", []), "actionable")):
        with pytest.raises(ValueError, match=text):
            load_table(tmp_path / args[0], *args[1:])


def test_intervals_against_peers():
    rng = np.random.default_rng(0)
    y, s = rng.integers(0, 2, 80), rng.integers(0, 6, 80).astype(float)  # many ties
    auc, low, high = auc_interval(y, s)
    assert auc == pytest.approx(roc_auc_score(y, s))
    a, b = s[y == 1], s[y == 0]
    psi = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    se = math.sqrt(psi.mean(axis=1).var(ddof=1) / len(a) + psi.mean(axis=0).var(ddof=1) / len(b))
    assert (high - low) / 2 == pytest.approx(1.959964 * se, rel=1e-6)
    d = rng.normal(0.1, 1, 25)
    mean, low, high, p = corrected_t(d, 0.0)  # without overlap: the ordinary t test
    assert (mean, p) == pytest.approx((d.mean(), stats.ttest_1samp(d, 0).pvalue))
    assert (low, high) == pytest.approx(stats.ttest_1samp(d, 0).confidence_interval())
    assert corrected_t(d, 0.25)[3] > p and corrected_t(np.zeros(5), 0.25)[3] == 1
    assert newcombe([56, 48], [70, 80])[1:] == pytest.approx((0.0524, 0.3339), abs=1e-4)
    for bad in (lambda: auc_interval([0, 1, 2], [1, 2, 3]), lambda: auc_interval([0, 1], [1, 2]), lambda: corrected_t([1.0], 0.2), lambda: newcombe([5, 1], [4, 4])):
        with pytest.raises(ValueError):
            bad()
