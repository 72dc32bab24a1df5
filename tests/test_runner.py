import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from conftest import RECORD, alive, notebook, tree, write
from researchkit.core.errors import InputError
from researchkit.run import page
from researchkit.core.files import write_atomically
from researchkit.run.runner import Job, Progress, Result, clock, cores, execute, finished, plan, resolve


@pytest.fixture
def make(tmp_path):
    def make(slug, *cells, given=None, **options):
        path = write(notebook(slug, *cells, front=None, **options), tmp_path / f"{slug}.ipynb")
        return plan(path, tmp_path / "out", given=given or {"shift": 0.0})
    return make


def test_resolve(repo):
    one, two, three = repo.paper("one", "1"), repo.paper("two", "1"), repo.paper("three", "1", theme="reuse")
    assert resolve(["all"], repo.root) == [three, one, two]
    assert resolve(["two", "theory", "two"], repo.root) == [two, one]
    assert resolve([str(one)], repo.root) == [one.resolve()]
    with pytest.raises(InputError, match="unknown paper or theme 'twoo'.*two"):
        resolve(["one", "twoo"], repo.root)
    with pytest.raises(InputError, match="security"):
        resolve(["security"], repo.root)


def test_plan_writes_nothing_and_names_the_places(make, tmp_path):
    job = make("one", "1")
    assert job.folder == tmp_path / "out" / "one" / "cpu" and not job.folder.parent.parent.exists()
    assert [p.name for p in (job.notebook, job.partial, job.page, job.record)] == ["one.ipynb", "one.partial.ipynb", "one.html", "one.record.json"]
    assert plan(job.path, tmp_path, "smoke", {"seeds": "3"}).params == {"profile": "smoke", "seeds": [3]}
    assert plan(job.path, tmp_path, "smoke", {"profile": "full"}).folder.name == "full"


def test_plan_refuses_in_the_name_of_the_notebook(make):
    with pytest.raises(InputError, match="^one: unknown parameter 'shfit' .did you mean shift.*profile: str = 'cpu'; seeds: list"):
        make("one", "1", given={"shfit": 1})
    with pytest.raises(InputError, match="one.*shift takes float"):
        make("one", "1", given={"shift": "x"})


def test_how_runs_end(make, tmp_path):
    jobs = [
        make("good", "## A\n\n```\n# no heading\n```", "1", "## Threads {#sec-t}", "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"),
        make("broken", "## Fine", "1", "## Broken *here*", "1 / 0", "## Never", "2"),
        make("refused", "## Data", "from researchkit.core.errors import DataError\nraise DataError('x.csv is missing:\\nget it')"),
        make("exits", "## Leaves", "import os\nos._exit(7)"),
        make("killed", "## Falls", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
        make("other_kernel", "1"), make("no_kernel", "1"),
    ]
    for name, metadata in (("other_kernel", {"kernelspec": {"name": "nope", "display_name": "x", "language": "python"}}), ("no_kernel", {})):
        path = tmp_path / f"{name}.ipynb"
        write(json.loads(path.read_text()) | {"metadata": metadata}, path)
    results = {r.job.name: r for r in execute(jobs, parallel=2)}
    assert list(results) == [j.name for j in jobs]
    assert {n: r.status for n, r in results.items()} == {
        "good": "done", "broken": "failed", "refused": "refused", "exits": "failed", "killed": "failed",
        "other_kernel": "done", "no_kernel": "done"}

    good = results["good"].job
    assert tree(good.folder).keys() == {str(good.notebook), str(good.page)}
    threads = json.loads(good.notebook.read_text())["cells"][-1]["outputs"][0]["text"]
    assert "".join(threads).split() == [str(max(1, cores() // 2))] * 2

    broken = results["broken"]
    assert (broken.heading, broken.error) == ("Broken *here*", "ZeroDivisionError: division by zero")
    assert "1 / 0" in broken.traceback and "\x1b" not in broken.traceback
    assert tree(broken.job.folder).keys() == {str(broken.job.partial)}

    refused = results["refused"]
    assert refused.error == "x.csv is missing: get it" and not (tmp_path / "out" / "refused").exists()
    for name, heading in (("exits", "Leaves"), ("killed", "Falls")):
        assert "Kernel died" in results[name].error and results[name].heading == heading and results[name].job.partial.exists()


def test_a_timeout_ends_the_kernel_and_its_children(make):
    job = make("late", "## Sleeps", "import subprocess, time\nchild = subprocess.Popen(['sleep', '300'])\nopen('pid', 'w').write(str(child.pid))\ntime.sleep(300)")
    (late,) = execute([job], timeout=8)
    assert late.status == "timed out" and late.seconds >= 8 and job.partial.exists() and not job.notebook.exists()
    assert not alive(int((job.folder / "pid").read_text()))


def test_a_refused_run_leaves_the_folders_that_were_there(make, tmp_path):
    job = make("data", "from researchkit.core.errors import DataError\nraise DataError('gone')")
    (tmp_path / "out").mkdir()
    before = tree(tmp_path)
    assert execute([job])[0].status == "refused"
    assert tree(tmp_path) == before
    nested = plan(job.path, tmp_path / "a" / "b")
    assert execute([nested])[0].status == "refused"
    assert tree(tmp_path) == before


def test_results_that_cannot_be_written_fail_alone(make, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "render_page", full)
    (result,) = execute([make("one", "1")])
    assert result.status == "failed" and "No space left on device" in result.error


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_ctrl_c_while_a_kernel_starts_is_not_lost(make, monkeypatch, delay):
    from papermill.clientwrap import PapermillNotebookClient

    start = PapermillNotebookClient.__init__

    def interrupted(self, *a, **k):
        start(self, *a, **k)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(PapermillNotebookClient, "__init__", interrupted)
    since, before = time.monotonic(), set(psutil.Process().children(recursive=True))
    (result,) = execute([make("long", "import time; time.sleep(60)")])
    assert result.status == "cancelled" and time.monotonic() - since < 30
    assert not [p for p in psutil.Process().children(recursive=True) if alive(p.pid) and p not in before]


def test_execute_refuses(make):
    job = make("one", "1")
    for options, word in ((dict(parallel=0), "at least 1"), (dict(timeout=0), "positive"), (dict(timeout=float("nan")), "positive")):
        with pytest.raises(InputError, match=word):
            execute([job], **options)
    with pytest.raises(InputError, match="same folder"):
        execute([job, job])
    assert execute([]) == []


def test_resume_keeps_the_same_run_and_no_other(make, tmp_path):
    def job(**given):
        return plan(tmp_path / "one.ipynb", tmp_path / "out", given=given)

    make("one", "seeds = seeds[:1]", RECORD)
    first = job(seeds=[4, 5], shift=0.5)
    assert execute([first], resume=True)[0].status == "done"
    stamp = first.notebook.stat().st_mtime_ns
    assert execute([job(shift="0.5", seeds="4,5")], resume=True)[0].status == "kept" and first.notebook.stat().st_mtime_ns == stamp
    assert not finished(job()) and not finished(job(shift=0.5)) and not finished(job(seeds=[4, 5], shift=0.1))
    make("one", "seeds = seeds[:2]", RECORD)
    assert not finished(job(seeds=[4, 5], shift=0.5))


def test_write_atomically(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "one")
    write_atomically(path, "zwei")
    assert path.read_text() == "zwei" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        write_atomically(path, 3)
    assert path.read_text() == "zwei" and list(tmp_path.iterdir()) == [path]


def test_clock():
    assert [clock(s) for s in (0, 9.9, 60, 3601)] == ["0:00", "0:09", "1:00", "60:01"]


def test_progress_shows_each_heading_once(capsys):
    job = Job(Path("one.ipynb"), Path("out"))
    with Progress([job], live=False, stream=sys.stderr) as p:
        p.start(job)
        for i, heading in enumerate(["", "A", "A", "B [1]"]):
            p.heading(job, heading, i, 4)
        p.end(Result(job, "done", 61))
    assert [line[11:] for line in capsys.readouterr().err.splitlines()] == ["started (cpu)", "A  [1/4]", "B [1]  [3/4]", "done"]
