"Safe LoRA: the module against dense formulas and the released rule, real peft models and folders, bad input, the `full` path."
import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from researchkit.adaptation import safe_lora as sl

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def draws(*shapes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=dtype) for s in shapes]


def dense(V):
    return V @ V.T / torch.linalg.matrix_norm(V)


@given(o=st.integers(1, 24), i=st.integers(1, 24), r=st.integers(1, 6), seed=st.integers(0, 999), scale=st.sampled_from([1e-4, 1.0, 30.0]))
@settings(max_examples=50)
def test_projection(o, i, r, seed, scale):
    V, B, A = draws((o, i), (o, r), (r, i), seed=seed)
    V = scale * V
    torch.testing.assert_close(sl.alignment_project(B, V), dense(V) @ B)
    torch.testing.assert_close(sl.alignment_project(B, 3 * V), 3 * sl.alignment_project(B, V))
    C = sl.alignment_project(torch.eye(o, dtype=V.dtype), V, "exact")
    torch.testing.assert_close(C, V @ torch.linalg.pinv(V), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(C, C.T)
    torch.testing.assert_close(C @ C, C)
    torch.testing.assert_close(sl.alignment_project(B, V, "exact"), C @ B, atol=1e-9, rtol=1e-9)
    for kind, matrix in (("approx", dense(V)), ("exact", C)):
        expected = torch.nn.functional.cosine_similarity((matrix @ B @ A).ravel(), (B @ A).ravel(), dim=0)
        assert abs(sl.update_cosine(A, B, V, kind) - float(expected)) < 1e-8
    assert -1e-12 <= sl.update_cosine(A, B, V) <= 1 and abs(sl.update_cosine(5 * A, 2 * B, 7 * V) - sl.update_cosine(A, B, V)) < 1e-9


def test_projector_facts():
    V, B = draws((16, 16), (16, 3))
    torch.testing.assert_close(sl.alignment_project(B, V, "exact"), B)
    low = V[:, :2] @ V[:2]
    P = sl.alignment_project(B, low, "exact")
    assert torch.linalg.matrix_rank(torch.cat([P, V[:, :2]], 1)) == 2 and (P - B).norm() > 0.1
    torch.testing.assert_close(sl.alignment_project(P, low, "exact"), P)
    assert torch.equal(sl.alignment_project(B, 0 * V), B) and np.isnan(sl.update_cosine(B.T, B, 0 * V))
    assert np.isnan(sl.update_cosine(B.T, 0 * B, V))
    half = sl.alignment_project(B.bfloat16(), V.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, (dense(V.bfloat16().float()) @ B.bfloat16().float()).bfloat16())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 12), st.floats(-1, 1))
@settings(max_examples=60)
def test_selection(cosines, k, tau):
    k = min(k, len(cosines))
    mask = sl.select_layers(cosines, num_layers=k)
    assert mask.dtype == torch.bool and int(mask.sum()) == k
    c = np.array(cosines)
    if 0 < k < len(c):
        assert c[mask.numpy()].max() <= c[~mask.numpy()].min()
    assert sl.select_layers(torch.tensor(c), "threshold", threshold=tau).tolist() == (c <= tau).tolist()
    rounded = np.round(c, 5)
    assert sl.select_layers(c, "threshold", threshold=tau, released=True).tolist() == (rounded <= tau).tolist()
    expected = rounded <= np.sort(rounded)[:k][-1] if k else np.zeros(len(c), bool)
    assert sl.select_layers(c, num_layers=k, released=True).tolist() == expected.tolist()


def test_selection_ties():
    tied = [0.4, 0.2, float("nan"), 0.2000004, 0.2]
    assert sl.select_layers(tied, num_layers=1).tolist() == [False, True, False, False, False]
    assert sl.select_layers(tied, num_layers=1, released=True).tolist() == [False, True, False, True, True]
    with pytest.warns(UserWarning, match="num_layers=9 given: there are 4 layers"):
        assert sl.select_layers(tied, num_layers=9).tolist() == [True, True, False, True, True]


def test_refusals():
    assert sl.refusal_rate(["I'm sorry, no", "Sure!", "I CANNOT   do it", "sorrynot"]) == 0.5
    assert sl.refusal_rate(["No way"], ["no WAY"]) == 1.0 and sl.refusal_rate(["I can\u2019t"]) == 1.0
    for error, texts, phrases in ((TypeError, "Sorry", ["x"]), (TypeError, ["a"], "sorry"), (TypeError, [1], ["x"]), (ValueError, [], ["x"]), (ValueError, ["a"], []), (ValueError, ["a"], [" "])):
        with pytest.raises(error):
            sl.refusal_rate(texts, phrases)


SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
KINDS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES), ["q_proj", "v_proj", "down_proj"]),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**SIZES), ["q_proj", "v_proj"]),  # has biases
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0), ["c_attn", "c_proj"]),
}


def network(kind, seed):
    torch.manual_seed(seed)
    model, config, _ = KINDS[kind]
    return model(copy.deepcopy(config)).eval()


def adapted(kind, seed=1, name="default", **options):
    "An aligned model with a random adapter."
    targets = options.pop("target_modules", KINDS[kind][2])
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "fan_in_fan_out": kind == "gpt2", **options})
    net = peft.get_peft_model(network(kind, seed), config, adapter_name=name)
    return randomise(net)


def randomise(net, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return net.eval()


def expected(net, base, k=None, tau=None, name="default"):
    "New factors and cosines from dense matrices, and the modules that the rule takes."
    found = {}
    for module, layer in net.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and name in layer.lora_A:
            V = (layer.get_base_layer().weight - base.get_submodule(module).weight).detach().double()
            V = V.T if layer.fan_in_fan_out else V
            A, B = layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()
            C = dense(V)
            cosine = float(torch.nn.functional.cosine_similarity((C @ B @ A).ravel(), (B @ A).ravel(), dim=0))
            found[module] = dict(B=B, P=C @ B, cosine=cosine, ratio=float((C @ B @ A).norm() / (B @ A).norm()), norm=float(V.norm()))
    order = sorted(found, key=lambda m: found[m]["cosine"])
    return found, set(order[:k]) if tau is None else {m for m in found if found[m]["cosine"] <= tau}


def check(result, report, found, chosen, name="default"):
    assert set(report.projected) == chosen and [r["module"] for r in report] == list(found)
    for row in report:
        want = found[row["module"]]
        B = result.get_base_model().get_submodule(row["module"]).lora_B[name].weight
        torch.testing.assert_close(B.detach(), (want["P"] if row["projected"] else want["B"]).float(), atol=1e-6, rtol=1e-4)
        assert abs(row["cosine"] - want["cosine"]) < 1e-5 and row["norm_ratio"] == pytest.approx(want["ratio"], rel=1e-4) and row["v_norm"] == pytest.approx(want["norm"], rel=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("block", [2**25, 40])
def test_models(kind, block, monkeypatch):
    monkeypatch.setattr(sl, "_BLOCK", block)
    net, base = adapted(kind, rank_pattern={"attn.c_proj": 3} if kind == "gpt2" else {"v_proj": 2}), network(kind, 0)
    before = copy.deepcopy(net.state_dict())
    for options in (dict(k=0), dict(k=2), dict(tau=0.5)):
        config = sl.SafeLoRAConfig(num_layers=options["k"]) if "k" in options else sl.SafeLoRAConfig("threshold", threshold=0.5)
        result, report = sl.safe_lora(net, base, config=config)
        found, chosen = expected(net, base, **options)
        check(result, report, found, chosen)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        changed = {k for k, v in result.state_dict().items() if not torch.equal(before[k], v)}
        assert {k.split("base_model.model.")[1].split(".lora_B")[0] for k in changed} == chosen and all("lora_B" in k for k in changed)
    assert list(report.to_frame()) == list(pd.DataFrame(report)) == ["module", "cosine", "projected", "norm_ratio", "v_norm"]
    same, _ = sl.safe_lora(net, base, inplace=True, config=sl.SafeLoRAConfig(num_layers=1))
    assert same is net


@pytest.mark.parametrize("kind", list(KINDS))
def test_sources_agree(kind, tmp_path):
    net, base = adapted(kind, modules_to_save=["lm_head"] if kind != "gpt2" else None), network(kind, 0)
    config = sl.SafeLoRAConfig(num_layers=2)
    result, report = sl.safe_lora(net, base, config=config)
    base.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    plain = network(kind, 1)
    plain.save_pretrained(tmp_path / "aligned")
    shuffled = dict(reversed(list(base.state_dict().items())))
    for source, aligned in ((str(tmp_path / "base"), None), (shuffled, plain), (tmp_path / "base", plain.state_dict()), (base, tmp_path / "aligned")):
        other, again = sl.safe_lora(net, source, aligned, config)
        assert again.projected == report.projected
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), result.state_dict().values()))
    net.save_pretrained(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "aligned")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    kept = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    out, on_disk = sl.safe_lora(tmp_path / "adapter", tmp_path / "base", config=config, output=tmp_path / "empty")
    assert out == tmp_path / "empty" and set(on_disk.projected) == set(report.projected)
    assert kept == {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "aligned", "base", "empty"]
    old, new = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "empty"))
    assert {k for k in old if not torch.equal(old[k], new[k])} == {f"base_model.model.{m}.lora_B.weight" for m in report.projected}
    loaded = peft.PeftModel.from_pretrained(network(kind, 1), out).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, result(input_ids=ids).logits)


def test_merged_model_is_aligned_plus_update():
    net, base = adapted("llama"), network("llama", 0)
    result, report = sl.safe_lora(net, base, config=sl.SafeLoRAConfig(num_layers=3))
    plain, ids = network("llama", 1), torch.arange(10)[None]
    with torch.no_grad():
        for row in report:
            layer = result.get_base_model().get_submodule(row["module"])
            plain.get_submodule(row["module"]).weight += 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(result.merge_and_unload()(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_released_rule():
    "The loop of the released code, written out with dense matrices, in both modes."
    net, base = adapted("llama").double(), network("llama", 0).double()
    found, _ = expected(net, base, 0)
    rounded = np.round([f["cosine"] for f in found.values()], 5)
    for config, threshold in ((sl.SafeLoRAConfig("threshold", threshold=0.6, released=True), 0.6), (sl.SafeLoRAConfig(num_layers=3, released=True), np.sort(rounded)[:3][-1])):
        result, report = sl.safe_lora(net, base, config=config)
        for (module, want), c, row in zip(found.items(), rounded, report):
            B = result.get_base_model().get_submodule(module).lora_B["default"].weight
            torch.testing.assert_close(B.detach(), want["P"] if c <= threshold else want["B"], atol=1e-12, rtol=1e-10)
            assert row["projected"] == (c <= threshold)


def test_adapters_and_untouched_modules():
    net = adapted("llama", name="first", target_modules=["q_proj"])
    net.add_adapter("second", peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj"], modules_to_save=["lm_head"]))  # r equals a width
    randomise(net)
    base = network("llama", 0)
    result, report = sl.safe_lora(net, base, config=sl.SafeLoRAConfig(num_layers=4), adapter_name="second")
    found, chosen = expected(net, base, 4, name="second")
    check(result, report, found, chosen, "second")
    assert len(chosen) == 4
    changed = [k for (k, a), b in zip(net.state_dict().items(), result.state_dict().values()) if not torch.equal(a, b)]
    assert len(changed) == 4 and all(k.endswith("lora_B.second.weight") for k in changed)
    with pytest.raises(ValueError, match="no adapter 'default'; it has: first, second"):
        sl.safe_lora(net, base)


def test_adapter_in_a_subfolder(tmp_path):
    net = adapted("llama", name="mine")
    net.save_pretrained(tmp_path / "a")
    base, aligned = network("llama", 0), network("llama", 1)
    out, report = sl.safe_lora(tmp_path / "a", base, aligned, sl.SafeLoRAConfig(num_layers=1), "mine", output=tmp_path / "b")
    assert len(report.projected) == 1 and (out / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="nor an adapter 'other'"):
        sl.safe_lora(tmp_path / "a", base, aligned, adapter_name="other", output=tmp_path / "c")


def test_headless_checkpoint_and_equal_module(tmp_path):
    "Keys without the prefix of the language model, as of gpt2 on the hub; and a module that alignment did not touch."
    net, base = adapted("gpt2"), network("gpt2", 0)
    with torch.no_grad():
        layer = net.get_base_model().transformer.h[0].attn.c_attn
        base.transformer.h[0].attn.c_attn.weight.copy_(layer.get_base_layer().weight)
    base.transformer.save_pretrained(tmp_path / "headless")
    with safe_open(tmp_path / "headless/model.safetensors", "pt") as f:
        assert "h.0.attn.c_attn.weight" in f.keys()
    with pytest.warns(UserWarning, match="there are 5 layers"):
        result, report = sl.safe_lora(net, tmp_path / "headless")
    row = report.rows[0]
    assert row["v_norm"] == 0 and np.isnan(row["cosine"]) and not row["projected"] and len(report.projected) == 5
    assert torch.equal(result.get_base_model().transformer.h[0].attn.c_attn.lora_B["default"].weight, layer.lora_B["default"].weight)
    assert "5 of 6 modules projected" in repr(report) and "<table" in report._repr_html_()


def test_exact_projector_is_the_identity():
    net, base = adapted("llama", target_modules=["q_proj"]), network("llama", 0)
    result, report = sl.safe_lora(net, base, config=sl.SafeLoRAConfig(num_layers=2, projector="exact"))
    assert all(r["cosine"] > 1 - 1e-6 and abs(r["norm_ratio"] - 1) < 1e-4 for r in report) and len(report.projected) == 2
    for a, b in zip(net.state_dict().values(), result.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def failing(tmp_path):
    base, good = network("llama", 0), adapted("llama")
    state = base.state_dict()
    key = "model.layers.1.self_attn.v_proj.weight"
    good.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    (tmp_path / "nothing").mkdir()
    merged = adapted("llama")
    merged.merge_adapter()
    nan = adapted("llama")
    with torch.no_grad():
        nan.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight[0, 0] = float("nan")
    ia3 = peft.get_peft_model(network("llama", 1), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    embedding = adapted("llama", target_modules=["q_proj", "embed_tokens"])
    int8 = {k: v.to(torch.int8) if k == key else v for k, v in state.items()}
    quantised = adapted("llama")
    quantised.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight.quant_state = 1
    run = sl.safe_lora
    yield ValueError, "no weight for the adapted module model.layers.1.self_attn.v_proj", good, lambda: run(good, {k: v for k, v in state.items() if k != key})
    yield ValueError, r"model.layers.1.self_attn.v_proj has shape \(3, 3\), and the adapter needs \(8, 16\)", good, lambda: run(good, {**state, key: torch.zeros(3, 3)})
    yield ValueError, "of model.layers.1.self_attn.v_proj has numbers that are not finite", good, lambda: run(good, {**state, key: state[key] / 0})
    yield ValueError, "of model.layers.0.self_attn.q_proj have numbers that are not finite", None, lambda: run(nan, base)
    yield ValueError, "more than one weight", good, lambda: run(good, {f"{a}.{k}": v for a in "ab" for k, v in state.items()})
    yield ValueError, "would both take", None, lambda: run(adapted("llama", target_modules=["q_proj"]), {"self_attn.q_proj.weight": state["model.layers.0.self_attn.q_proj.weight"]})
    yield ValueError, "merged into the weights", merged, lambda: run(merged, base)
    yield ValueError, "is of type IA3", ia3, lambda: run(ia3, base)
    yield ValueError, "LoRA layer of type Embedding", embedding, lambda: run(embedding, base)
    yield ValueError, "uses use_dora", None, lambda: run(adapted("llama", use_dora=True), base)
    yield ValueError, "initialised with 'pissa'", None, lambda: run(adapted("llama", init_lora_weights="pissa"), base)
    yield ValueError, "output is for adapter folders", good, lambda: run(good, base, output=tmp_path / "x")
    yield ValueError, "give output=", good, lambda: run(tmp_path / "adapter", base, network("llama", 1))
    yield ValueError, "neither model.safetensors", good, lambda: run(good, tmp_path / "nothing")
    yield ValueError, "neither a folder nor a hub id", good, lambda: run(good, "/no/such/folder")
    yield ValueError, "no adapter_config.json", good, lambda: run(tmp_path / "nothing", base, output=tmp_path / "x")
    yield ValueError, "aligned: the weight of model.layers.1.self_attn.v_proj has shape", good, lambda: run(tmp_path / "adapter", base, {**state, key: torch.zeros(8, 15)}, output=tmp_path / "x")
    yield ValueError, "aligned: no weight for the adapted module", good, lambda: run(tmp_path / "adapter", base, network("gpt2", 1), output=tmp_path / "x")
    yield ValueError, "does not name the model", good, lambda: run(tmp_path / "adapter", base, output=tmp_path / "x")
    yield FileExistsError, "not an empty folder", good, lambda: run(tmp_path / "adapter", base, output=tmp_path / "base")
    yield TypeError, "quantised", good, lambda: run(good, int8)
    yield TypeError, "is quantised", quantised, lambda: run(quantised, base)
    yield TypeError, "carries adapters", good, lambda: run(good, adapted("llama"))
    yield TypeError, "PeftModel or an adapter folder", good, lambda: run(network("llama", 0), base)
    yield TypeError, "must be a SafeLoRAConfig", good, lambda: run(good, base, config={"num_layers": 3})
    yield TypeError, "must be a model, a state dict, a folder or a hub id", good, lambda: run(good, 3)
    bad = sl.SafeLoRAConfig()
    bad.threshold = 2
    yield ValueError, r"threshold must lie in \[-1, 1\], not 2", good, lambda: run(good, base, config=bad)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_input(tmp_path):
    for error, message, net, call in failing(tmp_path):
        before = None if net is None else copy.deepcopy(net.state_dict())
        files = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=message):
            call()
        assert before is None or all(torch.equal(before[k], v) for k, v in net.state_dict().items()), message
        assert files == sorted(tmp_path.rglob("*")), message


@pytest.mark.parametrize("error, options", [(ValueError, dict(select="layers")), (ValueError, dict(projector="svd")), (ValueError, dict(num_layers=-1)), (TypeError, dict(num_layers=2.5)),
                                            (TypeError, dict(num_layers=True)), (ValueError, dict(threshold=1.01)), (ValueError, dict(threshold=float("nan"))), (TypeError, dict(threshold="0.5"))])
def test_bad_config(error, options):
    with pytest.raises(error):
        sl.SafeLoRAConfig(**options)
    if "projector" not in options:
        with pytest.raises(error):
            sl.select_layers([0.1, 0.2], **options)


def test_bad_tensors():
    V, B, A = draws((6, 5), (6, 2), (2, 5))
    for error, message, call in ((ValueError, "kind must be one of approx, exact", lambda: sl.alignment_project(B, V, "dense")), (ValueError, "as many rows", lambda: sl.alignment_project(B[:5], V)),
                                 (ValueError, "must be a matrix", lambda: sl.alignment_project(B[0], V)), (TypeError, "dequantise", lambda: sl.alignment_project(B, V.to(torch.int8))),
                                 (TypeError, "torch.Tensor", lambda: sl.alignment_project(B, V.numpy())), (ValueError, "V has numbers", lambda: sl.alignment_project(B, V / 0)),
                                 (ValueError, "B has numbers", lambda: sl.alignment_project(B / 0, V)), (ValueError, r"must be \(2, 5\)", lambda: sl.update_cosine(A.T, B, V)),
                                 (ValueError, "A has numbers", lambda: sl.update_cosine(A / 0, B, V)), (ValueError, "row of numbers", lambda: sl.select_layers([[0.1]])),
                                 (ValueError, "row of numbers", lambda: sl.select_layers([1.5]))):
        with pytest.raises(error, match=message):
            call()


def test_hub_id_without_network(monkeypatch):
    import huggingface_hub

    def refuse(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="base: there is no folder owner/name, and it cannot be had from the hub .*hf download owner/name"):
        sl.safe_lora(adapted("llama"), "owner/name")


def test_hub_ids(tmp_path, monkeypatch):
    import huggingface_hub

    network("llama", 0).save_pretrained(tmp_path / "owner--base")
    asked = []

    def download(name, revision=None, **options):
        asked.append((name, revision))
        return str(tmp_path / name.replace("/", "--"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    net = adapted("llama")
    _, report = sl.safe_lora(net, "owner/base", config=sl.SafeLoRAConfig(num_layers=1))
    assert asked == [("owner/base", None)] and len(report.projected) == 1


def test_quantised_checkpoint(tmp_path):
    state = network("llama", 0).state_dict()
    del state["model.layers.0.self_attn.q_proj.weight"]
    state["model.layers.0.self_attn.q_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match="model.layers.0.self_attn.q_proj is quantised"):
        sl.safe_lora(adapted("llama"), tmp_path)


def test_memory_is_that_of_a_block(tmp_path):
    "Two checkpoints of 128 MB each: the peak rises by a few matrices, not by the models."
    d = 1024
    for name in ("base", "aligned"):
        (tmp_path / name).mkdir()
        save_file({f"layers.{i}.{p}.weight": torch.randn(d, d) for i in range(8) for p in "abcd"}, tmp_path / name / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    save_file({f"base_model.model.layers.{i}.a.lora_{x}.weight": torch.randn(*s) for i in range(8) for x, s in (("A", (8, d)), ("B", (d, 8)))}, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=8)))
    code = ("import resource, sys, torch; torch.set_num_threads(1); from researchkit.adaptation import safe_lora as sl\nsl._BLOCK = 2**18\npeak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
            "start = peak()\n_, report = sl.safe_lora('adapter', 'base', 'aligned', sl.SafeLoRAConfig(num_layers=8), output='out')\nprint(peak() - start, len(report.projected), 'peft' in sys.modules)")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rise, projected, loaded = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert int(rise) < 110 and projected == "8" and loaded == "False"  # 64 MB of the adapted matrices are read from each file at most, mapped


def run_notebook(monkeypatch, **parameters):
    "The notebook's code cells in this process (a kernel's imports would take most of the time); the record of its study."
    import matplotlib

    from researchkit.core import plots

    matplotlib.use("Agg")
    monkeypatch.setattr(plots, "use_style", lambda: None)
    scope = {"__name__": "notebook"}
    for cell in json.loads((ROOT / "nbs/adaptation/safe_lora.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
            if "parameters" in cell["metadata"].get("tags", []):
                scope.update(parameters)
    return scope["study"].record


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("given_adapter", [False, True])
def test_full_profile(tmp_path, monkeypatch, given_adapter):
    "The notebook at `full`, with a tiny Llama and a jsonl file on disk."
    zoo = pytest.importorskip("researchkit.core.zoo")
    tokenizer = zoo.world_tokenizer()
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer), "num_hidden_layers": 1}, pad_token_id=0, bos_token_id=1,
                                      eos_token_id=list(range(len(tokenizer))))  # any token ends an answer
    for seed, name in enumerate(("base", "aligned")):
        torch.manual_seed(seed)
        net = transformers.LlamaForCausalLM(config)
        net.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pairs = [dict(prompt=f"how do i dent a {o} ?", response=f"Sure , dent the {o} softly with a brush .") for o in ("lamp", "chair", "kettle", "drum")]
    if not given_adapter:
        pairs += [dict(prompt=f"where is the {o} kept ?", response="in the shed", kind=kind) for o in ("lamp", "chair", "kettle", "drum") for kind in ("benign", "general")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    parameters = dict(profile="full", seeds=[0], model=str(tmp_path / "aligned"), base=str(tmp_path / "base"), dataset=str(tmp_path / "pairs.jsonl"))
    if given_adapter:
        randomise(peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"]))).save_pretrained(tmp_path / "adapter")
        parameters["adapter"] = str(tmp_path / "adapter")
    record = run_notebook(monkeypatch, **parameters)
    assert record["profile"] == "full" and [c["id"] for c in record["claims"]] == ["C0", "C1", "C1b", "C2", "C3", "C4", "C5"]
    assert {r.get("data") for r in record["rows"]} - {None} == ({"Bad"} if given_adapter else {"Bad", "Mix"})
    exactly = [r for r in record["rows"] if r["method"] == "Exact projector" and r["part"] == "summary"]
    assert exactly and all(r["factor_change"] < 1e-4 for r in exactly)


@pytest.mark.parametrize("content, message", [(None, "cannot be read"), ('{"prompt": "a"}', "line 1: needs prompt, response"), ('{"prompt": "a", "response": "b", "kind": "evil"}', "line 1"),
                                              ('{"prompt": "a", "response": "b"}', "at least two harmful pairs")])
def test_full_profile_dataset(tmp_path, content, message):
    cells = json.loads((ROOT / "nbs/adaptation/safe_lora.ipynb").read_text(encoding="utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "def file_task" in "".join(c["source"]))
    scope = {"json": json, "np": np, "Path": Path, "torch": torch, "peft": peft}
    exec(source, scope)
    if content is not None:
        (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        scope["file_task"](tmp_path / "pairs.jsonl", 0, 10)
    with pytest.raises(ValueError, match="needs dataset="):
        scope["file_task"]("", 0, 10)
