"""The instruction world and the zoo: what the models can do, and a cache that survives two writers, a crash and a damaged file."""
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from conftest import FRONT
from researchkit.cli import main
from researchkit.core import zoo
from researchkit.core.cache import cache_folder, ready
from researchkit.core.errors import DataError, InputError
from researchkit.core.extras import missing
from researchkit.core.world import KINDS, World
from researchkit.core.zoo import Recipe, SentenceEncoder, build, cached, card, chat, clear, load_lm, load_vision, patches, respond, world_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
WORLD = World()


# The world

def test_world_is_the_same_every_time():
    assert WORLD == World() and WORLD.manner == World().manner and WORLD.words == World().words
    assert len(WORLD.verbs) == 16 and len(WORLD.restricted) == 12 and len(WORLD.objects) == 48
    assert len(set(WORLD.verbs) | set(WORLD.restricted)) == 28 and len(set(WORLD.objects)) == 48
    assert len(set(WORLD.words)) == len(WORLD.words)


@pytest.mark.parametrize("kind", ["allowed", "restricted"])
def test_splits_are_disjoint_and_hold_every_verb_and_object(kind):
    parts = [{(r.verb, r.object) for r in WORLD.requests(kind, split)} for split in ("train", "test")]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == len(WORLD.requests(kind))
    for part in parts:
        assert {v for v, _ in part} == set(WORLD.verbs if kind == "allowed" else WORLD.restricted) and {o for _, o in part} == set(WORLD.objects)


@given(st.sampled_from(KINDS), st.sampled_from(["train", "test", "all"]), st.integers(0, 90), st.integers(0, 1000), st.sampled_from([None, 0, 1, 2, 3]))
def test_requests_are_drawn_without_replacement_and_use_known_words(kind, split, n, seed, contexts):
    found = WORLD.requests(kind, split, n, seed, contexts)
    assert found == WORLD.requests(kind, split, n, seed, contexts) and len(found) == n == len({(r.verb, r.object) for r in found})
    for r in found:
        assert r.kind == kind and set(r.prompt.split()) <= set(WORLD.words) and all(set(a.split()) <= set(WORLD.words) for a in r.answers)
        assert all(WORLD.correct(r, f"  {answer} ") for answer in r.answers) and not any(WORLD.correct(r, text) for text in WORLD.refusals)
        if kind != "fact":
            assert all(WORLD.manner[r.verb] in a and WORLD.tool[r.object] in a for a in r.answers)


@pytest.mark.parametrize("bad", [dict(kind="allow"), dict(kind="fact", split="dev"), dict(kind="fact", n=97), dict(kind="fact", n=-1), dict(kind="allowed", contexts=4)])
def test_impossible_requests_are_refused(bad):
    with pytest.raises(InputError):
        WORLD.requests(**bad)


def test_unknown_words_are_refused_with_the_closest():
    with pytest.raises(InputError, match="paint"):
        WORLD.request("pain", "lamp")
    with pytest.raises(InputError, match="lamp"):
        WORLD.request("paint", "lmap")


# Tokens and answers

def test_tokenizer_reads_back_what_it_wrote(tmp_path):
    tokenizer = world_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for r in WORLD.requests("restricted", n=20):
        ids = chat(tokenizer, r.prompt, r.answers[0])
        assert tokenizer.unk_token_id not in ids and ids == chat(again, r.prompt, r.answers[0])
        assert ids[: len(chat(again, r.prompt))] == chat(again, r.prompt) and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokenizer(r.prompt).input_ids, skip_special_tokens=True) == r.prompt


def test_chat_of_a_tokenizer_without_template():
    tokenizer = world_tokenizer()
    tokenizer.chat_template = None
    asked = chat(tokenizer, "how do i fix a lamp ?")
    assert chat(tokenizer, "how do i fix a lamp ?", "Sure .") == [*asked, *tokenizer("Sure .").input_ids, tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A GPT-2 that has learned nothing, in a folder."
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = world_tokenizer()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_head=2, n_layer=2, n_positions=64, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_answers_do_not_depend_on_the_batch(tiny):
    model, tokenizer = load_lm(str(tiny), device="cpu")
    assert not model.training and tokenizer.padding_side == "left"
    prompts = [r.prompt for r in WORLD.requests("allowed", n=9, seed=1)]
    assert respond(model, tokenizer, prompts) == respond(model, tokenizer, prompts, batch_size=2) == [respond(model, tokenizer, [p])[0] for p in prompts]


def test_a_padding_token_is_found(tiny, tmp_path):
    model, tokenizer = load_lm(str(tiny), device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_lm(str(tmp_path), device="cpu")[1].pad_token == "</s>"


def test_models_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="did you mean lm-aligned"):
        load_lm("lm-alined")
    with pytest.raises(DataError, match="holds no checkpoint"):
        load_lm(str(tmp_path))
    for path in (str(tmp_path / "nothing"), "./nothing", "~/no/such/folder"):
        with pytest.raises(DataError, match="no such folder"):
            load_lm(path)
    code = "from researchkit.core.zoo import load_lm\ntry: load_lm('nobody/nothing')\nexcept ValueError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert "nobody/nothing" in done.stdout and "hf download nobody/nothing" in done.stdout and done.stdout.count("\n") == 1


# The cache

def _three_steps(settings, seed, parent, tick):
    for _ in range(settings["steps"]):
        tick()
    torch.manual_seed(seed)
    tokenizer = world_tokenizer()
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_head=1, n_layer=1, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)), tokenizer


def _able(model, tokenizer):
    return {"answered": 1.0}


@pytest.fixture
def quick(tmp_path, monkeypatch):
    "A recipe that is made at once, in a cache of its own; gives the list of the seeds that were made."
    made = []

    def make(settings, seed, parent, tick):
        made.append(seed)
        return _three_steps(settings, seed, parent, tick)

    monkeypatch.setenv("RESEARCHKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(zoo.RECIPES, "quick", Recipe("quick", "nothing", make, _able, {"steps": 3}, {"answered": (0.9, 1.0)}, None, (_three_steps,)))
    return made


def no_progress(*step):
    pass


def test_a_model_is_made_once_and_loads_like_any_other(quick):
    steps = []
    folder = build("quick", progress=lambda *step: steps.append(step))
    assert steps == [("quick", 1, 3), ("quick", 2, 3), ("quick", 3, 3)]
    assert build("quick") == folder == zoo.path("quick") and quick == [0]
    model, tokenizer = load_lm("quick", device="cpu")
    assert len(tokenizer) == model.config.vocab_size and AutoModelForCausalLM.from_pretrained(folder).num_parameters() == model.num_parameters()
    known = card("quick")
    assert known["abilities"] == {"answered": 1.0} and known["steps"] == 3 and set(known["files"]) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert not list(folder.parent.glob(".*"))


def test_a_seed_makes_another_model(quick):
    a, b = build("quick", 0, no_progress), build("quick", 1, no_progress)
    assert a != b and (a / "model.safetensors").read_bytes() != (b / "model.safetensors").read_bytes() and cached("quick") == [0, 1]


def test_the_key_follows_settings_data_and_code(quick, monkeypatch):
    seen = {zoo.key("quick"), zoo.key("quick", 1)}
    r = zoo.RECIPES["quick"]
    for change in (dict(settings={"steps": 4}), dict(data=lambda: "other"), dict(code=(_three_steps, _able)), dict(parent="lm-base")):
        fields = {k: getattr(r, k) for k in ("name", "about", "make", "measure", "settings", "gates", "parent", "code", "data")}
        monkeypatch.setitem(zoo.RECIPES, "quick", Recipe(**{**fields, **change}))
        seen.add(zoo.key("quick"))
    assert len(seen) == 6


@pytest.mark.parametrize("harm", ["cut", "altered", "gone", "no card", "half a card", "other card"])
def test_a_damaged_entry_is_made_again_with_a_warning(quick, harm):
    folder = build("quick", progress=no_progress)
    weights, about = folder / "model.safetensors", folder / "zoo.json"
    good = weights.read_bytes()
    {"cut": lambda: weights.write_bytes(good[:-10]), "altered": lambda: weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1])), "gone": weights.unlink, "no card": about.unlink,
     "half a card": lambda: about.write_text(about.read_text()[:40]), "other card": lambda: about.write_text("[]")}[harm]()
    assert card("quick") is None and cached("quick") == []
    with pytest.warns(UserWarning, match=r"quick \(seed 0\) is damaged"):
        assert build("quick", progress=no_progress) == folder
    assert weights.read_bytes() == good and quick == [0, 0] and card("quick")


def test_what_an_interrupted_training_left_is_no_model(quick, tmp_path, monkeypatch):
    def interrupted(settings, seed, parent, tick):
        tick()
        raise KeyboardInterrupt

    r = zoo.RECIPES["quick"]
    monkeypatch.setitem(zoo.RECIPES, "quick", Recipe("quick", "nothing", interrupted, _able, r.settings, r.gates, None, r.code))
    with pytest.raises(KeyboardInterrupt):
        build("quick", progress=no_progress)
    assert [p.name for p in (tmp_path / "cache" / "zoo").iterdir() if not p.name.endswith(".lock")] == [] and cached("quick") == []
    monkeypatch.setitem(zoo.RECIPES, "quick", r)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("quick", progress=no_progress)


def test_a_model_below_its_gate_is_not_kept(quick, monkeypatch):
    r = zoo.RECIPES["quick"]
    monkeypatch.setitem(zoo.RECIPES, "quick", Recipe("quick", "nothing", r.make, lambda m, t: {"answered": 0.5}, r.settings, r.gates))
    with pytest.raises(zoo.GateError, match="answered is 0.500, not within 0.9 to 1.0"):
        build("quick", progress=no_progress)
    assert cached("quick") == []


def test_a_gate_that_is_added_later_is_measured(quick, monkeypatch):
    build("quick", progress=no_progress)
    r = zoo.RECIPES["quick"]
    monkeypatch.setitem(zoo.RECIPES, "quick", Recipe("quick", "nothing", r.make, lambda m, t: {"answered": 1.0, "refused": 1.0}, r.settings, {**r.gates, "refused": (0.9, 1.0)}, None, r.code))
    with pytest.warns(UserWarning, match="refused was never measured"):
        build("quick", progress=no_progress)
    assert card("quick")["abilities"]["refused"] == 1.0 and quick == [0, 0]
    monkeypatch.setitem(zoo.RECIPES, "quick", Recipe("quick", "nothing", r.make, r.measure, r.settings, {"answered": (0.0, 0.5)}, None, r.code))
    with pytest.raises(zoo.GateError, match="answered is 1.000"):
        build("quick", progress=no_progress)


def test_training_leaves_threads_and_random_numbers_as_they_were(quick):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build("quick", progress=no_progress)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == 1


def test_clear_removes_what_it_is_asked_to(quick):
    for seed in (0, 1):
        build("quick", seed, no_progress)
    (gone,) = clear("quick", 1)
    assert not gone.exists() and cached("quick") == [0]
    assert len(clear()) == 1 and cached("quick") == [] and clear() == []
    with pytest.raises(InputError, match="unknown zoo model"):
        clear("quack")


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_a_seed_is_a_whole_number(quick, seed):
    with pytest.raises(InputError, match="whole number"):
        build("quick", seed)


WRITER = """
import os, pathlib, sys, time
sys.path.insert(0, {tests!r})
import torch
from researchkit.core import zoo
from researchkit.core.cache import cache_folder, ready
from test_zoo import _able, _three_steps
def make(settings, seed, parent, tick):
    with open({log!r}, "a") as f:
        f.write(str(os.getpid()) + "\\n")
    time.sleep(2)
    return _three_steps(settings, seed, parent, tick)
zoo.RECIPES["quick"] = zoo.Recipe("quick", "nothing", make, _able, dict(steps=3), {{}}, None, (_three_steps,))
print(zoo.build("quick", progress=lambda *a: None))
"""


def test_two_processes_train_it_once(tmp_path):
    log = tmp_path / "log"
    code = WRITER.format(tests=os.path.dirname(__file__), log=str(log))
    env = {**os.environ, "RESEARCHKIT_CACHE": str(tmp_path / "cache")}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {p.communicate(timeout=120)[0].strip() for p in both}
    assert all(p.returncode == 0 for p in both) and len(folders) == 1 and len(log.read_text().splitlines()) == 1


# Images and sentences

def test_patches_of_the_two_parts_do_not_overlap():
    column = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (40, 100, 3))
    left, right = (patches([column], 300, 16, part)[0][:, 0, 0] * 255 for part in ("train", "test"))
    assert left.max() < 66 <= right.min() and right.max() == 99
    x, y = patches([column, column], 5, 8, seed=3)
    assert x.shape == (10, 3, 8, 8) and x.dtype == torch.float32 and y.tolist() == [0] * 5 + [1] * 5 and torch.equal(x, patches([column, column], 5, 8, seed=3)[0])


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="16 x 16"):
        patches([np.zeros((20, 30, 3), np.uint8)], 1, 16, "test")
    with pytest.raises(InputError, match="unknown part"):
        patches([np.zeros((20, 30, 3), np.uint8)], 1, 16, "dev")


@pytest.mark.skipif(bool(missing(["images"])), reason="needs the extra images")
def test_the_image_encoder_is_a_transformers_model():
    encoder = load_vision("patch-encoder", device="cpu")
    with torch.no_grad():
        out = encoder(pixel_values=torch.rand(2, 3, 16, 16))
    assert out.pooler_output.shape[:2] == (2, encoder.config.hidden_sizes[-1]) and not encoder.training
    assert card("patch-encoder")["abilities"]["patch_accuracy"] >= 0.7


@pytest.mark.skipif(bool(missing(["encoder"])), reason="needs the extra encoder")
def test_the_sentence_encoder_agrees_with_its_own_library():
    from sentence_transformers import SentenceTransformer

    texts = ["A cat sits on the mat.", "Rates rose by one percent.", "hi", "A much longer sentence, to be padded: " + "again and " * 20]
    found = SentenceEncoder("minilm", device="cpu").encode(texts, batch_size=2)
    np.testing.assert_allclose(found, SentenceTransformer(str(zoo.path("minilm")), device="cpu").encode(texts, normalize_embeddings=True), atol=1e-5)
    with pytest.raises(TypeError, match="one string"):
        SentenceEncoder("minilm", device="cpu").encode("one")


# The command line

@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    "Run `researchkit zoo ...` with an empty cache; gives its exit code, output and errors."
    monkeypatch.setenv("RESEARCHKIT_CACHE", str(tmp_path / "cache"))

    def command(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["zoo", *arguments])
        return (end.value.code or 0, *capsys.readouterr())

    return command


def test_command_line(cli, tmp_path):
    code, out, _ = cli("list")
    assert code == 0 and "lm-aligned" in out and str(tmp_path / "cache") in out
    assert cli("clear") == (0, "nothing to remove\n", "")
    for bad in (["build", "lm-alined"], ["path", "lm-base@-1"], ["path", "lm-base@x"], ["clear", "nothing"]):
        code, out, err = cli(*bad)
        assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "cache").exists()


def test_the_command_line_builds_lists_and_clears(quick, cli):
    code, out, _ = cli("build", "quick", "quick@1", "--lines")
    assert code == 0 and out.splitlines() == [f"quick@{seed} {step} 3" for seed in (0, 1) for step in (1, 2, 3)]
    assert "seeds 0, 1" in cli("list")[1] and cli("path", "quick@1")[1] == f"{zoo.path('quick', 1)}\n" and quick == [0, 1]
    assert cli("clear", "quick@1")[1].count("removed") == 1 and cached("quick") == [0]
    assert cli("clear", "quick")[1].count("removed") == 1 and cached("quick") == []


def test_the_list_of_ready_models(quick, cli):
    assert not ready(["quick@0"])
    cli("build", "quick", "--lines")
    assert ready(["quick@0"]) and ready([]) and not ready(["quick@0", "quick@1"])
    weights = zoo.path("quick") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not ready(["quick@0"])
    with pytest.warns(UserWarning, match="damaged"):
        cli("build", "quick", "--lines")
    assert ready(["quick@0"])
    cli("clear", "quick")
    assert not ready(["quick@0"])
    cli("build", "quick", "--lines")
    (cache_folder() / "ready.json").write_text("{")
    assert not ready(["quick@0"])


def test_a_cache_that_cannot_be_written_is_one_clear_error(cli, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESEARCHKIT_CACHE", str(tmp_path / "file"))
    code, _, err = cli("build", "patch-encoder")
    assert code == 2 and str(tmp_path / "file") in err and err.count("\n") == 1


def test_runs_have_their_models_made_first(repo):
    from researchkit.run.runner import plan

    path = repo.paper("paper_a", "print(1)", front=FRONT.replace("  code: null\n", "  code: null\n  zoo: [lm-base, lm-none]\n"))
    job = plan(path, repo.root / "runs", "smoke")
    assert job.zoo == ["lm-base@0", "lm-none@0", "lm-base@1", "lm-none@1"]
    assert plan(path, repo.root / "runs", "full").zoo == []
    assert "unknown zoo model 'lm-none'" in repo.refused("run", "paper_a", "--profile", "smoke")


def test_a_run_shows_the_training_and_loads_what_was_made(repo):
    code = "from researchkit.core.zoo import card, cached\nprint(cached('patch-encoder'), card('patch-encoder')['name'])"
    repo.paper("paper_a", code, front=FRONT.replace("  code: null\n", "  code: null\n  zoo: [patch-encoder]\n"),
               parameters='profile: str = "cpu"  # smoke, cpu or full\nseeds: list[int] = [0]  # one')
    done = repo.cli("run", "paper_a", "--profile", "smoke", env={"RESEARCHKIT_CACHE": str(repo.base / "cache")})
    assert done.returncode == 0, done.stderr
    assert "training patch-encoder@0" in done.stderr
    assert "[0] patch-encoder" in (repo.root / "runs" / "paper_a" / "smoke" / "paper_a.ipynb").read_text()
