"""Weights by name: a state dict and a checkpoint on disk look alike."""
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from researchkit.core.checkpoint import Checkpoint, Tensors, checkpoint_folder
from researchkit.core.errors import some

STATE = {"a.weight": torch.arange(60.0).reshape(10, 3, 2), "a.bias": torch.arange(10).to(torch.bfloat16), "b.weight": torch.arange(8, dtype=torch.int64), "scale": torch.tensor(2.5, dtype=torch.float64)}


def shards(folder, index=None):
    save_file({k: STATE[k] for k in ("a.weight", "scale")}, folder / "one.safetensors")
    save_file({k: STATE[k] for k in ("a.bias", "b.weight")}, folder / "two.safetensors")
    named = {"a.weight": "one.safetensors", "scale": "one.safetensors", "a.bias": "two.safetensors", "b.weight": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named if index is None else index}))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    single = tmp_path_factory.mktemp("single")
    save_file(STATE, single / "model.safetensors")
    return Tensors(STATE), Checkpoint(single), Checkpoint(shards(tmp_path_factory.mktemp("sharded")))


@given(st.sampled_from(sorted(STATE)), st.integers(0, 11), st.one_of(st.none(), st.integers(0, 12)))
def test_rows_from_memory_and_from_disk(both, key, start, stop):
    expected = STATE[key][start:stop] if STATE[key].ndim else STATE[key]
    for source in both:
        found = source.rows(key, start, stop)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert source.shapes[key] == tuple(STATE[key].shape) and source.dtypes[key] == STATE[key].dtype


def test_names(both):
    assert all(set(source.shapes) == set(source.dtypes) == set(STATE) for source in both)
    assert Tensors({"a": torch.zeros(1), "note": "text"}).shapes == {"a": (1,)}


def test_quantised_dtypes_stand_there_as_text(tmp_path):
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert isinstance(Checkpoint(tmp_path).dtypes["w"], str)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        Checkpoint(tmp_path)
    shards(tmp_path, {"a.weight": "three.safetensors"})
    with pytest.raises(ValueError, match="shards that do not exist: three.safetensors"):
        Checkpoint(tmp_path)
    shards(tmp_path, {"a.weight": "one.safetensors", "lost": "one.safetensors"})
    with pytest.raises(ValueError, match="no shard holds: lost"):
        Checkpoint(tmp_path)


def test_where_a_checkpoint_is(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(tmp_path))
    assert checkpoint_folder(tmp_path) == tmp_path and asked == []
    assert checkpoint_folder("owner/name", "v1") == tmp_path and asked[0][0] == "owner/name" and asked[0][1]["revision"] == "v1"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked[0][1]["allow_patterns"])
    for bad in ("/no/such/folder", "./x", "a/b/c", "name", tmp_path / "nothing"):
        with pytest.raises(ValueError, match="neither a folder nor a hub id"):
            checkpoint_folder(bad)


def test_a_model_that_cannot_be_downloaded(monkeypatch):
    import huggingface_hub

    def offline(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"no folder owner/name.*OSError.*hf download owner/name"):
        checkpoint_folder("owner/name")


def test_lists_in_messages():
    assert some("abc") == "a, b, c" and some(map(str, range(9)), 3) == "0, 1, 2 and 6 more" and some([]) == ""
