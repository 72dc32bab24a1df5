"""The wheel, installed where there is no clone: built from a copy of the tree, put into an environment that sees the dependencies
of this Python and not the repository, and used from an empty folder."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import HOME, one_line, tree, write
from researchkit.core.notebook import code_hash, load_notebook, paper_paths

SLUG = "impossible_languages"  # needs no extra and no model of the zoo
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def done(command, cwd, **options) -> str:
    "Run a command that must succeed, and return what it printed."
    process = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def tracked() -> list[str]:
    "The files of the tree: what git knows or would add."
    listed = done(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], HOME).split("\0")
    return sorted({name for name in listed if name and (HOME / name).is_file()})


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    "A copy of the tree, with strays that must not be packed."
    folder = tmp_path_factory.mktemp("sources") / "researchkit"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, folder / name)
    for stray in ("nbs/theory/.ipynb_checkpoints/x-checkpoint.ipynb", "nbs/runs/x/cpu/x.ipynb", "nbs/_draft.ipynb", "nbs/__pycache__/x.svg",
                  "researchkit/core/__pycache__/x.cpython-311.pyc", "runs/x/cpu/x.ipynb"):
        (folder / stray).parent.mkdir(parents=True, exist_ok=True)
        (folder / stray).write_text("{}")
    return folder


def build(source: Path, out: Path) -> Path:
    done([*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", out, source], out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build(sources, tmp_path_factory.mktemp("wheel"))


@dataclass
class Installed:
    "An environment with the wheel in it."
    base: Path

    def __post_init__(self):
        self.python = self.base / "env" / "bin" / "python"
        (self.site,) = (self.base / "env" / "lib").glob("python*/site-packages")
        self.nbs = self.site / "researchkit" / "_repository" / "nbs"

    def contents(self) -> dict:
        return {str(p): hashlib.sha256(p.read_bytes()).digest() if p.is_file() else None for p in sorted(self.site.rglob("*"))}

    def environment(self) -> dict:
        keep = {k: v for k, v in os.environ.items()
                if not k.startswith(("RESEARCHKIT_", "PYTEST_", "PYTHON", "XDG_", "OMP_", "VIRTUAL_ENV")) and k != "MPLCONFIGDIR"}
        for name in ("home", "tmp"):
            (self.base / name).mkdir(exist_ok=True)
        return {**keep, "HOME": str(self.base / "home"), "TMPDIR": str(self.base / "tmp"), "PYTHONDONTWRITEBYTECODE": "1",
                "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}  # nbconvert's templates, which came with the dependencies

    def run(self, program, *arguments, cwd) -> subprocess.CompletedProcess:
        "Run a program of the environment; whatever it does, the installed files stay as they are."
        before = self.contents()
        process = subprocess.run([str(self.python.with_name(program)), *map(str, arguments)], cwd=cwd, env=self.environment(),
                                 stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
        after = self.contents()
        assert before == after, sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
        return process

    def cli(self, *arguments, cwd) -> str:
        process = self.run("researchkit", *arguments, cwd=cwd)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    def code(self, source, cwd) -> str:
        process = self.run("python", "-c", source, cwd=cwd)
        assert process.returncode == 0, process.stderr
        return process.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    base = tmp_path_factory.mktemp("installed")
    venv.create(base / "env", with_pip=False, symlinks=True)
    done([*PIP, "--python", base / "env", "install", "--no-deps", "--no-index", "--no-compile", wheel], base)
    made = Installed(base)
    # Lines of a .pth file are folders to search; the .pth files in those, an editable install among them, are not read.
    seen = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (made.site / "dependencies.pth").write_text("\n".join(seen) + "\n")
    return made


def test_every_file_of_the_wheel_is_accounted_for(wheel, sources):
    packed = zipfile.ZipFile(wheel)
    inside = {n: n for n in tracked() if n.startswith("researchkit/") and n.endswith(".py")}
    inside |= {f"researchkit/_repository/{n}": n for n in tracked() if n == "settings.ini" or n.startswith("nbs/") and n.endswith((".ipynb", ".svg"))}
    names = [n for n in packed.namelist() if not n.split("/")[0].endswith(".dist-info")]
    assert sorted(names) == sorted(inside)
    assert all(packed.read(name) == (sources / source).read_bytes() for name, source in inside.items())


def test_the_sdist_makes_the_same_wheel(wheel, sources, tmp_path):
    done([sys.executable, "-c", "from setuptools import build_meta; build_meta.__legacy__.build_sdist('" + str(tmp_path) + "')"], sources)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        assert not [n for n in packed.getnames() if n.endswith("_draft.ipynb") or {".ipynb_checkpoints", "__pycache__", "runs"} & set(n.split("/"))]
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(build(archive, tmp_path))
    assert sorted(first.namelist()) == sorted(second.namelist())
    assert all(first.read(n) == second.read(n) for n in first.namelist() if not n.endswith("/RECORD"))


def test_an_editable_install_uses_the_clone(sources, tmp_path):
    done([sys.executable, "-c", "from setuptools import build_meta; build_meta.__legacy__.build_editable('" + str(tmp_path) + "')"], sources)
    (made,) = tmp_path.glob("*.whl")
    assert not [n for n in zipfile.ZipFile(made).namelist() if "_repository" in n]
    assert not (sources / "researchkit" / "_repository").exists()
    found = done([sys.executable, "-c", "from researchkit.core.notebook import find_clone; print(find_clone())"], tmp_path,
                 env={k: v for k, v in os.environ.items() if k != "RESEARCHKIT_HOME"} | {"PYTHONPATH": str(sources)})
    assert Path(found.strip()) == sources.resolve()


def test_the_list_needs_neither_a_clone_nor_torch(installed, tmp_path):
    listed = json.loads(installed.cli("list", "--json", cwd=tmp_path))
    assert [row["slug"] for row in listed] == list(paper_paths(HOME))
    assert Path(installed.code("import researchkit; print(researchkit.__file__)", tmp_path).strip()).is_relative_to(installed.site)
    installed.code("import sys\nfrom researchkit.cli import main\ntry: main(['list'])\nexcept SystemExit as e: assert not e.code\n"
                   "assert not {'torch', 'transformers'} & set(sys.modules)", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_show_and_doctor(installed, tmp_path):
    shown = installed.cli("show", SLUG, cwd=tmp_path)
    assert str(installed.nbs / "language" / f"{SLUG}.ipynb") in shown and "Parameters" in shown and "C1" in shown
    process = installed.run("researchkit", "doctor", cwd=tmp_path)
    assert f"{len(paper_paths(HOME))} papers, packaged" in process.stdout and "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


COMMANDS = [["check"], ["new", "my_paper", "--theme", "theory"], ["docs"], ["publish", SLUG], ["verify", "--changed"]]


def test_what_needs_a_clone_says_so(installed, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda command: installed.run("researchkit", *command, cwd=tmp_path), COMMANDS))
    for process in results:
        line = one_line(process.returncode, process.stdout, process.stderr, {}, tree(tmp_path))
        assert "needs a clone" in line and "read-only" in line, process.args


COPY = f"""from researchkit.core.errors import InputError
from researchkit.run.new import copy_paper
print(copy_paper({SLUG!r}))
try: copy_paper({SLUG!r})
except InputError as e: print(e)"""


@pytest.fixture(scope="module")
def copied(installed, tmp_path_factory) -> Path:
    "A folder with a copy of the paper."
    folder = tmp_path_factory.mktemp("copied")
    made, again = installed.code(COPY, folder).splitlines()
    assert made == f"{SLUG}.ipynb" and again.startswith(f"{SLUG}.svg exists")
    return folder


def test_a_copy_is_what_is_published(copied):
    source = paper_paths(HOME)[SLUG]
    assert sorted(p.name for p in copied.iterdir()) == [f"{SLUG}.ipynb", f"{SLUG}.svg"]
    for path in copied.iterdir():
        assert path.read_bytes() == source.with_name(path.name).read_bytes()


PARAMETERS = """profile: str = "cpu"  # smoke, cpu or full
seeds: list[int] = [0, 1, 2]  # one run each
size: int = 3  # of my own"""
EDIT = f"""from researchkit.core.study import Study, greater
study = Study(paper={SLUG!r}, profile=profile, seeds=seeds)
for seed in seeds:
    study.log(method="mine", seed=seed, loss=float(size))
study.claim("C1", "a claim", paper="none", test=greater("loss", "mine", "mine"))
study.conclude()"""


@pytest.fixture(scope="module")
def ran(installed, copied, tmp_path_factory) -> Path:
    "A folder with an edited copy under another name, in which it and the paper itself have run."
    folder = tmp_path_factory.mktemp("ran")
    nb = load_notebook(copied / f"{SLUG}.ipynb")
    nb["cells"] = nb["cells"][:2]  # front matter and the name of the module
    for source, tags in ((PARAMETERS, ["parameters"]), (EDIT, [])):
        nb["cells"].append({"cell_type": "code", "id": f"own-{len(tags)}", "metadata": {"tags": tags} if tags else {},
                            "source": source.splitlines(keepends=True), "execution_count": None, "outputs": []})
    write(nb, folder / "mine.ipynb")
    installed.cli("run", "mine.ipynb", SLUG, "--profile", "smoke", cwd=folder)
    return folder


def record(folder: Path, name: str) -> dict:
    out = folder / "runs" / name / "smoke"
    assert sorted(p.name for p in out.iterdir()) == [f"{name}.html", f"{name}.ipynb", f"{name}.record.json"]
    return json.loads((out / f"{name}.record.json").read_text(encoding="utf-8"))


def test_a_paper_runs_and_writes_here_and_nowhere_else(ran):
    assert sorted(p.name for p in ran.iterdir()) == ["mine.ipynb", "runs"]
    assert record(ran, SLUG)["code_hash"] == code_hash(load_notebook(paper_paths(HOME)[SLUG]))


def test_an_edited_copy_under_another_name_hashes_its_own_code(ran):
    mine = record(ran, "mine")
    assert mine["paper"] == SLUG and mine["params"] == {"profile": "smoke", "seeds": [0, 1, 2], "size": 3}
    assert mine["code_hash"] == code_hash(load_notebook(ran / "mine.ipynb")) != record(ran, SLUG)["code_hash"]
