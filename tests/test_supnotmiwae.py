"supnotMIWAE: the estimator against closed forms and peers, what must never leak, and the scikit-learn side."

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import brier_score_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from torch import nn

from researchkit.core.errors import DataError
from researchkit.core.notebook import MIME, find_paper, load_notebook, parameters
from researchkit.perception.supnotmiwae import (
    BODIES, KERNELS, PHYSIONET_SERIES, FillClassifier, SequenceNet, SeriesClassifier, SupNotMIWAE, SupNotMIWAEClassifier, TimeConv, TransformerBlock,
    brier_score, effective_sample_size, expected_calibration_error, fdecay_impute, gp_kernel, gp_log_prob, importance_logweights, japanese_vowels, last_kept,
    load_physionet2012, log_mean_exp, obs_dropout, pad_series, time_code, whitener)

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, D, C = 4, 9, 3, 3
LENGTHS = torch.tensor([9, 5, 2, 7])


def seeded(n=3):
    return torch.Generator().manual_seed(n)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(B, T, D), torch.rand(B, T, D) < 0.6, torch.tensor([0, 1, 2, 1])


def small(**options):
    torch.manual_seed(0)
    return SupNotMIWAE(D, C, **{**dict(z_dim=4, hidden=16, n_latents=3, n_samples=2, layers=1, classifier_layers=2), **options})


@pytest.fixture
def no_noise(monkeypatch):
    "Draws of zero, so that they do not depend on the shape of a batch."
    monkeypatch.setattr(torch, "randn", lambda shape, **kind: torch.zeros(shape, **{k: v for k, v in kind.items() if k != "generator"}))


def series(n=24, equal=True, missing=0.3, seed=0):
    "Two classes of sines, (n, 2, 12) or a list of unequal lengths, with NaN."
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    X = [np.sin(np.arange(12 if equal else rng.integers(4, 13)) * (0.4 + 0.8 * k) + np.array([[0.0], [1.0]])) + 0.1 * rng.standard_normal((2, 1)) for k in y]
    X = [np.where(rng.random(x.shape) < missing, np.nan, x) for x in X]
    return (np.stack(X) if equal else X), np.array(["slow", "fast"])[y]


def quick(**options):
    return SupNotMIWAEClassifier(**{**dict(hidden=8, z_dim=2, layers=1, classifier_layers=1, body="conv", n_latents=2, max_epochs=3, batch_size=8, lr=1e-2, random_state=0), **options})


# ---- kernels and the latent prior

def test_kernels_are_their_formulas():
    t = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    d = (t[:, None] - t).abs()
    torch.testing.assert_close(gp_kernel(t, "cauchy", 7.0), 1.005 / (1 + d**2 / 49) + 1e-3 * torch.eye(3))
    torch.testing.assert_close(gp_kernel(t, "rbf", 2.0), torch.exp(-(d**2) / 4))
    torch.testing.assert_close(gp_kernel(t, "matern", 4.0), torch.exp(-d / 2))
    beside = torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1)
    torch.testing.assert_close(gp_kernel(4, "diffusion", 0.3), (torch.eye(4) + 0.3 * beside).double())
    assert gp_kernel(5).shape == (5, 5) and gp_kernel(torch.rand(2, 5)).shape == (2, 5, 5) and gp_kernel(torch.arange(4)).dtype == torch.float64
    torch.testing.assert_close(gp_kernel(3, "rbf", 1.0, sigma=2.0, jitter=0.5).diagonal(), torch.full((3,), 2.5).double())
    for kind in KERNELS:
        whitener(gp_kernel(40, kind, 0.4, jitter=1e-3))


@pytest.mark.parametrize("bad, match", [(dict(kind="cauchi"), "cauchy"), (dict(length_scale=0), "positive"), (dict(kind="diffusion", length_scale=0.5), "below 0.5"),
                                        (dict(times=0), "at least one")])
def test_kernel_refuses(bad, match):
    with pytest.raises(ValueError, match=match):
        gp_kernel(**{**dict(times=4), **bad})


def test_singular_gram_is_refused():
    with pytest.raises(ValueError, match="positive definite"):
        whitener(torch.ones(3, 3))


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(0, 9))
def test_prior_of_every_length_is_multivariate_normal(t, extra):
    torch.manual_seed(t)
    z = torch.randn(2, 1, t + extra, 3, dtype=torch.float64)
    valid = (torch.arange(t + extra) < t)[None]
    peer = torch.distributions.MultivariateNormal(torch.zeros(t).double(), gp_kernel(t)).log_prob(z[:, 0, :t].mT).sum(-1)
    torch.testing.assert_close(gp_log_prob(z, gp_kernel(t + extra), valid)[:, 0], peer)
    if extra:
        assert (gp_log_prob(z, gp_kernel(t + extra)) - peer[:, None]).abs().min() > 1e-6  # the released code counts padding


# ---- ObsDropout, decay, weights

@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 0.9, (0.1, 0.0, 0.6)]))
def test_dropout_bookkeeping(seed, p):
    g = seeded(seed)
    s = torch.rand(B, T, D, generator=g) < 0.7
    kept, log_m = obs_dropout(s, p, g, sizes=(2, 5))
    assert kept.shape == (2, 5, B, T, D) and not (kept & ~s).any()
    rate = np.broadcast_to(np.asarray(p, dtype=float), D)
    n_kept, n_gone = kept.sum(-2).double().numpy(), (s & ~kept).sum(-2).double().numpy()
    assert (n_gone[..., rate == 0] == 0).all()
    expected = (n_kept * np.log1p(-rate) + n_gone * np.log(np.where(rate > 0, rate, 1))).sum(-1)
    np.testing.assert_allclose(log_m.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan"), (0.1, 0.2), ((0.1, 0.1, 0.1),)])
def test_dropout_refuses(p):
    with pytest.raises(ValueError, match="drop|channel"):
        obs_dropout(torch.ones(B, T, D), p)
    with pytest.raises(ValueError, match="drop|channel"):
        small(obs_dropout=p)


def test_decay_is_the_recursion_and_never_reads_what_is_hidden():
    torch.manual_seed(1)
    x, x_tilde, kept = torch.randn(B, T, D), torch.randn(2, 3, B, T, D), torch.rand(2, 3, B, T, D) < 0.3
    kept[..., 0] = False  # a channel without any value: last value 0 at time 0
    times, w, b = torch.rand(B, T).cumsum(1), torch.randn(D), torch.rand(D)
    value, when, expected = torch.zeros(2, 3, B, D), torch.zeros(2, 3, B, D), torch.empty_like(x_tilde)
    for t in range(T):
        now = times[:, t, None].expand(B, D)
        value, when = torch.where(kept[..., t, :], x[:, t], value), torch.where(kept[..., t, :], now, when)
        gamma = torch.exp(-torch.relu((now - when) * w + b))
        expected[..., t, :] = torch.where(kept[..., t, :], x[:, t], gamma * value + (1 - gamma) * x_tilde[..., t, :])
    torch.testing.assert_close(fdecay_impute(x, x_tilde, kept, times, w, b), expected)
    torch.testing.assert_close(fdecay_impute(torch.where(kept.any(0).any(0), x, torch.nan), x_tilde, kept, times, w, b), expected)
    x_last, t_last = last_kept(x, kept, times)
    assert (x_last[..., 0] == 0).all() and (t_last[..., 0] == 0).all()
    with pytest.raises(ValueError, match="mask"):
        fdecay_impute(x, x_tilde, kept[..., :2], times, w, b)


def test_weights_and_sample_size():
    torch.manual_seed(0)
    a, b, c, m, d = (torch.randn(*shape) for shape in ((4, 6), (4, 6), (4, 6), (2, 4, 6), (2, 4, 6)))
    raw = importance_logweights(a, b, c, m, d, normalize=False)
    torch.testing.assert_close(raw, a + b - c + m + d)
    w = importance_logweights(a, b, c, m, d)
    torch.testing.assert_close(w.exp().sum(1), torch.ones(2, 6))
    torch.testing.assert_close(effective_sample_size(w), 1 / (w.exp() ** 2).sum(1))
    torch.testing.assert_close(effective_sample_size(w + 500), effective_sample_size(raw - 1e3), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(effective_sample_size(torch.zeros(5, 1)), torch.tensor([5.0]))
    torch.testing.assert_close(log_mean_exp(torch.tensor([[-1000.0], [-1000.0]])), torch.tensor([-1000.0]))


def test_bound_rises_with_k_and_is_exact_for_the_posterior():
    torch.manual_seed(0)
    normal = torch.distributions.Normal
    x = torch.randn(5, dtype=torch.float64) * 2**0.5  # z ~ N(0, 1), x | z ~ N(z, 1)
    exact = normal(x / 2, 0.5**0.5)

    def bound(q, K, repeats=400):
        z = q.sample((repeats, K))
        return log_mean_exp(importance_logweights(normal(z, 1.0).log_prob(x), normal(0.0, 1.0).log_prob(z), q.log_prob(z), normalize=False)).mean(0)

    truth = normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(bound(exact, 1, 2), truth)
    poor = normal(x / 2, 1.0)
    found = [bound(poor, K).mean() for K in (1, 4, 32)]
    assert found[0] < found[1] < found[2] < truth.mean() + 0.02


# ---- networks

def test_block_is_torch_encoder_layer():
    torch.manual_seed(0)
    block, peer = TransformerBlock(12, 3), nn.TransformerEncoderLayer(12, 3, 12, dropout=0.0, batch_first=True)
    names = dict(qkv="self_attn.in_proj_", out="self_attn.out_proj.", hidden="linear1.", down="linear2.", norm1="norm1.", norm2="norm2.")
    state = peer.state_dict()
    block.load_state_dict({f"{mine}.{part}": state[theirs + part] for mine, theirs in names.items() for part in ("weight", "bias")})
    h, valid = torch.randn(B, T, 12), torch.arange(T) < LENGTHS[:, None]
    causal = torch.ones(T, T).tril().bool()
    torch.testing.assert_close(block(h, valid[:, None, None] & causal)[valid], peer(h, src_mask=~causal, src_key_padding_mask=~valid)[valid], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiple"):
        TransformerBlock(10, 3)


@pytest.mark.parametrize("kernel, causal", [(3, False), (8, False), (3, True)])
def test_convolution_is_conv1d(kernel, causal):
    conv, x = TimeConv(4, 6, kernel, causal), torch.randn(2, 11, 4)
    pad = (kernel - 1, 0) if causal else ((kernel - 1) // 2, kernel // 2)
    torch.testing.assert_close(conv(x), nn.functional.conv1d(nn.functional.pad(x.mT, pad), conv.weight, conv.bias).mT)


def test_time_code():
    t = torch.tensor([[0.0, 2.5]])
    code = time_code(t, 5)
    scales = 100 ** np.linspace(0, 1, 5)
    expected = [np.sin(2.5 / s) if i % 2 == 0 else np.cos(2.5 / s) for i, s in enumerate(scales)]
    np.testing.assert_allclose(code[0, 1], expected, rtol=1e-5)
    np.testing.assert_allclose(code[0, 0], [0, 1, 0, 1, 0])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_copies_do_not_matter_and_causal_is_causal(body, causal):
    torch.manual_seed(0)
    net, t = SequenceNet(D, 16, 2, causal=causal, body=body), torch.rand(B, T).cumsum(1)
    valid = torch.arange(T) < LENGTHS[:, None]
    x = torch.randn(B, T, D) * valid[..., None]
    h = net(x, t, valid)
    longer = net(nn.functional.pad(x, (0, 0, 0, 4)), nn.functional.pad(t, (0, 4), value=99.0), nn.functional.pad(valid, (0, 4)))
    torch.testing.assert_close(longer[:, :T][valid], h[valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x.repeat(3, 1, 1), t, valid)[B : 2 * B][valid], h[valid], rtol=1e-4, atol=1e-5)
    every = torch.ones(B, T, dtype=torch.bool)
    late = x.clone()
    late[:, -1] += 1
    moved = (net(late, t, every) - net(x, t, every)).abs().amax((0, 2))
    assert moved[-1] > 0 and (moved[: T - 2].max() < 1e-5) == causal  # the first convolution looks one step ahead


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_classifier_uses_static_features(pooling):
    net = SeriesClassifier(D, C, 16, 1, pooling=pooling, n_static=2)
    x, t, valid = torch.randn(B, T, D), torch.arange(T).float().expand(B, T), torch.ones(B, T).bool()
    assert not torch.equal(net(x, t, valid, torch.zeros(B, 2)), net(x, t, valid, torch.ones(B, 2)))
    with pytest.raises(ValueError, match="pooling"):
        SeriesClassifier(D, C, pooling="median")
    with pytest.raises(ValueError, match="body"):
        SequenceNet(D, 8, body="lstm")


# ---- the model

@pytest.mark.parametrize("options", [{}, dict(compat=True), dict(impute="sample"), dict(likelihood="bernoulli"), dict(prior="normal", body="gru")])
def test_hidden_values_never_leak(batch, options):
    x, s, y = batch
    model = small(**options)
    for other in (torch.nan, torch.inf, 1e6):
        changed = torch.where(s, x, other)
        assert torch.equal(model.loss(x, s, y, lengths=LENGTHS, generator=seeded()), model.loss(changed, s, y, lengths=LENGTHS, generator=seeded()))
        for call in (model.predict_proba, lambda *a, **k: model.impute(*a, **k)[0], lambda *a, **k: model.impute(*a, **k)[1]):
            assert torch.equal(call(x, s, lengths=LENGTHS, generator=seeded()), call(changed, s, lengths=LENGTHS, generator=seeded()))


def test_dropped_values_reach_the_generative_term_only(batch):
    x, s, y = batch
    model = small(obs_dropout=0.5)
    a = model(x, s, generator=seeded())
    gone = s & ~a.kept.any(0).any(0)  # dropped in every completion
    assert gone.any()
    model.eval()
    b = model(x, s, generator=seeded())
    torch.testing.assert_close(a.log_p_x, b.log_p_x)
    assert torch.equal(b.kept[0, 0], s) and (a.log_r - b.log_r).abs().min() > 0
    _, log_m = obs_dropout(s, 0.5, seeded(8), (2, 3))
    torch.testing.assert_close(log_m, (s.sum((1, 2)) * np.log(0.5)).float().expand(2, 3, B))


@pytest.mark.parametrize("body", BODIES)
def test_padding_changes_nothing_unless_compat(batch, no_noise, body):
    x, s, _ = batch
    pad = lambda a: nn.functional.pad(a, (0, 0, 0, 5))  # noqa: E731
    model = small(body=body).eval()
    a, b = model(x, s, lengths=LENGTHS), model(pad(x), pad(s), lengths=LENGTHS)
    for name in ("log_py", "log_w", "log_r", "log_p_d", "log_p_x", "log_p_z", "log_q_z"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-3, atol=1e-3)
    model.compat = True
    assert (model(x, s, lengths=LENGTHS).log_p_z - model(pad(x), pad(s), lengths=LENGTHS).log_p_z).abs().min() > 1e-3


def test_single_draw_without_label_is_the_elbo(batch):
    x, s, y = batch
    model = small(n_latents=1, n_samples=1, missingness=False, label_weight=0.0, prior="normal").eval()
    out = model(x, s, lengths=LENGTHS, generator=seeded())
    torch.testing.assert_close(model.loss(x, s, y, lengths=LENGTHS, generator=seeded()), -(out.log_p_x + out.log_p_z - out.log_q_z).mean())
    q = torch.distributions.Normal(*model._gaussian(model.z_head(model.encoder(torch.where(s & (torch.arange(T) < LENGTHS[:, None])[..., None], x, 0.0),
                                                                             torch.arange(T).float() * (torch.arange(T) < LENGTHS[:, None]),
                                                                             torch.arange(T) < LENGTHS[:, None])), model.min_latent_sigma))
    z = q.loc + q.scale * torch.randn((1, *q.loc.shape), generator=seeded())
    live = (torch.arange(T) < LENGTHS[:, None])[..., None]
    torch.testing.assert_close(out.log_q_z, (q.log_prob(z) * live).sum((-2, -1)))
    torch.testing.assert_close(out.log_p_z, (torch.distributions.Normal(0.0, 1.0).log_prob(z) * live).sum((-2, -1)))
    seen = s & live
    torch.testing.assert_close(out.log_p_x[0], torch.where(seen, torch.distributions.Normal(out.x_mean[0], out.x_sigma[0]).log_prob(x), 0.0).sum((-2, -1)))


def test_loss_and_prediction_are_their_formulas(batch):
    x, s, y = batch
    for compat in (False, True):
        model = small(compat=compat).eval()
        out = model(x, s, generator=seeded())
        label = out.log_py[..., torch.arange(B), y]
        torch.testing.assert_close(model.loss(x, s, y, generator=seeded()), -(torch.logsumexp(label + out.log_p_d + out.log_r, 1) - np.log(3)).mean())
        w = torch.softmax(out.log_r if compat else out.log_r + out.log_p_d, 1)
        per_j = (w[..., None] * out.log_py.exp()).sum(1)
        expected = torch.softmax(per_j.log().mean(0), -1) if compat else per_j.mean(0)
        torch.testing.assert_close(model.predict_proba(x, s, generator=seeded()), expected)


def test_bernoulli_losses(batch):
    x, s, y = batch
    model = small(likelihood="bernoulli").eval()
    out, hot = model(x, s, generator=seeded()), nn.functional.one_hot(y, C).float()
    each = torch.distributions.Bernoulli(logits=out.logits).log_prob(hot.expand(out.logits.shape))
    rest = (out.log_p_d + out.log_r)[..., None]
    torch.testing.assert_close(model.loss(x, s, y, generator=seeded()), -log_mean_exp(each.sum(-1) + rest[..., 0], 1).mean())
    model.compat = True
    torch.testing.assert_close(model.loss(x, s, y, generator=seeded()), -log_mean_exp(each + rest, 1).mean())
    torch.testing.assert_close(model.predict_proba(x, s, generator=seeded()).sum(-1), torch.ones(B))


def test_fully_observed_and_fully_missing(batch):
    x, s, _ = batch
    model = small().eval()
    alone = torch.softmax(model.classifier(x, torch.arange(T).float().expand(B, T), torch.ones(B, T).bool()), -1)
    torch.testing.assert_close(model.predict_proba(x, torch.ones_like(s), generator=seeded()), alone)
    assert torch.equal(model.impute(x, torch.ones_like(s))[0], x.expand(2, 3, B, T, D))
    nothing = model.predict_proba(torch.full_like(x, torch.nan), torch.zeros_like(s))
    assert nothing.isfinite().all()


@pytest.mark.parametrize("change, match", [
    (dict(mask=torch.ones(B, T, D + 1)), "same shape"), (dict(values=torch.zeros(B, 0, D), mask=torch.zeros(B, 0, D)), "none of them 0"),
    (dict(values=torch.zeros(B, T), mask=torch.zeros(B, T)), "shape"), (dict(values=torch.full((B, T, D), torch.nan)), "finite"),
    (dict(lengths=torch.tensor([1, 2, 0, 3])), "length"), (dict(lengths=torch.tensor([1, 2, T + 1, 3])), "length"), (dict(times=torch.zeros(T + 1)), "times")])
def test_model_refuses(change, match):
    given = {**dict(values=torch.zeros(B, T, D), mask=torch.ones(B, T, D)), **change}
    with pytest.raises(ValueError, match=match):
        small()(**given)
    with pytest.raises(ValueError, match=match):
        FillClassifier(D, C, hidden=8)(**given)


@pytest.mark.parametrize("options, match", [(dict(prior="gaussian"), "prior"), (dict(impute="decay"), "impute"), (dict(likelihood="poisson"), "likelihood"), (dict(z_dim=0), "z_dim"),
                                            (dict(kernel="linear"), "kernel"), (dict(n_samples=0), "n_samples")])
def test_model_refuses_options(options, match):
    with pytest.raises(ValueError, match=match):
        small(**options)


@pytest.mark.parametrize("y", [torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, -1, 2]), torch.tensor([0.0, 1, 2, 1])])
def test_loss_refuses_labels(batch, y):
    with pytest.raises(ValueError, match="one class in 0..2"):
        small().loss(*batch[:2], y)


def test_static_features_are_asked_for(batch):
    with pytest.raises(ValueError, match="static"):
        small(n_static=2)(*batch[:2])
    assert small(n_static=2)(*batch[:2], static=torch.zeros(B, 2)).logits.shape == (2, 3, B, C)


def test_parts_can_be_replaced_and_state_dicts_travel(batch):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(D, C)

        def forward(self, x, times, valid):
            return self.head(x.mean(1))

    x, s, y = batch
    model, twin = (small(classifier=Mean(), encoder=SequenceNet(D, 16, 1, body="gru")) for _ in range(2))
    model.loss(x, s, y).backward()
    assert model.classifier.head.weight.grad.abs().sum() > 0 and model.decay_w.grad is not None
    with torch.no_grad():
        model.decay_b.fill_(-1)
    model.clamp_()
    assert (model.decay_b == 0).all()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.predict_proba(x, s, generator=seeded()), model.predict_proba(x, s, generator=seeded()))
    assert small().double().predict_proba(x.double(), s).dtype == torch.float64


def test_fill_classifier(batch):
    x, s, y = batch
    net = FillClassifier(D, C, fill="mean", hidden=8, classifier_layers=1).eval()
    filled = net.impute(x, s, lengths=LENGTHS)[0][0, 0]
    torch.testing.assert_close(filled, torch.where(s & (torch.arange(T) < LENGTHS[:, None])[..., None], x, 0.0))
    torch.testing.assert_close(net.loss(x, s, y), nn.functional.nll_loss(net.predict_proba(x, s).log(), y))
    decay = FillClassifier(D, C, fill="decay", hidden=8, classifier_layers=1, likelihood="bernoulli").eval()
    torch.testing.assert_close(decay.impute(x, s)[0][0, 0], fdecay_impute(x, torch.zeros_like(x), s, torch.arange(T), decay.decay_w, decay.decay_b))
    assert decay.loss(x, s, y) > 0
    with pytest.raises(ValueError, match="fill"):
        FillClassifier(D, C, fill="median")


# ---- the estimator

def test_pad_series():
    values, mask, lengths = pad_series([np.array([[1.0, np.nan], [2, 3]]), np.ones((2, 3))])
    assert values.shape == (2, 3, 2) and lengths.tolist() == [2, 3] and mask[0].tolist() == [[True, True], [False, True], [False, False]] and values[0, 1].tolist() == [0, 3]
    for bad, match in (([], "no series"), ([np.ones(3)], "shapes"), ([np.ones((2, 3)), np.ones((3, 3))], "same channels"), ([np.ones((2, 0))], "at least one"),
                       ([np.full((1, 2), np.inf)], "infinite")):
        with pytest.raises(ValueError, match=match):
            pad_series(bad)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("fill", ["generate", "decay"])
def test_estimator_learns_and_keeps_observed_values(equal, fill):
    X, y = series(40, equal)
    model = quick(fill=fill, max_epochs=14).fit(X, y)
    p = model.predict_proba(X)
    assert p.shape == (40, 2) and np.allclose(p.sum(1), 1) and model.score(X, y) > 0.8
    assert set(model.predict(X)) <= {"slow", "fast"} and list(model.classes_) == ["fast", "slow"]
    out = model.transform(X)
    assert isinstance(out, np.ndarray) == equal
    for o, x in zip(out, X):
        assert o.shape == x.shape and np.isfinite(o).all() and np.array_equal(o[~np.isnan(x)], x[~np.isnan(x)])
    completions, weights = model.sample(X, n_latents=3, n_samples=2)
    assert weights.shape == ((40, 6) if fill == "generate" else (40, 1)) and np.allclose(weights.sum(1), 1, atol=1e-5)
    if fill == "generate":
        assert completions[0].shape == (6, *X[0].shape)
        np.testing.assert_allclose(np.einsum("s,sct->ct", weights[0], completions[0]), model.transform(X, n_latents=3, n_samples=2)[0], atol=1e-5)
    assert np.isfinite(model.filling_reliance(X, y))


def test_reliance_is_zero_where_nothing_is_missing():
    X, y = series(16, missing=0.0)
    model = quick().fit(X, y)
    assert abs(model.filling_reliance(X, y)) < 1e-6
    with pytest.raises(ValueError, match="seen in fit"):
        model.filling_reliance(X, np.full(16, "other"))


def test_estimator_is_deterministic_and_leaves_the_global_generator_alone():
    X, y = series()
    before = torch.get_rng_state()
    a, b = quick().fit(X, y), quick().fit(X, y)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(a.predict_proba(X), b.predict_proba(X))
    np.testing.assert_array_equal(a.predict_proba(X), a.predict_proba(X))
    assert not np.array_equal(a.predict_proba(X), a.predict_proba(X, stream=1))
    assert not np.array_equal(a.predict_proba(X), quick(random_state=1).fit(X, y).predict_proba(X))


@pytest.mark.parametrize("fill", ["generate", "mean", "decay"])
def test_what_padding_holds_never_reaches_the_estimator(fill):
    "The padded batch of unequal series is filled with junk before it reaches the model; input is not changed."
    X, y = series(equal=False)
    copies = [x.copy() for x in X]
    model = quick(fill=fill).fit(X, y)
    assert all(np.array_equal(x, c, equal_nan=True) for x, c in zip(X, copies))
    x, s, _, n, _ = model._tensors(X, None, None)
    p = model.model_.predict_proba(x, s, lengths=n, generator=seeded())
    assert torch.equal(p, model.model_.predict_proba(torch.where(s, x, 1e9), s, lengths=n, generator=seeded()))


def test_array_and_list_agree():
    X, y = series()
    np.testing.assert_allclose(quick().fit(X, y).predict_proba(X), quick().fit(list(X), y).predict_proba(list(X)))


def test_scikit_learn_side():
    X, y = series(24)
    model = quick(max_epochs=2)
    twin = clone(model)
    assert twin is not model and twin.get_params() == model.get_params()
    assert twin.set_params(obs_dropout=0.1).obs_dropout == 0.1 and model.obs_dropout == 0.4
    tags = model.__sklearn_tags__()
    assert tags.input_tags.allow_nan and tags.input_tags.three_d_array and tags.estimator_type == "classifier"
    search = GridSearchCV(model, {"obs_dropout": [0.0, 0.4], "fill": ["generate"]}, cv=2).fit(X, y)
    assert search.predict(X).shape == y.shape and np.isfinite(search.cv_results_["mean_test_score"]).all()
    ragged, labels = series(24, equal=False)
    assert cross_val_score(model, ragged, labels, cv=2).shape == (2,)
    with pytest.raises(NotFittedError):
        model.predict(X)


def test_early_stopping_keeps_the_best_and_balance_draws_rare_classes():
    X, y = series(40)
    model = quick(validation_fraction=0.25, patience=2, max_epochs=30, lr=0.2).fit(X, y)
    assert len(model.history_) < 30 and len(model.validation_) == len(model.history_)
    y = np.where(np.arange(40) < 4, y, "slow")
    assert quick(balance=True, max_epochs=1).fit(X, y).classes_.tolist() == ["fast", "slow"]


def test_times_and_static_features():
    X, y = series(16, equal=False)
    times = [np.sort(np.random.default_rng(0).random(x.shape[1])) * 10 for x in X]
    static = np.random.default_rng(1).random((16, 3))
    static[0, 0] = np.nan
    model = quick().fit(X, y, times=times, static=static)
    assert np.isfinite(model.predict_proba(X, times, static)).all()
    assert not np.allclose(model.predict_proba(X, times, static), model.predict_proba(X, [2 * t for t in times], static))
    for args, match in (((X, times), "with static"), ((X, times, static[:, :2]), "shape"), ((X, times[:3], static), "time stamp"), ((X, [t[:1] for t in times], static), "time stamp")):
        with pytest.raises(ValueError, match=match):
            model.predict_proba(*args)


@pytest.mark.parametrize("options, change, match", [
    (dict(fill="median"), {}, "fill"), (dict(obs_dropout=1.0), {}, "drop"), (dict(validation_fraction=1.0), {}, "validation_fraction"), (dict(max_epochs=0), {}, "max_epochs"),
    ({}, dict(times=[np.arange(3)] * 24), "time stamp"), ({}, dict(static=np.full((24, 1), np.inf)), "infinite"), ({}, dict(y=np.zeros(24)), "two classes"), ({}, dict(y=np.zeros(3)), "shape"), ({}, dict(X=np.ones((24, 12))), "shapes"), ({}, dict(static=np.ones(24)), "static")])
def test_fit_refuses_and_leaves_nothing_behind(options, change, match):
    X, y = series()
    model = quick(**options)
    with pytest.raises(ValueError, match=match):
        model.fit(**{**dict(X=X, y=y), **change})
    assert not hasattr(model, "classes_")


def test_predict_refuses_other_channels():
    X, y = series()
    with pytest.raises(ValueError, match="3 channels, the estimator was fitted with 2"):
        quick(max_epochs=1).fit(X, y).predict(np.ones((2, 3, 5)))


# ---- scores

def test_scores():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(2), 50)
    y = rng.integers(0, 2, 50)
    assert brier_score(p, y) == pytest.approx(2 * brier_score_loss(y, p[:, 1]))
    assert expected_calibration_error(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2])) == 0
    assert expected_calibration_error(np.eye(3)[[0, 1, 2]], np.array([1, 1, 2])) == pytest.approx(1 / 3)
    assert expected_calibration_error(np.array([[0.7, 0.3], [0.65, 0.35]]), np.array([0, 1])) == pytest.approx(abs(0.5 - 0.675))
    with pytest.raises(ValueError, match="at least one bin"):
        expected_calibration_error(p, y, bins=0)
    with pytest.raises(ValueError, match="needed"):
        expected_calibration_error(p, y[:3])


# ---- data

def test_japanese_vowels_is_what_aeon_ships(monkeypatch, tmp_path):
    datasets = pytest.importorskip("aeon.datasets")
    X, y = japanese_vowels("train")
    assert len(X) == 270 and X[0].shape[0] == 12 and {x.shape[1] for x in X} <= set(range(7, 30)) and sorted(set(y)) == list("123456789")
    with pytest.raises(ValueError, match="split"):
        japanese_vowels("validation")
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(DataError, match="does not ship"):
        japanese_vowels("train")


def physionet(folder, n=3, deaths=None):
    "A tiny folder in the format of the challenge."
    rng = np.random.default_rng(0)
    (folder / "set-a").mkdir(parents=True)
    rows = []
    for i in range(n):
        record = 132539 + i
        lines = ["Time,Parameter,Value", f"00:00,RecordID,{record}", f"00:00,Age,{50 + i}", "00:00,Gender,0", "00:00,Height,-1", "00:00,ICUType,4", "00:00,Weight,-1"]
        for k in range(2 + i % 3):
            lines += [f"{k:02d}:07,HR,{60 + i + k + rng.integers(20)}", f"{k:02d}:37,Temp,{36 + k / 10:.1f}", f"{k:02d}:37,GCS,{10 + rng.integers(5)}"]
        (folder / "set-a" / f"{record}.txt").write_text("\n".join(lines) + "\n")
        rows.append(f"{record},6,1,5,-1,{int(deaths[i]) if deaths is not None else i % 2}")
    (folder / "Outcomes-a.txt").write_text("RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n" + "\n".join(rows) + "\n")
    return folder


def test_physionet_loader(tmp_path):
    X, y, times, static = load_physionet2012(physionet(tmp_path))
    assert y.tolist() == [0, 1, 0] and [x.shape for x in X] == [(37, 4), (37, 6), (37, 8)]
    np.testing.assert_allclose(times[0], [7 / 60, 37 / 60, 1 + 7 / 60, 1 + 37 / 60], rtol=1e-6)
    temperature = X[0][PHYSIONET_SERIES.index("Temp")]
    np.testing.assert_allclose(temperature, [np.nan, 36.0, np.nan, 36.1], rtol=1e-6)
    assert np.isnan(X[0][PHYSIONET_SERIES.index("Weight")]).all()  # -1 is unknown
    np.testing.assert_array_equal(static[1], [51, 0, np.nan, 4, np.nan])
    model = quick(max_epochs=1, balance=True).fit(X, y, times=times, static=static)
    assert np.isfinite(model.predict_proba(X, times, static)).all()


def test_physionet_loader_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match="physionet.org/content/challenge-2012"):
        load_physionet2012(tmp_path / "none")
    folder = physionet(tmp_path / "a")
    (folder / "set-a" / "7.txt").write_text("Time,Parameter,Value\n00:00,RecordID,7\n")
    with pytest.raises(DataError, match="not in Outcomes-a.txt, the first is 7"):
        load_physionet2012(folder)
    (folder / "set-a" / "7.txt").unlink()
    (folder / "set-a" / "132539.txt").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="132539.txt is not a PhysioNet"):
        load_physionet2012(folder)
    pd.DataFrame({"RecordID": [1]}).to_csv(folder / "Outcomes-a.txt", index=False)
    with pytest.raises(DataError, match="no column 'In-hospital_death'"):
        load_physionet2012(folder)


def test_patient_without_measurements(tmp_path):
    folder = physionet(tmp_path, 2)
    (folder / "set-a" / "132539.txt").write_text("Time,Parameter,Value\n00:00,RecordID,132539\n00:00,Age,60\n")
    X, _, times, _ = load_physionet2012(folder)
    assert X[0].shape == (37, 1) and np.isnan(X[0]).all() and times[0].tolist() == [0]


def test_notebook_on_a_folder_of_ones_own(tmp_path):
    papermill = pytest.importorskip("papermill")
    pytest.importorskip("aeon")
    physionet(tmp_path / "data", 20)
    path = find_paper("supnotmiwae")
    assert set(parameters(load_notebook(path), "supnotmiwae")) == {"profile", "seeds", "p_drop", "slope", "n_train", "n_test", "label_weight", "dataset"}
    nb = papermill.execute_notebook(path, tmp_path / "out.ipynb", dict(profile="smoke", seeds=[3], dataset=str(tmp_path / "data"), n_test=2), progress_bar=False, cwd=tmp_path)
    records = [o["data"][MIME] for c in nb.cells for o in c.get("outputs", []) if MIME in o.get("data", {})]
    assert len(records) == 1 and [c["id"] for c in records[0]["claims"]] == [f"C{i}" for i in range(1, 9)]
    assert {r["setting"] for r in records[0]["rows"] if "setting" in r} == {"natural"} and any("auroc" in r for r in records[0]["rows"])
