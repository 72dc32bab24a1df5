"PCB-Merging: the module against independent formulas and peers, real checkpoints and adapters, bad input, the `full` path."
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from researchkit.reuse import pcb_merging as pcb

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


def vectors(n, d, seed=0, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(tv, ratio, form, q):
    "c and w from sorted rows in NumPy, written from the equations."
    t = tv.numpy()
    n, d = t.shape

    def clamp(x, low, high):
        ordered = np.sort(x, 1)
        return np.clip(x, ordered[:, [int(d * low)]], ordered[:, [int(d * (1 - high) - 1)]])

    def norm(x):
        return (x - x.min(1, keepdims=True)) / (x.max(1, keepdims=True) - x.min(1, keepdims=True))

    a = clamp(np.abs(t), q, q)
    s = np.sign(t) * norm(a)
    inter = {"root": lambda: np.tanh(t * t.sum(0)), "vision": lambda: np.tanh(t * s.sum(0)),
             "es": lambda: np.tanh(s[:, None] * s[None]).sum(1)}[form]()
    return np.sign(t) * a, norm(clamp(np.exp(n * norm(a) ** 2) * inter, 1 - ratio, 0))


@pytest.mark.parametrize("form, q", [("root", 1e-4), ("vision", 0.01), ("es", 0.01)])
@pytest.mark.parametrize("n, d, ratio", [(2, 60, 0.2), (3, 1001, 0.1), (6, 5000, 0.05), (4, 777, 1.0), (3, 270_000, 0.2)])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_released_forms(form, q, n, d, ratio, scale):
    tv = vectors(n, d, scale=scale)
    c, w = reference(tv, ratio, form, q)
    clamped, weights = pcb.pcb_weights(tv, ratio, form)
    np.testing.assert_allclose(clamped, c, rtol=1e-12)
    np.testing.assert_allclose(weights, w, rtol=1e-9, atol=1e-12)
    lambdas = np.linspace(0.8, 1.3, n)
    merged = (w * c * lambdas[:, None]).sum(0) / np.maximum(w.sum(0), 1e-12)
    state = pcb.pcb_merge({"w": torch.zeros(d, dtype=torch.float64)}, [{"w": t} for t in tv], ratio, lambdas, form)
    np.testing.assert_allclose(state["w"], merged, rtol=1e-9, atol=1e-12)


def test_paper_form():
    tv = vectors(4, 3000)
    n, d = tv.shape

    def norm(x):
        return (x - x.amin(-1, keepdim=True)) / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True))

    beta = torch.softmax(n * norm(tv * tv), -1) * torch.softmax(norm(tv[:, None] * tv[None]), -1).sum(1)
    kept = beta * (beta >= beta.sort(1).values[:, [int(d * 0.9)]])
    torch.testing.assert_close(pcb.pcb_weights(tv, 0.1, "paper")[1], kept)
    torch.testing.assert_close(pcb.merge_vectors(tv, ratio=0.1, form="paper", lambdas=1.1),
                               torch.where(kept.sum(0) > 0, (kept * 1.1 * tv).sum(0) / kept.sum(0), 0.0))


@pytest.mark.parametrize("form", ["paper", "es", "root", "vision"])
def test_blocks_do_not_matter(form):
    tv = vectors(3, 300_000).float()  # larger than a sample: thresholds come from brackets
    whole = pcb.PCB(0.2, form).fit(pcb.TaskVectors.from_tensor(tv))
    small = pcb.PCB(0.2, form).fit(pcb.TaskVectors.from_tensor(tv, block_size=40_000))
    torch.testing.assert_close(small.threshold, whole.threshold)
    beta = whole.scores(tv)
    assert torch.equal(whole.threshold[:, 0], beta.sort(1).values[:, int(300_000 * 0.8)])


@given(n=st.integers(2, 6), d=st.integers(120, 400), ratio=st.floats(0.05, 1.0), seed=st.integers(0, 999),
       form=st.sampled_from(["root", "vision", "es"]))
@settings(max_examples=60, deadline=None)
def test_weight_properties(n, d, ratio, seed, form):
    tv = vectors(n, d, seed)
    c, w = pcb.pcb_weights(tv, ratio, form)
    assert w.min() == 0 and (w.amax(1) == 1).all()
    assert ((w > 0).sum(1) <= d - int(d * (1 - ratio)) - 1).all()
    models, places = torch.randperm(n), torch.randperm(d)
    torch.testing.assert_close(pcb.pcb_weights(tv[models], ratio, form)[1], w[models])
    torch.testing.assert_close(pcb.pcb_weights(tv[:, places], ratio, form)[1], w[:, places])
    torch.testing.assert_close(pcb.merge_vectors(tv[models], ratio=ratio, form=form), pcb.merge_vectors(tv, ratio=ratio, form=form))
    if form == "es":
        torch.testing.assert_close(pcb.pcb_weights(1e-4 * tv, ratio, form)[1], w)


@given(d=st.integers(1, 3000), m=st.integers(1, 400), seed=st.integers(0, 99), ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_order_statistics(d, m, seed, ties):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, d, generator=g)
    x = x.round() if ties else x
    ranks = sorted({0, d // 3, d - 1})
    sample = x[:, torch.randint(d, (m,), generator=g)] if m != d else x
    found = pcb.order_statistics(lambda: x.split(97, 1), ranks, d, sample)
    assert torch.equal(found, x.sort(1).values[:, ranks])


def test_identical_models_and_one_model():
    tv = vectors(1, 500).expand(4, -1).clone()
    merged = pcb.merge_vectors(tv, ratio=1.0, clip=0.0, lambdas=1.3)
    assert merged.eq(0).sum() == 1 and merged[tv[0].abs().argmin()] == 0
    torch.testing.assert_close(merged[merged != 0], 1.3 * tv[0][merged != 0])
    constant = torch.full((1, 50), 0.3)
    assert torch.equal(pcb.merge_vectors(constant, lambdas=2.0), 2 * constant[0])
    c, w = pcb.pcb_weights(vectors(1, 500), 0.2)
    assert (w > 0).sum() == 99


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_ties_against_peft(ratio):
    ties = pytest.importorskip("peft.utils.merge_utils").ties
    tv = vectors(5, 300_000).float()
    weights = torch.tensor([1.0, 0.8, 1.2, 1.0, 0.5])
    torch.testing.assert_close(pcb.merge_vectors(tv, "ties", ratio=ratio, lambdas=weights), ties(list(tv), weights, ratio))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.norm = nn.Embedding(11, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.out, self.head = nn.Linear(6, 11, bias=False), nn.Linear(6, 3)
        self.out.weight = self.embed.weight


@pytest.fixture
def nets():
    torch.manual_seed(0)
    return [Net() for _ in range(4)]


def test_state_dicts(nets):
    base, *tuned = [n.state_dict() for n in nets]
    before = {k: v.clone() for k, v in base.items()}
    plain = {k: v for k, v in base.items() if not k.startswith("head")}
    for merge in (pcb.pcb_merge, pcb.ties_merge, pcb.task_arithmetic, pcb.average):
        merged = merge(base, tuned, ratio=0.5, lambdas=1.0, exclude=["head"])
        assert list(merged) == list(base)
        assert merged["out.weight"] is merged["embed.weight"]
        assert torch.equal(merged["head.weight"], base["head.weight"]) and merged["head.weight"] is not base["head.weight"]
        assert merged["norm.num_batches_tracked"].dtype == torch.int64
        assert all(torch.equal(base[k], before[k]) for k in base)
    tv = pcb.task_vectors(plain, [{k: t[k] for k in plain} for t in tuned])
    assert tv.shape == (3, 11 * 6 + 6 * 6 + 6 + 4 * 6)
    back = pcb.unflatten(tv[2], plain)
    torch.testing.assert_close(back["out.weight"], tuned[2]["embed.weight"] - base["embed.weight"])
    back["embed.weight"].zero_()
    assert tv[2].abs().sum() > 0 and tv[2][:10].abs().sum() > 0  # copies, not views
    torch.testing.assert_close(pcb.average(base, tuned)["body.weight"], torch.stack([t["body.weight"] for t in tuned]).mean(0))
    torch.testing.assert_close(pcb.task_arithmetic(base, tuned, lambdas=0.4)["body.bias"],
                               base["body.bias"] + 0.4 * sum(t["body.bias"] - base["body.bias"] for t in tuned))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    base = {"w": vectors(1, 400)[0].to(dtype).reshape(20, 20)}
    tuned = [{"w": (base["w"].double() + v.reshape(20, 20)).to(dtype)} for v in vectors(12, 400, 1, 0.1)]
    merged = pcb.pcb_merge(base, tuned)["w"]
    wide = pcb.pcb_merge({"w": base["w"].float()}, [{"w": t["w"].float()} for t in tuned])["w"]
    assert merged.dtype == dtype and torch.equal(merged, wide.to(dtype))


def test_many_models():
    assert torch.isfinite(pcb.merge_vectors(vectors(100, 2000).float())).all()


def test_merge_models(nets):
    merged = pcb.merge_models(nets[0], nets[1:], ratio=0.5, exclude=["head"])
    assert not merged.training and nets[0].training and merged.out.weight is merged.embed.weight
    assert torch.equal(merged.norm.running_var, nets[0].norm.running_var)
    names = [k for k, _ in nets[0].named_parameters() if "head" not in k]
    states = [{k: p.detach() for k, p in n.named_parameters() if k in names} for n in nets]
    expected = pcb.pcb_merge(states[0], states[1:], ratio=0.5)
    assert all(torch.equal(merged.get_parameter(k), expected[k]) for k in names)
    with torch.no_grad():
        merged.body.weight.add_(1)
    assert not torch.equal(merged.body.weight, nets[0].body.weight)


def bad_inputs():
    base = {"a": torch.zeros(40), "b": torch.zeros(3, 4)}
    good = [{"a": v[:40].float(), "b": v[40:].float().reshape(3, 4)} for v in vectors(3, 52)]
    change = lambda **k: [good[0], {**good[1], **k}]
    yield "missing keys: b", lambda: pcb.pcb_merge(base, [{"a": good[0]["a"]}])
    yield "unexpected keys: c", lambda: pcb.pcb_merge(base, change(c=torch.zeros(2)))
    yield r"model 1 .*shapes differ: b \(4, 3\) instead of \(3, 4\)", lambda: pcb.pcb_merge(base, change(b=torch.zeros(4, 3)))
    yield "dtypes differ: a", lambda: pcb.pcb_merge(base, change(a=torch.zeros(40).half()))
    yield "model 1 minus base is not finite in: b", lambda: pcb.pcb_merge(base, change(b=torch.full((3, 4), torch.nan)))
    yield "model 1 has no spread", lambda: pcb.pcb_merge(base, [good[0], base, good[1]])
    yield "at least one model", lambda: pcb.pcb_merge(base, [])
    yield r"ratio must lie in \(0, 1\]", lambda: pcb.pcb_merge(base, good, ratio=0.0)
    yield r"ratio must lie in \(0, 1\]", lambda: pcb.ties_merge(base, good, ratio=1.5)
    yield r"ratio must lie in \(0, 1\]", lambda: pcb.pcb_merge(base, good, ratio=float("nan"))
    yield "lambdas must be one number or 3", lambda: pcb.pcb_merge(base, good, lambdas=[1.0, 2.0])
    yield "lambdas must be finite", lambda: pcb.average(base, good, lambdas=float("inf"))
    yield "unknown form 'softmax'", lambda: pcb.pcb_merge(base, good, form="softmax")
    yield "clip must lie", lambda: pcb.pcb_weights(vectors(2, 99), clip=0.5)
    yield "allowed: intra, inter, drop, rescale", lambda: pcb.pcb_weights(vectors(2, 99), without=["norm"])
    yield "keeps nothing of model 0", lambda: pcb.pcb_weights(vectors(2, 99), ratio=0.001)
    yield r"shape \(N, D\)", lambda: pcb.pcb_weights(torch.zeros(4))
    yield "unknown method 'slerp'", lambda: pcb.merge_vectors(vectors(2, 99), "slerp")
    yield "nothing to merge", lambda: pcb.average(base, good, exclude=["a", "b"])
    yield "needs \\(52,\\)", lambda: pcb.unflatten(torch.zeros(51), base)
    yield "outside the bounds", lambda: pcb.search_lambdas(sum, 2, (0.8, 1.3), init=2.0)
    yield "budget", lambda: pcb.search_lambdas(sum, 2, budget=0)
    yield "neither a folder nor a hub id", lambda: pcb.merge_checkpoints("/no/such/folder", ["a/b"], "out")


@pytest.mark.parametrize("message, call", list(bad_inputs()))
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types(nets):
    base, tuned = nets[0].state_dict(), nets[1].state_dict()
    for call in (lambda: pcb.pcb_merge(base, tuned), lambda: pcb.average(base, [tuned], exclude="head"),
                 lambda: pcb.merge_models(nets[0], nets[1]), lambda: pcb.merge_checkpoints("a", "b", "c")):
        with pytest.raises(TypeError):
            call()
    untied = {**tuned, "out.weight": tuned["out.weight"] + 1}
    with pytest.raises(ValueError, match="one tensor in the base and differ in model 0"):
        pcb.average(base, [untied])
    with pytest.warns(UserWarning, match="exclude matches no key: haed"):
        pcb.average(base, [tuned], exclude=["haed"])


def test_search_lambdas():
    target, calls = np.array([0.9, 1.2, 1.0]), []

    def score(x):
        calls.append(x)
        return -((x - target) ** 2).sum() if x[0] < 1.25 else float("nan")

    found = pcb.search_lambdas(score, 3, budget=100, seed=3)
    assert len(calls) == 100 and (calls[0] == 1).all() and all(((0.8 <= x) & (x <= 1.3)).all() for x in calls)
    assert np.abs(found - target).max() < 0.03
    assert (pcb.search_lambdas(score, 3, budget=100, seed=3) == found).all()
    assert len(pcb.search_lambdas(lambda x: x.sum(), 1, budget=1)) == 1


transformers = pytest.importorskip("transformers")


def gpt2s(count, dtype=torch.float32):
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    models = [transformers.GPT2LMHeadModel(config).to(dtype) for _ in range(count)]
    for i, m in enumerate(models):
        m.load_state_dict(models[0].state_dict())
        with torch.no_grad():
            for p in m.parameters():
                p.add_(0.02 * i * torch.randn_like(p))
    return models


@pytest.mark.parametrize("dtype, shard", [(torch.float32, "50GB"), (torch.float32, "40KB"), (torch.bfloat16, "30KB")])
def test_checkpoints(tmp_path, dtype, shard):
    models = gpt2s(4, dtype)
    for i, m in enumerate(models):
        m.save_pretrained(tmp_path / str(i), max_shard_size=shard if i != 2 else "50GB")
    out = pcb.merge_checkpoints(tmp_path / "0", [tmp_path / str(i) for i in (1, 2, 3)], tmp_path / "new" / "merged", lambdas=1.1, exclude=["wpe"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    expected = pcb.merge_models(models[0], models[1:], lambdas=1.1, exclude=["wpe"])
    assert loaded.dtype == dtype and loaded.lm_head.weight is loaded.transformer.wte.weight
    for (name, a), (_, b) in zip(loaded.named_parameters(), expected.named_parameters()):
        assert torch.equal(a, b), name
    assert torch.equal(loaded.transformer.wpe.weight, models[0].transformer.wpe.weight)
    assert sorted(p.name for p in tmp_path.glob("new/*")) == ["merged"]
    with pytest.raises(FileExistsError):
        pcb.merge_checkpoints(tmp_path / "0", [tmp_path / "1"], out)


def test_broken_checkpoints(tmp_path):
    models = gpt2s(2)
    for i, m in enumerate(models):
        m.save_pretrained(tmp_path / str(i), max_shard_size="40KB")
    next((tmp_path / "1").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="shards that do not exist"):
        pcb.merge_checkpoints(tmp_path / "0", [tmp_path / "1"], tmp_path / "out")
    (tmp_path / "2").mkdir()
    with pytest.raises(ValueError, match="save_pretrained"):
        pcb.merge_checkpoints(tmp_path / "0", [tmp_path / "2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    models[1].half().save_pretrained(tmp_path / "3")
    with pytest.raises(ValueError, match="dtypes differ"):
        pcb.merge_checkpoints(tmp_path / "0", [tmp_path / "3"], tmp_path / "out")
    pcb.merge_checkpoints(tmp_path / "0", [tmp_path / "3"], tmp_path / "out", mixed_dtypes=True)


def test_memory_does_not_grow_with_models(tmp_path):
    "Merging seven checkpoints of 12 MB takes hardly more memory than merging two."
    from safetensors.torch import save_file

    for i in range(8):
        (tmp_path / str(i)).mkdir()
        save_file({f"w{k}": torch.randn(1500, 1000) for k in range(2)}, tmp_path / str(i) / "model.safetensors", metadata={"format": "pt"})
    code = ("import resource, torch; torch.set_num_threads(1); from researchkit.reuse.pcb_merging import merge_checkpoints\n"
            "for n in (2, 7):\n    merge_checkpoints('0', [str(i) for i in range(1, 1 + n)], f'out{n}', form='root')\n"
            "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    two, seven = map(int, out.split())
    assert seven < two + 60


peft = pytest.importorskip("peft")


def lora_model(targets=("c_attn", "wte"), **options):
    model = None
    for i, name in enumerate(("one", "two", "three")):
        config = peft.LoraConfig(r=2 + i, lora_alpha=8, target_modules=list(targets), **options)
        if model is None:
            model = peft.get_peft_model(gpt2s(1)[0], config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1)
    return model.eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["pcb", "ties", "average"])
def test_lora_dense(method, tmp_path):
    model = lora_model()
    layers = {k: m for k, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    assert len(layers) == 3
    deltas = torch.stack([torch.cat([m.get_delta_weight(a).detach().ravel() for m in layers.values()]) for a in model.peft_config])
    expected = pcb.merge_vectors(deltas, method)
    merged = pcb.merge_adapters(model, method=method)
    change = torch.cat([(merged.get_submodule(k).weight - m.get_base_layer().weight).ravel() for k, m in layers.items()])
    torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-4)
    assert list(model.peft_config) == ["one", "two", "three"] and not isinstance(merged, peft.PeftModel)
    model = lora_model(["c_attn", "c_fc"])  # a change of the tied embedding would change the output layer too
    merged = pcb.merge_adapters(model, method=method)
    errors = pcb.add_merged_adapter(model, method=method, rank=32)
    assert max(errors.values()) < 1e-5 and model.active_adapter == "merged"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4, rtol=1e-3)
    assert 0 < max(pcb.add_merged_adapter(model, ["one", "two"], "low", method, rank=1).values()) < 1


def test_adapter_folders(tmp_path):
    model = lora_model()
    gpt2s(1)[0].save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path)
    out = pcb.merge_checkpoints(tmp_path / "base", [tmp_path / n for n in ("one", "two", "three")], tmp_path / "merged", lambdas=[1, 2, 1])
    loaded = transformers.GPT2LMHeadModel.from_pretrained(out)
    expected = pcb.merge_adapters(model, lambdas=[1, 2, 1])
    torch.testing.assert_close(loaded.transformer.h[0].attn.c_attn.weight, expected.transformer.h[0].attn.c_attn.weight)
    with pytest.raises(ValueError, match="some folders hold adapters"):
        pcb.merge_checkpoints(tmp_path / "base", [tmp_path / "one", tmp_path / "base"], tmp_path / "other")


def test_ia3():
    model = None
    for name in ("one", "two", "three"):
        config = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[])
        if model is None:
            model = peft.get_peft_model(gpt2s(1)[0], config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ia3_l" in name:
                p.add_(0.1 * torch.randn_like(p))
    layers = [m for m in model.get_base_model().modules() if hasattr(m, "ia3_l")]
    tv = torch.stack([torch.cat([m.ia3_l[a].detach().ravel() - 1 for m in layers]) for a in ("one", "two", "three")])
    assert set(pcb.add_merged_adapter(model, ratio=0.5).values()) == {0.0}
    torch.testing.assert_close(torch.cat([m.ia3_l["merged"].detach().ravel() for m in layers]) - 1, pcb.merge_vectors(tv, ratio=0.5), atol=1e-6, rtol=1e-4)
    dense, ids = pcb.merge_adapters(model, ["one", "two", "three"], ratio=0.5), torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(dense(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-3)


def test_bad_adapters():
    model = lora_model()
    with pytest.raises(TypeError, match="PeftModel"):
        pcb.merge_adapters(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown adapters: four; the model has: one, two, three"):
        pcb.merge_adapters(model, ["one", "four"])
    with pytest.raises(ValueError, match="use merge_adapters"):
        pcb.merge_models(model, [model])
    with pytest.raises(ValueError, match="already has an adapter 'two'"):
        pcb.add_merged_adapter(model, adapter_name="two")
    with pytest.raises(ValueError, match="rank must be at least 1"):
        pcb.add_merged_adapter(model, rank=0)
    assert list(model.peft_config) == ["one", "two", "three"]


def test_full_profile(tmp_path):
    "The notebook at `full`, with tiny BERT classifiers and tables of sentences on disk."
    import nbformat
    import papermill

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "meal", "the", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for i in range(2):
        tuned = transformers.BertForSequenceClassification(config)
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            for p in tuned.parameters():
                p.add_(0.05 * torch.randn_like(p))
        tuned.save_pretrained(tmp_path / f"tuned{i}")
        (tmp_path / f"data{i}").mkdir()
        with open(tmp_path / f"data{i}" / "test.csv", "w", newline="") as f:
            out = csv.writer(f)
            out.writerow(["text", "label"])
            out.writerows([f"the {'good' if k % 2 else 'bad'} {'film' if k % 3 else 'meal'}", k % 2] for k in range(60))
    papermill.execute_notebook(ROOT / "nbs/reuse/pcb_merging.ipynb", tmp_path / "out.ipynb", cwd=tmp_path, progress_bar=False, parameters=dict(
        profile="full", seeds=[0], model=str(tmp_path / "base"), finetuned=[str(tmp_path / f"tuned{i}") for i in range(2)],
        dataset=[str(tmp_path / f"data{i}") for i in range(2)]))
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs]
    records = [o["data"]["application/vnd.researchkit.record+json"] for o in outputs if "application/vnd.researchkit.record+json" in o.get("data", {})]
    assert len(records) == 1 and records[0]["profile"] == "full" and [c["id"] for c in records[0]["claims"]] == [f"C{i}" for i in range(1, 8)]
