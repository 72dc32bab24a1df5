"""The embedded data: equal to its peers, the same in every process, and one clear error when something is wrong."""
import gzip
import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import researchkit.core.data as data
from researchkit.core.data import digits, sentences
from researchkit.core.errors import DataError, InputError


def python(code, **environment):
    "Standard output of a fresh interpreter that also fails on any warning or message."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


# Digits

def test_digits_equal_those_of_scikit_learn():
    from sklearn.datasets import load_digits
    X, y = digits()
    peer = load_digits()
    assert X.shape == (1797, 64) and X.dtype == np.float32 and y.dtype == np.int64
    assert X.min() == 0 and X.max() == 1
    np.testing.assert_array_equal(X * 16, peer.data)
    np.testing.assert_array_equal(y, peer.target)


def test_digits_are_a_new_copy_each_time():
    X, y = digits()
    X[:], y[:] = -1, -1
    again, labels = digits()
    assert again.min() == 0 and labels.min() == 0


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "scikit-learn's data file in a folder of the test's own."
    original = (data._folder("sklearn") / data.DIGITS_FILE).read_bytes()
    monkeypatch.setattr(data, "_folder", lambda package: tmp_path)
    path = tmp_path / data.DIGITS_FILE
    path.parent.mkdir(parents=True)
    return path, original


def test_missing_digits_name_the_file(elsewhere):
    path, _ = elsewhere
    with pytest.raises(DataError, match=re.escape(str(path))) as e:
        digits()
    assert isinstance(e.value, ValueError) and "\n" not in str(e.value)


def test_altered_digits_name_the_file_and_the_checksum(elsewhere):
    path, original = elsewhere
    text = gzip.decompress(original)
    path.write_bytes(gzip.compress(text.replace(b"0,0,5,13", b"0,0,6,13", 1)))
    with pytest.raises(DataError, match="altered") as e:
        digits()
    assert str(path) in str(e.value) and data.DIGITS_SHA256 in str(e.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no archive", lambda b: b[:200] + bytes(50) + b[250:]])
def test_damaged_digits_name_the_file(elsewhere, damage):
    path, original = elsewhere
    path.write_bytes(damage(original))
    with pytest.raises(DataError, match=re.escape(str(path))):
        digits()


def test_a_repackaged_archive_is_fine(elsewhere):
    path, original = elsewhere
    path.write_bytes(gzip.compress(gzip.decompress(original), compresslevel=1))
    assert digits()[0].shape == (1797, 64)


# Sentences

@pytest.fixture(scope="module")
def corpus():
    return sentences()


def test_the_corpus_is_large_and_without_duplicates(corpus):
    assert len(corpus) > 10_000
    keys = {re.sub(r"[^a-z]+", " ", text.lower()) for text in corpus}
    assert len(keys) == len(corpus)


def test_every_sentence_is_plain_text(corpus):
    plain = re.compile(r"""[A-Z][A-Za-z0-9 ,;:.'"()!?-]*[.!?][)"]*""")
    odd = [text for text in corpus if not plain.fullmatch(text)]
    assert odd == []
    assert not [text for text in corpus if "  " in text or text.count("(") != text.count(")") or text.count('"') % 2]


@pytest.mark.parametrize("what", [">>>", "`", "://", "www.", "=", "\\", "_", "<", "[", "{", "::", "/", "|", "*", "...", ":math"])
def test_no_code_markup_or_addresses(corpus, what):
    assert [text for text in corpus if what in text] == []


def test_words_are_english(corpus):
    words = [word.strip("()\".,;:!?") for text in corpus for word in text.split()]
    common = {"the", "of", "is", "a", "to", "and", "in", "for", "be", "if"}
    assert sum(word.lower() in common for word in words) > 0.2 * len(words)
    assert sum(word.isalpha() or "-" in word or "'" in word for word in words) > 0.97 * len(words)


@settings(max_examples=15)
@given(st.integers(1, 45), st.integers(0, 45))
def test_lengths_are_respected(low, more):
    found = sentences(low, low + more)
    assert all(low <= len(text.split()) <= low + more for text in found)
    assert found == [text for text in sentences(1, 100) if low <= len(text.split()) <= low + more]


def test_the_list_is_new_each_time(corpus):
    mine = sentences()
    mine.clear()
    assert sentences() == corpus


@pytest.mark.parametrize("bounds", [(0, 5), (6, 5), (-3, 4)])
def test_impossible_bounds(bounds):
    with pytest.raises(InputError, match=f"min_words={bounds[0]}"):
        sentences(*bounds)


def test_order_depends_on_nothing():
    "Neither on the hash seed, nor on the folder, nor on what was imported before."
    digest = "import hashlib; from researchkit.core.data import sentences; print(hashlib.sha256('|'.join(sentences()).encode()).hexdigest())"
    one = python(digest, PYTHONHASHSEED="1")
    other = python("import scipy.stats, pandas, numpy.ma, pydoc_data.topics, os; os.chdir('/'); " + digest, PYTHONHASHSEED="99")
    assert one == other


def test_loading_imports_nothing_heavy_and_writes_nothing(tmp_path):
    code = ("import sys, os; os.chdir(sys.argv[1] if len(sys.argv) > 1 else '.'); import researchkit.core.data as d; d.sentences(); d.digits();"
            "print([m for m in ('torch', 'transformers', 'sklearn', 'scipy', 'pandas') if m in sys.modules], os.listdir('.'))")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[] []" and done.stderr == "", done.stderr


@pytest.mark.parametrize("text, sentence", [
    ("Return a copy of the array.", True),
    ("This is the value that is returned if nothing is found.", True),
    ("Number of clusters to form.", False),  # no verb
    ("If the array is empty.", False),  # no consequence
    ("The shape is (n, 2", False),
    ("The result is x_0 of the list.", False),
    ("the first letter is not a capital in this.", False),
    ("It is described by the authors in.", False),  # a citation was taken out
])
def test_the_sieve(text, sentence):
    assert data._is_sentence(text) is sentence


def test_paragraphs_skip_what_is_no_prose():
    found = list(data._paragraphs("""First line of the
    summary.

    References
    ----------
    .. [1] A. Author, A title is not prose.

    Notes
    -----
    Prose again::

        code = 1

    .. math:: x

       more of it

    .. note::
       A remark counts.

    >>> 1 + 1
    2
    """))
    assert found == ["First line of the summary.", "Prose again::", "A remark counts."]


def test_a_missing_package_is_named():
    with pytest.raises(DataError, match="'not_there_at_all'"):
        data._folder("not_there_at_all")


# Photographs

needs_images = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs the extra images")


@needs_images
def test_photographs_equal_those_of_scikit_image():
    import skimage

    found = data.photographs()
    assert list(found) == [name.split(".")[0] for name in data.PHOTOGRAPHS] and len(found) == 21
    for name in ("astronaut", "coffee", "rocket"):
        np.testing.assert_array_equal(found[name], getattr(skimage.data, name)())
    np.testing.assert_array_equal(found["brick"], np.stack([skimage.data.brick()] * 3, axis=2))
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in found.values())


@needs_images
def test_some_photographs_in_the_order_asked():
    found = data.photographs(["moon", "cell"])
    assert list(found) == ["moon", "cell"]
    found["moon"][:] = 0
    assert data.photographs(["moon"])["moon"].any()
    with pytest.raises(InputError, match="did you mean moon"):
        data.photographs(["mon"])


@needs_images
@pytest.mark.parametrize("harm", ["missing", "altered"])
def test_damaged_photographs_name_the_file(harm, tmp_path, monkeypatch):
    original = (data._folder("skimage") / "data" / "moon.png").read_bytes()
    monkeypatch.setattr(data, "_folder", lambda package: tmp_path)
    (tmp_path / "data").mkdir()
    if harm == "altered":
        (tmp_path / "data" / "moon.png").write_bytes(original + b"x")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "data" / "moon.png"))):
        data.photographs(["moon"])


def test_photographs_without_scikit_image(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'researchkit\[images\]'"):
        data.photographs()
