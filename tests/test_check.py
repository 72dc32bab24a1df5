import copy
import json
import resource
import signal
import subprocess

import pytest

from conftest import HOME, notebook, tree, write
from researchkit.core.errors import InputError
from researchkit.core.notebook import MIME, THEMES, code_hash, find_record, load_notebook
from researchkit.run import check as rk
from researchkit.run.new import copy_paper, new_paper


def record(**changes):
    rows = [dict(method=m, seed=s, accuracy=a + 0.01 * s, seconds=1.5 + s) for m, a in (("A", 0.9), ("B", 0.8)) for s in range(3)]
    claims = [dict(id=f"C{i}", statement="s", paper="p", measured=0.1, interval=[0.05, 0.15], criterion="c", verdict="reproduced", units=3, note="")
              for i in range(1, 5)]
    return dict(schema=1, paper="one", profile="cpu", params={}, seeds=[0, 1, 2], versions={}, hardware={}, wall_seconds=1.0, cpu_seconds=1.0,
                peak_rss_bytes=1, code_hash=None, tolerances={"accuracy": ["abs", 0.02], "seconds": None}, rows=rows, claims=claims) | changes


def moved(by, metric="accuracy", where=lambda row: True):
    new = copy.deepcopy(record())
    for row in new["rows"]:
        if where(row):
            row[metric] += by
    return new


def test_compare():
    assert rk.compare(record(), record()) == []
    assert rk.compare(record(), moved(0.019)) == [] == rk.compare(record(), moved(50, "seconds"))
    (line,) = rk.compare(record(), moved(0.03, where=lambda row: row["method"] == "B"))
    assert "accuracy" in line and "1 of 2 means" in line and "B" in line
    assert rk.compare(record(), moved(0.03, where=lambda row: row["seed"] == 0)) == []
    claims = copy.deepcopy(record()["claims"])
    claims[1]["verdict"] = "partly"
    assert rk.compare(record(), record(claims=claims)) == ["C2: published 'reproduced', now 'partly'"]
    assert rk.compare(record(), record(claims=claims[:1])) == [f"C{i}: published 'reproduced', now 'absent'" for i in (2, 3, 4)]
    assert rk.compare(record(), record(code_hash="1")) == ["the published outputs belong to other code"]
    fewer = record(rows=[r for r in record()["rows"] if r["method"] == "A"])
    assert any("other rows" in line for line in rk.compare(record(), fewer))


def test_compare_takes_five_percent_where_nothing_is_said():
    old, near, far = (record(tolerances={}, rows=[dict(method="A", seed=0, loss=x)]) for x in (1.5, 1.57, 1.58))
    assert rk.compare(old, near) == [] and len(rk.compare(old, far)) == 1


@pytest.mark.parametrize("old, new", [(1.0, 0.0), (3, 4), (True, False)])
def test_compare_sees_numbers_without_a_fraction(old, new):
    a, b = (record(tolerances={}, rows=[dict(method="A", seed=s, hit=x) for s in range(3)]) for x in (old, new))
    assert rk.compare(a, a) == [] != rk.compare(a, b)


def published(path, **changes):
    "A notebook that is as `publish` would leave it, if nothing is changed."
    nb = notebook("one", "## Claims", "print('x')", "## Use it on your own model", "1")
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "one.svg").write_text("<svg/>")
    nb["metadata"]["researchkit"] = {"code_hash": code_hash(nb)}
    nb["cells"][4]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {MIME: record(code_hash=code_hash(nb)) | changes}}]
    return nb


def complaints(nb, path):
    write(nb, path)
    return rk.check(path.parents[2], [path])


def test_check_has_one_line_for_each_fault(tmp_path):
    path = tmp_path / "nbs" / "theory" / "one.ipynb"
    nb = published(path)
    assert complaints(nb, path) == []

    def fault(word, change, *, only=True):
        broken = copy.deepcopy(nb)
        change(broken)
        lines = complaints(broken, path)
        assert all(line.startswith("nbs/theory/one.ipynb:") for line in lines)
        assert any(word in line for line in lines), (word, lines)
        assert not only or len(lines) == 1, lines

    def output(**data):
        return lambda b: b["cells"][6].update(outputs=[data])

    def text(value):
        return output(output_type="stream", name="stdout", text=[value])

    fault("cell 7 ends in ValueError: boom", output(output_type="error", ename="ValueError", evalue="boom", traceback=[]))
    fault("cell 7 wrote to stderr", output(output_type="stream", name="stderr", text=["Warning: x\n"]))
    for place in ("/home/someone/x", "/root/x", "/tmp/y", "/Users/z/t"):
        fault("cell 7 shows a path", text(f"saved {place}\n"))
    fault("execution count", lambda b: b["cells"][6].update(execution_count=3))
    fault("execution count or metadata", lambda b: b["cells"][6].update(metadata={"scrolled": True}))
    fault("not evaluated", lambda b: b["cells"][6].update(source=["#| eval: false\n", "1"]), only=False)
    fault("belong to other code", lambda b: b["cells"][6].update(source=["2"]), only=False)
    fault("never run as a whole", lambda b: b["metadata"].pop("researchkit"))
    fault("no section '## Claims'", lambda b: b["cells"][3].update(source=["## claims"]))
    fault("no section '## Use it on your own model'", lambda b: b["cells"][5].update(source=["x"]))
    fault("does not export theory.one", lambda b: b["cells"][1].update(source=["#| default_exp theory.two"]), only=False)
    fault("carries no record", lambda b: b["cells"][4].update(outputs=[]))
    fault("no cell is tagged 'parameters'", lambda b: b["cells"][2].update(metadata={}))

    def records(**changes):
        def change(b):
            b["cells"][4]["outputs"][0]["data"][MIME].update(changes)
        return change

    fault("record of 'two'", records(paper="two"))
    fault("at profile 'smoke'", records(profile="smoke"))
    fault("record belongs to other code", records(code_hash="0"))
    fault("took 121 CPU-seconds, the budget is 120", records(cpu_seconds=121.0))
    fault("states 3 claims, at least 4", records(claims=record()["claims"][:3]))
    fault("not a valid record", records(seeds="0"))
    fault("update researchkit", records(schema=2))
    fault("front matter", lambda b: b["cells"][0].update(source=["---\n", "a: b: c\n", "---"]))
    (path.parent / "one.svg").unlink()
    assert complaints(nb, path) == ["nbs/theory/one.ipynb: the thumbnail 'one.svg' is missing"]


def test_check_gives_file_and_line_of_malformed_front_matter(tmp_path):
    path = tmp_path / "nbs" / "theory" / "one.ipynb"
    nb = published(path)
    nb["cells"][0]["source"] = ["---\n", "a: b: c\n", "---"]
    (line,) = complaints(nb, path)
    at = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "a: b: c" in text)
    assert line.startswith(f"nbs/theory/one.ipynb:{at}: ")


def test_write_back_keeps_outputs_and_drops_what_changes_from_run_to_run(tmp_path):
    source = write(notebook("one", "object()"), tmp_path / "one.ipynb")
    ran = json.loads(source.read_text())
    ran["cells"].insert(3, {"cell_type": "code", "id": "x", "metadata": {"tags": ["injected-parameters"]}, "source": "n = 1", "outputs": [], "execution_count": 2})
    ran["cells"][4].update(execution_count=5, metadata={"papermill": {"duration": 1}}, outputs=[
        {"output_type": "execute_result", "execution_count": 5, "metadata": {}, "data": {"text/plain": "<object at 0x7f3a2b> <b at 0x1>"}}])
    executed = write(ran, tmp_path / "executed.ipynb")
    rk.write_back(executed, source, {"code_hash": "h"})
    nb = load_notebook(source)
    assert nb["metadata"]["researchkit"] == {"code_hash": "h"} and len(nb["cells"]) == 4
    assert nb["cells"][3]["metadata"] == {} and nb["cells"][3]["execution_count"] is None
    assert "".join(nb["cells"][3]["outputs"][0]["data"]["text/plain"]) == "<object> <b>"
    nb["cells"][3]["source"] = ["other()"]
    write(nb, source)
    with pytest.raises(InputError, match="changed while it ran"):
        rk.write_back(executed, source, {})


def test_new_paper_refuses(tmp_path):
    (tmp_path / "nbs").mkdir()
    for slug in ("Tiny", "1x", "a-b", "", "class", "../x", "a b"):
        with pytest.raises(InputError, match="slug"):
            new_paper(slug, "theory", tmp_path)
    with pytest.raises(InputError, match="unknown theme 'theorie'.*theory"):
        new_paper("tiny", "theorie", tmp_path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "nbs"]
    path = new_paper("tiny", "theory", tmp_path)
    assert path.with_suffix(".svg").exists() and "SLUG" not in path.read_text() and "THEME" not in path.read_text()
    with pytest.raises(InputError, match="tiny exists: nbs/theory/tiny.ipynb"):
        new_paper("tiny", "reuse", tmp_path)


def test_a_copy_is_equal_and_replaces_nothing(tmp_path, monkeypatch):
    source = new_paper("tiny", "theory", tmp_path / "repo")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert copy_paper("tiny", root=tmp_path / "repo").resolve() == here / "tiny.ipynb"
    assert tree(here).keys() == {str(here / "tiny.ipynb"), str(here / "tiny.svg")}
    assert all(p.read_bytes() == source.with_name(p.name).read_bytes() for p in here.iterdir())
    for kept in ("tiny.svg", "tiny.ipynb"):
        before = tree(here)
        with pytest.raises(InputError, match="exists: nothing was copied"):
            copy_paper("tiny", here, tmp_path / "repo")
        assert tree(here) == before
        (here / kept).unlink()
    (here / "tiny.ipynb").symlink_to("nowhere")
    with pytest.raises(InputError, match="tiny.ipynb exists"):
        copy_paper("tiny", here, tmp_path / "repo")
    assert [p.name for p in here.iterdir()] == ["tiny.ipynb"]


def test_copies_that_are_refused(tmp_path, monkeypatch):
    new_paper("tiny", "theory", tmp_path / "repo")
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    for slug, folder, word in (("tyni", ".", "unknown paper 'tyni'"), ("tiny", "missing", "no folder"), ("tiny", "file", "not a folder")):
        with pytest.raises(InputError, match=word):
            copy_paper(slug, tmp_path / folder, tmp_path / "repo")
    monkeypatch.setattr("os.access", lambda *a: False)
    with pytest.raises(InputError, match="not writable"):
        copy_paper("tiny", tmp_path, tmp_path / "repo")
    assert tree(tmp_path) == before


def test_a_copy_that_fails_half_way_leaves_nothing(tmp_path):
    source = new_paper("tiny", "theory", tmp_path / "repo")
    here = tmp_path / "here"
    here.mkdir()
    source.with_suffix(".svg").write_text("<svg/>")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # room for the picture only
    try:
        with pytest.raises(OSError):
            copy_paper("tiny", here, tmp_path / "repo")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(here.iterdir()) == []


def test_nothing_is_published_into_an_installed_package(tmp_path):
    inside = tmp_path / "researchkit" / "_repository"
    path = new_paper("tiny", "theory", inside)
    (inside / "settings.ini").touch()
    (tmp_path / "researchkit" / "__init__.py").touch()
    before = tree(tmp_path)
    with pytest.raises(InputError, match="read-only"):
        rk.publish([path], tmp_path)
    assert tree(tmp_path) == before


@pytest.fixture
def history(repo):
    def git(*arguments):
        done = subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments], cwd=repo.root, capture_output=True, text=True,
                              env=repo.environment())
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    git("init", "-q")
    for slug in ("one", "two", "three"):
        repo.paper(slug, "1")
    git("add", "-A")
    git("commit", "-qm", "first")
    return repo, git


def test_changed_papers(history):
    repo, git = history

    def slugs(**options):
        return [p.stem for p in rk.changed_papers(repo.root, **options)]

    assert slugs() == []
    repo.paper("two", "2")
    repo.paper("four", "1", theme="reuse")
    assert slugs() == ["four", "two"]
    git("add", "-A")
    git("commit", "-qm", "second")
    assert slugs() == [] and slugs(since="HEAD~1") == ["four", "two"]
    assert slugs(since="4b825dc642cb6eb9a060e54bf8d69288fbee4904") == ["four", "one", "three", "two"]
    seen = set()
    for i in range(4):
        seen |= set(slugs(rotate=True))
        git("commit", "--allow-empty", "-qm", f"{i}")
    assert seen == {"one", "two", "three", "four"}
    with pytest.raises(InputError, match="git diff failed"):
        slugs(since="no-such-commit")
    write(notebook("core", "1", front=None), repo.root / "nbs" / "core" / "x.ipynb")
    assert len(slugs()) == 4


def test_changed_papers_outside_git(repo):
    repo.paper("one", "1")
    with pytest.raises(InputError, match="git"):
        rk.changed_papers(repo.root)


def test_no_notebook_of_this_repository_claims_a_slug_twice():
    slugs = [p.stem for theme in THEMES for p in (HOME / "nbs" / theme).glob("*.ipynb")]
    assert len(slugs) == len(set(slugs))


def test_records_digest_follows_records_and_titles(tmp_path):
    path = tmp_path / "nbs" / "theory" / "one.ipynb"
    write(published(path), path)
    digest = rk.records_digest(tmp_path)
    write(published(path, wall_seconds=9.0), path)
    assert rk.records_digest(tmp_path) == digest
    write(published(path, cpu_seconds=9.0), path)
    assert rk.records_digest(tmp_path) != digest
    assert find_record(path)["cpu_seconds"] == 9.0
    path.write_text(path.read_text().replace("one: a test", "one: another"))
    assert rk.records_digest(tmp_path) != digest
