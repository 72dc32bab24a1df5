"Censored ERM: peers, invariants, bad input, and data from a file."
import sys
import time
import tracemalloc
import types
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict, cross_val_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from researchkit.core.errors import DataError
from researchkit.core.notebook import MIME, find_paper, load_notebook, parameters
from researchkit.theory.censored_erm import (
    BeranSurvival, CensoredRegressor, censoring_features, censoring_survival, concordance_ipcw, fit_weighted, horizon,
    ipcw_weights, kaplan_meier_risk, load_survival, restrict, split_target, survival_target)

lifelines = pytest.importorskip("lifelines")


def world(n, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    X, Y = rng.random((n, 3)), rng.exponential(size=n)
    C = rng.exponential(size=n) / (0.2 + X[:, 0])
    T, delta = np.minimum(Y, C), Y <= C
    return X, np.ceil(T * 4) if ties else T, delta


@st.composite
def targets(draw):
    n = draw(st.integers(2, 40))
    time = draw(st.lists(st.integers(0, 8), min_size=n, max_size=n))
    event = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return np.array(time, float), np.array(event)


def brute_beran(X, time, event, x, u, h, ties):
    "The product of the page's equation, term by term: P(C >= u | x) with a Gaussian kernel."
    w = np.exp(-((X - x) ** 2).sum(axis=1) / (2 * h * h))
    out = 1.0
    for t in np.unique(time[~event]):
        if t < u:
            at_risk = (time > t) | ((time == t) & (~event if ties == "events_first" else True))
            out *= 1 - w[(time == t) & ~event].sum() / w[at_risk].sum()
    return out


# ---- the estimator against peers and brute force

@settings(max_examples=25)
@given(targets())
def test_kaplan_meier_is_that_of_lifelines(target):
    time, event = target[0] + 1, target[1]
    peer = lifelines.KaplanMeierFitter().fit(time, ~event).survival_function_at_times(np.nextafter(time, -np.inf)).to_numpy()
    np.testing.assert_allclose(censoring_survival(time, event), peer, atol=1e-12)
    X = np.zeros((len(time), 1))
    np.testing.assert_allclose(BeranSurvival("constant").fit(X, time, event).insample_survival(), peer, atol=1e-12)
    grid = np.arange(10.0)
    curve = lifelines.KaplanMeierFitter().fit(time, ~event).survival_function_at_times(grid).to_numpy()
    np.testing.assert_allclose(BeranSurvival("gaussian").fit(X, time, event).survival(X[:1], grid)[0], curve, atol=1e-12)


@settings(max_examples=25)
@given(targets())
def test_weights_are_the_jumps_of_kaplan_meier(target):
    time, event = target
    survival = censoring_survival(time, event, ties="events_first")
    w = np.divide(event, survival, out=np.zeros(len(time)), where=event) / len(time)
    u = np.unique(time)
    mass = np.array([w[time <= t].sum() for t in u])
    peer = lifelines.KaplanMeierFitter().fit(time, event).survival_function_at_times(u).to_numpy()
    np.testing.assert_allclose(mass, 1 - peer, atol=1e-12)


@pytest.mark.parametrize("ties", ["together", "events_first"])
@pytest.mark.parametrize("tied", [False, True])
def test_beran_is_its_formula(ties, tied):
    X, time, event = world(30, 1, tied)
    model = BeranSurvival(bandwidth=0.4, ties=ties).fit(X, time, event)
    expected = [brute_beran(X, time, event, X[i], time[i], 0.4, ties) for i in range(30)]
    np.testing.assert_allclose(model.insample_survival(), expected, atol=1e-12)
    np.testing.assert_allclose(model.survival_at(X, time), expected, atol=1e-12)
    np.testing.assert_allclose(np.diag(model.survival(X, time, left=True)), expected, atol=1e-12)


@pytest.mark.parametrize("ties", ["together", "events_first"])
@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", "uniform", "constant"])
@pytest.mark.parametrize("tied", [False, True])
def test_leave_one_out_is_a_refit_without_the_row(kernel, ties, tied):
    X, time, event = world(40, 2, tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small kernels do run out of neighbours
        make = BeranSurvival(kernel, bandwidth=0.6, ties=ties)
        refits = [make.fit(np.delete(X, i, 0), np.delete(time, i), np.delete(event, i)).survival(X[[i]], time[i], left=True).item()
                  for i in range(40)]
        np.testing.assert_allclose(make.fit(X, time, event).loo_survival(), refits, atol=1e-12)
    if kernel == "constant":
        np.testing.assert_allclose(censoring_survival(time, event, loo=True, ties=ties), refits, atol=1e-12)


@settings(max_examples=40)
@given(targets(), st.sampled_from(["gaussian", "uniform", "constant"]))
def test_curves_are_survival_functions(target, kernel):
    time, event = target
    X = np.linspace(0, 1, len(time))[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        curves = BeranSurvival(kernel, bandwidth=0.5).fit(X, time + 1, event).survival(X, np.arange(0, 11))
    assert (curves[:, 0] == 1).all() and (curves >= 0).all() and (np.diff(curves, axis=1) <= 0).all()


def test_order_duplication_units_and_blocks_do_not_matter():
    X, time, event = world(80, 3)
    w = BeranSurvival(bandwidth=0.3).fit(X, time, event).weights()
    order = np.random.default_rng(0).permutation(80)
    np.testing.assert_allclose(BeranSurvival(bandwidth=0.3).fit(X[order], time[order], event[order]).weights(), w[order], rtol=1e-10)
    np.testing.assert_allclose(BeranSurvival(bandwidth=0.3 * 2**0.5).fit(np.c_[X, X], time, event).weights(), w, rtol=1e-10)
    np.testing.assert_allclose(BeranSurvival(bandwidth=[30, 0.3, 0.3]).fit(X * [100, 1, 1], 365 * time, event).weights(), w, rtol=1e-10)
    np.testing.assert_array_equal(BeranSurvival(bandwidth=0.3, working_memory=0.01).fit(X, time, event).weights(), w)
    scott = BeranSurvival().fit(X, time, event).weights()
    np.testing.assert_allclose(BeranSurvival().fit(X * [1, 50, 1e-3], time, event).weights(), scott, rtol=1e-8)


def test_far_query_and_empty_neighbourhood():
    X, time, event = world(60, 4)
    far = BeranSurvival(bandwidth=0.5).fit(X, time, event).survival(X[:1] + 30, time)  # without rescaling, exp(-5000) is 0
    assert np.isfinite(far).all() and far.min() < 1
    model = BeranSurvival("epanechnikov", bandwidth=0.05).fit(X, time, event)
    with pytest.warns(UserWarning, match="outlived all their neighbours"):
        alone = model.survival(X[:1] + 100, time)
    np.testing.assert_allclose(alone, BeranSurvival("constant").fit(X, time, event).survival(X[:1], time), atol=1e-12)


def test_wide_kernel_is_kaplan_meier():
    X, time, event = world(200, 5)
    wide = BeranSurvival(bandwidth=1e6).fit(X, time, event)
    np.testing.assert_allclose(wide.loo_survival(), censoring_survival(time, event, loo=True), atol=1e-9)


# ---- cost

def test_a_million_rows_no_slower_than_lifelines():
    rng = np.random.default_rng(0)
    Y, C = rng.exponential(size=10**6), rng.exponential(1.5, size=10**6)
    T, delta = np.minimum(Y, C), Y <= C
    start = time.process_time()
    w = ipcw_weights(None, T, delta, method="km")
    ours = time.process_time() - start
    start = time.process_time()
    lifelines.KaplanMeierFitter().fit(T, ~delta)
    theirs = time.process_time() - start
    print(f"10^6 rows: {ours:.2f} s, lifelines {theirs:.2f} s, ratio {theirs / ours:.1f}")
    assert ours <= theirs
    assert abs(w.mean() - 1) < 0.02


def test_memory_stays_bounded_at_nine_thousand_rows():
    X, T, delta = world(9_000)
    tracemalloc.start()
    try:
        w = BeranSurvival(working_memory=64).fit(X, T, delta).weights()
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak < 200, peak  # one dense 9000 x 9000 matrix alone takes 618 MiB
    assert np.isfinite(w).all() and (w[~delta] == 0).all() and (w[delta] >= 1).all()


# ---- weights and risk

def test_true_weights_have_mean_one_and_the_risk_is_unbiased():
    rng = np.random.default_rng(0)
    X, Y = rng.random((200_000, 1)), rng.exponential(size=200_000)
    C = rng.exponential(size=200_000) / (0.1 + 0.2 * X[:, 0])
    T, delta = np.minimum(Y, C), Y <= C
    w = ipcw_weights(X, T, delta, "true", floor=0.0, survival=lambda X, u: np.exp(-(0.1 + 0.2 * X[:, 0]) * u))
    assert abs(w.mean() - 1) < 3 * w.std() / np.sqrt(len(w))
    assert kaplan_meier_risk(X[:, 0], T, delta, w) == pytest.approx(np.mean((Y - X[:, 0]) ** 2), rel=0.05)


def test_no_censoring_changes_nothing():
    X, T, _ = world(100)
    for method in ("beran", "km", "complete", "naive"):
        assert (ipcw_weights(X, T, np.ones(100), method=method) == 1).all()
    for base in (Ridge(), RandomForestRegressor(5, random_state=0), HistGradientBoostingRegressor(max_iter=5),
                 make_pipeline(StandardScaler(), Ridge())):
        np.testing.assert_array_equal(CensoredRegressor(base).fit(X, T).predict(X), clone(base).fit(X, T).predict(X))


def test_regressor_is_weighted_least_squares_on_all_rows():
    X, T, delta = world(150, 6)
    censoring = BeranSurvival(bandwidth=0.4, floor=0.1)
    for weighting in ("beran", "km", "complete", "naive"):
        options = {"beran": dict(bandwidth=0.4, floor=0.1), "km": dict(floor=0.1)}.get(weighting, {})
        w = ipcw_weights(X, T, delta, weighting, **options)
        for base in (LinearRegression(), RandomForestRegressor(5, random_state=0)):
            model = CensoredRegressor(base, weighting, censoring).fit(X, survival_target(T, delta))
            np.testing.assert_array_equal(model.weights_, w)
            np.testing.assert_array_equal(model.predict(X), clone(base).fit(X, T, sample_weight=w).predict(X))
    known = CensoredRegressor(weighting=lambda X, u: np.exp(-(0.2 + X[:, 0]) * u)).fit(X, (T, delta))
    np.testing.assert_allclose(known.weights_[delta], 1 / np.maximum(np.exp(-(0.2 + X[delta, 0]) * T[delta]), 0.05))
    assert known.score(X, (T, delta)) == pytest.approx(r2_score(T, known.predict(X), sample_weight=known.weights_))


def test_floor_and_its_share():
    X, T, delta = world(300, 7)
    survival = BeranSurvival().fit(X, T, delta).loo_survival()
    model = CensoredRegressor(censoring=BeranSurvival(floor=0.5)).fit(X, survival_target(T, delta))
    assert model.floored_ == np.mean(survival[delta] < 0.5) > 0
    assert model.weights_.max() == 2
    with pytest.raises(ValueError, match="floor"):
        ipcw_weights(None, [1.0, 2.0, 2.0, 3.0], [1, 0, 0, 1], "km", floor=0.0)  # without the last row all at risk are censored at 2


# ---- scikit-learn

@parametrize_with_checks([BeranSurvival(), BeranSurvival(bandwidth=0.5, loo=False), CensoredRegressor(), CensoredRegressor(Ridge(), "km"), CensoredRegressor(HistGradientBoostingRegressor(max_iter=5), "km"),
                          CensoredRegressor(make_pipeline(StandardScaler(), Ridge()))])
def test_sklearn(estimator, check):
    check(estimator)


def test_splits_searches_pipelines_and_frames():
    X, T, delta = world(200, 8)
    y = survival_target(T, delta)
    frame = pd.DataFrame(X, columns=["a", "b", "c"]).assign(kind=np.where(X[:, 0] > 0.5, "old", "new"))
    numeric = make_pipeline(PolynomialFeatures(2), Ridge())
    cv = KFold(3, shuffle=True, random_state=0)
    model = CensoredRegressor(numeric, censoring=BeranSurvival(features=["a"]))
    search = GridSearchCV(model, {"censoring__bandwidth": [0.1, 0.5], "estimator__ridge__alpha": [0.1, 1]}, cv=cv).fit(frame[["a", "b", "c"]], y)
    assert np.isfinite(search.best_score_)
    assert cross_val_predict(model, frame[["a", "b", "c"]], y, cv=cv).shape == (200,)
    assert np.isfinite(cross_val_score(CensoredRegressor(numeric, "km"), X, y, cv=cv)).all()
    by_name = BeranSurvival(features=["a"]).fit(frame, y).weights()
    np.testing.assert_array_equal(by_name, BeranSurvival(features=[0]).fit(X, T, delta).weights())
    np.testing.assert_array_equal(by_name, BeranSurvival(features=[0]).fit(frame, y).weights())
    inner = TransformedTargetRegressor(Ridge(), func=np.sqrt, inverse_func=np.square)
    assert CensoredRegressor(inner).fit(X, y).predict(X).shape == (200,)


def test_ways_to_write_a_target():
    expected = ([5.0, 8.0], [True, False])
    packed = survival_target([5, 8], [1, 0])
    for y in (packed, packed[["time", "event"]], ([5, 8], [1, 0]), pd.DataFrame(packed)):
        np.testing.assert_array_equal(split_target(y), expected)
    np.testing.assert_array_equal(split_target([5, 8], [1.0, 0.0]), expected)
    np.testing.assert_array_equal(split_target([5, 8]), ([5, 8], [True, True]))


# ---- bad input

@pytest.mark.parametrize("time, event, message", [
    ([1, -2], [1, 1], "non-negative"), ([1, np.nan], [1, 1], "NaN"), ([1, np.inf], [1, 1], "infinity"), ([1, 2], [1, 2], "got 2"),
    ([1, 2], [1, np.nan], "event must hold"), ([1, 2], ["1", "0"], "event must hold"), ([1, 2], [1], "same length"), ([[1, 2], [3, 4]], None, "1d array")])
def test_bad_targets(time, event, message):
    X = np.zeros((2, 1))
    for call in (lambda: survival_target(time, event), lambda: censoring_survival(time, event), lambda: ipcw_weights(X, time, event),
                 lambda: BeranSurvival().fit(X, time, event)):
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_calls():
    X, T, delta = world(20)
    y = survival_target(T, delta)
    bad = [
        (lambda: CensoredRegressor().fit(X, (T, np.zeros(20))), "no duration was observed"),
        (lambda: CensoredRegressor(KNeighborsRegressor()).fit(X, y), "KNeighborsRegressor takes no sample_weight"),
        (lambda: fit_weighted(make_pipeline(StandardScaler(), KNeighborsRegressor()), X, T, T), "Pipeline takes no sample_weight"),
        (lambda: CensoredRegressor(weighting="kaplan").fit(X, y), "unknown weighting 'kaplan'"),
        (lambda: CensoredRegressor().fit(X[:-1], y), "19 rows and y has 20"),
        (lambda: BeranSurvival().fit(X[:-1], y), "19 rows and y has 20"),
        (lambda: BeranSurvival("gauss").fit(X, y), "unknown kernel 'gauss'"),
        (lambda: BeranSurvival(ties="first").fit(X, y), "unknown ties"),
        (lambda: BeranSurvival(bandwidth="silverman").fit(X, y), "unknown bandwidth"),
        (lambda: BeranSurvival(bandwidth=0).fit(X, y), "bandwidth must be"),
        (lambda: BeranSurvival(bandwidth=[1, 2]).fit(X, y), "or 3 of them"),
        (lambda: BeranSurvival(floor=1).fit(X, y), "floor must be"),
        (lambda: BeranSurvival().fit(X, y, delta), "given once"),
        (lambda: BeranSurvival().fit(X, y).survival_at(X, T[:3]), "one time per row"),
        (lambda: BeranSurvival().fit(X[:, :2], y).survival(X, T), "3 features"),
        (lambda: ipcw_weights(X, T, delta, "breslow"), "unknown method 'breslow'"),
        (lambda: ipcw_weights(X, T, delta, "true"), "needs survival"),
        (lambda: ipcw_weights(X, T, delta, floor=-1), "floor must be"),
        (lambda: kaplan_meier_risk(T[:3], T, delta, T), "one prediction"),
        (lambda: restrict(T, delta, 0), "tau must be positive"),
        (lambda: concordance_ipcw(T, T, np.zeros(20), T), "no comparable pair"),
        (lambda: split_target(np.zeros(2, dtype=[("status", bool), ("time", float)])), "status"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    for call in (lambda: CensoredRegressor().predict(X), lambda: BeranSurvival().survival(X, T), lambda: BeranSurvival().weights()):
        with pytest.raises(NotFittedError):
            call()


# ---- helpers for real data

def test_restriction_and_horizon():
    time, event = restrict([1, 5, 9], [1, 0, 0], 6)
    np.testing.assert_array_equal(time, [1, 5, 6])
    np.testing.assert_array_equal(event, [True, False, True])
    _, y = load_survival("rossi")
    tau = horizon(y["time"], y["event"])
    assert tau == 52 and restrict(y["time"], y["event"], tau)[1].all()


@pytest.mark.parametrize("ties", [False, True])
def test_concordance_is_harrells_with_unit_weights(ties):
    X, T, delta = world(120, 9, ties)
    f = np.round(X[:, 0], 1)
    assert concordance_ipcw(f, T, delta, np.ones(120)) == pytest.approx(lifelines.utils.concordance_index(T, f, delta), abs=1e-12)
    w = ipcw_weights(X, T, delta)
    pairs = [(w[i] ** 2, f[i] < f[j], f[i] == f[j]) for i in range(120) for j in range(120)
             if delta[i] and T[i] < 1 and (T[i] < T[j] or (T[i] == T[j] and not delta[j]))]
    if pairs:
        expected = sum(p * (a + b / 2) for p, a, b in pairs) / sum(p for p, *_ in pairs)
        assert concordance_ipcw(f, T, delta, w, tau=1) == pytest.approx(expected, abs=1e-12)


def test_screen_finds_the_column_that_drives_censoring():
    rng = np.random.default_rng(0)
    X = rng.random((400, 8))
    C, Y = rng.exponential(size=400) * np.exp(-3 * X[:, 5]), rng.exponential(size=400)
    assert censoring_features(X, np.minimum(Y, C), Y <= C, k=3)[0] == 5


def tiny(n=60):
    X, T, delta = world(n, 11)
    return pd.DataFrame(X, columns=["a", "b", "c"]).assign(arm=np.where(X[:, 1] > 0.5, "new", "old"), months=np.ceil(T * 10), died=delta.astype(int))


def test_data_from_a_file(tmp_path):
    frame = tiny()
    frame.to_csv(tmp_path / "tiny.csv", index=False)
    X, y = load_survival(str(tmp_path / "tiny.csv"), "months", "died")
    assert list(X.columns) == ["a", "b", "c", "arm_old"] and (X.dtypes == float).all()
    np.testing.assert_array_equal(y["time"], frame.months)
    try:
        frame.to_parquet(tmp_path / "tiny.parquet")
    except ImportError:
        (tmp_path / "tiny.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match="cannot be read"):
            load_survival(str(tmp_path / "tiny.parquet"), "months", "died")
    else:
        pd.testing.assert_frame_equal(load_survival(str(tmp_path / "tiny.parquet"), "months", "died")[0], X)
    frame.assign(a=np.nan).to_csv(tmp_path / "gaps.csv", index=False)
    for path, columns, message in ((tmp_path / "tiny.csv", ("duration", "event"), "no column 'duration'; it has: a, b"),
                                   (tmp_path / "gaps.csv", ("months", "died"), "missing values in: a"),
                                   (tmp_path / "none.csv", ("months", "died"), "no dataset"), ("support2", ("a", "b"), "no dataset 'support2'")):
        with pytest.raises(DataError, match=message):
            load_survival(str(path), *columns)


def test_named_studies(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycox", None)
    monkeypatch.setitem(sys.modules, "pycox.datasets", None)
    with pytest.raises(DataError, match="metabric is not available here.*pip install pycox"):
        load_survival("metabric")
    study = types.SimpleNamespace(read_df=lambda: pd.DataFrame({"x0": [1.0, 2, 3], "futime": [4.0, 5, 6], "death": [1.0, 0, 1]}))
    package, datasets = types.ModuleType("pycox"), types.ModuleType("pycox.datasets")
    package.datasets, datasets.flchain = datasets, study
    monkeypatch.setitem(sys.modules, "pycox", package)
    monkeypatch.setitem(sys.modules, "pycox.datasets", datasets)
    X, y = load_survival("flchain")
    assert list(X) == ["x0"] and y["event"].tolist() == [True, False, True]


# ---- the notebook

def test_notebook_on_a_file_of_ones_own(tmp_path):
    papermill = pytest.importorskip("papermill")
    tiny(80).to_csv(tmp_path / "mine.csv", index=False)
    path = find_paper("censored_erm")
    assert set(parameters(load_notebook(path), "censored_erm")) == {"profile", "seeds", "bandwidth", "floor", "sizes", "dataset", "time_column", "event_column"}
    given = dict(profile="smoke", sizes=[60, 90], dataset=str(tmp_path / "mine.csv"), time_column="months", event_column="died")
    nb = papermill.execute_notebook(path, tmp_path / "out.ipynb", given, progress_bar=False, cwd=tmp_path)
    records = [o["data"][MIME] for c in nb.cells for o in c.get("outputs", []) if MIME in o.get("data", {})]
    assert len(records) == 1
    record = records[0]
    assert [c["id"] for c in record["claims"]] == [f"C{i}" for i in range(1, 9)]
    assert {c["verdict"] for c in record["claims"]} == {"not tested"}
    mine = [r for r in record["rows"] if r.get("part") == "C"]
    assert {r["dataset"] for r in mine} == {"mine"} and all(r["n_rows"] == 80 for r in mine)
