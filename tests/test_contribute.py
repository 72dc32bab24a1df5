"""The guide to adding a paper, done as it stands there: every block that it shows is typed, pasted or saved, in its order."""
import contextlib
import importlib
import io
import re
import resource
import shlex
import sys

import pytest

from conftest import HOME, Repo, notebook, write
from researchkit.core.notebook import find_record, joined, load_notebook, read_paper
from researchkit.run.check import MIN_CLAIMS

GUIDE = HOME / "nbs" / "guide" / "contribute.ipynb"
BLOCK = re.compile(r"(?:^\*\*(Cell|File) ([^*]+)\*\*[ \t]*\n+)?^```(\w+)\n(.*?)\n```$", re.M | re.S)
KINDS = {"yaml": "raw", "markdown": "markdown", "python": "code"}
ELSEWHERE = ("make", "source", "pytest", "researchkit run", "researchkit show", "researchkit docs")  # left to other tests


def blocks():
    "(what, where, language, text) of every block of the guide: a cell or a file to be replaced, or commands."
    text = "\n\n".join(joined(c["source"]) for c in load_notebook(GUIDE)["cells"] if c["cell_type"] == "markdown")
    return [m.groups() for m in BLOCK.finditer(text)]


def used():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    "A repository in which the guide was followed, the commands with what they said, and the CPU time of all."
    repo, said, start = Repo(tmp_path_factory.mktemp("guide")), [], used()
    home = notebook("index", "# Home", front="---\ntitle: t\ndescription: d\n---", parameters=None)
    home["cells"] = [c for c in home["cells"] if c["cell_type"] != "code"]
    write(home, repo.root / "nbs" / "index.ipynb")
    for what, where, language, text in blocks():
        if language == "sh":
            for line in text.splitlines():
                if not line.startswith(ELSEWHERE):
                    program, *arguments = shlex.split(line)
                    assert program == "researchkit", line
                    said.append((line, repo.cli(*arguments)))
        elif what == "File":
            path = repo.root / where
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        else:
            assert what == "Cell", text
            (path,) = repo.root.glob("nbs/*/*.ipynb")
            nb = load_notebook(path)
            cell = nb["cells"][int(where) - 1]
            assert cell["cell_type"] == KINDS[language], (where, language)
            cell["source"] = text.splitlines(keepends=True)
            write(nb, path)
    (path,) = repo.root.glob("nbs/*/*.ipynb")
    return repo, path, said, used() - start


def test_every_command_of_the_guide_succeeds(followed):
    for line, done in followed[2]:
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert [line.split()[1] for line, _ in followed[2]] == ["new", "publish", "check"]
    assert "nothing to complain about" in followed[2][-1][1].stdout


def test_the_record_has_verdicts(followed):
    repo, path, said, _ = followed
    claims = find_record(path)["claims"]
    assert len(claims) >= MIN_CLAIMS
    verdicts = {c["id"]: c["verdict"] for c in claims}
    assert verdicts == {"C1": "reproduced", "C2": "reproduced", "C3": "not reproduced", "C4": "reproduced"}  # as the guide tells
    assert find_record(path)["cpu_seconds"] < 20


def test_the_cells_that_the_guide_counts(followed):
    nb, text = load_notebook(followed[1]), GUIDE.read_text(encoding="utf-8")
    count, kept = re.search(r"The template has (\d+) cells", text)[1], re.search(r"cells ([\d, and]+) stay as they are", text)[1]
    pasted = [int(where) for what, where, *_ in blocks() if what == "Cell"]
    assert len(nb["cells"]) == int(count)
    assert sorted(pasted + [int(n) for n in re.findall(r"\d+", kept)]) == list(range(1, int(count) + 1))


def test_nothing_of_the_template_is_left(followed):
    repo, path, *_ = followed
    text = path.read_text(encoding="utf-8") + (repo.root / "researchkit" / read_paper(path).theme / f"{path.stem}.py").read_text(encoding="utf-8")
    assert not re.search("trim|wild", text)
    assert "trimmed" not in path.with_suffix(".svg").read_text(encoding="utf-8")


def test_its_own_tests_and_its_shortest_use(followed, monkeypatch):
    repo, path, *_ = followed
    paper = read_paper(path)
    name = f"researchkit.{paper.theme}"
    package = importlib.import_module(name)
    monkeypatch.setattr(package, "__path__", [str(repo.root / "researchkit" / paper.theme)])
    try:
        tests = {}
        exec((repo.root / "tests" / f"test_{paper.slug}.py").read_text(encoding="utf-8"), tests)
        tests = {n: f for n, f in tests.items() if n.startswith("test_")}
        assert len(tests) >= 2
        for test in tests.values():
            test()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(paper.use, {"__name__": "__main__"})
        assert printed.getvalue().strip()
    finally:
        sys.modules.pop(f"{name}.{paper.slug}", None)
        vars(package).pop(paper.slug, None)


def test_it_is_quick(followed):
    assert followed[3] < 2 * 40  # CPU-seconds; a budget of 40 stretches when neighbours share the cores
