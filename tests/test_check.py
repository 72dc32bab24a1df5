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


def test_check_reads_the_shortest_use(tmp_path):
    path = tmp_path / "nbs" / "theory" / "one.ipynb"
    nb = published(path)
    head, mark, _ = "".join(nb["cells"][0]["source"]).partition("  use: |\n")
    assert mark

    def said(*use):
        nb["cells"][0]["source"] = (head + (mark + "".join(f"    {line}\n" for line in use) if use else "") + "---").splitlines(keepends=True)
        return [line.removeprefix("nbs/theory/one.ipynb: ") for line in complaints(nb, path)]

    for good in ("from researchkit.theory.one import f", "import researchkit.theory.one as m", "from researchkit.theory import one"):
        assert said(good, "print(1)") == []
    missing = "front matter has no paper.use: add 'use: |' and the shortest program that uses researchkit.theory.one and prints something"
    assert said() == said("") == [missing]
    (line,) = said("from researchkit.theory.one import f", "print(f()")
    assert line.startswith("paper.use is not valid Python (line 2: ")
    for other in ("print(1)", "from researchkit.theory.ones import f", "import researchkit.theory", "from .one import f", "# from researchkit.theory.one import f"):
        assert said(other) == ["paper.use does not import from researchkit.theory.one: show how the paper's own module is used"]
    assert said("print('{')", "from researchkit.theory.one import *") == []


def with_text(nb, *sources):
    "Markdown cells at the end of a notebook, which change no hash."
    cells = [{"cell_type": "markdown", "id": f"more-{i}", "metadata": {}, "source": source.splitlines(keepends=True)} for i, source in enumerate(sources)]
    return nb | {"cells": nb["cells"] + cells}


@pytest.mark.parametrize("sources, said", [
    (["By @eq-a:\n\n$$\na = b\n$$ {#eq-a}"], []),
    (["$$ a = b $$ {#eq-a}", "Then (@eq-a), and so [@eq-a] and [-@eq-a]."], []),
    (["$$ a = b $$"], ["cell 8 has an equation without a label ($$ a = b): end it with $$ {#eq-name}"]),
    (["$$ a = b $$ and\n\n$$\n\\sum_{i=1}^n x_i + \\sum_{i=1}^n y_i\n$$"],
     ["cell 8 has an equation without a label ($$ a = b): end it with $$ {#eq-name}",
      "cell 8 has an equation without a label ($$ \\sum_{i=1}^n x_i + \\sum_{i=1}^…): end it with $$ {#eq-name}"]),
    (["$$ a = b $$ {#eq-a}"], ["nothing refers to the equation eq-a: write @eq-a where the text uses it"]),
    (["$$ a = b $$ {#eq-a}", "`@eq-a`\n\n```python\n@eq-a\n```"], ["nothing refers to the equation eq-a: write @eq-a where the text uses it"]),
    (["Inline $a = b$, in a fence:\n\n```\n$$ a = b $$\n@eq-b\n```\n\nand `$$ a $$ @eq-b`, me@eq-b.org"], []),
    (["See @eq-b and @fig-c, @eq-b."], ["cell 8 refers to @eq-b, which no label on the page has: correct it, or label what is meant",
                                      "cell 8 refers to @fig-c, which no label on the page has: correct it, or label what is meant"]),
    (["## Part {#sec-part}\n\nSee @sec-part.", "| a |\n|---|\n\n: Caption {#tbl-t}\n\nand @tbl-t."], []),
])
def test_check_of_equations_and_references(tmp_path, sources, said):
    path = tmp_path / "nbs" / "theory" / "one.ipynb"
    assert complaints(with_text(published(path), *sources), path) == [f"nbs/theory/one.ipynb: {line}" for line in said]


def test_check_of_references_in_captions_and_outside_papers(tmp_path):
    path = tmp_path / "nbs" / "theory" / "one.ipynb"
    nb = with_text(published(path), "$$ a $$ {#eq-a}", "As in @fig-f.")
    nb["cells"][6]["source"] = ["#| label: fig-f\n", '#| fig-cap: "The sides of @eq-a."\n', "1"]
    assert not [line for line in complaints(nb, path) if "@" in line or "label" in line]
    nb["cells"][6]["source"][1] = '#| fig-cap: "The sides of @eq-b."\n'
    lines = complaints(nb, path)
    assert any("cell 7 refers to @eq-b" in line for line in lines) and any("nothing refers to the equation eq-a" in line for line in lines)
    other = write(notebook("x", "# Text", "## $$ a = b $$\n\n$$ c $$ {#eq-c} and @eq-d", front="---\ntitle: t\ndescription: d\n---", parameters=None),
                  tmp_path / "nbs" / "core" / "x.ipynb")
    lines = rk.check(tmp_path, [other])
    assert [line for line in lines if "@" in line or "label" in line] == [
        "nbs/core/x.ipynb: cell 4 refers to @eq-d, which no label on the page has: correct it, or label what is meant"]


@pytest.mark.parametrize("text, said", [
    ("![a plot](one.svg)", None), ("![a [b] c](one.svg){width=50%}", None), ('![](one.svg){fig-alt="a plot"}', None), 
    ("```\n![](one.svg)\n```\nand `![](one.svg)`", None), ("![](one.svg)", "one.svg"), ('text ![ ](one.svg "title") text', "one.svg"),
    ('![](two.png){width=50% fig-alt=""}', "two.png"), ("[![](badge.svg)](https://example.org)", "badge.svg")])
def test_check_of_pictures_in_text(tmp_path, text, said):
    path = tmp_path / "nbs" / "theory" / "one.ipynb"
    lines = complaints(with_text(published(path), text), path)
    if said is None:
        assert lines == []
    else:
        assert lines == [f"nbs/theory/one.ipynb: cell 8 has the picture {said} without a description: write ![what is seen]({said})"]


@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("kind", ["image/png", "image/svg+xml", "image/jpeg"])
def test_check_of_pictures_in_outputs(tmp_path, kind, paper):
    folder = tmp_path / "nbs" / ("theory" if paper else "core")
    path = folder / "one.ipynb"
    for source, fine in ((["1"], False), (["#| fig-alt: \"\"\n", "1"], False), (["1\n", "#| fig-alt: late"], False), (["#| fig-cap: c\n", "#| fig-alt: \"a: b\"\n", "1"], True)):
        nb = published(path)
        nb["cells"][6].update(source=source, outputs=[{"output_type": "display_data", "metadata": {}, "data": {kind: "x", "text/plain": "<Figure>"}}])
        lines = complaints(nb, path)
        said = f"nbs/{folder.name}/one.ipynb: cell 7 shows a picture without a description: begin it with #| fig-alt: \"what is seen\""
        assert (said not in lines) == fine, lines


def test_check_knows_the_template(tmp_path):
    path = new_paper("tiny", "theory", tmp_path)
    facts = path.read_text()
    left = "front matter still has the template's"

    def lines(**changes):
        text = facts
        for old, new in changes.values():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        return [line.partition(": ")[2] for line in rk.check(tmp_path, [path]) if left in line]

    assert lines() == [f"{left} title, description, paper.title, paper.authors, paper.venue: write the paper's own"]
    names = dict(a=("First Author", "A. Author"), t=("The full title as published", "A title"), d=("One line that a stranger understands.", "d"))
    assert lines(**names) == [f"{left} title, paper.venue: write the paper's own"]
    assert lines(**names, v=("Conference or journal", "Venue"), n=("what it does, in a few words", "it trims")) == []
    path.write_text(facts)
    others = [line for line in rk.check(tmp_path, [path]) if left not in line]
    assert len(others) == 2 and all("publish" in line for line in others), others  # never run; no record


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
    seen, everything = set(), "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
    for i in range(4):
        some = slugs(since=everything, most=3)
        assert len(some) == len(set(some)) == 3
        seen |= set(some)
        git("commit", "--allow-empty", "-qm", f"most {i}")
    assert seen == {"one", "two", "three", "four"} and len(slugs(since=everything, most=9)) == 4
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
