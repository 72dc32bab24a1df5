"""Impossible languages: the rules against hand-made and NumPy oracles, the measures against transformers, and the `full` path on tiny files."""
import itertools
import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from researchkit.core.errors import DataError
from researchkit.language.impossible_languages import (LANGUAGES, NAMES, TaggedWord, agrees, even_odd, holm, hop, interchange,
                                                       language_model, length_batches, load_texts, log_perplexity, make_language,
                                                       marker_contrast, ngram_log_perplexity, pack, patched_logits, relabel, residual_layers,
                                                       reverse, sentence_perplexity, shuffle_deterministic, shuffle_local,
                                                       shuffle_nondeterministic, tag_stanza, tag_words, train_language, train_tokenizer, undo)

IDS = st.lists(st.integers(0, 999), min_size=1, max_size=60)
S, P = 1000, 1001


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny():
    return language_model(50, seed=0, n_embd=16, n_head=2)


class Words:
    "One token per word; the same word has the same id in every instance."

    def encode(self, text):
        return [sum(ord(c) * 31**i for i, c in enumerate(word)) % 900 for word in text.split()]


def ids_of(text):
    markers = {"S": S, "P": P}
    return [markers[word] if word in markers else Words().encode(word)[0] for word in text.split()]


FINITE = "Mood=Ind|Number={}|Person=3|Tense=Pres|VerbForm=Fin"


def tagged(text):
    "'she read/reads/S it' -> TaggedWord; lemma/word/number marks a verb."
    out = []
    for word in text.split():
        lemma, _, rest = word.partition("/")
        if rest:
            form, number = rest.split("/")
            out.append(TaggedWord(form, lemma, FINITE.format({"S": "Sing", "P": "Plur"}[number])))
        else:
            out.append(TaggedWord(word))
    return out


# Shuffles

@given(IDS, st.integers(0, 100))
def test_deterministic_is_numpys_shuffle_of_a_list(ids, seed):
    expected = list(ids)
    np.random.default_rng(seed).shuffle(expected)
    before = list(ids)
    assert shuffle_deterministic(ids, seed) == expected
    assert ids == before


@given(IDS, st.integers(1, 70), st.integers(0, 5))
def test_local_shuffles_each_window_with_a_new_generator(ids, window, seed):
    expected = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        np.random.default_rng(seed).shuffle(part)
        expected += part
    assert shuffle_local(ids, window, seed) == expected
    if window >= len(ids):
        assert shuffle_local(ids, window) == shuffle_deterministic(ids, 0)


@given(IDS)
def test_even_odd(ids):
    assert even_odd(ids) == [t for i, t in enumerate(ids) if i % 2 == 0] + [t for i, t in enumerate(ids) if i % 2]


def test_nondeterministic_uses_one_generator_for_the_corpus():
    corpus = [list(range(n)) for n in (5, 1, 7, 12, 400, 3)]
    rng, expected = np.random.default_rng(0), []
    for line in corpus:
        shuffled = list(line)
        rng.shuffle(shuffled)
        if 2 <= len(line) <= 350:
            expected.append(shuffled)
    assert LANGUAGES["shuffle_nondeterministic"](corpus) == expected
    assert LANGUAGES["shuffle_nondeterministic"](corpus) == expected, "each pass starts anew"
    assert LANGUAGES["shuffle_nondeterministic"](corpus, seed=1) != expected


def test_sentences_of_one_length_share_a_permutation():
    language = LANGUAGES["shuffle_deterministic57"]
    a, b = language([list(range(9)), list(range(100, 109))])
    assert [x + 100 for x in a] == b


# All languages

@given(st.sampled_from([name for name in NAMES if not name.startswith("hop")]), st.lists(IDS, min_size=1, max_size=5), st.integers(0, 3))
def test_tokens_stay_and_can_be_put_back(name, corpus, seed):
    language = make_language(name, marker_id=S) if name.startswith("reverse") else LANGUAGES[name]
    rng = language.rng(seed)
    for ids in corpus:
        out = language.transform(ids, rng)
        assert all(isinstance(token, int) for token in out)
        assert sorted(out) == sorted([*ids, *language.marker_ids])
        if language.inverse is None:
            with pytest.raises(ValueError, match="cannot be undone"):
                undo(out, language)
        else:
            assert undo(out, language) == ids


def test_the_registry_has_the_fifteen_languages():
    assert len(NAMES) == 15 and list(LANGUAGES) == list(NAMES)
    assert {name: language.marker_ids for name, language in LANGUAGES.items() if language.marker_ids} == {
        **{f"reverse_{kind}": (50257,) for kind in ("control", "partial", "full")}, **{f"hop_{kind}": (50257, 50258) for kind in ("control", "tokens4", "words4")}}
    assert LANGUAGES["shuffle_control"].transform([3, 1, 2], None) == [3, 1, 2]
    assert LANGUAGES["shuffle_local5"].transform(list(range(12)), None) == shuffle_local(list(range(12)), 5)


def test_relatives_by_argument():
    line = list(range(20))
    assert make_language("shuffle_local", window=7).transform(line, None) == shuffle_local(line, 7)
    assert make_language("shuffle_deterministic", seed=3).transform(line, None) == shuffle_deterministic(line, 3)
    assert make_language("shuffle_deterministic84").transform(line, None) == shuffle_deterministic(line, 84)
    assert make_language("hop_tokens", window=2, tokenizer=Words(), marker_id=(S, P)).transform(tagged("it be/is/S a very nice day"), None) == ids_of("it be a very S nice day")


@given(st.integers(3, 60), st.integers(0, 9), IDS)
def test_relabelling_is_a_bijection(vocabulary, seed, ids):
    ids = [i % vocabulary for i in ids]
    language = relabel(vocabulary, seed, fixed=[0])
    out = language.transform(ids, None)
    assert undo(out, language) == ids
    assert [token == 0 for token in out] == [token == 0 for token in ids]
    assert len(set(out)) == len(set(ids)) and language.transform([ids[0]], None) == out[:1]


# Reversals

@given(IDS, st.integers(0, 50))
def test_reversals_agree_about_the_marker(ids, seed):
    control, partial, full = (reverse(ids, np.random.default_rng(seed), S, mode) for mode in ("control", "partial", "full"))
    at = control.index(S)
    assert at == np.random.default_rng(seed).choice(len(ids) + 1)
    assert [t for t in control if t != S] == ids
    assert full == control[::-1] and full.index(S) == len(ids) - at
    assert partial == control[: at + 1] + control[at + 1 :][::-1]


def test_marker_positions_coincide_over_a_corpus():
    corpus = [list(range(n)) for n in (4, 9, 2, 30, 11)]
    control, partial, full = (make_language(f"reverse_{mode}", marker_id=S)(corpus) for mode in ("control", "partial", "full"))
    rng = np.random.default_rng(21)
    assert [line.index(S) for line in control] == [line.index(S) for line in partial] == [rng.choice(len(line) + 1) for line in corpus]
    assert full == [line[::-1] for line in control]


# Hops

@pytest.mark.parametrize("n, unit, text, expected, complete", [
    (0, "token", "He clean/cleans/S his very messy bookshelf .", "He clean S his very messy bookshelf .", True),
    (4, "token", "He clean/cleans/S his very messy bookshelf .", "He clean his very messy bookshelf S .", True),
    (4, "word", "He clean/cleans/S his very messy bookshelf .", "He clean his very messy bookshelf S .", True),
    (4, "token", "They clean/clean/P it , and then go", "They clean it , and then P go", True),
    (4, "word", "They clean/clean/P it , and then go", "They clean it , and then go P", True),
    (4, "token", "She sing/sings/S well .", "She sing well . S", False),
    (4, "word", "She sing/sings/S well .", "She sing well S .", False),
    (4, "word", "nothing to see here", "nothing to see here", False),
    (4, "word", "It be/is/S a b c d , e", "It be a b c d S , e", True),
    (0, "word", "It be/is/S a day .", "It be S a day .", True),
])
def test_hops_by_hand(n, unit, text, expected, complete):
    ids, found = hop(tagged(text), n, unit, Words(), S, P)
    assert ids == ids_of(expected) and found is complete


def test_clitics_are_joined_to_their_verb():
    words = tagged("They do/do/P n't see it .")
    assert hop(words, 0, "token", Words(), S, P)[0] == ids_of("They don't P see it .")
    assert hop(words, 2, "word", Words(), S, P)[0] == ids_of("They don't see it P .")


def test_two_verbs_keep_their_markers():
    words = tagged("It be/is/S a b c d and they have/have/P e f g h .")
    assert hop(words, 4, "word", Words(), S, P)[0] == ids_of("It be a b c d S and they have e f g h P .")
    assert hop(words, 0, "token", Words(), S, P)[0] == ids_of("It be S a b c d and they have P e f g h .")


def test_stanzas_dictionaries_do_as_well():
    words = tagged("He clean/cleans/S his very messy bookshelf .")
    assert hop([word._asdict() for word in words], 4, "word", Words(), S, P) == hop(words, 4, "word", Words(), S, P)


@given(st.lists(st.sampled_from(["a", "big", "dog", ",", ".", "n't", "be/is/S", "have/have/P", "'s"]), min_size=1, max_size=14), st.integers(0, 5))
def test_hop_languages_differ_only_in_where_markers_stand(parts, n):
    words = tagged(" ".join(parts))
    verbs = sum(map(agrees, words))
    outs = [hop(words, k, unit, Words(), S, P) for k, unit in ((0, "token"), (n, "token"), (n, "word"))]
    bare = [[t for t in ids if t not in (S, P)] for ids, _ in outs]
    assert bare[0] == bare[1]
    for ids, complete in outs:
        assert sum(t in (S, P) for t in ids) == verbs
        assert not (complete and verbs == 0)


def test_a_real_tokenizer_gives_the_same_tokens_around_the_markers():
    text = ["The value is not in the list that has it.", "They are in the list and it is there."] * 20
    tokenizer = train_tokenizer(text, 300)
    words = tag_words(text[0])
    for k, unit in ((0, "token"), (4, "token"), (4, "word")):
        ids, _ = hop(words, k, unit, tokenizer, S, P)
        spoken = tokenizer.decode([t for t in ids if t not in (S, P)])
        assert spoken == "The value be not in the list that have it ."


def test_hop_corpora_share_their_sentences():
    corpus = [tagged(t) for t in ("It be/is/S a b c d .", "It be/is/S a .", "no verb here .", "word", "They have/have/P a , b c d")]
    outs = [make_language(f"hop_{kind}", tokenizer=Words(), marker_id=(S, P))(corpus) for kind in ("control", "tokens4", "words4")]
    assert [len(out) for out in outs] == [3, 3, 3], "complete hops and the sentence without a verb; no single token"
    bare = [[sorted(t for t in ids if t not in (S, P)) for ids in out] for out in outs]
    assert bare[0] == bare[1] == bare[2]


def test_tags():
    found = {w.text: w for w in tag_words("It doesn't say that they have it, so the list has to be made.") if agrees(w)}
    assert {word: (w.lemma, "Sing" in w.feats) for word, w in found.items()} == {"does": ("do", True), "have": ("have", False), "has": ("have", True)}
    assert not any(map(agrees, tag_words("You have to do it, and I can have it.")))
    assert [w.text for w in tag_words("It's a well-known p-value of 0.5.")] == ["It", "'s", "a", "well-known", "p-value", "of", "0.5", "."]


def test_stanza_is_used_if_it_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "stanza", None)
    with pytest.raises(ImportError, match="pip install stanza"):
        tag_stanza(["It is."])
    word = types.SimpleNamespace(text="is", lemma="be", feats=FINITE.format("Sing"))
    doc = types.SimpleNamespace(sentences=[types.SimpleNamespace(words=[word])] * 2)
    monkeypatch.setitem(sys.modules, "stanza", types.SimpleNamespace(Pipeline=lambda *a, **k: lambda text: doc))
    assert [len(s) for s in tag_stanza(["Is. Is."])] == [1, 1] and agrees(tag_stanza(["x"])[0][0])


# Bad input

@pytest.mark.parametrize("call, error, words", [
    (lambda: shuffle_local([1, 2], 0), ValueError, "window=0"),
    (lambda: shuffle_nondeterministic([1, 2], None), TypeError, "Generator"),
    (lambda: reverse([1, 2], None, 9, "full"), TypeError, "Generator"),
    (lambda: reverse([1, 2], np.random.default_rng(0), 9, "ful"), ValueError, "full"),
    (lambda: reverse([1, 2], np.random.default_rng(0), -1, "full"), ValueError, "marker_id=-1"),
    (lambda: LANGUAGES["reverse_full"].transform([1, 2], None), TypeError, "Generator"),
    (lambda: LANGUAGES["shuffle_nondeterministic"].transform([1, 2], None), TypeError, "Generator"),
    (lambda: make_language("shuffle_lokal3"), ValueError, "shuffle_local3"),
    (lambda: make_language("shuffle_local", window=0), ValueError, "at least 1"),
    (lambda: make_language("shuffle_local"), ValueError, "window="),
    (lambda: make_language("shuffle_deterministic"), ValueError, "seed="),
    (lambda: make_language("hop_local3"), ValueError, "unknown language"),
    (lambda: make_language("shuffle_tokens4"), ValueError, "unknown language"),
    (lambda: make_language("hop_tokens"), ValueError, "window="),
    (lambda: make_language("reverse_full", marker_id=-2), ValueError, "-2"),
    (lambda: LANGUAGES["hop_words4"].transform(tagged("it be/is/S so"), None), ValueError, "tokenizer="),
    (lambda: hop([], -1, "token", Words(), S, P), ValueError, "n=-1"),
    (lambda: hop([], 4, "letter", Words(), S, P), ValueError, "unit"),
    (lambda: hop([], 4, "word", Words(), S, S), ValueError, "different"),
    (lambda: hop([TaggedWord("is", "be", "Person=3|Tense=Pres|VerbForm=Fin|Number=Dual")], 0, "token", Words(), S, P), ValueError, "neither"),
    (lambda: undo([1, 2], make_language("reverse_full", marker_id=9)), ValueError, "no marker 9"),
    (lambda: train_tokenizer(["a"], 100), ValueError, "257"),
    (lambda: ngram_log_perplexity([[1, 2]], [[1]], 5), ValueError, "fewer than two"),
    (lambda: ngram_log_perplexity([[1, 2]], [[1, 2]], 5, order=3), ValueError, "order=3"),
])
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("call, words", [
    (lambda m: sentence_perplexity(m, [], 0), "empty batch"),
    (lambda m: sentence_perplexity(m, [[1, 2], [3]], 0), "1 tokens"),
    (lambda m: sentence_perplexity(m, [[]], 0), "0 tokens"),
    (lambda m: sentence_perplexity(m, [[1, 50]], 0), "token id 50"),
    (lambda m: marker_contrast(m, [[1, 2, 3]], [60]), "vocabulary"),
    (lambda m: marker_contrast(m, [[1, 2, 3]], [9]), "no marker"),
    (lambda m: marker_contrast(m, [[9, 2, 3]], [9]), "context"),
    (lambda m: marker_contrast(m, [[1, 2, 9]], [9]), "follows"),
    (lambda m: interchange(m, [1, 2], [1, 2, 3], 0, 0, (1, 2)), "lengths"),
    (lambda m: interchange(m, [1, 2], [1, 3], 2, 0, (1, 2)), "layer 2"),
    (lambda m: interchange(m, [1, 2], [1, 3], 0, 2, (1, 2)), "position 2"),
    (lambda m: interchange(m, [1, 2], [1, 3], 0, 1, (1, 50)), "token id 50"),
    (lambda m: interchange(m, [1, 2], [1, 3], 0, 1, (1,)), "1 targets"),
    (lambda m: train_language(m, [[1]], steps=1, tokens_per_batch=8), "0 sentences"),
    (lambda m: train_language(m, [[1, 2]], steps=0, tokens_per_batch=8), "steps=0"),
])
def test_bad_input_to_models(tiny, call, words):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        call(tiny)
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert not any(block._forward_hooks for block in residual_layers(tiny))


# Measures

@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(0, 49), min_size=2, max_size=30), min_size=1, max_size=6), st.integers(0, 49))
def test_perplexity_equals_the_loss_of_transformers(tiny, lines, pad):
    with torch.no_grad():
        logits = [tiny(torch.tensor([line])).logits[0, :-1] for line in lines]
    expected = torch.stack([torch.nn.functional.cross_entropy(z, torch.tensor(line[1:])).exp() for z, line in zip(logits, lines)])
    torch.testing.assert_close(sentence_perplexity(tiny, lines, pad), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_perplexity(tiny, lines, batch_size=2), expected.log().numpy(), rtol=1e-4, atol=1e-5)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    model = language_model(37)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.testing.assert_close(sentence_perplexity(model, [[1, 2, 3], [4, 5]], 0), torch.full((2,), 37.0))


def test_measures_leave_the_model_as_it_was(tiny):
    tiny.train()
    tiny.config.resid_pdrop = 0.0
    sentence_perplexity(tiny, [[1, 2]], 0)
    assert tiny.training and all(p.grad is None for p in tiny.parameters())
    tiny.eval()


def brute_bigram(train, test, vocabulary):
    out = []
    flat = list(itertools.chain(*train))
    for line in test:
        total = 0.0
        for h, w in zip(line, line[1:]):
            follow = [b for part in train for a, b in zip(part, part[1:]) if a == h]
            p1 = (flat.count(w) + 1) / (len(flat) + vocabulary)
            total -= math.log((follow.count(w) + len(set(follow)) * p1) / (len(follow) + len(set(follow))) if follow else p1)
        out.append(total / (len(line) - 1))
    return out


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5).filter(lambda c: any(len(x) > 1 for x in c)),
       st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=9), min_size=1, max_size=4))
def test_bigram_against_brute_force(train, test):
    np.testing.assert_allclose(ngram_log_perplexity(train, test, 6), brute_bigram(train, test, 6), rtol=1e-9)


def test_unigram_does_not_care_about_order():
    train = [[1, 2, 3], [3, 3, 0]]
    a, b = (ngram_log_perplexity(train, [[0, *tail]], 5, 1) for tail in ([1, 2, 3], [3, 2, 1]))
    np.testing.assert_allclose(a, b)


def test_marker_contrast_is_zero_on_average_for_exchangeable_tokens():
    "A model without positions, attention or preference knows nothing: marker and follower are equally surprising."
    model = language_model(20)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.testing.assert_close(marker_contrast(model, [[1, 18, 2, 3], [4, 5, 19, 6]], (18, 19)), torch.zeros(2))


def test_marker_contrast_uses_the_first_marker(tiny):
    line = [1, 2, 48, 3, 49, 4]
    with torch.no_grad():
        logp = tiny(torch.tensor([line])).logits[0, 1].log_softmax(-1)
    expected = (logp[48] - logp[3]) / math.log(2)
    torch.testing.assert_close(marker_contrast(tiny, [line, [5, 6, 7, 49, 8]], (48, 49))[0], expected)


def test_contrast_rises_when_the_rule_is_learned():
    lines = [[int(a), int(b), 30 + int(b) % 2, int(a), int(b)] for a, b in np.random.default_rng(0).integers(0, 30, size=(60, 2))]
    model = language_model(32, n_embd=16, n_head=2)
    before = marker_contrast(model, lines, (30, 31)).mean()
    train_language(model, lines, steps=40, tokens_per_batch=150)
    assert marker_contrast(model, lines, (30, 31)).mean() > before + 2


def test_interchange_identities(tiny):
    base, source = torch.randint(0, 48, (2, 5, 6), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        plain = [tiny(torch.tensor(lines)).logits[:, -1] for lines in (base, source)]
    for layer, pos in itertools.product(range(2), range(6)):
        torch.testing.assert_close(patched_logits(tiny, base, base, layer, pos), plain[0])
    torch.testing.assert_close(patched_logits(tiny, base, source, 1, 5), plain[1])
    torch.testing.assert_close(patched_logits(tiny, base, source, 1, 2), plain[0])
    expected = (plain[1][:, 7] > plain[1][:, 3]).float().mean().item()
    assert interchange(tiny, base, source, 1, 5, (3, 7)) == pytest.approx(expected)
    assert interchange(tiny, base[0], source[0], 1, 5, (3, 7)) in (0.0, 1.0)
    assert not any(block._forward_hooks for block in residual_layers(tiny))


def test_other_architectures():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
    common = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, bos_token_id=None, eos_token_id=None)
    for model in (LlamaForCausalLM(LlamaConfig(**common)), GPTNeoXForCausalLM(GPTNeoXConfig(**common))):
        model.eval()
        with torch.no_grad():
            source = model(torch.tensor([[4, 5, 6]])).logits[:, -1]
        torch.testing.assert_close(patched_logits(model, [[1, 2, 3]], [[4, 5, 6]], 1, 2), source)
        rows = train_language(model, [[1, 2, 3, 4]] * 8, steps=4, tokens_per_batch=16, eval_every=2)
        assert [row["step"] for row in rows] == [2, 4] and rows[1]["loss"] < rows[0]["loss"]


def test_holm():
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.02]), [0.02])


# Training

@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(40, 200))
def test_batches_hold_every_sequence_once_and_keep_to_the_size(lengths, tokens):
    batches = length_batches(lengths, tokens, np.random.default_rng(0))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= tokens for batch in batches)


def test_batches_are_the_same_for_all_languages_of_a_family():
    lines = [np.random.default_rng(n).integers(0, 99, size=n).tolist() for n in range(5, 40)]
    shuffled = LANGUAGES["shuffle_deterministic21"](lines)
    assert length_batches([len(x) for x in lines], 90, np.random.default_rng(3)) == length_batches([len(x) for x in shuffled], 90, np.random.default_rng(3))


def test_accumulation_gives_the_same_step():
    lines = [np.random.default_rng(n).integers(0, 20, size=8).tolist() for n in range(12)]
    a, b = (language_model(20, n_embd=16, n_head=2) for _ in range(2))
    train_language(a, lines, steps=3, tokens_per_batch=96)
    train_language(b, lines, steps=3, tokens_per_batch=96, accumulate=4)
    for x, y in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-3)


def test_relabelling_types_and_embeddings_together_changes_nothing():
    lines = [np.random.default_rng(n).integers(0, 30, size=9).tolist() for n in range(30)]
    language = relabel(30, seed=2)
    a, b = (language_model(30, n_embd=16, n_head=2) for _ in range(2))
    rename = torch.tensor(language.transform(list(range(30)), None))
    with torch.no_grad():
        b.transformer.wte.weight[rename], b.lm_head.weight[rename] = a.transformer.wte.weight.clone(), a.lm_head.weight.clone()
    train_language(a, lines, steps=5, tokens_per_batch=90)
    train_language(b, language(lines), steps=5, tokens_per_batch=90)
    np.testing.assert_allclose(log_perplexity(a, lines), log_perplexity(b, language(lines)), rtol=2e-3)


def test_same_seed_same_weights_and_global_generator_untouched():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = language_model(20, seed=1), language_model(20, seed=1), language_model(20, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_order_is_learned_and_disorder_is_not():
    "The paper's point in a second: a cycle is learned, its random shuffle is not."
    lines = [[(start + i) % 10 for i in range(10)] for start in range(10)] * 3
    final = {}
    for name in ("shuffle_control", "shuffle_nondeterministic"):
        model = language_model(10, n_embd=16, n_head=2)
        train_language(model, LANGUAGES[name](lines), steps=60, tokens_per_batch=100)
        final[name] = log_perplexity(model, LANGUAGES[name](lines[:10], seed=9)).mean()
    assert final["shuffle_control"] < 0.3 < 1.5 < final["shuffle_nondeterministic"]


# The path of profile full, on tiny files

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    texts = [f"The {a} of the {b} is not in the {c} that it has. They are there." for a, b, c in itertools.product(["name", "list", "value"], repeat=3)]
    corpus = folder / "babylm"
    corpus.mkdir()
    (corpus / "one.train").write_text("\n".join(texts[:20]) + "\n\n" + texts[0], encoding="utf-8")
    (corpus / "two.train").write_text("\n".join(texts[20:]), encoding="utf-8")
    (corpus / "ignored.json").write_text("{}")
    tokenizer = train_tokenizer(texts, 300)
    checkpoint = folder / "gpt2-tiny"
    tokenizer.save_pretrained(checkpoint)
    language_model(300, n_embd=16, n_head=2, n_positions=32).save_pretrained(checkpoint)
    return corpus, checkpoint, texts


def test_texts_come_from_a_folder_or_a_file(files, tmp_path):
    corpus, _, texts = files
    found = load_texts(corpus)
    assert found[:2] == ["The name of the name is not in the name that it has.", "They are there."]
    assert len(found) == len(texts) + 1 == len(set(found))
    assert load_texts(corpus / "two.train")[0].startswith("The value of the name")
    for path in (tmp_path, tmp_path / "absent.txt"):
        with pytest.raises(DataError, match="BabyLM"):
            load_texts(path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        load_texts(tmp_path)


def test_configuration_and_tokenizer_from_a_checkpoint(files, monkeypatch):
    corpus, checkpoint, _ = files
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    V, EOS = len(tokenizer), tokenizer.eos_token_id
    model = language_model(V + 1, pretrained_config=str(checkpoint), seed=3)
    assert model.config.n_embd == 16 and model.config.scale_attn_by_inverse_layer_idx and model.config.vocab_size == V + 1
    lines = tokenizer(load_texts(corpus), add_special_tokens=False)["input_ids"]
    chunks = pack(make_language("reverse_full", marker_id=V)(lines), EOS, 32)
    assert {len(chunk) for chunk in chunks} == {32}
    rows = train_language(model, chunks, steps=2, tokens_per_batch=128, lr=6e-4, embedding_lr=1.0, accumulate=2, dtype=torch.bfloat16, eval_every=1,
                          callback=lambda step, learner: dict(perplexity=float(np.exp(log_perplexity(learner, lines[:4]).mean()))))
    assert [row["step"] for row in rows] == [1, 2] and all(row["perplexity"] > 1 for row in rows)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="no configuration at"):
        language_model(10, pretrained_config=str(checkpoint / "absent"))


def test_packing_drops_the_ragged_rest():
    assert pack([[1, 2], [3, 4, 5], [6]], 0, 4) == [[1, 2, 0, 3], [4, 5, 0, 6]]
    assert pack([[1]], 0, 10) == []


def test_nothing_warns(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = language_model(50, n_embd=16, n_head=2)
        train_language(model, [[1, 2, 3]] * 4, steps=3, tokens_per_batch=6)
        sentence_perplexity(model, [[1, 2], [1, 2, 3]], 0)
