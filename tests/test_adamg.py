"""AdamG, its relatives and the suite that judges them: closed forms, peers, bad input, real objects."""
import copy
import io
import math
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from researchkit.core.errors import DataError, InputError
from researchkit.efficiency import adamg as module
from researchkit.efficiency.adamg import (GOG, AdamG, DoG, Task, accuracy, batches, digit_tasks, fine_tuning_tasks, mlp, numerator,
                                          pretrained_task, problem_tasks, reliability, run_suite, seeded, solution_gap, table_tasks,
                                          with_loss_scale)

SHAPES = [(5, 4), (7,), (), (3, 2, 2)]
FAST = settings(max_examples=25, deadline=None)


pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def train(opt, params, steps, seed=1, scale=1.0, start=0):
    for k in range(start, start + steps):
        gen = torch.Generator().manual_seed(1000 * seed + k)
        for x in params:
            x.grad = (scale * torch.randn(x.shape, generator=gen, dtype=torch.float64)).to(x.dtype)
        opt.step()
    return [x.detach().clone() for x in params]


def close(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


# The numerator

@FAST
@given(st.floats(1e-18, 1e6), st.floats(1e-3, 10), st.floats(0.01, 1.0))
def test_numerator_is_the_power(v, p, q):
    v = float(np.float32(v))
    assert numerator(torch.tensor([v]), p, q).item() == pytest.approx(p * v**q, rel=4e-6)


def test_numerator_limits():
    assert numerator(torch.zeros(3)).tolist() == [0, 0, 0]
    assert numerator(torch.tensor([0.0, 2.0]), 0.5, 0.0).tolist() == [0.5, 0.5]


# AdamG: closed forms

@pytest.mark.parametrize("foreach", [True, False])
def test_two_steps_by_hand(foreach):
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    opt = AdamG([x], eps=0.0, foreach=foreach)
    x.grad = torch.ones_like(x)
    opt.step()
    r1 = 0.05 * 0.2 * 1e-3**0.24
    assert -x.item() == pytest.approx(r1, rel=1e-12)
    x.grad = torch.full_like(x, -3.0)
    before = x.item()
    opt.step()
    v2 = 0.999 * 1e-3 + 9e-3
    r2 = 0.95 * r1 + 0.05 * 0.2 * v2**0.24
    m2 = 0.95 * 0.05 * r1 - 0.05 * r2 * 3
    assert before - x.item() == pytest.approx(m2 / (1 - 0.95**2) / math.sqrt(v2 / (1 - 0.999**2)) / math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("foreach", [True, False])
def test_zero_gradients_and_missing_gradients_change_nothing(foreach):
    params = parameters()
    start = [x.detach().clone() for x in params]
    opt = AdamG(params, foreach=foreach)
    for x in params[:2]:
        x.grad = torch.zeros_like(x)
    for _ in range(3):
        opt.step()
    close([x.detach() for x in params], start, rtol=0, atol=0)
    assert params[2] not in opt.state and opt.state[params[0]]["step"] == 3


def test_constant_gradient_reaches_the_numerator_and_the_cap():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    opt = AdamG([x], eps=0.0, betas=(0.5, 0.5, 0.5))
    for t in range(1, 201):
        x.grad = torch.tensor([3.0, -0.01], dtype=torch.float64)
        before = x.detach().clone()
        opt.step()
    r = 0.2 * torch.tensor([3.0, 0.01], dtype=torch.float64) ** 0.48
    torch.testing.assert_close(opt.state[x]["r"], r)
    torch.testing.assert_close(before - x.detach(), r * torch.tensor([1.0, -1.0]) / math.sqrt(200), rtol=1e-10, atol=0)


def test_without_numerator_and_under_a_low_cap_it_is_adam():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    a = train(AdamG(ours, lr=1e-3, p=1.0, q=0.0, betas=(0.9, 0.999, 0.0)), ours, 60)
    b = train(torch.optim.Adam(theirs, lr=1e-3, betas=(0.9, 0.999)), theirs, 60)
    close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"q": 0.1, "p": 1.0, "lr": 0.01},
                                     {"weight_decay": 0.1, "decoupled": True, "lr": 1e-3}])  # the peer shrinks by its lr, we by min(lr, 1/sqrt(t)): equal under a low cap
def test_agrees_with_pytorch_optimizer(options, foreach):
    peer = pytest.importorskip("pytorch_optimizer").AdamG
    ours, theirs = parameters(), parameters()
    train(AdamG(ours, foreach=foreach, **options), ours, 50)
    train(peer(theirs, foreach=False, **{{"decoupled": "weight_decouple"}.get(k, k): v for k, v in options.items()}), theirs, 50)
    close([x.detach() for x in ours], [x.detach() for x in theirs], rtol=1e-6, atol=1e-6)


@FAST
@given(st.floats(-3, 3), st.floats(0.05, 0.5))
def test_law_of_the_step(log_c, q):
    c = 10**log_c
    moved = []
    for scale in (1.0, c):
        params = parameters(torch.float64)
        start = [x.detach().clone() for x in params]
        end = train(AdamG(params, q=q, eps=0.0), params, 5, scale=scale)
        moved.append([b - a for a, b in zip(start, end)])
    close(moved[1], [c ** (2 * q) * m for m in moved[0]], rtol=1e-6, atol=1e-14)


# AdamG: paths

@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.05}, {"weight_decay": 0.05, "decoupled": True, "maximize": True}, {"q": 0.0}, {"q": 0.5}])
def test_paths_agree_over_blocks(options, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)  # cuts the larger tensors and packs the small ones
    shapes = [*SHAPES, (0,), (33,)]
    one, many = parameters(shapes=shapes), parameters(shapes=shapes)
    close(train(AdamG(one, foreach=False, **options), one, 20), train(AdamG(many, foreach=True, **options), many, 20), rtol=1e-5, atol=1e-6)


def test_non_contiguous_parameters_and_gradients():
    base = torch.randn(4, 3, 5, 5)
    params = [base.clone().contiguous(memory_format=torch.channels_last).requires_grad_(), torch.randn(6, 4).t().requires_grad_(), torch.randn(6, 4).requires_grad_()]
    plain = [x.detach().contiguous().clone().requires_grad_() for x in params]
    opts = AdamG(params), AdamG(plain)
    for _ in range(4):
        for x, y in zip(params, plain):
            y.grad = torch.randn(y.shape)
            x.grad = y.grad.t().contiguous().t() if y.dim() == 2 else y.grad.clone()
        for opt in opts:
            opt.step()
    close([x.detach() for x in params], [x.detach() for x in plain])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("foreach", [True, False])
def test_half_precision_keeps_float32_states(dtype, foreach):
    params = parameters(dtype)
    opt = AdamG(params, foreach=foreach)
    train(opt, params, 3, scale=1e-3)
    assert all(opt.state[x][k].dtype == torch.float32 for x in params for k in "vrm") and all(x.dtype == dtype for x in params)
    again = [x.detach().clone().requires_grad_() for x in params]
    loaded = AdamG(again, foreach=foreach)
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(loaded.state[x][k].dtype == torch.float32 for x in again for k in "vrm")
    close(train(loaded, again, 3, start=3), train(opt, params, 3, start=3), rtol=0, atol=0)


def test_late_parameters_count_their_own_steps():
    first, second = parameters(shapes=[(3,), (3,)])
    second.data.copy_(first.data)
    opt = AdamG([first, second])
    grads = torch.randn(6, 3)
    for k in range(3):
        first.grad = grads[k].clone()
        opt.step()
    reference = torch.zeros(3, requires_grad=True)
    reference.data.copy_(second.data)
    alone = AdamG([reference])
    for k in range(3, 6):
        first.grad, second.grad, reference.grad = grads[k].clone(), grads[k].clone(), grads[k].clone()
        opt.step()
        alone.step()
    torch.testing.assert_close(second.detach(), reference.detach())
    assert opt.state[first]["step"] == 6 and opt.state[second]["step"] == 3


@pytest.mark.parametrize("make", [AdamG, GOG, DoG, lambda ps: DoG(ps, weighted=True)])
def test_state_dict_round_trip_through_a_file(make):
    a = parameters()
    opt = make(a)
    train(opt, a, 7)
    b = [x.detach().clone().requires_grad_() for x in a]
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = make(b)
    other.load_state_dict(torch.load(file, weights_only=True))
    close(train(opt, a, 7, start=7), train(other, b, 7, start=7), rtol=0, atol=0)


def test_parameter_groups_keep_their_options():
    a, b = parameters(shapes=[(4,), (4,)])
    opt = AdamG([{"params": [a]}, {"params": [b], "p": 0.4, "lr": 1.0}])
    b.data.copy_(a.data)
    start = a.detach().clone()
    a.grad = torch.randn(4)
    b.grad = a.grad.clone()
    opt.step()
    torch.testing.assert_close(b.detach() - start, 2 * (a.detach() - start))


def test_closure_and_schedule():
    x = torch.ones(3, requires_grad=True)
    opt = AdamG([x])

    def closure():
        opt.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 3
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 0.0)
    before = x.detach().clone()
    opt.step(closure)
    assert opt.param_groups[0]["lr"] == 0 and torch.equal(before, x.detach())
    schedule.step()


def test_tensor_rate():
    a, b = parameters(), parameters()
    close(train(AdamG(a, lr=torch.tensor(1e-2)), a, 5), train(AdamG(b, lr=1e-2), b, 5))


def test_compiled_step_is_the_same():
    plain, compiled = parameters(), parameters()
    a, b = AdamG(plain, weight_decay=0.01), AdamG(compiled, weight_decay=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it traces
        try:
            b.step = torch.compile(b.step, backend="aot_eager", fullgraph=True)
            end = train(b, compiled, 5)
        except (RuntimeError, NotImplementedError) as e:
            if "not supported" in str(e):
                pytest.skip(f"torch.compile: {e}")
            raise
    close(end, train(a, plain, 5), rtol=1e-5, atol=1e-6)


# Refusals: clear, and before anything is changed

@pytest.mark.parametrize("make", [AdamG, GOG, DoG])
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused_untouched(make, kind):
    first, second = parameters(shapes=[(4, 2), (4, 2)])
    opt = make([{"params": [first]}, {"params": [second]}])
    first.grad = torch.ones(4, 2)
    if kind == "sparse":
        second.grad = torch.ones(4, 2).to_sparse()
        before = first.detach().clone(), second.detach().clone()
        with pytest.raises(TypeError, match="sparse_coo.*nothing was changed"):
            opt.step()
        assert torch.equal(first.detach(), before[0]) and torch.equal(second.detach(), before[1]) and not opt.state
    else:
        with pytest.raises(TypeError, match="complex"):
            opt.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64, requires_grad=True)]})
        assert len(opt.param_groups) == 2


@pytest.mark.parametrize("option", [{"p": 0}, {"p": -1.0}, {"q": -0.1}, {"eps": -1e-8}, {"lr": -1}, {"lr": float("nan")}, {"weight_decay": -1}, {"betas": (0.9, 0.999)},
                                    {"betas": (0.9, 1.0, 0.9)}, {"betas": (-0.1, 0.9, 0.9)}])
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        AdamG(parameters(), **option)
    with pytest.raises(ValueError, match=next(iter(option))):
        AdamG([{"params": parameters(), **option}])


def test_options_of_the_wrong_type():
    with pytest.raises(TypeError, match="lr='fast' given"):
        AdamG(parameters(), lr="fast")
    with pytest.raises(TypeError, match="lr"):
        AdamG(parameters(), lr=torch.ones(2))
    for make in (lambda: GOG(parameters(), p=0.0), lambda: GOG(parameters(), q=-1.0), lambda: DoG(parameters(), reps_rel=0.0)):
        with pytest.raises(ValueError):
            make()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_can_be_skipped(bad):
    params = parameters()
    opt = AdamG(params, skip_nonfinite=True)
    train(opt, params, 2)
    before, states = [x.detach().clone() for x in params], copy.deepcopy(opt.state_dict()["state"])
    params[1].grad[0] = bad
    with pytest.warns(RuntimeWarning, match="skipped"):
        opt.step()
    close([x.detach() for x in params], before, rtol=0, atol=0)
    assert all(torch.equal(opt.state_dict()["state"][k][n], states[k][n]) for k in states for n in states[k])


# GOG and DoG

def test_gog_is_gradient_descent_at_one_half_and_adagrad_norm_at_zero():
    a, b = parameters(torch.float64), parameters(torch.float64)
    close(train(GOG(a, q=0.5, eps=0.0), a, 10), train(torch.optim.SGD(b, lr=0.2), b, 10))
    a, total = parameters(torch.float64, [(3,)]), 0.0
    expected = a[0].detach().clone()
    opt = GOG(a, p=0.7, q=0.0, eps=0.0)
    for _ in range(5):
        g = torch.randn(3, dtype=torch.float64)
        total = total + g.pow(2).sum()
        expected -= 0.7 * g / total.sqrt()
        a[0].grad = g.clone()
        opt.step()
    torch.testing.assert_close(a[0].detach(), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_dog_by_hand_over_several_tensors(weighted):
    params = parameters(torch.float64, [(3,), (2, 2)])
    opt = DoG(params, reps_rel=1e-2, eps=0.0, weighted=weighted)
    x = start = torch.cat([p.detach().flatten() for p in params])
    rbar, total = 1e-2 * (1 + start.norm()), 0.0
    for k in range(6):
        g = torch.randn(7, dtype=torch.float64)
        if k:
            rbar = max(rbar, (x - start).norm())
        total = total + (rbar**2 if weighted else 1) * g.pow(2).sum()
        x = x - (rbar**2 if weighted else rbar) / total.sqrt() * g
        params[0].grad, params[1].grad = g[:3].clone(), g[3:].view(2, 2).clone()
        opt.step()
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in params]), x)


# The suite

def toy(name="toy", **options):
    gen = torch.Generator().manual_seed(0)
    X = torch.randn(120, 5, generator=gen)
    Y = (X[:, 0] > 0).long()
    return Task(name, seeded(lambda: mlp(5, 6, 2)), F.cross_entropy, accuracy, (X[:60], Y[:60]), (X[60:90], Y[60:90]), (X[90:], Y[90:]), **options)


def test_batches_are_permutations():
    index = batches(10, 4, 5, seed=3)
    assert index.shape == (5, 4) and sorted(index.flatten()[:10].tolist()) == list(range(10)) == sorted(index.flatten()[10:].tolist())
    assert batches(3, 64, 2, 0).shape == (2, 3) and not torch.equal(index, batches(10, 4, 5, seed=4))


def test_together_and_alone_agree_for_every_kind_of_optimizer():
    peers = pytest.importorskip("prodigyopt")
    optimizers = {"AdamG": AdamG, "adam": lambda ps: torch.optim.Adam(ps, 1e-2), "DoG": DoG, "GOG": GOG, "Prodigy": peers.Prodigy, "scaled": with_loss_scale(AdamG, 100.0)}
    def probability(out, y):
        return out.softmax(-1).gather(-1, y[:, None]).mean()
    tasks = [Task(**{**vars(toy(loss_scale=3.0)), "score": probability})]
    a, b = (run_suite(tasks, optimizers, [0, 5], 15, [1, 15], together=t).set_index(["method", "seed", "step"]).sort_index() for t in (True, False))
    assert len(a) == 24
    pd.testing.assert_frame_equal(a[["valid", "test"]], b[["valid", "test"]], atol=1e-5)
    pd.testing.assert_frame_equal(a[["update"]], b[["update"]], rtol=1e-2, atol=1e-7)


def test_loss_scale_as_option_and_as_wrapper_agree():
    a = run_suite([toy(loss_scale=50.0)], {"X": lambda ps: torch.optim.SGD(ps, 1e-2)}, [0, 1, 2], 10)
    b = run_suite([toy()], {"X": with_loss_scale(lambda ps: torch.optim.SGD(ps, 1e-2), 50.0)}, [0, 1, 2], 10)
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_diverged_run_scores_zero():
    for together in (True, False):
        out = run_suite([toy()], {"wild": lambda ps: torch.optim.SGD(ps, 1e30)}, [0], 5, together=together)
        assert out[["valid", "test"]].to_numpy().max() == 0 and np.isfinite(out["update"]).all()


def test_same_seed_same_result():
    a, b = (run_suite([toy()], {"AdamG": AdamG}, [3], 10) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("arguments, message", [(dict(tasks=[]), "tasks is empty"), (dict(optimizers={}), "optimizers is empty"), (dict(seeds=[]), "seeds is empty"),
                                                (dict(steps=0), "steps=0"), (dict(evaluate=[11]), "evaluate")])
def test_bad_suite(arguments, message):
    given_ = dict(tasks=[toy()], optimizers={"AdamG": AdamG}, seeds=[0], steps=10) | arguments
    with pytest.raises(InputError, match=message):
        run_suite(**given_)


def results():
    rows = [("t", "adam a", 0.7, 0.99), ("t", "adam b", 0.8, 0.90), ("t", "AdamG", 0.99, 0.86), ("u", "adam a", 0.9, 1.0), ("u", "adam b", 0.1, 0.1), ("u", "AdamG", 0.5, 0.94)]
    return pd.DataFrame([(t, m, s, 9, v, x) for t, m, v, x in rows for s in (0, 1)], columns=["task", "method", "seed", "step", "valid", "test"])


def test_gap_and_reliability_by_hand():
    gaps = solution_gap(results())
    assert gaps.drop_duplicates("task").set_index("task")["best"].to_dict() == {"t": "adam b", "u": "adam a"}
    assert gaps.query("method == 'AdamG'").groupby("task")["gap"].mean().round(9).to_dict() == {"t": 0.04, "u": 0.06}
    for tol, share in ((0.0, 0.0), (0.05, 0.5), (0.06, 1.0)):
        assert set(reliability(results(), tol=tol).query("method == 'AdamG'")["reliability"]) == {share}
    assert reliability(results(), tol=0.0).query("method == 'adam b'")["reliability"].tolist() == [0.5, 0.5]


def test_only_the_last_step_counts():
    early = results().assign(step=1, valid=0.0, test=0.0)
    pd.testing.assert_frame_equal(solution_gap(pd.concat([early, results()])), solution_gap(results()))


def test_bad_results():
    with pytest.raises(InputError, match="no method matches 'sgd*"):
        solution_gap(results(), "sgd*")
    with pytest.raises(InputError, match="incomplete for: u"):
        solution_gap(results().query("not (task == 'u' and method == 'adam b')"))
    with pytest.raises(InputError, match="seed"):
        solution_gap(results().query("not (method == 'adam a' and seed == 1)"))
    with pytest.raises(InputError, match="tol"):
        reliability(results(), tol=-1)


@FAST
@given(st.floats(0, 1), st.floats(0, 1))
def test_reliability_grows_with_the_tolerance(a, b):
    low, high = sorted((a, b))
    assert (reliability(results(), tol=low)["reliability"] <= reliability(results(), tol=high)["reliability"]).all()


def test_embedded_tasks_run():
    tasks = digit_tasks() + table_tasks() + problem_tasks() + fine_tuning_tasks()
    assert len({t.name for t in tasks}) == len(tasks) == 17
    out = run_suite(tasks, {"AdamG": AdamG}, [0], 2)
    assert out["test"].between(0, 1).all() and len(out) == 17
    for t in tasks:
        parts = [t.train[0], t.valid[0], t.test[0]]
        assert torch.equal(t.model(1).state_dict()[next(iter(t.model(1).state_dict()))], t.model(1).state_dict()[next(iter(t.model(1).state_dict()))])
        if len(parts[0]) > 1 and t.name != "Rosenbrock":
            rows = [set(map(tuple, p.flatten(1).tolist())) for p in parts]
            assert len(rows[0] & rows[2]) <= 0.01 * len(rows[2]) + 1, t.name


# Real objects

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    root = tmp_path_factory.mktemp("hub")
    rng = np.random.default_rng(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(root / "vit")
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "day"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(root / "bert")
    transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16)).save_pretrained(root / "bert")
    labels = rng.integers(0, 3, 90)
    images = np.repeat(np.repeat((80 * labels)[:, None, None], 8, 1), 8, 2).astype(np.uint8)
    (root / "pictures").mkdir()
    np.savez(root / "pictures" / "train.npz", images=images[:60], labels=labels[:60])
    np.savez(root / "pictures" / "test.npz", images=images[60:], labels=labels[60:])
    (root / "words").mkdir()
    for part, n in (("train", 40), ("validation", 12), ("test", 12)):
        y = rng.integers(0, 2, n)
        pd.DataFrame({"sentence": [f"{'good' if k else 'bad'} film day"[: None if i % 2 else -4] for i, k in enumerate(y)], "label": y}).to_csv(root / "words" / f"{part}.csv", index=False)
    return root


@pytest.mark.parametrize("model, dataset, classes", [("vit", "pictures", 3), ("bert", "words", 2)])
def test_full_path_with_saved_checkpoints(checkpoints, model, dataset, classes):
    task = pretrained_task(str(checkpoints / model), str(checkpoints / dataset), batch_size=16)
    assert task.name == f"{model} on {dataset}"
    out = run_suite([task], {"adam 1e-2": lambda ps: torch.optim.Adam(ps, 1e-2), "AdamG": AdamG}, [0, 1], 12, together=False)
    assert out["test"].between(0, 1).all() and (out["update"] > 0).all()
    assert out.query("method == 'adam 1e-2'")["test"].mean() > 1.2 / classes
    heads = [task.model(s).model.classifier.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_full_path_names_what_is_missing(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    def no_network(*args, **kwargs):
        raise OSError("offline")
    monkeypatch.setattr(module, "snapshot_download", no_network)
    with pytest.raises(DataError, match="dataset 'nobody/nothing'.*network"):
        pretrained_task(str(checkpoints / "vit"), "nobody/nothing")
    with pytest.raises(DataError, match="model '.*absent'"):
        pretrained_task(str(tmp_path / "absent"), str(checkpoints / "pictures"))
    with pytest.raises(DataError, match="no train table"):
        pretrained_task(str(checkpoints / "vit"), str(tmp_path))
    shutil.copy(checkpoints / "words" / "train.csv", tmp_path / "train.csv")
    pd.read_csv(tmp_path / "train.csv").rename(columns={"label": "answer"}).to_csv(tmp_path / "train.csv", index=False)
    module._dataset_folder.cache_clear()
    with pytest.raises(DataError, match="it has sentence, answer"):
        pretrained_task(str(checkpoints / "bert"), str(tmp_path))


def test_transformers_trainer(checkpoints, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = transformers.ViTForImageClassification.from_pretrained(checkpoints / "vit")
    before = model.classifier.weight.detach().clone()
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": k % 2} for k in range(16)]
    options = transformers.TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to=[], disable_tqdm=True, save_strategy="steps", save_steps=3, use_cpu=True)
    trainer = transformers.Trainer(model, options, train_dataset=data, optimizers=(AdamG(model.parameters()), None))
    trainer.train()
    assert not torch.equal(before, model.classifier.weight.detach())
    opt = AdamG(model.parameters())
    opt.load_state_dict(torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True))
    assert next(iter(opt.state.values()))["step"] == 3
