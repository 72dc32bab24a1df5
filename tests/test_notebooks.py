"""Every notebook runs at smoke, two at a time, and leaves nothing behind outside its output folder."""

import pytest

from conftest import HOME, tree
from researchkit.core.notebook import find_record, paper_paths
from researchkit.core.study import validate_record
from researchkit.run.check import BUDGET, all_notebooks
from researchkit.run.runner import execute, plan

PAPERS = paper_paths(HOME)
OTHERS = {str(p.relative_to(HOME / "nbs")): p for p in all_notebooks(HOME) if p not in PAPERS.values() and not p.name.startswith("benchmarks")}
CACHES = ("matplotlib", "__pycache__", ".git", ".hypothesis", ".pytest_cache", "fontconfig", "_docs", "_proc", "runs", ".venv", "researchkit.egg-info")
BUSY = 2  # a budget in CPU-seconds stretches when neighbours share the cores


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "The results by notebook, and which files came or changed outside the output folder."
    base = tmp_path_factory.mktemp("notebooks")
    home, tmp, out = (base / name for name in ("home", "tmp", "out"))
    for folder in (home, tmp):
        folder.mkdir()
    from researchkit.core.cache import cache_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESEARCHKIT_CACHE", str(cache_folder().parent))  # the user's own: the models are trained once
        for name, value in (("HOME", home), ("TMPDIR", tmp), ("RESEARCHKIT_HOME", HOME), ("MPLCONFIGDIR", base / "matplotlib")):
            patch.setenv(name, str(value))
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        before = tree(HOME, home, tmp, skip=CACHES)
        jobs = [plan(p, out / p.parent.name, "smoke") for p in [*PAPERS.values(), *OTHERS.values()]]
        results = {r.job.path: r for r in execute(jobs, parallel=2, timeout=600)}
        after = tree(HOME, home, tmp, skip=CACHES)
    return results, {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}


def finished(result):
    assert result.ok, f"{result.status} in section '{result.heading}': {result.error}\n{result.traceback}"
    return result


@pytest.mark.parametrize("slug", PAPERS)
def test_a_paper_at_smoke(slug, ran):
    result = finished(ran[0][PAPERS[slug].resolve()])
    record = validate_record(find_record(result.job.notebook))
    assert record["paper"] == slug and record["profile"] == "smoke" and record["code_hash"] == result.job.hash and record["rows"]
    assert len(record["claims"]) >= 4 and {c["verdict"] for c in record["claims"]} == {"not tested"}
    assert any(c["measured"] is not None for c in record["claims"])
    assert record["cpu_seconds"] < BUSY * BUDGET["smoke"]
    assert {p.name for p in result.job.folder.iterdir()} == {f"{slug}.ipynb", f"{slug}.html", f"{slug}.record.json"}


@pytest.mark.parametrize("name", OTHERS)
def test_another_notebook(name, ran):
    finished(ran[0][OTHERS[name].resolve()])


def test_nothing_is_left_behind(ran):
    assert ran[1] == set()


def test_what_is_published_is_fresh():
    from researchkit.run.check import check

    problems = check(HOME)
    assert not problems, "\n".join(problems)
