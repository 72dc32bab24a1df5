"Unlearnable Clusters: the module against independent formulas and peers, transformers models, bad input, folders of images, the `full` path."
import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import NotFittedError
from torch import nn

from researchkit.security import unlearnable_clusters as uc

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(n_clusters=3, steps=4, lr=1e-2, batch_size=8, ngf=4, n_blocks=1, n_init=2, random_state=0)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def groups(n=30, side=8, dtype=torch.float32):
    "Images of three colours."
    colour = torch.eye(3, dtype=dtype)[torch.arange(n) % 3].view(n, 3, 1, 1)
    return (0.15 + 0.5 * colour + 0.2 * rand(n, 3, side, side, dtype=dtype)).clamp(0, 1)


class Net(nn.Module):
    "A small network with batch norm: its mode matters."

    def __init__(self, d=6):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, d))

    def forward(self, x):
        return self.body(x)


@pytest.fixture
def net():
    return Net().eval()


@given(n=st.integers(1, 6), d=st.integers(2, 40), scale=st.floats(0.01, 30), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_anchor_kl(n, d, scale, seed):
    g = torch.Generator().manual_seed(seed)
    features, anchors = scale * torch.randn(n, d, generator=g, dtype=torch.float64), scale * torch.randn(n, d, generator=g, dtype=torch.float64)
    peer = nn.KLDivLoss(reduction="batchmean")(features.log_softmax(-1), anchors.softmax(-1))
    torch.testing.assert_close(uc.anchor_kl(features, anchors), peer, rtol=1e-12, atol=1e-12)
    p = np.exp(anchors.numpy() - anchors.numpy().max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    q = np.exp(features.numpy() - features.numpy().max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    keep = p > 0
    if (q > 0).all():
        assert uc.anchor_kl(features, anchors).item() == pytest.approx((p[keep] * np.log(p[keep] / q[keep])).sum() / n, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(uc.anchor_kl(features, anchors[0]), uc.anchor_kl(features, anchors[:1].expand(n, d)))
    torch.testing.assert_close(uc.anchor_mse(features, anchors), F.mse_loss(features, anchors))


def test_anchor_shapes():
    for call in (uc.anchor_kl, uc.anchor_mse):
        for anchors in (rand(4, 5), rand(2, 6), rand(1, 6)):
            with pytest.raises(ValueError, match=r"features must be \(N, d\)"):
                call(rand(4, 6), anchors)


@given(seed=st.integers(0, 99), limit=st.floats(0, 5))
def test_clamp_by_l2(seed, limit):
    x = rand(4, 3, 5, 5, seed=seed, dtype=torch.float64) * torch.tensor([0.0, 0.01, 1.0, 10.0], dtype=torch.float64).view(4, 1, 1, 1)
    out = uc.clamp_by_l2(x, limit)
    norms, before = out.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, before.clamp(max=limit))
    assert torch.equal(out[before < limit], x[before < limit])
    with pytest.raises(ValueError, match="max_norm be at least 0"):
        uc.clamp_by_l2(x, -1)


def by_hand(net, x, anchors, eps, iters, norm, sign, delta):
    "The attack, step by step, with the optimiser's gradients."
    for _ in range(iters):
        delta = delta.detach().requires_grad_(True)
        nn.KLDivLoss(reduction="batchmean")(net(x + delta).log_softmax(-1), anchors.softmax(-1)).backward()
        g = delta.grad
        if norm == "linf":
            delta = torch.clamp(delta.data + sign * eps / iters * 1.25 * torch.sign(g), -eps, eps)
        else:
            delta = delta.data + sign * eps / iters * 1.25 * g / torch.norm(g, dim=(1, 2, 3), p=2, keepdim=True)
            length = torch.norm(delta, dim=(1, 2, 3), p=2, keepdim=True)
            delta = delta * torch.min(eps / length, torch.ones_like(length))
        delta = torch.clamp(x + delta, 0, 1) - x
    return (x + delta).detach()


@pytest.mark.parametrize("norm, eps", [("linf", 16 / 255), ("l2", 0.7)])
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("random_start", [True, False])
def test_anchor_pgd(norm, eps, targeted, random_start):
    net = Net().double().eval()
    x, anchors = rand(4, 3, 8, 8, dtype=torch.float64), net(rand(4, 3, 8, 8, seed=1, dtype=torch.float64)).detach()
    start = torch.zeros_like(x)
    if random_start:
        torch.manual_seed(5)
        start.uniform_(0, 1)
        start = start * eps if norm == "linf" else uc.clamp_by_l2(start - x, eps)
    torch.manual_seed(5)
    out = uc.anchor_pgd(net, x, anchors, eps, 6, norm, targeted=targeted, random_start=random_start)
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(out, by_hand(net, x, anchors, eps, 6, norm, -1 if targeted else 1, start), rtol=1e-12, atol=1e-12)
    size = (out - x).abs().max() if norm == "linf" else (out - x).flatten(1).norm(dim=1).max()
    assert size <= eps + 1e-9 and 0 <= out.min() and out.max() <= 1
    assert (uc.anchor_kl(net(out), anchors) < uc.anchor_kl(net(x), anchors)) == targeted
    if random_start and not targeted:  # the defaults of the released function
        torch.manual_seed(5)
        assert torch.equal(uc.anchor_pgd(net, x, anchors, eps, 6, norm), out)


def test_anchor_pgd_refuses(net):
    x = rand(1, 3, 8, 8)
    for options, message in ((dict(norm="l1"), "unknown norm 'l1'"), (dict(eps=0), "eps must be above 0"), (dict(iters=0), "iters at least 1")):
        with pytest.raises(ValueError, match=message):
            uc.anchor_pgd(net, x, rand(6), **options)
    flat = uc.anchor_pgd(lambda x: x.flatten(1)[:, :4] * 0, x, rand(4), norm="l2", random_start=False)  # no gradient anywhere
    assert torch.equal(flat, x)


def test_generator():
    net = uc.ResnetGenerator(3, 3, 64, 6)
    assert sum(p.numel() for p in net.parameters()) == 7_841_411
    assert {"model.1.weight", "model.2.running_mean", "model.10.conv_block.1.weight", "model.10.conv_block.6.bias", "model.16.weight", "model.23.bias"} <= set(net.state_dict())
    assert net.state_dict()["model.23.weight"].shape == (3, 64, 7, 7) and net.state_dict()["model.16.weight"].shape == (256, 128, 3, 3)
    small = uc.ResnetGenerator(1, 2, 4, 0)
    for side in ((5, 5), (16, 16), (17, 30)):
        out = small(rand(2, 1, *side))
        assert out.shape == (2, 2, *side) and out.abs().max() < 1
    with pytest.raises(ValueError, match="at least 5 x 5"):
        small(rand(1, 1, 4, 9))
    with pytest.raises(ValueError, match="at least 1"):
        uc.ResnetGenerator(ngf=0)


def check(model, images, dtype=torch.float32):
    assert (model.transform(images).double() - images.double()).abs().max().item() <= model.eps
    assert model.delta_.dtype == dtype and model.delta_.abs().max().item() <= model.eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [dict(), dict(loss="mse", at_once=None), dict(scope="all", bound="scale"), dict(generator="direct"), dict(generator="direct", bound="scale")])
def test_fit(net, dtype, options):
    x, net = groups(dtype=dtype), net.to(dtype)
    model = uc.ClusterPerturbation(**SMALL, **options).fit(x, net)
    check(model, x, dtype)
    features = net(x).detach()
    kmeans = KMeans(3, n_init=10, random_state=0).fit(features.numpy())
    assert len({(int(a), int(b)) for a, b in zip(kmeans.labels_, model.labels_)}) == 3  # the same partition
    assert torch.equal(model.labels_, torch.cdist(features.double(), model.centers_.double()).argmin(1))
    assert torch.equal(model.predict(x), model.labels_) and (model.targets_ != torch.arange(3)).all()
    assert model.loss_curve_.shape == (3, 4) and np.isfinite(model.loss_curve_).all()
    out = model.transform(x)
    assert out.min() >= 0 and out.max() <= 1 and out.dtype == dtype
    torch.testing.assert_close(model.transform(torch.full_like(x, 0.5), clusters=[1] * len(x)) - 0.5, model.delta_[[1] * len(x)], rtol=0, atol=1e-7)
    again = clone(model).fit(x, net)
    assert torch.equal(again.delta_, model.delta_)
    assert torch.equal(uc.ClusterPerturbation(**SMALL, **options).fit_transform(x, net), out)


@given(eps=st.floats(1e-4, 0.9), seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60)
def test_bound_is_exact(eps, seed, dtype):
    x, delta = rand(2, 3, 16, 16, seed=seed, dtype=dtype), (rand(2, 3, 16, 16, seed=seed + 1, dtype=dtype) * 2 - 1).sign() * uc._below(eps, dtype)
    out = uc.perturb(x, delta, eps)
    assert (out.double() - x.double()).abs().max().item() <= eps and out.min() >= 0 and out.max() <= 1
    torch.testing.assert_close(out, (x + delta).clamp(0, 1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(net, dtype):
    x = groups().to(dtype)
    model = uc.ClusterPerturbation(**SMALL).fit(x, net)
    out = model.transform(x)
    assert out.dtype == dtype and model.delta_.dtype == torch.float32
    assert (out.double() - x.double()).abs().max().item() <= 16 / 255 and out.min() >= 0 and out.max() <= 1 and not torch.equal(out, x)
    y = torch.arange(30) % 3
    noise = uc.emn_noise(Net(3), x, y, rounds=1, train_steps=2, batch_size=10, random_state=0)
    assert noise.dtype == torch.float32 and 0 <= uc.accuracy(uc.train_target(Net(3), x, y, epochs=1, batch_size=10, random_state=0), x, y) <= 1


def test_side_by_side_is_one_by_one():
    x, net = groups(dtype=torch.float64), Net().double().eval()
    a, b, c = [uc.ClusterPerturbation(**SMALL, loss="mse", at_once=k).fit(x, net) for k in (1, 2, None)]
    torch.testing.assert_close(a.delta_, b.delta_, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.delta_, c.delta_, rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_zero_noise_has_the_clean_loss_and_fitting_lowers_it(net, loss):
    x = groups(60)
    model = uc.ClusterPerturbation(**{**SMALL, "steps": 40, "batch_size": 60}, loss=loss, generator="direct").fit(x, net)
    measure = {"kl": uc.anchor_kl, "mse": uc.anchor_mse}[loss]
    for k in range(3):
        own, aim = x[model.labels_ == k], model.centers_[(k + 1) % 3]
        clean = measure(net(own), aim).item()
        tiny = uc.ClusterPerturbation(**{**SMALL, "steps": 1, "batch_size": 60, "eps": 1e-9}, loss=loss).fit(x, net)
        assert tiny.loss_curve_[k, 0] == pytest.approx(clean, rel=1e-4)
        assert model.loss_curve_[k, -1] < model.loss_curve_[k, 0] and measure(net(uc.perturb(own, model.delta_[k])), aim).item() < clean


def test_l2(net):
    model = uc.ClusterPerturbation(**SMALL, norm="l2").set_params(eps=0.8).fit(groups(), net)
    torch.testing.assert_close(model.delta_.flatten(1).norm(dim=1), torch.full((3,), 0.8))
    assert (model.transform(groups()) - groups()).flatten(1).norm(dim=1).max() <= 0.8 + 1e-5


def test_mode_and_weights_of_the_surrogate_are_kept(net):
    net.train()
    net.body[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = uc.ClusterPerturbation(**SMALL).fit(groups(), net)
    assert net.training and not net.body[1].training and net.body[0].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    assert torch.equal(model.predict(groups()), model.labels_)


def test_options_reach_the_loop(net):
    seen = []
    model = uc.ClusterPerturbation(**{**SMALL, "target_offset": 2}, augment=lambda x: seen.append(len(x)) or x.flip(3), feature_batch=7, device="cpu").fit(groups(), net)
    assert model.targets_.tolist() == [2, 0, 1] and len(seen) == 3 * 4 and max(seen) <= 8
    other = uc.ClusterPerturbation(**{**SMALL, "random_state": 1}).fit(groups(), net)
    assert not torch.equal(other.delta_, model.delta_)


def test_an_empty_cluster_keeps_no_noise(net):
    x = groups(3).repeat(10, 1, 1, 1)  # three different images
    with pytest.warns(UserWarning, match="no image belongs to cluster") as seen:
        model = uc.ClusterPerturbation(**{**SMALL, "n_clusters": 5}).fit(x, net)
    assert len(seen) == 1
    empty = sorted(set(range(5)) - set(model.labels_.tolist()))
    assert len(empty) == 2 and (model.delta_[empty] == 0).all() and np.isnan(model.loss_curve_[empty]).all()
    assert (model.delta_[model.labels_.unique()].abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("options, message", [
    (dict(n_clusters=1), "n_clusters must be from 2"), (dict(n_clusters=31), r"number of images \(30\), not 31"), (dict(eps=0), "eps must be above 0"),
    (dict(eps=float("nan")), "eps must be above 0"), (dict(loss="l1"), "unknown loss 'l1'; allowed: kl, mse"), (dict(scope="class"), "unknown scope"),
    (dict(generator="unet"), "unknown generator"), (dict(norm="l1"), "unknown norm"), (dict(bound="none"), "unknown bound"), (dict(steps=0), "steps must be at least 1"),
    (dict(at_once=0), "at_once must be at least 1"), (dict(target_offset=3), "own centre"), (dict(batch_size=0), "batch_size")])
def test_bad_options(net, options, message):
    model = uc.ClusterPerturbation(**{**SMALL, **options})
    with pytest.raises(ValueError, match=message):
        model.fit(groups(), net)
    assert not hasattr(model, "delta_") and not hasattr(model, "centers_")


def test_bad_images(net):
    model = uc.ClusterPerturbation(**SMALL)
    nan = groups()
    nan[0, 0, 0, 0] = torch.nan
    for bad, message in ((groups() * 255, r"must lie in \[0, 1\]"), (groups() - 0.5, r"must lie in \[0, 1\]"), ((groups() * 255).byte(), "floating-point"), (groups()[0], "floating-point"),
                         (groups().numpy(), "not ndarray"), (groups()[:0], "not empty"), (nan, "nan"), (groups(side=4), "5 x 5")):
        with pytest.raises(ValueError, match=message):
            model.fit(bad, net)
    with pytest.raises(NotFittedError):
        model.transform(groups())
    for f, error in ((lambda x: x, TypeError), (lambda x: x.flatten(1).numpy(), TypeError), (lambda x: x.flatten(1)[:1], TypeError), (lambda x: x.flatten(1) / 0, ValueError)):
        with pytest.raises(error, match="feature extractor"):
            model.fit(groups(), f)
    model.fit(groups(), net)
    for images, clusters, message in ((groups(side=9), None, "shape"), (groups(), [0], "30 integers"), (groups(), [3] * 30, "from 0 to 2"), (groups(), torch.zeros(30), "integers")):
        with pytest.raises(ValueError, match=message):
            model.transform(images, clusters)


CONFIGS = {
    "regnet": (transformers.RegNetModel, transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)),
    "resnet": (transformers.ResNetForImageClassification, transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)),
    "clip": (transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, projection_dim=12)),
    "clip without projection": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_models(name):
    torch.manual_seed(0)
    kind, config = CONFIGS[name]
    model = kind(config).eval()
    x = rand(4, 3, 16, 16)
    f = uc.feature_extractor_from_hf(model)
    features = f(x)
    assert features.ndim == 2 and len(features) == 4 and features.shape[1] in (12, 16)
    if name == "regnet":
        torch.testing.assert_close(features, model(x).pooler_output.flatten(1))
    if name in ("resnet", "vit"):  # the input of the last linear layer
        torch.testing.assert_close((model.classifier if name == "vit" else model.classifier[1])(features), model(x).logits)
    (grad,) = torch.autograd.grad(f(x.requires_grad_(True)).square().sum(), x)
    assert grad.abs().sum() > 0
    processor = type("Processor", (), {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})()
    normal = (x.detach() - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    torch.testing.assert_close(uc.feature_extractor_from_hf(model, processor)(x.detach()), f(normal))
    uc.ClusterPerturbation(**{**SMALL, "steps": 1}).fit(groups(side=16), f)
    assert uc.feature_extractor_from_hf(model.to(torch.bfloat16))(x.detach()).dtype == torch.float32


def test_feature_extractor_refuses():
    for bad in (nn.Linear(2, 2), "resnet", None):
        with pytest.raises(TypeError, match="vision model of transformers"):
            uc.feature_extractor_from_hf(bad)


def test_emn_noise_makes_training_easy_and_leaves_the_model():
    x, y = rand(60, 3, 8, 8), torch.arange(60) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    before = model[1].weight.detach().clone()
    noise = uc.emn_noise(model, x, y, rounds=10, alpha=4 / 255, lr=0.05, batch_size=20, random_state=0)
    assert noise.shape == (2, 3, 8, 8) and noise.abs().max().item() <= 16 / 255 and torch.equal(model[1].weight, before)
    assert torch.equal(noise, uc.emn_noise(model, x, y, rounds=10, alpha=4 / 255, lr=0.05, batch_size=20, random_state=0))
    poisoned = uc.train_target(model, uc.perturb(x, noise[y], 16 / 255), y, epochs=20, batch_size=20, lr=0.05, random_state=0)
    fresh = rand(60, 3, 8, 8, seed=9)  # images that say nothing about their label: the noise alone tells it
    assert uc.accuracy(poisoned, uc.perturb(fresh, noise[y], 16 / 255), y) > 0.95 and uc.accuracy(poisoned, fresh, y) < 0.8
    for bad in (y.float(), y[:5], y - 1):
        with pytest.raises(ValueError, match="labels must be a tensor of 60 integers"):
            uc.emn_noise(model, x, bad)
    for options in (dict(eps=0), dict(rounds=0)):
        with pytest.raises(ValueError, match="eps must be above 0"):
            uc.emn_noise(model, x, y, **options)


def test_train_target():
    x, y = groups(60), torch.arange(60) % 3
    model = uc.train_target(Net(3), x, y, epochs=6, batch_size=20, lr=0.05, random_state=0)
    assert not model.training and uc.accuracy(model, x, y, batch_size=7) == 1.0
    torch.manual_seed(0)
    hf = transformers.ResNetForImageClassification(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3))
    assert 0 <= uc.accuracy(uc.train_target(hf, x, y, epochs=1, batch_size=20, random_state=0), x, y) <= 1
    with pytest.raises(ValueError, match="epochs and batch_size"):
        uc.train_target(model, x, y, epochs=0)
    before = copy.deepcopy(model.state_dict())
    for warmup in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="warmup must be at least 0 and below 1"):
            uc.train_target(model, x, y, epochs=1, warmup=warmup)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_learning_rate_is_torchs_cosine_after_the_warmup(warmup):
    x, y = groups(40, dtype=torch.float64), torch.arange(40) % 3
    model, twin = Net(3).double(), Net(3).double()  # whole batches: the order within them does not matter
    uc.train_target(model, x, y, epochs=10, batch_size=40, lr=0.05, warmup=warmup, random_state=0)
    rise = round(10 * warmup)
    optimizer = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 - rise, eta_min=1e-6)
    for t in range(10):
        rate = 0.05 * (t + 1) / (rise + 1) if t < rise else cosine.get_last_lr()[0]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        if t >= rise:
            cosine.step()
    for a, b in zip(model.state_dict().values(), twin.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def folder(root, classes=("cat", "dog"), n=5, size=(20, 14)):
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(n):
            pixels = (rng.integers(0, 120, (*size, 3)) + 60 * (i % 3)).astype(np.uint8)
            Image.fromarray(pixels if k % 2 else pixels[..., 0]).save(root / name / f"{k}.png")  # colour and grey
    return root


def test_load_images(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "cat" / "notes.txt").write_text("not an image")
    images, labels, names = uc.load_images(root, size=8)
    assert images.shape == (10, 3, 8, 8) and images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
    assert labels.tolist() == [0] * 5 + [1] * 5 and names == ["cat", "dog"]
    train, test = uc.load_images(root, 8, "train"), uc.load_images(str(root), 8, "test", torch.float16)
    assert len(train[0]) == 8 and len(test[0]) == 2 and test[0].dtype == torch.float16
    split = tmp_path / "split"
    folder(split / "train", n=3), folder(split / "val", n=2)
    assert len(uc.load_images(split, 8, "train")[0]) == 6 and len(uc.load_images(split, 8, "test")[0]) == 4
    plain = tmp_path / "plain"
    (plain / "a").mkdir(parents=True), (plain / "b").mkdir()
    for name in "ab":
        Image.new("RGB", (30, 30), (51, 102, 204)).save(plain / name / "x.png")
    torch.testing.assert_close(uc.load_images(plain, 8)[0][0, :, 0, 0], torch.tensor([0.2, 0.4, 0.8]))


def test_load_images_refuses(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="timm/oxford-iiit-pet: .*pip install datasets"):
        uc.load_images("timm/oxford-iiit-pet", 8)
    for source, message in ((tmp_path / "nowhere", "neither a folder nor a hub id"), ("pets", "neither a folder nor a hub id"), (root / "cat", "two or more classes, found 0")):
        with pytest.raises(ValueError, match=message):
            uc.load_images(source, 8)
    with pytest.raises(ValueError, match="split must be"):
        uc.load_images(root, 8, "valid")
    (root / "cat" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.png cannot be read as an image"):
        uc.load_images(root, 8)
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images"):
        uc.load_images(root, 8)


def test_full_profile(tmp_path):
    "The notebook at `full`, with a tiny surrogate, a tiny target and a folder of images."
    import nbformat
    import papermill

    folder(tmp_path / "images" / "train", ("a", "b", "c", "d"), n=5, size=(16, 16))
    folder(tmp_path / "images" / "test", ("a", "b", "c", "d"), n=2, size=(16, 16))
    kind, config = CONFIGS["regnet"]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "surrogate")
    transformers.ConvNextImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "surrogate")
    CONFIGS["resnet"][1].save_pretrained(tmp_path / "target")
    papermill.execute_notebook(ROOT / "nbs/security/unlearnable_clusters.ipynb", tmp_path / "out.ipynb", cwd=tmp_path, progress_bar=False, parameters=dict(
        profile="full", seeds=[0], clusters=3, model=str(tmp_path / "surrogate"), dataset=str(tmp_path / "images"),
        target=str(tmp_path / "target"), steps=1, epochs=1, ngf=1, image_size=16))
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs]
    records = [o["data"]["application/vnd.researchkit.record+json"] for o in outputs if "application/vnd.researchkit.record+json" in o.get("data", {})]
    assert len(records) == 1 and records[0]["profile"] == "full" and [c["id"] for c in records[0]["claims"]] == [f"C{i}" for i in range(1, 8)]
