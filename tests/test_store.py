import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import tree
from researchkit.core.errors import InputError
from researchkit.run.store import Store, StoreError

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
KINDS = ["local", "memory", "generic", "chained"]


def generic(folder):
    "A file system that writes where a reader can see it half done: not among those that show whole files only."
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Plain(LocalFileSystem):
        protocol = "plain"
        written = []

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            self.written.append(path)
            super().pipe_file(path, value, mode=mode, **kwargs)

    fsspec.register_implementation("plain", Plain, clobber=True)
    return Store(f"plain://{folder}")


def make(kind, tmp_path, name="store"):
    if kind == "generic":
        return generic(tmp_path / name)
    return Store({"local": str(tmp_path / name), "memory": f"memory://{tmp_path.name}/{name}", "chained": f"dir://::file://{tmp_path}/{name}"}[kind])


@pytest.fixture(params=KINDS)
def store(request, tmp_path):
    return make(request.param, tmp_path)


# What every place can do

def test_files_are_written_read_listed_and_removed(store):
    assert store.names("a") == store.names("") == [] and not store.exists("a/x") and store.read_many([]) == {}
    store.write("a/x", "grüß")
    store.write("a/y.json", b"\x00\xff")
    store.write("z", b"")
    assert store.read("a/x") == "grüß".encode() and store.read("a/y.json") == b"\x00\xff" and store.read("z") == b""
    assert store.names("a") == ["x", "y.json"] and "z" in store.names("") and store.exists("a/x") and not store.exists("a/none")
    store.write("a/x", "new")
    assert store.read_many(["a/x", "a/gone", "z"]) == {"a/x": b"new", "z": b""} and store.read_many(["a/x"]) == {"a/x": b"new"} and store.read_many(["a/gone"]) == {}
    store.remove("a/x")
    store.remove("a/x")
    store.remove("nowhere/x")
    assert store.names("a") == ["y.json"]
    with pytest.raises(FileNotFoundError):
        store.read("a/x")


def test_another_store_at_the_same_place_sees_the_files(store):
    other = Store(store.place)
    assert other.names("a") == []
    store.write("a/x", "1")
    assert other.names("a") == ["x"] and other.read("a/x") == b"1"
    store.write("a/y", "2")
    assert other.names("a") == ["x", "y"]


@given(name=st.from_regex(r"[A-Za-z0-9_äß][A-Za-z0-9_ äß.,=%#+@()-]{0,20}", fullmatch=True), data=st.binary(max_size=200))
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_any_name_and_content(tmp_path_factory, kind, name, data):
    store = make(kind, tmp_path_factory.getbasetemp(), f"any-{kind}")
    store.write(f"d/{name}", data)
    assert store.read(f"d/{name}") == data and name in store.names("d") and store.exists(f"d/{name}") and store.read_many([f"d/{name}"]) == {f"d/{name}": data}
    store.remove(f"d/{name}")
    assert store.names("d") == []


def test_claims(store):
    release = store.claim("a")
    assert callable(release) and callable(store.claim("b"))
    release()
    again = store.claim("a")
    assert callable(again)
    again()


def test_places_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("x").place == Store(Path("x")).place == Store("~/x").place == Store(f"file://{tmp_path}/x").place == Store(Store("x").place).place == str(tmp_path / "x")
    assert Store("memory://a/b/").place == "memory://a/b" and repr(Store("x")) == f"Store('{tmp_path}/x')"
    assert not (tmp_path / "x").exists()


# Whole or not at all

def test_a_generic_place_never_shows_half_a_file(tmp_path):
    store = generic(tmp_path / "s")
    store.write("a/x", "1")
    assert all("/." in path for path in store.fs.written) and os.listdir(tmp_path / "s" / "a") == ["x"]

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.fs.mv, before = fails, tree(tmp_path)
    try:
        with pytest.raises(StoreError, match="cannot be written: No space left on device"):
            store.write("a/x", "2")
    finally:
        del store.fs.mv
    assert tree(tmp_path).keys() == before.keys() and store.read("a/x") == b"1"


@linux
def test_a_write_that_is_killed_leaves_the_old_or_the_new(tmp_path):
    store, moments = Store(tmp_path / "s"), random.Random(0)
    contents = [bytes([c]) * 1_000_000 for c in b"ab"]
    store.write("x", contents[0])
    code = f"""
from researchkit.run.store import Store
store = Store({store.place!r})
print("ready", flush=True)
while True:
    for c in b"ab":
        store.write("x", bytes([c]) * 1_000_000)
"""
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        for _ in range(20):
            assert store.read("x") in contents
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert store.read("x") in contents and store.names("") == ["x"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    store = Store(tmp_path / "s")
    store.write("a/x", "old")
    before = tree(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=f"'{store.place}' cannot be written: No space left on device"):
        store.write("a/x", "new")
    assert tree(tmp_path).keys() == before.keys() and store.read("a/x") == b"old"


# Claims

CLAIM = """
import sys
from researchkit.run.store import Store
store = Store(sys.argv[1])
release = store.claim("one")
print("got" if release else "none", flush=True)
sys.stdin.readline()
if release:
    release()
"""


@pytest.fixture
def claimant(tmp_path):
    started = []

    def claimant():
        process = subprocess.Popen([sys.executable, "-c", CLAIM, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield claimant
    for process in started:
        process.kill()
        process.communicate()


@linux
def test_one_process_at_a_time_holds_a_claim(tmp_path, claimant):
    store = Store(tmp_path / "s")
    one, got = claimant()
    assert got == "got" and store.claim("one") is None and claimant()[1] == "none" and callable(store.claim("two"))
    one.communicate("\n")
    release = store.claim("one")
    assert release and claimant()[1] == "none" and Store(tmp_path / "s").claim("one") is None
    release()
    assert store.names("locks") == ["two"]


@linux
def test_a_claim_ends_with_its_process(tmp_path, claimant):
    one, got = claimant()
    assert got == "got"
    os.kill(one.pid, signal.SIGKILL)
    one.wait()
    assert callable(Store(tmp_path / "s").claim("one"))


@linux
def test_many_processes_never_hold_the_same_claim(tmp_path):
    code = """
import os, sys, time
from researchkit.run.store import Store
store, end, count = Store(sys.argv[1]), time.monotonic() + 2, 0
while time.monotonic() < end:
    release = store.claim("one")
    if release:
        held = os.open(sys.argv[1] + "/held", os.O_CREAT | os.O_EXCL)  # fails if somebody else holds it too
        os.close(held)
        os.unlink(sys.argv[1] + "/held")
        release()
        count += 1
print(count)
"""
    (tmp_path / "s").mkdir()
    many = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [(p.communicate(timeout=60), p.returncode) for p in many]
    assert all(code == 0 for _, code in ended), ended
    assert sum(int(out) for (out, _), _ in ended) > 10 and [*(tmp_path / "s" / "locks").iterdir()] == []


def test_a_claim_is_released_even_if_its_file_cannot_be_removed(tmp_path):
    store = Store(tmp_path / "s")
    release = store.claim("one")
    (tmp_path / "s").rename(tmp_path / "moved")
    (tmp_path / "s").write_text("in the way")
    release()


def test_drives_without_locks_always_give_a_claim(tmp_path, monkeypatch):
    import filelock

    def none(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    release = Store(tmp_path / "s").claim("one")
    release()
    assert callable(release)


# Errors

@pytest.mark.parametrize("place,message", [("nope://x", "nope"), ("s3://bucket/x", "s3fs"), ("gs://bucket/x", "gcsfs"), ("abfs://x/y", "adlfs"), ("dir::nope://x", "nope")])
def test_places_that_cannot_be_reached(place, message):
    with pytest.raises(StoreError, match=f"'{place}' cannot be reached: .*{message}") as e:
        Store(place)
    assert "\n" not in str(e.value) and isinstance(e.value, InputError)


def test_a_place_without_writing(tmp_path):
    pytest.importorskip("aiohttp")
    store = Store("http://127.0.0.1:9/x")
    for call in (lambda: store.write("a", "b"), lambda: store.names("a"), lambda: store.read_many(["a", "b"])):
        with pytest.raises(StoreError, match="http://127.0.0.1:9/x") as e:
            call()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["local", "generic"])
def test_a_file_in_the_way(tmp_path, kind):
    (tmp_path / "store").write_text("mine")
    store = make(kind, tmp_path)
    assert store.names("runs") == [] and not store.exists("runs/x")
    with pytest.raises(StoreError, match="cannot be written"):
        store.write("runs/x", "1")
    assert (tmp_path / "store").read_text() == "mine"


def test_a_folder_in_the_way(tmp_path):
    store = Store(tmp_path / "s")
    store.write("a/x/y", "1")
    with pytest.raises(StoreError, match="cannot be written"):
        store.write("a/x", "1")
    with pytest.raises(StoreError, match="cannot be read"):
        store.read("a/x")
    assert store.read("a/x/y") == b"1" and os.listdir(tmp_path / "s" / "a") == ["x"]


@pytest.mark.parametrize("call", ["write", "claim", "remove"])
def test_what_the_system_forbids_is_one_line(tmp_path, monkeypatch, call):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(StoreError, match="cannot be written: Permission denied"):
        getattr(Store(tmp_path / "s"), call)(*["x", "1"][:2 if call == "write" else 1])


@linux
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "s").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        Store(tmp_path / "s").write("a/x", "1")


def test_room_that_is_left(tmp_path):
    assert Store(tmp_path / "a" / "b").free() > 0 and Store("memory://x").free() is None and not (tmp_path / "a").exists()
