"""Fixtures for tests that need a repository of their own: small notebooks in a temporary folder, and the command line on them."""
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

settings.register_profile("researchkit", derandomize=True, deadline=None, database=None)
settings.load_profile("researchkit")

HOME = Path(__file__).resolve().parents[1]
COMMAND = Path(sys.executable).with_name("researchkit")

FRONT = """---
title: "{slug}: a test"
description: "A notebook of the tests."
categories: [{theme}]
image: {slug}.svg
paper:
  slug: {slug}
  title: "A title"
  authors: ["A. Author"]
  year: 2024
  venue: "Venue"
  arxiv: null
  code: null
  use: |
    from researchkit.{theme}.{slug} import f

    print(f())
---"""

PARAMETERS = 'profile: str = "cpu"  # smoke, cpu or full\nseeds: list[int] = [0, 1, 2]  # one run each\nshift: float = 0.0  # added to a'

# A record as `Study` writes it, without the imports that make `Study` slow to start.
RECORD = """import os
from IPython.display import display
from researchkit.core.notebook import MIME, code_hash, load_notebook
record = dict(schema=1, paper="{slug}", profile=profile, params=dict(profile=profile, seeds=seeds, shift=shift), seeds=seeds,
              versions={{}}, hardware={{}}, wall_seconds=1.0, cpu_seconds=1.0, peak_rss_bytes=1, tolerances={{}},
              code_hash=code_hash(load_notebook(os.environ["RESEARCHKIT_NOTEBOOK"])),
              claims=[dict(id=f"C{i}", statement="a beats [b]", paper="+10 points", measured=0.5 + shift, interval=[0.4, 0.6], criterion="a > b",
                           verdict="reproduced", units=3, note="see [/b] there") for i in range(1, 5)],
              rows=[dict(method="a", seed=s, accuracy=0.5 + shift) for s in seeds])
display({{MIME: record, "text/plain": "record"}}, raw=True)"""


def notebook(slug, *cells, theme="theory", front=FRONT, parameters=PARAMETERS) -> dict:
    "A notebook as a dictionary; a text that begins with '# ' or '##' is a Markdown cell, any other a code cell."
    made = []

    def add(kind, source, tags=()):
        cell = {"cell_type": kind, "id": f"cell-{len(made):02d}", "metadata": {"tags": list(tags)} if tags else {},
                "source": source.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))

    if front:
        add("raw", front.format(slug=slug, theme=theme))
        add("code", f"#| default_exp {theme}.{slug}")
    if parameters is not None:
        add("code", parameters, ["parameters"])
    for source in cells:
        add("markdown" if source.startswith(("# ", "##")) else "code", source.replace("{slug}", slug).replace("{{", "{").replace("}}", "}"))
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def write(nb, path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def tree(*folders, skip=()) -> dict:
    "Every file and folder below some folders, with what a change would change."
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if not any(part in path.parts for part in skip) and not path.is_symlink():
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                found[str(path)] = (stat.st_size, stat.st_mtime_ns) if path.is_file() else None
    return found


def alive(pid: int) -> bool:
    "Whether a process runs; one that ended and was not waited for does not."
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Repo:
    "A repository in a temporary folder, with a home and a folder for temporary files of its own."
    base: Path
    env: dict = field(default_factory=dict)

    def __post_init__(self):
        self.root, self.home, self.tmp = self.base / "repo", self.base / "home", self.base / "tmp"
        for folder in (self.root / "nbs", self.home, self.tmp):
            folder.mkdir(parents=True)
        (self.root / "settings.ini").write_text((HOME / "settings.ini").read_text(encoding="utf-8"), encoding="utf-8")

    def paper(self, slug, *cells, theme="theory", **options) -> Path:
        return write(notebook(slug, *cells, theme=theme, **options), self.root / "nbs" / theme / f"{slug}.ipynb")

    def environment(self, **more) -> dict:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("RESEARCHKIT_", "PYTEST_", "OMP_"))}
        return {**keep, "HOME": str(self.home), "TMPDIR": str(self.tmp), "RESEARCHKIT_HOME": str(self.root),
                "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(self.base / "matplotlib"), **self.env, **more}

    def popen(self, *arguments, env=None, **options) -> subprocess.Popen:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
                   "start_new_session": True, "cwd": self.root, **options}
        return subprocess.Popen([str(COMMAND), *map(str, arguments)], env=self.environment(**(env or {})), **options)

    def cli(self, *arguments, timeout=120, **options) -> subprocess.CompletedProcess:
        process = self.popen(*arguments, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def tree(self) -> dict:
        return tree(self.root, self.home, self.tmp)

    def refused(self, *arguments, **options) -> str:
        "Run a command that must be refused: one line, exit code 2, nothing written. Returns the line."
        before = self.tree()
        done = self.cli(*arguments, **options)
        return one_line(done.returncode, done.stdout, done.stderr, before, self.tree())


def one_line(code, out, err, before, after) -> str:
    lines = [line for line in err.splitlines() if "  0:" not in line]  # without the progress
    assert code == 2, (code, out, err)
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert "Traceback" not in out + err
    assert before == after
    return lines[0]


@pytest.fixture
def repo(tmp_path) -> Repo:
    return Repo(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Repo:
    "One repository for all tests of a module that leave it as it is."
    return Repo(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def one_thread():
    "Two threads are slower than one on tensors this small."
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site of this repository, made without Quarto."
    from researchkit.run.site import build_site

    return build_site(HOME, tmp_path_factory.mktemp("site") / "out", quarto=False)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "A small site with three made-up papers."
    from researchkit.run.site import build_site
    from sites import small_tree

    folder = tmp_path_factory.mktemp("small")
    return build_site(small_tree(folder), folder / "out", quarto=False)
