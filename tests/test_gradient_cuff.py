"""Gradient Cuff: the judge and the estimate by hand, sampling and the attack against transformers, and the `full` path on a tiny checkpoint."""
import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM,
                          PreTrainedTokenizerFast)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from researchkit.core.errors import DataError
from researchkit.safety import gradient_cuff as cuff_module
from researchkit.safety.gradient_cuff import (REFUSAL_PHRASES, GradientCuff, calibrate_threshold, contains_refusal, decide, embedding_shift, gcg_attack, gcg_suffix,
                                              load_prompts, locate_query, mu_from_embeddings, nucleus, ordinary_tokens, perplexity_filter, query_perplexity,
                                              refusal_gradient_norm, sample_answers, smooth_llm, zeroth_order_gradient)

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "<pad> <s> </s> <unk> <|user|> <|system|> <|end|> how do i paint dent a lamp tent rug ? Sure Sorry , cannot I help be nice the it with brush".split()
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}<|system|> {{ m['content'] }} {% else %}<|user|> {{ m['content'].strip() }} {% endif %}"
            "{% endfor %}<|end|>")


def words_tokenizer(template=TEMPLATE):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<|user|>", "<|system|>", "<|end|>"])
    tokenizer.chat_template = template
    return tokenizer


def llama(seed=0, scale=0.3, **changed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(dict(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=scale,
                                                pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64) | changed))).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


@pytest.fixture(scope="module")
def model():
    return llama()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def says(word):
    return lambda texts: [word in text.split() for text in texts]


# The judge

@pytest.mark.parametrize("text, refused", [
    ("I'm sorry, but no", True), ("Sorry.", True), ("I am sorry", True), ("I apologize for that", True), ("As I cannot", True), ("No, I can't", True),
    ("I am not able to help", True), ("I am unable to", True), ("well, I'm not able to", True), ("I'm unable to", True), ("", False), ("sorry", False), ("i cannot", False),
    ("I can not do that", False), ("Sure, here is", False), ("Es tut mir leid", True), ("Ich kann es nicht", True), ("Förlåt", True), ("jag är ledsen", True), ("Je ne peux pas", True),
    ("je m'excuse", True), ("Je m'excuse", False), ("对不起，", True), ("我无法", True), ("U29ycnk=", True), ("SSBjYW5ub3Q=", True), ("SSBjYW5ub3", False)])
def test_judge(text, refused):
    assert contains_refusal([text]).tolist() == [refused]


def test_judge_lists_and_errors():
    english = REFUSAL_PHRASES[:10]
    assert all(base64.b64encode(phrase.encode()).decode() in REFUSAL_PHRASES for phrase in english)
    found = contains_refusal(["no way", "yes"], ["way"])
    assert found.dtype == bool and found.tolist() == [True, False] and contains_refusal([]).shape == (0,)
    with pytest.raises(TypeError, match="sequence of strings"):
        contains_refusal("Sorry")
    with pytest.raises(TypeError, match="phrases"):
        contains_refusal(["Sorry"], "Sorry")
    with pytest.raises(ValueError, match="every text"):
        contains_refusal(["Sorry"], ["a", ""])


# The estimate

@given(st.integers(0, 99), st.integers(1, 12), st.integers(1, 9), st.floats(0.01, 3))
def test_estimate_is_the_mean_of_differences(seed, P, d, mu):
    rng = np.random.default_rng(seed)
    f0, fj, U = rng.random(), rng.random(P), rng.normal(size=(P, d))
    expected = sum((fj[j] - f0) / mu * U[j] for j in range(P)) / P
    got = zeroth_order_gradient(f0, fj, U, mu)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert got.dtype == np.float64
    np.testing.assert_allclose(zeroth_order_gradient(3 * f0, 3 * fj, U, mu), 3 * got, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(zeroth_order_gradient(1 - f0, 1 - fj, U, mu), -got, rtol=1e-9, atol=1e-9)  # rates in place of losses
    assert not zeroth_order_gradient(f0, np.full(P, f0), U, mu).any()


def test_estimate_of_a_linear_function_is_unbiased():
    rng = np.random.default_rng(0)
    slope, U = rng.normal(size=6), rng.normal(size=(40_000, 6))
    each = (U @ slope)[:, None] * U
    assert (abs(zeroth_order_gradient(1.0, 1.0 + 0.1 * U @ slope, U, 0.1) - slope) < 4 * each.std(0) / 200).all()


@pytest.mark.parametrize("args, message", [((0.0, [1.0], np.ones((1, 2)), 0.0), "above 0"), ((0.0, [1.0], np.ones((1, 2)), float("nan")), "above 0"), ((0.0, [1.0, 2.0], np.ones((1, 2)), 1.0), r"\(2,\)"),
                                           ((0.0, [], np.ones((0, 2)), 1.0), "at least 1"), ((0.0, [1.0], np.ones(1), 1.0), r"\(P, d\)")])
def test_estimate_errors(args, message):
    with pytest.raises(ValueError, match=message):
        zeroth_order_gradient(*args)


def test_shift_moves_the_query_alone():
    query, shifts, before, after = torch.randn(4, 6), torch.randn(3, 6), torch.randn(2, 6), torch.randn(5, 6)
    moved = embedding_shift(query, shifts, before, after)
    expected = torch.stack([torch.cat([before, torch.stack([token + v for token in query]), after]) for v in shifts])
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close(embedding_shift(query, shifts), expected[:, 2:6])
    assert embedding_shift(query.bfloat16(), shifts).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        embedding_shift(query, shifts[:, :5])


# Decisions

@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 4)), min_size=1, max_size=60), st.floats(0.01, 0.6))
def test_calibration_keeps_its_promise(queries, fpr):
    rates, norms = np.array([q[0] for q in queries]) / 10, np.array([float(q[1]) for q in queries])
    stage1 = (rates > 0.5).sum()
    if stage1 == len(rates):
        with pytest.raises(ValueError, match="passes stage 1"):
            calibrate_threshold(rates, norms, fpr)
        return
    if stage1 > int(np.floor(fpr * len(rates) + 1e-9)):
        with pytest.warns(UserWarning, match="stage 1 alone"):
            t = calibrate_threshold(rates, norms, fpr)
        assert t == float("inf") and decide(rates, norms, t).sum() == stage1
        return
    t = calibrate_threshold(rates, norms, fpr)
    assert decide(rates, norms, t).mean() <= fpr + 1e-9
    lower = norms[(rates <= 0.5) & (norms < t)]
    if len(lower):  # the next smaller observed norm would reject too many
        assert decide(rates, norms, lower.max()).mean() > fpr


def test_decisions_are_strict():
    assert decide([0.5, 0.51, 0.6, 0.0, 0.0], [100.0, np.nan, 0.0, 100.1, np.nan], 100).tolist() == [False, True, True, True, False]
    with pytest.raises(ValueError, match="fpr=0"):
        calibrate_threshold([0.0], [1.0], 0)
    with pytest.raises(ValueError, match="one of each"):
        calibrate_threshold([0.0], [1.0, 2.0])


# Where the user's tokens are

def test_locates_the_user_inside_a_template(tokenizer):
    ids, own = locate_query(tokenizer, "  how do i paint a lamp ?\n")
    assert tokenizer.convert_ids_to_tokens(ids) == "<s> <|user|> how do i paint a lamp ? <|end|>".split()
    assert own == [False, False] + [True] * 7 + [False]
    ids, own = locate_query(tokenizer, "paint", system="be nice paint")
    assert tokenizer.convert_ids_to_tokens(ids) == "<s> <|system|> be nice paint <|user|> paint <|end|>".split()
    assert [i for i, mine in enumerate(own) if mine] == [6]
    ids, own = locate_query(tokenizer, "paint", prefix="be nice ", suffix=" ?")
    assert tokenizer.convert_ids_to_tokens(ids) == "be nice paint ?".split() and own == [False, False, True, False]
    assert locate_query(words_tokenizer(None), "a lamp")[1] == [True, True]


def test_locates_with_a_byte_level_tokenizer():
    from tokenizers import decoders, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(["User: how do i paint a lamp? Assistant: sure"] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    for query in ("how do i paint a lamp?", "Ünïcode 对不起", "x"):
        ids, own = locate_query(tokenizer, query, "User: ", "\nAssistant:")
        assert tokenizer.decode(ids) == f"<s>User: {query}\nAssistant:"
        assert tokenizer.decode([i for i, mine in zip(ids, own) if mine]).strip() == query and not own[0]


def test_locates_without_offsets(tokenizer, monkeypatch):
    expected = locate_query(tokenizer, "how do i paint a lamp ?")
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert locate_query(tokenizer, "how do i paint a lamp ?") == expected


def test_location_errors(tokenizer):
    for query, error, message in (("", ValueError, "empty"), (" \n", ValueError, "empty"), (3, TypeError, "string")):
        with pytest.raises(error, match=message):
            locate_query(tokenizer, query)
    with pytest.raises(ValueError, match="fixed text"):
        locate_query(words_tokenizer("{{ bos_token }} nothing"), "paint")
    with pytest.raises(ValueError, match="template"):
        locate_query(tokenizer, "paint", prefix="be ", system="be nice")


# Sampling

@given(st.integers(0, 99), st.sampled_from([0.3, 0.6, 1.0, 2.0]), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_nucleus_is_transformers(seed, temperature, top_p):
    logits = torch.randn(4, 60, generator=generator(seed)) * 4
    probabilities, ids = nucleus(logits, temperature, top_p)
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    torch.testing.assert_close(torch.zeros_like(logits).scatter(-1, ids, probabilities), torch.softmax(warped, -1))


def prompts_of(model, tokenizer, queries):
    "Left-padded embeddings and mask."
    rows = [locate_query(tokenizer, query)[0] for query in queries]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, model.get_input_embeddings()(ids).detach(), mask


QUERIES = ["how do i paint a lamp ?", "a rug", "how do i dent a tent with the brush ?"]


def other(kind):
    torch.manual_seed(0)
    common = dict(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)).eval()
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, **common)).eval()
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **common)).eval()
    return llama()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_sharing_work_changes_no_answer(kind, tokenizer):
    model = other(kind)
    _, embeds, mask = prompts_of(model, tokenizer, QUERIES)
    numbers = torch.rand(3, 25, 6, generator=generator())
    shared = sample_answers(model, embeds, mask, numbers, temperature=1.5)
    assert shared.shape == (3, 25, 6) and len(torch.unique(shared.flatten(0, 1), dim=0)) > 20
    assert torch.equal(shared, sample_answers(model, embeds, mask, numbers, temperature=1.5, share=False))
    for i, query in enumerate(QUERIES):  # padding changes nothing either
        _, alone, full = prompts_of(model, tokenizer, [query])
        assert torch.equal(shared[i], sample_answers(model, alone, full, numbers[i : i + 1], temperature=1.5)[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_greedy_limit_is_generate(kind, tokenizer):
    model = other(kind)
    ids, embeds, mask = prompts_of(model, tokenizer, QUERIES)
    peer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    peer = torch.nn.functional.pad(peer, (0, 6 - peer.shape[1]))
    ours = sample_answers(model, embeds, mask, torch.rand(3, 2, 6, generator=generator()), top_p=1e-6)
    assert torch.equal(ours[:, 0], peer) and torch.equal(ours[:, 1], peer)


def test_sampled_frequencies_are_those_of_generate(model, tokenizer):
    ids, embeds, mask = prompts_of(model, tokenizer, QUERIES[:1])
    torch.manual_seed(0)
    peer = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=True, temperature=1.0, top_p=0.7, top_k=0, num_return_sequences=4000, max_new_tokens=2)
    ours = sample_answers(model, embeds, mask, torch.rand(1, 4000, 2, generator=generator()), temperature=1.0, top_p=0.7)[0]
    counts = [torch.bincount(x[:, 0] * len(WORDS) + x[:, 1], minlength=len(WORDS) ** 2).double() for x in (peer, ours)]
    expected = (counts[0] + counts[1]) / 2
    some = expected > 10
    chi2 = ((counts[0] - counts[1])[some] ** 2 / (2 * expected[some])).sum()
    assert chi2 < some.sum() + 5 * (2 * some.sum()) ** 0.5


def test_a_state_space_model_is_sampled_by_generate(tokenizer):
    model = other("mamba")
    state = torch.get_rng_state()
    guard = GradientCuff(model, tokenizer, n_samples=3, n_directions=2, mu=0.1, max_new_tokens=3, judge=says("Sure"), generator=generator())
    again = GradientCuff(model, tokenizer, n_samples=3, n_directions=2, mu=0.1, max_new_tokens=3, judge=says("Sure"), generator=generator())
    pd.testing.assert_frame_equal(guard.score(QUERIES), again.score(QUERIES))
    assert torch.equal(state, torch.get_rng_state())


# The detector

def guard_of(model, tokenizer, seed=0, **changed):
    options = dict(n_samples=6, n_directions=4, mu=0.5, max_new_tokens=3, judge=says("Sure"), generator=generator(seed))
    return GradientCuff(model, tokenizer, **(options | changed))


def test_score_by_hand(model, tokenizer):
    guard = guard_of(model, tokenizer, temperature=1.5)
    scores = guard.score(QUERIES)
    hand, stream = [], generator()
    U = torch.randn(4, 16, generator=stream)
    torch.testing.assert_close(U, guard.directions_)
    for query in QUERIES:
        numbers = torch.rand(5, 6, 3, generator=stream)
        ids, own = locate_query(tokenizer, query)
        e = model.get_input_embeddings()(torch.tensor(ids)).detach()
        mine = torch.tensor(own)
        rates = []
        for v, u in zip([torch.zeros(16), *(0.5 * U)], numbers):
            moved = torch.where(mine[:, None], e + v, e)
            answers = sample_answers(model, moved[None], torch.ones(1, len(ids), dtype=torch.long), u[None], temperature=1.5)[0]
            rates.append(np.mean([("Sure" in tokenizer.decode(a, skip_special_tokens=True).split()) for a in answers]))
        g = sum((np.array(rates[1 + j]) - rates[0]) / 0.5 * U[j].double().numpy() for j in range(4)) / 4
        hand.append((rates[0], np.linalg.norm(g) if rates[0] <= 0.5 else np.nan))
    np.testing.assert_allclose(scores.to_numpy(), hand, rtol=1e-6)
    assert list(scores.columns) == ["refusal_rate", "grad_norm"] and scores.grad_norm.max() > 0


def test_score_does_not_depend_on_batches_or_neighbours(model, tokenizer):
    whole = guard_of(model, tokenizer, batch_size=1000).score(QUERIES)
    for batch_size in (1, 4, 13, 64):
        pd.testing.assert_frame_equal(whole, guard_of(model, tokenizer, batch_size=batch_size).score(QUERIES))
    pd.testing.assert_frame_equal(whole.head(1), guard_of(model, tokenizer).score(QUERIES[:1]))
    assert guard_of(model, tokenizer).score([]).shape == (0, 2)


def test_template_and_padding_are_never_moved(model, tokenizer, monkeypatch):
    seen, real = [], cuff_module.sample_answers
    monkeypatch.setattr(cuff_module, "sample_answers", lambda model, embeds, mask, *rest: (seen.append((embeds.clone(), mask)), real(model, embeds, mask, *rest))[1])
    guard_of(model, tokenizer, batch_size=1000).refusal_rates(QUERIES, torch.full((1, 16), 7.0))
    (embeds, mask), = seen
    order = sorted(range(3), key=lambda i: len(locate_query(tokenizer, QUERIES[i])[0]))
    weight = model.get_input_embeddings().weight.detach()
    for row, i in enumerate(order):
        ids, own = locate_query(tokenizer, QUERIES[i])
        moved = embeds[row, -len(ids) :] - weight[ids]
        torch.testing.assert_close(moved, torch.tensor(own)[:, None] * torch.full((len(ids), 16), 7.0))
        assert mask[row].sum() == len(ids) and (embeds[row, : -len(ids)] == weight[0]).all()


def test_stages(model, tokenizer):
    refuses = guard_of(model, tokenizer, judge=lambda texts: [True] * len(texts), threshold=1.0)
    scores = refuses.score(QUERIES)
    assert (scores.refusal_rate == 1).all() and scores.grad_norm.isna().all() and refuses.predict(QUERIES).all()
    answers = guard_of(model, tokenizer, judge=lambda texts: [False] * len(texts), threshold=0.0)
    assert (answers.score(QUERIES).grad_norm == 0).all() and not answers.predict(QUERIES).any()  # a norm of 0 is not above 0
    assert refuses.generate(QUERIES, 4) == ["[Gradient Cuff Reject]: I cannot fulfill your request."] * 3
    texts = answers.generate(QUERIES, 4)
    assert len(texts) == 3 and all(isinstance(text, str) and "Reject" not in text for text in texts)
    first = guard_of(model, tokenizer, n_directions=0, threshold=1.0).score(QUERIES)
    assert first.grad_norm.isna().all() and first.refusal_rate.notna().all()


def test_fit(model, tokenizer):
    benign = [f"how do i {verb} a {thing} ?" for verb in ("paint", "help", "dent") for thing in ("lamp", "tent", "rug")]
    guard = guard_of(model, tokenizer, fpr=0.3)
    assert guard.fit(benign) is guard and guard.mu_ == 0.5
    auto = guard_of(model, tokenizer, mu="auto", largest_rate=1.0, fpr=0.3, multiples=(2, 0.5)).fit(benign)
    assert auto.mu_ == pytest.approx(mu_from_embeddings(model, 2)) and auto.sweep_.multiple.tolist() == [0.5, 2]
    quiet = guard_of(model, tokenizer, mu="auto", judge=lambda texts: [False] * len(texts)).fit(benign)
    assert quiet.threshold_ == 0 and quiet.mu_ == pytest.approx(mu_from_embeddings(model, 3))
    with pytest.warns(UserWarning, match="smallest"):
        noisy = guard_of(model, tokenizer, mu="auto", largest_rate=-1.0, fpr=0.3).fit(benign)
    assert noisy.mu_ == pytest.approx(mu_from_embeddings(model, 0.25))


def test_detector_errors(model, tokenizer):
    for changed, message in ((dict(n_samples=0), "n_samples=0"), (dict(n_directions=-1), "n_directions"), (dict(mu=0.0), "mu=0"), (dict(mu="best"), "mu='best'"), (dict(mu=float("inf")), "mu=inf"),
                             (dict(temperature=0.0), "temperature=0"), (dict(top_p=1.5), "top_p=1.5"), (dict(fpr=1.0), "fpr=1"), (dict(batch_size=0), "batch_size=0"), (dict(multiples=()), "multiples")):
        with pytest.raises(ValueError, match=message):
            guard_of(model, tokenizer, **changed)
    guard = guard_of(model, tokenizer)
    with pytest.raises(NotFittedError, match="fit"):
        guard.predict(QUERIES)
    with pytest.raises(NotFittedError, match="auto"):
        guard_of(model, tokenizer, mu="auto").score(QUERIES)
    for queries, error, message in (("how do i", TypeError, "sequence of queries"), (["a lamp", ""], ValueError, "empty")):
        with pytest.raises(error, match=message):
            guard.score(queries)
    with pytest.raises(ValueError, match="none were given"):
        guard.fit([])
    refuses = guard_of(model, tokenizer, judge=lambda texts: [True] * len(texts))
    with pytest.raises(ValueError, match="passes stage 1"):
        refuses.fit(QUERIES)
    assert not hasattr(refuses, "threshold_") and not hasattr(refuses, "mu_")
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        guard.refusal_rates(QUERIES, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="one verdict"):
        guard_of(model, tokenizer, judge=lambda texts: [True]).score(QUERIES)


def test_bfloat16(tokenizer):
    model = llama().bfloat16()
    scores = guard_of(model, tokenizer, threshold=1e9).score(QUERIES)
    assert scores.refusal_rate.between(0, 1).all()
    assert gcg_suffix(model, tokenizer, "a lamp", "Sure", length=2, steps=2, candidates=4, generator=generator())


def test_mu_from_embeddings(model):
    weight = model.get_input_embeddings().weight.detach().numpy()
    assert mu_from_embeddings(model, 2) == pytest.approx(2 * weight.std(ddof=1), rel=1e-5)
    with pytest.raises(ValueError, match="multiple=0"):
        mu_from_embeddings(model, 0)


# The attack

def loss_of(model, tokenizer, text, target):
    ids, wanted = locate_query(tokenizer, text)[0], tokenizer(target, add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(ids) + wanted])
    return model(input_ids=torch.tensor([ids + wanted]), labels=labels).loss.item()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_attack_loss_is_transformers_and_falls(kind, tokenizer):
    model = other(kind)
    targets = ["Sure , it", "I", "Sure"]
    found = gcg_attack(model, tokenizer, QUERIES, targets, length=4, steps=5, candidates=12, generator=generator())
    for query, target, attack in zip(QUERIES, targets, found):
        losses = [loss_of(model, tokenizer, f"{query} {suffix}", target) for suffix in attack.trace]
        assert attack.loss == pytest.approx(losses[-1], rel=1e-4) and attack.suffix == attack.trace[-1] and len(losses) == 6
        assert all(after <= before + 1e-5 for before, after in zip(losses, losses[1:])) and losses[-1] < losses[0]
        for before, after in zip(attack.trace, attack.trace[1:]):
            assert sum(a != b for a, b in zip(before.split(), after.split())) <= 1


def test_attack_gradient_is_autograds_on_the_whole_prompt(model, tokenizer):
    frames = [cuff_module._frame(tokenizer, query, "Sure , it", "", "") for query in QUERIES]
    tails = torch.randint(7, len(WORDS), (3, 1, 4), generator=generator())
    weight = model.get_input_embeddings().weight.detach()
    hot = torch.nn.functional.one_hot(tails, len(WORDS)).float().requires_grad_()
    ours = torch.autograd.grad(cuff_module._target_loss(model, frames, tails, hot).sum(), hot)[0]
    for i, (before, behind, target) in enumerate(frames):
        one = torch.nn.functional.one_hot(tails[i, 0], len(WORDS)).float().requires_grad_()
        embeds = torch.cat([weight[before], one @ weight, weight[behind + target]])[None]
        labels = torch.tensor([[-100] * (len(before) + 4 + len(behind)) + target])
        peer = torch.autograd.grad(model(inputs_embeds=embeds, labels=labels).loss, one)[0]
        torch.testing.assert_close(ours[i, 0], peer, rtol=1e-3, atol=1e-5)


def test_attack_batches_masks_and_stops(model, tokenizer):
    options = dict(length=3, steps=4, candidates=10)
    allowed = ordinary_tokens(tokenizer, ["Paint", "Sure", "sorry"])
    banned = {"paint", "Sure", "Sorry", "<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|system|>", "<|end|>"}
    assert {WORDS[i] for i in (~allowed).nonzero().flatten()} == banned
    whole = gcg_attack(model, tokenizer, QUERIES, ["Sure"] * 3, allowed=allowed, generator=generator(), **options)
    split = gcg_attack(model, tokenizer, QUERIES, ["Sure"] * 3, allowed=allowed, generator=generator(), batch_size=7, **options)
    assert [a.trace for a in whole] == [a.trace for a in split]
    assert not banned & {word for attack in whole for suffix in attack.trace for word in suffix.split()}
    calls = []
    stopped = gcg_attack(model, tokenizer, QUERIES, ["Sure"] * 3, allowed=allowed, generator=generator(), stop=lambda texts: calls.append(texts) or [text.startswith("a rug") for text in texts], **options)
    assert [a.stopped for a in stopped] == [False, True, False] and [len(a.trace) for a in stopped] == [5, 1, 5]
    assert len(calls[0]) == 3 and len(calls[1]) == 2
    suffix = gcg_suffix(model, tokenizer, "a rug", "Sure", 3, 50, 8, stop=lambda text: len(text) > 0, generator=generator())
    assert len(suffix.split()) == 3


def test_attack_errors(model, tokenizer):
    for change, error, message in ((dict(targets=["Sure"]), ValueError, "1 targets"), (dict(steps=0), ValueError, "steps=0"), (dict(allowed=torch.zeros(5)), ValueError, "at least one token"),
                                   (dict(allowed=torch.ones(999)), ValueError, "999"), (dict(queries="a lamp"), TypeError, "one string"), (dict(targets=["", "a", "a"]), ValueError, "no token")):
        with pytest.raises(error, match=message):
            gcg_attack(model, tokenizer, **(dict(queries=QUERIES, targets=["Sure"] * 3, length=2, steps=1, candidates=4) | change))


# Other defences

def test_perplexity(model, tokenizer):
    found = query_perplexity(model, tokenizer, QUERIES, batch_size=2)
    for query, value in zip(QUERIES, found):
        ids, own = locate_query(tokenizer, query)
        labels = torch.tensor([[i if mine else -100 for i, mine in zip(ids, own)]])
        assert value == pytest.approx(model(input_ids=torch.tensor([ids]), labels=labels).loss.exp().item(), rel=1e-4)
    assert perplexity_filter(model, tokenizer, QUERIES, threshold=np.median(found)).sum() == 1
    assert not perplexity_filter(model, tokenizer, QUERIES, benign=QUERIES).any()
    with pytest.raises(ValueError, match="either"):
        perplexity_filter(model, tokenizer, QUERIES)


def test_smooth_llm(model, tokenizer):
    prompts, real = [], cuff_module._refusals
    try:
        cuff_module._refusals = lambda model, tokenizer, given, *rest: (prompts.extend(given), real(model, tokenizer, given, *rest))[1]
        rates = smooth_llm(model, tokenizer, QUERIES, share=0.3, copies=5, judge=says("Sure"), max_new_tokens=2, generator=generator())
    finally:
        cuff_module._refusals = real
    assert rates.shape == (3,) and ((rates * 5).round() == rates * 5).all() and len(prompts) == 15
    for i, (ids, own) in enumerate(prompts):
        original, mine = locate_query(tokenizer, QUERIES[i // 5])
        changed = [a != b for a, b in zip(ids, original)]
        assert own == mine and not any(c and not m for c, m in zip(changed, mine)) and sum(changed) <= max(1, round(0.3 * sum(mine)))
    assert smooth_llm(model, tokenizer, QUERIES, unit="character", judge=lambda texts: [True] * len(texts), max_new_tokens=1, generator=generator()).tolist() == [1, 1, 1]
    for changed, message in ((dict(unit="word"), "token"), (dict(share=0), "share=0"), (dict(copies=0), "copies=0")):
        with pytest.raises(ValueError, match=message):
            smooth_llm(model, tokenizer, QUERIES, **changed)


def test_true_gradient_is_a_finite_difference(model, tokenizer):
    double = other("gpt2").double()  # Llama's norms compute in float32
    sorry = WORDS.index("Sorry")
    found = refusal_gradient_norm(double, tokenizer, QUERIES, [sorry])
    for query, value in zip(QUERIES, found):
        ids, own = locate_query(tokenizer, query)
        e, mine = double.get_input_embeddings()(torch.tensor([ids])).detach(), torch.tensor(own)[:, None]

        def logp(v):
            return torch.log_softmax(double(inputs_embeds=e + mine * v).logits[0, -1], -1)[sorry].item()

        step = 1e-5 * torch.eye(16, dtype=torch.double)
        slope = [(logp(v) - logp(-v)) / 2e-5 for v in step]
        assert value == pytest.approx(np.linalg.norm(slope), rel=1e-3)
    with pytest.raises(ValueError, match="refusal_ids"):
        refusal_gradient_norm(model, tokenizer, QUERIES, [])


# Prompts from files, and the profile full

def test_load_prompts(tmp_path, monkeypatch):
    rows = [dict(prompt="a lamp", kind="benign"), dict(prompt="a tent", kind="jailbreak", attack="gcg")]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    table = load_prompts(file)
    assert table.attack.tolist() == ["", "gcg"] and table.kind.tolist() == ["benign", "jailbreak"]
    pd.DataFrame(rows).to_csv(tmp_path / "q.csv", index=False)
    assert len(load_prompts(tmp_path)) == 4
    file.write_text('{"prompt": "x", "kind": "odd"}')
    with pytest.raises(DataError, match="odd"):
        load_prompts(file)
    file.write_text('{"text": "x"}')
    with pytest.raises(DataError, match="prompt and kind"):
        load_prompts(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        load_prompts(tmp_path / "empty")
    monkeypatch.setattr(cuff_module, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(DataError, match="no-such/set"):
        load_prompts("no-such/set")


def run_notebook(folder, **parameters):
    "Papermill on the notebook, with a cache of its own; the executed notebook or the error's text."
    notebook = Path(__file__).resolve().parents[1] / "nbs" / "safety" / "gradient_cuff.ipynb"
    given = [x for name, value in parameters.items() for x in ("-p", name, str(value))] + ["-y", "seeds: [0]"]
    done = subprocess.run([sys.executable, "-m", "papermill", str(notebook), str(folder / "out.ipynb"), "-k", "python3", "--cwd", str(folder), "--no-progress-bar", *given],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    return done.returncode, (json.loads((folder / "out.ipynb").read_text()) if done.returncode == 0 else done.stderr)


def test_full_runs_with_a_tiny_checkpoint_and_a_tiny_file(tmp_path, tokenizer):
    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [dict(prompt=f"how do i {verb} {thing} ?", kind=kind) for kind, verb in (("benign", "paint"), ("benign", "help"), ("harmful", "dent")) for thing in ("a lamp", "the tent")]
    rows += [dict(prompt=f"how do i dent a {thing} ? it nice", kind="jailbreak", attack=attack) for attack, thing in (("GCG", "lamp"), ("PAIR", "tent"))]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out = run_notebook(tmp_path, profile="full", model=tmp_path / "model", dataset=tmp_path / "prompts.jsonl", n_samples=2, n_directions=2)
    assert code == 0, out[-3000:]
    records = [data for cell in out["cells"] for o in cell.get("outputs", []) for mime, data in o.get("data", {}).items() if "record" in mime]
    assert len(records) == 1 and records[0]["profile"] == "full"
    kinds = {row.get("kind") for row in records[0]["rows"]}
    assert {"GCG", "PAIR", "benign", "plain"} <= kinds
    verdicts = {claim["id"]: claim["verdict"] for claim in records[0]["claims"]}
    assert len(verdicts) == 8 and verdicts["C6"] == verdicts["C7"] == verdicts["C8"] == "not tested"
    assert {verdicts[c] for c in ("C1", "C2", "C3", "C4", "C5")} <= {"void", "not tested"}  # a random model refuses nothing: the gate fails
