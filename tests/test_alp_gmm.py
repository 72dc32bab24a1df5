"ALP-GMM: teachers against brute force and peers, restarts bit for bit, Gymnasium and stable-baselines3 around them."
import copy
import pickle
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.mixture import GaussianMixture

from researchkit.core.errors import DataError
from researchkit.core.notebook import find_paper, load_notebook, parameters
from researchkit.decision.alp_gmm import (
    ALPGMM, RIAC, AbsoluteLearningProgress, CovarGMM, CurriculumWrapper, OracleTeacher, RandomTeacher, StumpTracks, Teacher, ToyGrid,
    evaluate_tasks, fit_mixture, information_criterion, load_state, mixture_parameters, region_progress, rescale, save_state, train, train_sac)

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("Box2D")
sb3 = pytest.importorskip("stable_baselines3")
from gymnasium.envs.classic_control import PendulumEnv  # noqa: E402
from gymnasium.utils.env_checker import check_env  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

BOX = gymnasium.spaces.Box(np.float32([0, -5]), np.float32([3, 100]))
MIXTURE = dict(fit_rate=20, ks=[2, 3])
MAKE = {"random": lambda **k: RandomTeacher(BOX, **k), "oracle": lambda **k: OracleTeacher(BOX, step=[0.1, -3.5], threshold=0.4, every=7, **k),
        "riac": lambda **k: RIAC(BOX, max_size=25, **k), "covar": lambda **k: CovarGMM(BOX, **MIXTURE, **k), "alp": lambda **k: ALPGMM(BOX, **MIXTURE, **k),
        "released": lambda **k: ALPGMM(BOX, criterion="aicc", released_count=True, min_points=6, max_history=30, flush=10, em_seed=5, normalize=False, **MIXTURE, **k),
        "riac_released": lambda **k: RIAC(BOX, max_size=25, released_split=True, leaves_only=True, normalize=False, **k)}


def student(task, t):
    return min(1.0, t / 60) * float(task[0] < 1) + 0.01 * np.cos(37 * float(task[1]))


def play(teacher, n, start=0):
    tasks = []
    for t in range(start, start + n):
        task = teacher.sample_task()
        teacher.update(task, student(task, t))
        tasks.append(task)
    return np.array(tasks)


class Gravity(PendulumEnv):
    "A pendulum whose gravity and length are the task."

    def __init__(self, **options):
        super().__init__(**options)
        self.task_space = gymnasium.spaces.Box(np.float32([4, 0.6]), np.float32([16, 1.4]))

    def set_task(self, task):
        self.g, self.l = map(float, task)


def pendulum(steps=20):
    return gymnasium.wrappers.TimeLimit(Gravity(), steps)


def finish(env, action=None):
    while True:
        _, _, terminated, truncated, info = env.step(env.action_space.sample() if action is None else action)
        if terminated or truncated:
            return info


# ---- learning progress

@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(0, 2**32), st.booleans())
def test_progress_is_brute_force_and_ties_go_to_the_oldest(dim, n, seed, coarse):
    rng = np.random.default_rng(seed)
    tasks, rewards = rng.random((n, dim)), rng.normal(size=n)
    tasks = np.round(tasks * 2) / 2 if coarse else tasks
    ours = AbsoluteLearningProgress(dim)
    for i in range(n):
        brute = 0.0 if i == 0 else abs(rewards[i] - rewards[min(range(i), key=lambda j: ((tasks[j] - tasks[i]) ** 2).sum())])
        assert ours.compute(tasks[i], rewards[i]) == brute


def test_progress_over_1300_rows():
    rng = np.random.default_rng(0)
    tasks, rewards = rng.random((1300, 2)), rng.random(1300)
    earlier = np.where(np.tri(1300, k=-1, dtype=bool), cdist(tasks, tasks), np.inf).argmin(1)
    expected = np.abs(rewards - rewards[earlier])
    expected[0] = 0
    plain, released = AbsoluteLearningProgress(2), AbsoluteLearningProgress(2, min_points=6, flush=500)
    np.testing.assert_array_equal([plain.compute(*row) for row in zip(tasks, rewards)], expected)
    expected[:6] = 0
    np.testing.assert_array_equal([released.compute(*row) for row in zip(tasks, rewards)], expected)
    assert len(plain) == 1300


@pytest.mark.parametrize("flush", [None, 7])
def test_capped_history(flush):
    "flush=None: the last rows at all times. flush=7: a buffer of 7 is added to the rest, and only then the rest is cut."
    rng = np.random.default_rng(1)
    tasks, rewards = rng.random((100, 2)), rng.random(100)
    ours = AbsoluteLearningProgress(2, 20, flush=flush)
    main, buffer = [], []
    for p, r in zip(tasks, rewards):
        held = main + buffer
        brute = abs(r - held[int(np.argmin([((p - q) ** 2).sum() for q, _ in held]))][1]) if held else 0.0
        assert ours.compute(p, r) == brute
        if flush is None:
            main = (main + [(p, r)])[-20:]
        elif len(buffer) < flush:
            buffer.append((p, r))
        else:
            main, buffer = (main + buffer)[-20:], [(p, r)]
    assert len(ours) == len(main + buffer)


def test_progress_refuses_bad_rows_unchanged():
    ours = AbsoluteLearningProgress(2)
    ours.compute([0, 0], 1.0)
    for task, reward in (([0.0], 1.0), ([0.0, np.nan], 1.0), ([0, 0], np.nan), ([0, 0], "high"), ([[0, 0]], 1.0)):
        with pytest.raises(ValueError):
            ours.compute(task, reward)
    assert len(ours) == 1 and ours.compute([1, 1], 3.0) == 2.0
    for bad in (dict(dim=0), dict(dim=2, max_size=0), dict(dim=2, flush=-1), dict(dim=2, min_points=0)):
        with pytest.raises(ValueError):
            AbsoluteLearningProgress(**bad)


def test_long_histories_are_fast():
    ours = AbsoluteLearningProgress(2)
    rng = np.random.default_rng(0)
    start = time.process_time()
    for p in rng.random((4000, 2)):
        ours.compute(p, 0.0)
    assert time.process_time() - start < 2


# ---- mixtures

def test_mixture_is_the_best_of_sklearn():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(m, 0.07, (60, 3)) for m in (0.1, 0.5, 0.9)])
    for criterion in ("aic", "bic", "aicc"):
        ours = fit_mixture(rows, [2, 3, 4], criterion, random_state=3)
        peers = [GaussianMixture(k, random_state=3).fit(rows) for k in (2, 3, 4)]
        m = np.array([mixture_parameters(k, 3) for k in (2, 3, 4)])
        values = [p.bic(rows) if criterion == "bic" else p.aic(rows) for p in peers]
        if criterion == "aicc":
            values = values + 2 * m * (m + 1) / (180 - m - 1)
        best = peers[int(np.argmin(values))]
        np.testing.assert_array_equal(ours.means_, best.means_)
        assert information_criterion(ours, rows, criterion) == pytest.approx(min(values))
    assert mixture_parameters(4, 3) == 4 * (1 + 3 + 6) - 1
    assert mixture_parameters(10, 2) == 59  # what the released code counts for tasks in two dimensions


def test_mixture_of_degenerate_rows():
    same = np.zeros((50, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_mixture(same, [2, 3], random_state=0) is not None
        many = np.random.default_rng(0).random((40, 13))
        assert fit_mixture(many, [2, 3], "aicc", random_state=0).n_components == 2  # more parameters than rows
    teacher = ALPGMM([0.0], [1.0], fit_rate=10, ks=[2], seed=0)
    for _ in range(30):
        teacher.update([0.5], 0.0)
    assert 0 <= teacher.sample_task()[0] <= 1
    for bad in (dict(ks=[]), dict(ks=[51]), dict(ks=[0]), dict(criterion="loglik")):
        with pytest.raises(ValueError):
            fit_mixture(same, **{"ks": [2], **bad})


def test_components_are_drawn_in_proportion_to_progress():
    teacher = ALPGMM(BOX, random_ratio=0.0, **MIXTURE, seed=0)
    play(teacher, 20)
    teacher._use(np.full(3, 1 / 3), np.array([[0.1, 0.1, 0.1], [0.5, 0.5, 0.6], [0.9, 0.9, 0.3]]), np.tile(1e-6 * np.eye(3), (3, 1, 1)))
    np.testing.assert_allclose(teacher.component_probabilities(), [0.1, 0.6, 0.3])
    tasks = np.array([teacher.sample_task() for _ in range(3000)])
    counts = np.histogram(tasks[:, 0] / 3, [0, 0.3, 0.7, 1])[0]
    assert stats.chisquare(counts, 3000 * np.array([0.1, 0.6, 0.3])).pvalue > 1e-3
    assert stats.chisquare(counts).pvalue < 1e-9
    np.testing.assert_allclose(teacher.components()["means"][1], [1.5, 47.5])
    teacher.means[:, -1] = 0
    np.testing.assert_allclose(teacher.component_probabilities(), 1 / 3)
    uniform = ALPGMM(BOX, choice="uniform", **MIXTURE, seed=0)
    play(uniform, 40)
    np.testing.assert_allclose(uniform.component_probabilities(), 1 / len(uniform.means))


def test_fit_uses_the_last_window_and_the_released_start():
    teacher = ALPGMM([0, 0], [1, 1], fit_rate=30, ks=[2, 3], em_seed=7, seed=0)
    rows, brute = [], AbsoluteLearningProgress(2)
    for t in range(90):
        task = teacher.sample_task()
        reward = student(task, t)
        rows.append([*task, brute.compute(task, reward)])
        teacher.update(task, reward)
    peer = min((GaussianMixture(k, random_state=7).fit(np.array(rows[-30:])) for k in (2, 3)), key=lambda m: m.aic(np.array(rows[-30:])))
    np.testing.assert_array_equal(teacher.means, peer.means_)
    np.testing.assert_array_equal(teacher.covariances, peer.covariances_)


def test_covar_weights():
    rows = []
    for absolute in (False, True):
        teacher = CovarGMM([0.0], [1.0], fit_rate=40, ks=[2], absolute=absolute, em_seed=0, seed=1)
        for t in range(40):
            x = 0.1 if t % 2 else 0.9
            teacher.update([x + 0.01 * np.sin(t)], t / 40 if x < 0.5 else 1 - t / 40)
        rows.append((teacher.component_probabilities(), teacher.means[:, 0].argmin()))
        np.testing.assert_allclose(teacher._recent.values[:, 1], np.arange(40) / 40)
    (gains, low), (both, _) = rows
    assert gains[low] == 1 and (both > 0.4).all()


def test_progress_pays_attention_to_the_corner_that_improves():
    for make in ("alp", "riac", "covar"):
        teacher = {"alp": ALPGMM, "riac": RIAC, "covar": CovarGMM}[make]([0, 0], [1, 1], seed=0, **({} if make == "riac" else dict(ks=[2, 4])))
        tasks = []
        for t in range(1000):
            task = teacher.sample_task()
            teacher.update(task, t / 1000 if task.max() < 0.5 else 0.0)
            tasks.append(task)
        assert np.mean(np.max(tasks[600:], axis=1) < 0.5) > 0.4, make


# ---- RIAC and oracle

def test_region_progress():
    assert region_progress([]) == region_progress([1, 5]) == 0
    assert region_progress([0, 0, 4, 4]) == 4
    assert region_progress([1, 2, 9, 0, 2]) == 3
    assert region_progress([100, 0, 0, 4, 4], window=4) == 4
    rng = np.random.default_rng(0)
    for n in (3, 10, 199, 200, 201, 350):
        r = rng.random(n)
        w = min(n, 200)
        assert region_progress(r, 200) == pytest.approx(abs(r[-w:-(w // 2)].mean() - r[-(w // 2):].mean()), abs=1e-15)


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 3), st.booleans())
def test_riac_regions_tile_the_box(seed, dim, released):
    rng = np.random.default_rng(seed)
    low = rng.normal(size=dim)
    high = low + rng.random(dim) * 50 + 0.1
    tree = RIAC(low, high, max_size=30, leaves_only=True, released_split=released, seed=seed)
    for _ in range(400):
        task = tree.sample_task()
        assert ((task >= low) & (task <= high)).all()
        tree.update(task, rng.random() * task.sum())
    leaf = tree.regions()
    assert ((leaf["high"] - leaf["low"]) / (high - low)).prod(1).sum() == pytest.approx(1)
    assert ((leaf["high"] - leaf["low"]) / (high - low) >= 1 / 15 - 1e-9).all() and (leaf["alp"] >= 0).all()
    assert len(leaf["alp"]) > 3
    sizes = [len(p) for p, c in zip(tree._points, tree._children) if c is None]
    assert max(sizes) <= 30


def test_riac_forgets_when_it_cannot_split():
    tree = RIAC([0.0], [1.0], max_size=40, seed=0)
    for t in range(41):
        tree.update([0.5], t)
    assert len(tree._points[0]) == 31 and tree._points[0].values[0, -1] == 10 and len(tree.regions()["alp"]) == 1


def test_riac_split_score_and_its_released_form():
    "The paper's score counts populations; the released one does not, and starts children with the last cut that was tried."
    rng = np.random.default_rng(3)
    x = np.sort(rng.random(41))
    for released in (False, True):
        tree = RIAC([0.0], [1.0], max_size=40, attempts=12, released_split=released, seed=8)
        rewards = rng.random(41)
        for p, r in zip(x[:40], rewards):
            tree.update([p], r)
        probe = np.random.default_rng()
        probe.bit_generator.state = tree.rng.bit_generator.state
        tree.update([x[40]], rewards[40])
        cuts = []
        while len(cuts) < 12:
            probe.integers(1, size=12)
            cuts += [c for c in probe.random(12) if 2 <= (x <= c).sum() <= 39]
        tried = []
        for c in cuts[:12]:
            left = x <= c
            alps = region_progress(rewards[left], 40), region_progress(rewards[~left], 40)
            size = 4 if released else left.sum() * (~left).sum()
            tried.append((size * abs(alps[0] - alps[1]) if 1 / 15 <= c <= 14 / 15 else -1, c, alps))
        best = max(range(12), key=lambda i: (tried[i][0], i))
        assert tree._cuts[0] == (0, tried[best][1])
        np.testing.assert_allclose(tree._alps[1:], tried[-1 if released else best][2])


def test_oracle_window():
    oracle = OracleTeacher(BOX, step=[0.1, -3.5], threshold=230, seed=0)
    assert oracle.scaled is False
    tasks = np.array([oracle.sample_task() for _ in range(200)])
    assert tasks[:, 0].max() <= 0.5 and tasks[:, 1].min() >= 100 - 17.5 - 1e-4
    for reward in [230.0] * 50 + [231.0] * 50 + [0.0] * 50:
        oracle.update(tasks[0], reward)
    np.testing.assert_allclose(oracle._corner * (oracle.high - oracle.low) + oracle.low, [0.1, 79.0])
    for _ in range(50 * 100):
        oracle.update(tasks[0], 300.0)
    np.testing.assert_allclose(oracle._corner * (oracle.high - oracle.low) + oracle.low, [2.5, -5.0], atol=1e-9)


# ---- one interface

@pytest.mark.parametrize("name", MAKE)
def test_seed_box_and_dtype(name):
    a, b, other = (play(MAKE[name](seed=s), 150) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != other).any() and a.dtype == np.float32 and all(BOX.contains(t) for t in a)
    state = np.random.get_state()[1].copy()
    play(MAKE[name](seed=0), 45)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # the global generator is left alone


@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=6)
@given(cut=st.integers(0, 120))
def test_interrupted_anywhere_it_continues_bit_for_bit(name, cut, tmp_path_factory):
    whole = MAKE[name](seed=4)
    play(whole, cut)
    file = tmp_path_factory.mktemp("state") / "teacher.npz"
    save_state(file, whole.state_dict())
    restored = MAKE[name](seed=99)
    play(restored, 33)
    restored.load_state_dict(load_state(file))
    assert restored.episodes == cut
    np.testing.assert_array_equal(play(restored, 90, cut), play(whole, 90, cut))
    again, now = restored.state_dict(), whole.state_dict()
    np.testing.assert_equal(again, now)


def test_interruption_between_a_task_and_its_return():
    whole, restored = MAKE["alp"](seed=0), MAKE["alp"](seed=1)
    play(whole, 45)
    task = whole.sample_task()
    restored.load_state_dict(copy.deepcopy(whole.state_dict()))
    for teacher in (whole, restored):
        teacher.update(task, 0.3)
    np.testing.assert_array_equal(play(whole, 60, 46), play(restored, 60, 46))


def test_a_state_does_not_change_afterwards():
    for name in MAKE:
        teacher = MAKE[name](seed=0)
        play(teacher, 70)
        state = teacher.state_dict()
        before = copy.deepcopy(state)
        play(teacher, 70, 70)
        np.testing.assert_equal(state, before)
        fresh = MAKE[name]()
        fresh.load_state_dict(state)
        play(fresh, 70, 70)
        np.testing.assert_equal(state, before)


def test_foreign_and_damaged_states_change_nothing(tmp_path):
    teacher = MAKE["alp"](seed=0)
    play(teacher, 50)
    good = copy.deepcopy(teacher.state_dict())
    bad = [MAKE["riac"](seed=0).state_dict(), ALPGMM(BOX, fit_rate=21, ks=[2, 3]).state_dict(), ALPGMM([0, -5], [3, 101], **MIXTURE).state_dict(), None, {},
           {**good, "rng": {}}, {**good, "recent": np.zeros(5)}, {k: v for k, v in good.items() if k != "progress"}, {**good, "mixture": [1]}]
    for state in bad:
        with pytest.raises(ValueError):
            teacher.load_state_dict(state)
        np.testing.assert_equal(teacher.state_dict(), good)
    with pytest.raises(ValueError, match="fit_rate 21 instead of 20"):
        teacher.load_state_dict(bad[1])
    file = save_state(tmp_path / "a" / "state.npz", good)
    whole = file.read_bytes()
    for broken in (whole[:len(whole) // 2], b"", b"not an archive"):
        file.write_bytes(broken)
        with pytest.raises(DataError, match="state.npz"):
            load_state(file)
    with pytest.raises(DataError, match="does not exist"):
        load_state(tmp_path / "nothing.npz")
    np.savez(tmp_path / "other.npz", x=np.arange(3))
    with pytest.raises(DataError):
        load_state(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", json=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError):
        load_state(tmp_path / "objects.npz")


def test_save_state_is_atomic_and_plain(tmp_path):
    file = save_state(tmp_path / "s.npz", {"a": np.arange(3), "b": [1, {"c": None, "d": np.float32(2)}], "big": 2**100})
    back = load_state(file)
    assert back["b"] == [1, {"c": None, "d": 2.0}] and back["big"] == 2**100 and back["a"].tolist() == [0, 1, 2]
    for value in (object(), np.array([object()]), {1, 2}):
        with pytest.raises(TypeError):
            save_state(file, {"a": value})
    assert load_state(file)["big"] == 2**100 and [p.name for p in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.parametrize("make", [ALPGMM, RIAC, CovarGMM, RandomTeacher, OracleTeacher])
def test_bad_input(make):
    for low, high in (([0, 0], [1]), ([0, 1], [1, 1]), ([0, 0], [1, np.inf]), ([[0]], [[1]]), ([], []), ([0, np.nan], [1, 1])):
        with pytest.raises(ValueError):
            make(low, high)
    with pytest.raises(ValueError):
        make(gymnasium.spaces.Box(0, 5, (2,), np.int64))
    with pytest.raises(ValueError):
        make(gymnasium.spaces.Discrete(3))
    teacher = make(([0, 0], [1, 2]), seed=0)
    before = copy.deepcopy(teacher.state_dict())
    for task, reward in (([0.5, 3], 1), ([0.5], 1), ([0.5, np.nan], 1), ([0.5, 1], np.nan), ([0.5, 1], np.inf), ([0.5, 1], None), ([0.5, 1], [1, 2])):
        with pytest.raises(ValueError):
            teacher.update(task, reward)
    np.testing.assert_equal(teacher.state_dict(), before)
    assert isinstance(teacher, Teacher)


def test_bad_settings():
    for make, bad in ((ALPGMM, dict(fit_rate=10)), (ALPGMM, dict(ks=[])), (ALPGMM, dict(criterion="mdl")), (ALPGMM, dict(choice="best")), (ALPGMM, dict(random_ratio=1.5)),
                      (ALPGMM, dict(reg_covar=0)), (ALPGMM, dict(max_history=0)), (CovarGMM, dict(fit_rate=5)), (RIAC, dict(max_size=2)), (RIAC, dict(ratios=(0.5, 0.2, 0.1))),
                      (RIAC, dict(discard=1.0)), (RIAC, dict(min_range=2)), (OracleTeacher, dict(step=[1, 2, 3])), (OracleTeacher, dict(every=0)), (OracleTeacher, dict(window=2))):
        with pytest.raises(ValueError):
            make([0, 0], [1, 1], **bad)


def test_units_do_not_matter_unless_asked():
    def run(scale, **options):
        teacher = ALPGMM([0, 0], [1, scale], seed=0, **MIXTURE, **options)
        tasks = []
        for t in range(100):
            task = teacher.sample_task()
            teacher.update(task, student(task / [1, scale], t))
            tasks.append(task / [1, scale])
        return np.array(tasks)
    np.testing.assert_allclose(run(1), run(1024), atol=1e-12)
    assert abs(run(1, normalize=False) - run(1024, normalize=False)).max() > 0.01


# ---- the driver

def test_train_resumes_after_a_crash_bit_for_bit(tmp_path):
    grid = ToyGrid(4, 2, cap=5, noise=0.1, seed=3)
    tasks, returns = train(ALPGMM(grid.task_space, **MIXTURE, seed=0), grid.episode, 150)
    assert tasks.shape == (150, 2) and returns.shape == (150,)

    calls = []
    for attempt in range(6):
        again = ToyGrid(4, 2, cap=5, noise=0.1, seed=3 if attempt == 0 else 100)

        def fragile(task):
            calls.append(0)
            if len(calls) % 41 == 0:
                raise KeyboardInterrupt
            return again.episode(task)

        try:
            got = train(ALPGMM(grid.task_space, **MIXTURE, seed=0 if attempt == 0 else 50), fragile, 150, student=again, checkpoint=tmp_path / "run", every=20)
            break
        except KeyboardInterrupt:
            assert [p.name for p in (tmp_path / "run").iterdir()] == ["curriculum.npz"]
    assert attempt > 2
    np.testing.assert_array_equal(got[0], tasks)
    np.testing.assert_array_equal(got[1], returns)
    np.testing.assert_array_equal(again.competence, grid.competence)
    more, _ = train(ALPGMM(grid.task_space, **MIXTURE), again.episode, 170, student=again, checkpoint=tmp_path / "run")
    assert len(more) == 170
    with pytest.raises(ValueError, match="this is a RIAC"):
        train(RIAC(grid.task_space), again.episode, 200, student=again, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="with a student"):
        train(ALPGMM(grid.task_space, **MIXTURE), again.episode, 200, checkpoint=tmp_path / "run")


def test_train_rescales_and_checks():
    seen = []

    class Listener(RandomTeacher):
        def _update(self, u, reward):
            seen.append(reward)
    _, returns = train(Listener([0], [1], seed=0), lambda task: 100.0, 3, reward_range=(-150, 350))
    assert seen == [0.5] * 3 and (returns == 100).all()
    assert [rescale(v, -150, 350) for v in (-1000, -150, 100, 350, 1000)] == [0, 0, 0.5, 1, 1]
    oracle = OracleTeacher([0], [1], every=10, threshold=90)
    train(oracle, lambda task: 100.0, 9, reward_range=(-150, 350))
    assert oracle._returns == [100.0] * 9
    for bad in (dict(episodes=-1), dict(episodes=1.5), dict(every=0), dict(reward_range=(1, 0)), dict(reward_range=3)):
        with pytest.raises(ValueError):
            train(RandomTeacher([0], [1]), lambda task: 0.0, **{"episodes": 2, **bad})
    with pytest.raises(ValueError):
        train(RandomTeacher([0], [1]), lambda task: np.nan, 2)
    assert train(RandomTeacher([0], [1]), lambda task: 0.0, 0)[1].shape == (0,)


# ---- environments

def test_toy_grid():
    grid = ToyGrid(10, 2)
    assert grid.cap == 100 and grid.threshold == 75 and grid.mastered == 0
    assert [grid.episode([0.05, 0.15]), grid.episode([0.95, 0.95])] == [0, 0]
    for _ in range(75):
        grid.episode([0.0, 0.0])
    assert grid.mastered == 0 and grid.episode([0.15, 0.15]) == 0.01 and grid.episode([0.25, 0.05]) == 0
    for _ in range(100):
        last = grid.episode([0.0999, 0.0])
    assert last == 1 and grid.mastered == 1 and grid.competence.max() == 100
    assert grid.episode([1.0, 1.0]) == 0
    mask = np.zeros((3, 3), bool)
    mask[0] = True
    partial = ToyGrid(3, 2, cap=4, learnable=mask, irrelevant=1, noise=0.2, seed=0)
    for task in np.random.default_rng(0).random((600, 3)):
        assert 0 <= partial.episode(task) <= 1
    assert partial.mastered == 100 and partial.competence[1:].sum() == 0
    check_env(ToyGrid(5, 3, noise=0.1), skip_render_check=True)
    one = ToyGrid(2, 2, cap=1)
    one.reset(options={"task": [0.1, 0.2]})
    observation, reward, terminated, truncated, info = one.step(0)
    assert (observation.tolist(), reward, terminated, truncated, info) == ([1.0], 1.0, True, False, {"mastered": 25.0})
    with pytest.raises(TypeError):
        RandomTeacher([0], [1], sed=0)
    for bad in (dict(n_cells=0), dict(noise=-1), dict(threshold=200), dict(learnable=np.ones(3))):
        with pytest.raises(ValueError):
            ToyGrid(**bad)
    for task in ([0.5], [0.5, 1.1], [np.nan, 0]):
        with pytest.raises(ValueError):
            grid.episode(task)


def test_wrapper_passes_gymnasiums_checks_and_keeps_pending_tasks():
    teacher = ALPGMM(Gravity().task_space, **MIXTURE, seed=0)
    env = CurriculumWrapper(pendulum(), teacher, reward_range=(-200, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env, skip_render_check=True)
    assert teacher.episodes == 0  # the checks finish no episode
    task = env.task
    for _ in range(3):
        observation, info = env.reset(seed=5)
        np.testing.assert_array_equal(info["task"], task)
        assert env.unwrapped.g == task[0] and env.unwrapped.l == task[1]
        env.step(env.action_space.sample())
    info = finish(env)
    assert teacher.episodes == env.episode_count == 1
    np.testing.assert_array_equal(info["curriculum"]["task"], task)
    expected = rescale(info["curriculum"]["return"], -200, 0)
    assert teacher._recent.values[-1, -1] == 0 and teacher.progress._rows.values[-1, -1] == expected
    assert (env.reset()[1]["task"] != task).any()


def test_evaluation_on_a_given_task_is_not_told():
    teacher = RandomTeacher(Gravity().task_space, seed=0)
    env = CurriculumWrapper(pendulum(), teacher)
    pending = env.task
    _, info = env.reset(options={"task": [9.0, 1.0]})
    assert info["task"].tolist() == [9, 1] and env.unwrapped.g == 9
    info = finish(env)
    assert info["curriculum"]["task"].tolist() == [9, 1] and teacher.episodes == 0
    np.testing.assert_array_equal(env.reset()[1]["task"], pending)
    with pytest.raises(ValueError, match="outside"):
        env.reset(options={"task": [100.0, 1.0]})


def test_three_ways_to_hand_over_a_task():
    space = ([4.0], [16.0])
    by_function = CurriculumWrapper(gymnasium.make("Pendulum-v1"), RandomTeacher(*space, seed=0), set_task=lambda env, task: setattr(env.unwrapped, "g", float(task[0])))
    by_function.reset()
    assert by_function.unwrapped.g == by_function.task[0]
    made = []

    def factory(task):
        made.append(float(task[0]))
        return gymnasium.wrappers.TimeLimit(gymnasium.make("Pendulum-v1", g=float(task[0])), 3)
    by_factory = CurriculumWrapper(factory, RandomTeacher(*space, seed=0))
    for _ in range(3):
        by_factory.reset()
        assert by_factory.unwrapped.g == by_factory.task[0] == made[-1]
        finish(by_factory)
    assert by_factory.teacher.episodes == 3 and len(set(made)) == 3

    class Optional(gymnasium.Wrapper):
        def reset(self, *, seed=None, options=None):
            self.got = options
            return self.env.reset(seed=seed)
    by_options = CurriculumWrapper(Optional(gymnasium.make("Pendulum-v1")), RandomTeacher(*space, seed=0), set_task="options")
    by_options.reset(options={"x": 1})
    assert by_options.env.got["x"] == 1 and by_options.env.got["task"] == by_options.task

    with pytest.raises(ValueError, match="no method set_task"):
        CurriculumWrapper(gymnasium.make("Pendulum-v1"), RandomTeacher(*space))
    with pytest.raises(TypeError, match="sample_task"):
        CurriculumWrapper(pendulum(), object())
    with pytest.raises(TypeError, match="factory"):
        CurriculumWrapper("Pendulum-v1", RandomTeacher(*space))
    with pytest.raises(TypeError, match="must return"):
        CurriculumWrapper(lambda task: 3, RandomTeacher(*space))
    with pytest.raises(ValueError, match="reward_range"):
        CurriculumWrapper(pendulum(), RandomTeacher(*space), reward_range=(1, 1))
    changing = CurriculumWrapper(lambda task: gymnasium.make("Pendulum-v1" if len(made) < 100 else "CartPole-v1"), RandomTeacher(*space))
    made.extend([0.0] * 100)
    with pytest.raises(ValueError, match="same observation and action spaces"):
        changing.reset()


def test_vectorised_environments_share_a_teacher():
    teacher = ALPGMM(Gravity().task_space, **MIXTURE, seed=0)
    make = lambda: CurriculumWrapper(pendulum(10), teacher, reward_range=(-100, 0))  # noqa: E731
    vector = gymnasium.vector.SyncVectorEnv([make] * 3)
    vector.reset(seed=0)
    for _ in range(45):
        vector.step(vector.action_space.sample())
    assert teacher.episodes >= 9 and sum(env.episode_count for env in vector.envs) == teacher.episodes
    ppo = sb3.PPO("MlpPolicy", sb3.common.vec_env.DummyVecEnv([make] * 2), n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu")
    before = teacher.episodes
    ppo.learn(256)
    assert teacher.episodes - before == pytest.approx(25, abs=2) and teacher.means is not None


@pytest.mark.parametrize("task", [(0.3, 5.0), (2.5, 0.8), (0.0, 0.0), (3.0, 6.0)])
def test_stump_tracks_are_as_asked(task):
    env = StumpTracks(task)
    check_env(env, skip_render_check=True)
    env.reset(seed=1)
    x, y, width, height = env.stumps.T
    unit = 14 / 30
    expected = max(task[0], 0.0)
    if task[0]:
        assert height.mean() / unit == pytest.approx(expected, abs=4 * 0.1 / len(x) ** 0.5)
    assert (height / unit >= 0.05 - 1e-6).all() and abs(height / unit - expected).max() < 0.6
    np.testing.assert_allclose(np.diff(x), unit + max(0.01, task[1]), atol=1e-5)
    np.testing.assert_allclose(width, unit)
    assert x[0] == pytest.approx(20 * unit) and x[-1] < 200 * unit and np.ptp(y) == 0
    for _ in range(10):
        env.step(env.action_space.sample())
    clone = pickle.loads(pickle.dumps(StumpTracks(task, height_sd=0.0)))
    clone.reset(seed=2)
    np.testing.assert_allclose(clone.stumps[:, 3] / unit, max(0.05, task[0]), atol=1e-6)


def test_stumps_are_solid():
    env = StumpTracks((2.0, 4.0))
    env.reset(seed=0)
    x, y, width, height = env.stumps[2]
    box = env.world.CreateDynamicBody(position=(x + width / 2, y + height + 1))
    box.CreatePolygonFixture(box=(0.1, 0.1), density=1.0, friction=1.0)
    puck = env.world.CreateDynamicBody(position=(x - 2, y + 0.2), linearVelocity=(20, 0))
    puck.CreatePolygonFixture(box=(0.1, 0.1), density=1.0)
    for _ in range(200):
        env.world.Step(1 / 50, 180, 60)
    assert box.position.y == pytest.approx(y + height + 0.1, abs=0.03)
    assert puck.position.x < x
    env.reset(seed=0, options={"task": (0.5, 6.0)})
    assert env.stumps[:, 3].mean() < height / 2


def test_rough_ground_and_bad_tracks():
    env = StumpTracks((0.5, 1.0), roughness=1.0)
    env.reset(seed=0)
    assert np.ptp(env.terrain_y) > 0.05
    for bad in ((-0.1, 1), (4, 1), (1, 7), (1,), (np.nan, 1)):
        with pytest.raises(ValueError):
            env.set_task(bad)
    with pytest.raises(ValueError):
        StumpTracks(height_sd=-1)


def test_walker_under_a_teacher():
    teacher = ALPGMM(StumpTracks().task_space, **MIXTURE, seed=0)
    env = CurriculumWrapper(gymnasium.wrappers.TimeLimit(StumpTracks(), 5), teacher, reward_range=(-150, 350))
    for _ in range(2):
        _, info = env.reset(seed=0)
        stumps = env.unwrapped.stumps
        assert abs(stumps[:, 3].mean() / stumps[0, 2] - max(0.05, info["task"][0])) < 0.2
        finish(env)
    assert teacher.episodes == 2


def test_sac_resumes(tmp_path):
    tiny = dict(batch_size=8, learning_starts=20, train_freq=5, gradient_steps=1, buffer_size=200, policy_kwargs={"net_arch": [8]}, device="cpu")
    env = lambda: gymnasium.wrappers.TimeLimit(StumpTracks(), 20)  # noqa: E731
    space = StumpTracks().task_space
    first = train_sac(env(), ALPGMM(space, **MIXTURE, seed=0), 60, checkpoint=tmp_path, every=30, **tiny)
    assert first.num_timesteps == 60 and [p.name for p in tmp_path.iterdir()] == ["sac.npz"]
    saved = load_state(tmp_path / "sac.npz")
    teacher = ALPGMM(space, **MIXTURE, seed=9)
    again = train_sac(env(), teacher, 60, checkpoint=tmp_path, **tiny)
    for name, value in first.policy.state_dict().items():
        np.testing.assert_array_equal(again.policy.state_dict()[name], value)
    assert again.replay_buffer.pos == first.replay_buffer.pos == 60 and again._n_updates == first._n_updates > 0
    np.testing.assert_array_equal(again.replay_buffer.observations[:60], first.replay_buffer.observations[:60])
    assert again.actor.optimizer.state_dict()["state"][0]["step"] == first.actor.optimizer.state_dict()["state"][0]["step"]
    np.testing.assert_equal(teacher.state_dict(), saved["teacher"])
    further = train_sac(env(), ALPGMM(space, **MIXTURE), 90, checkpoint=tmp_path, **tiny)
    assert further.num_timesteps == 90 and load_state(tmp_path / "sac.npz")["teacher"]["episodes"] > teacher.episodes
    returns = evaluate_tasks(further, env(), [[0.1, 5.0], [2.0, 1.0]])
    assert returns.shape == (2,) and np.isfinite(returns).all()
    with pytest.raises(ValueError):
        train_sac(env(), RIAC(space), 120, checkpoint=tmp_path, **tiny)
    with pytest.raises(ValueError, match="does not fit"):
        train_sac(env(), ALPGMM(space, **MIXTURE), 120, checkpoint=tmp_path, **{**tiny, "policy_kwargs": {"net_arch": [9]}})


def test_sac_with_a_full_buffer_and_learned_entropy(tmp_path):
    tiny = dict(batch_size=8, learning_starts=10, train_freq=5, gradient_steps=1, buffer_size=30, ent_coef="auto", policy_kwargs={"net_arch": [8]}, device="cpu")
    space = Gravity().task_space
    first = train_sac(pendulum(), RandomTeacher(space, seed=0), 50, reward_range=None, checkpoint=tmp_path, **tiny)
    again = train_sac(pendulum(), RandomTeacher(space, seed=0), 50, reward_range=None, checkpoint=tmp_path, **tiny)
    assert again.replay_buffer.full and again.replay_buffer.pos == first.replay_buffer.pos
    assert again.log_ent_coef.item() == first.log_ent_coef.item()


def test_teachers_work_without_gymnasium():
    code = """
import sys
sys.modules["gymnasium"] = sys.modules["Box2D"] = sys.modules["stable_baselines3"] = None
from researchkit.decision.alp_gmm import *
t = ALPGMM([0, 0], [1, 1], fit_rate=20, ks=[2], seed=0)
g = ToyGrid(3, 2, cap=4)
train(t, g.episode, 50)
assert t.means is not None
for make in (lambda: CurriculumWrapper(None, t), StumpTracks, g.reset, lambda: train_sac(None, t, 5)):
    try:
        make()
    except ImportError as e:
        assert "researchkit[rl]" in str(e), e
    else:
        raise SystemExit("no error")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_walker_experiment_of_the_full_profile(tmp_path):
    "The cell of Part C as it stands in the notebook, with short episodes, few tracks and few steps."
    import tempfile
    from pathlib import Path

    import pandas as pd

    cells = ["".join(c["source"]) for c in load_notebook(find_paper("alp_gmm"))["cells"] if c["cell_type"] == "code"]
    (source,) = [c for c in cells if 'if profile == "full"' in c and "train_sac" in c]
    (makers,) = [c for c in cells if "def make_teacher" in c]
    makers = makers[makers.index("def make_teacher"):makers.index("half = ")]
    assert "2000)" in source and "(50, 2)" in source
    rows = []

    class Log:
        rows = property(lambda self: pd.DataFrame(rows))

        def log(self, **row):
            rows.append(row)
    scope = dict(globals(), profile="full", seeds=[0], steps=20, checkpoint=str(tmp_path), study=Log(), fit_rate=20, random_ratio=0.2, size=dict(ks=[2]),
                 walker_teachers=["ALP-GMM", "Oracle"], tempfile=tempfile, Path=Path)
    exec(makers + source.replace("2000)", "10)").replace("(50, 2)", "(2, 2)"), scope)
    assert [r["method"] for r in rows] == scope["walker_teachers"] and all(r["tracks"] == 0 for r in rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{m}-0" for m in scope["walker_teachers"])


def test_notebook_declares_its_parameters():
    declared = parameters(load_notebook(find_paper("alp_gmm")), "alp_gmm")
    assert {"profile", "seeds", "episodes", "fit_rate", "random_ratio", "walker_teachers", "steps", "checkpoint"} <= set(declared)
