import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pandas as pd
import psutil
import pytest
import yaml

from conftest import HOME, RECORD, Repo, notebook, write
from researchkit.core.errors import InputError
from researchkit.run.results import Results, ResultsWarning
from researchkit.run.sweep import Sweep, versions

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
COUNT = 24  # runs of the sweep that is disturbed in many ways
MANY = int(os.environ.get("TEST_SWEEP_RUNS", 1000))
VOLATILE = ["started", "seconds", "wall_seconds", "cpu_seconds", "peak_rss_bytes"]
PARAMETERS = 'profile: str = "cpu"\nseeds: list[int] = [0]\nshift: float = 0.0\nmarks: str = ""'
# Every execution leaves its marks outside; a pause from the environment changes no id.
MARK = """import os
import time
def mark(word):
    at = os.open(marks or os.environ["MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(at, f"{word} {shift:g} {os.getpid()}\\n".encode())
    os.close(at)
mark("begin")"""
QUICK = [MARK, "time.sleep(float(os.environ.get('PAUSE', 0)))", RECORD, "mark('end')"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Repo:
    repo = Repo(tmp_path_factory.mktemp("sweeps"))
    repo.paper("quick", *QUICK, parameters=PARAMETERS)
    return repo


class Place:
    "A folder for one sweep of `quick`, and the marks that its runs leave."

    def __init__(self, repo: Repo, base: Path):
        self.repo, self.base, self.out, self.log, self.tmp = repo, base, base / "out", base / "marks", base / "tmp"
        self.tmp.mkdir()
        self.arguments = ["sweep", "quick", "-g", f"shift=0:{COUNT}", "-j", 2]

    def environment(self, pause=0.0) -> dict:
        return {"MARKS": str(self.log), "PAUSE": str(pause), "TMPDIR": str(self.tmp)}

    def popen(self, *more, pause=0.0, env=None, **options):
        process = self.repo.popen(*self.arguments, "--out", self.out, *more, env=self.environment(pause) | (env or {}), **options)
        self.pids = getattr(self, "pids", []) + [process.pid]
        return process

    def cli(self, *more, timeout=300, **options) -> subprocess.CompletedProcess:
        process = self.popen(*more, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(more, process.returncode, out, err)

    def marks(self, word: str) -> Counter:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter(float(line.split()[1]) for line in lines if line.startswith(word))

    def pid(self, shift: float) -> int:
        "Of the kernel that did, or does, a run."
        return int(next(line.split()[2] for line in reversed(self.log.read_text().splitlines()) if line.startswith(f"begin {shift:g} ")))

    def finished(self) -> dict:
        "shift -> id of every finished run."
        return {json.loads(p.read_text())["params"]["shift"]: p.stem for p in (self.out / "runs").glob("*.json")}

    def processes(self) -> list[psutil.Process]:
        "All that a sweep here has started."
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MARKS") == str(self.log) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                pass
        return found

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):  # it may end while we look
                command = "".join(process.cmdline())
                found += [process] if "loky" in command and "tracker" not in command else []
        return found

    def end(self) -> None:
        for process in self.processes():
            process.kill()

    def clean(self) -> bool:
        "Whether nothing is left but results: no process, no temporary file, no semaphore."
        semaphores = [p for pid in self.pids for p in Path("/dev/shm").glob(f"*loky-{pid}-*")] if Path("/dev/shm").exists() else []
        return not self.processes() and not [*self.tmp.iterdir()] and not semaphores


@pytest.fixture
def place(shared, tmp_path):
    place = Place(shared, tmp_path)
    yield place
    place.end()


@pytest.fixture(scope="module")
def undisturbed(shared, tmp_path_factory) -> Place:
    place = Place(shared, tmp_path_factory.mktemp("undisturbed"))
    done = place.cli()
    assert done.returncode == 0, done.stderr
    assert place.marks("begin") == place.marks("end") == Counter(range(COUNT))
    return place


def until(condition, seconds=60.0, every=0.02):
    "Wait for a condition, and return its value."
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)
    return value


def tables(out) -> dict:
    frames = {name: pd.read_parquet(Path(out) / "results" / f"{name}.parquet") for name in ("runs", "rows", "claims")}
    return {name: frame.drop(columns=[c for c in VOLATILE if c in frame]) for name, frame in frames.items()}


def assert_same(a, b) -> None:
    for name, frame in tables(a).items():
        pd.testing.assert_frame_equal(frame, tables(b)[name])


def small(tmp_path, *cells, name="small", parameters=PARAMETERS, front=None) -> Path:
    return write(notebook(name, *cells, front=front, parameters=parameters), tmp_path / f"{name}.ipynb")


def here(sweep: Sweep, threads=2, **how) -> Results:
    "Run a sweep in threads of this process: quick, for the fork server stays."
    with mock.patch.dict(os.environ), ThreadPoolExecutor(threads) as executor:
        os.environ.pop("PYTEST_CURRENT_TEST", None)
        return sweep.run(jobs=threads, executor=executor, **how)


# What identifies a run

def ids(path, *arguments, **options) -> list[str]:
    return [run.id for run in Sweep(path, *arguments, **options).runs]


def test_an_id_stands_for_code_parameters_and_versions(tmp_path):
    path = small(tmp_path, "import numpy as np", "# Text", "np.ones(1)")
    base = ids(path, {"shift": [0, 1]})
    assert len(set(base)) == 2 and all(len(i) == 16 for i in base)
    assert ids(path, {"shift": "0,1"}, params={"marks": "", "seeds": [0], "profile": "cpu"}) == base
    assert ids(path, {"shift": [1, 0]}) == base[::-1]
    assert not set(ids(path, {"shift": [0, 1]}, params={"marks": "x"})) & set(base)
    assert not set(ids(path, {"shift": [0, 1]}, profile="smoke")) & set(base)
    small(tmp_path, "import numpy as np", "# Other text", "np.ones(1)")
    assert ids(path, {"shift": [0, 1]}) == base
    small(tmp_path, "import numpy as np", "# Text", "np.ones(2)")
    assert not set(ids(path, {"shift": [0, 1]})) & set(base)


def test_the_order_of_the_axes_changes_no_id(tmp_path):
    path = small(tmp_path, "1")
    one, two = ids(path, {"shift": "0,1", "seeds": "0,1"}), ids(path, {"seeds": "0,1", "shift": "0,1"})
    assert sorted(one) == sorted(two) and one != two


@pytest.mark.parametrize("declared,given", [("shift: float = 0", "0"), ("shift: float = 1", 1.0), ("shift: list[float] = [1, 2]", [[1.0, 2.0]]), ("shift: list[int] = (1, 2)", [[1, 2]])])
def test_a_default_that_is_given_changes_no_id(tmp_path, declared, given):
    path = small(tmp_path, "1", parameters=f"{declared}\nother: int = 0")
    assert ids(path, {"other": [0]}) == ids(path, {"shift": given})


def test_versions_are_those_of_what_is_imported(tmp_path):
    def found(*cells):
        return set(versions(json.loads(small(tmp_path, *cells, name=f"n{len(list(tmp_path.iterdir()))}").read_text())))

    assert found("1") == {"python"}
    assert found("import numpy as np\nfrom yaml import safe_load") == {"python", "numpy", "PyYAML"}
    assert found("def f():\n    import pandas.api.types") == {"python", "pandas"}
    assert found("%matplotlib inline\nimport numpy") == {"python", "numpy"}
    assert found("%%time\nimport numpy") == {"python", "numpy"}
    assert found("if 1:\n    !true\nimport numpy") == {"python", "numpy"}
    assert found("files = !ls\nimport numpy") == {"python", "numpy"}
    assert found("numpy?\nimport numpy") == {"python", "numpy"}
    assert {"researchkit", "numpy", "pandas"} <= found("from researchkit.core.study import Study")


def test_the_source_of_imported_modules_counts(tmp_path):
    path = small(tmp_path, "from researchkit.core.study import Study")
    package = tmp_path / "copy" / "researchkit"
    shutil.copytree(Path(sys.modules["researchkit"].__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "_repository"))
    code = f"""
from pathlib import Path
from researchkit.run import sweep
ids = []
for module in (None, "run/site", "core/study", "core/notebook"):
    if module:
        with open(Path({str(package)!r}) / f"{{module}}.py", "a") as f:
            f.write("# changed")
    sweep._versions.cache_clear()
    ids.append(sweep.Sweep({str(path)!r}).runs[0].id)
print(sweep.__file__, *(a != b for a, b in zip(ids, ids[1:])))
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(package.parent), "RESEARCHKIT_HOME": str(HOME)}, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [str(package / "run" / "sweep.py"), "False", "True", "True"], done.stdout + done.stderr


def test_what_cannot_be_swept_is_refused_before_anything_runs(tmp_path):
    path, out = small(tmp_path, "1"), tmp_path / "out"
    for options, message in ((dict(grid={"shfit": [1]}), "unknown parameter 'shfit'.*did you mean shift"), (dict(grid={"shift": "x"}), "takes float"), (dict(keep="some"), "keep"),
                             (dict(timeout=0), "positive"), (dict(profile="big"), "profile"), (dict(grid={"shift": "uniform(0,1)"}), "sample"), (dict(params={"marks": "a"}, grid={"marks": "b"}), "twice")):
        with pytest.raises(InputError, match=message):
            Sweep(path, out=out, **options)
    for options, message in ((dict(jobs=0), "at least 1"), (dict(resources={"GPU": 1}), "scheduler")):
        with pytest.raises(InputError, match=message):
            Sweep(path, out=out).run(**options)
    with pytest.raises(InputError, match="parameters"):
        Sweep(small(tmp_path, "1", parameters=None, name="none"), {"shift": [1]}, out=out)
    assert not out.exists()


def test_refusals_of_the_command_are_one_line(shared):
    for arguments, message in ((["nope"], "unknown paper"), (["quick", "-g", "shift"], "-g takes name=values"), (["quick", "-g", "shift=1:2:0"], "step"),
                               (["quick", "-g", "shift=uniform(1,0)", "--sample", "3"], "shift"), (["missing.yaml"], "no such file"), (["quick", "--out", "nope://x"], "nope")):
        assert message in shared.refused("sweep", *arguments)


def test_a_dry_run_writes_nothing(shared, undisturbed):
    before = shared.tree()
    done = shared.cli("sweep", "quick", "-g", f"shift=0:{COUNT}", "--dry-run")
    assert done.returncode == 0 and shared.tree() == before
    *lines, last = done.stdout.splitlines()
    assert last == f"{COUNT} runs" and {line.split()[0] for line in lines} == set(undisturbed.finished().values())


# An undisturbed sweep

def test_what_a_sweep_leaves(undisturbed):
    out, done = undisturbed.out, undisturbed.finished()
    assert sorted(p.name for p in out.iterdir() if p.is_dir() and [*p.iterdir()]) == ["notebooks", "results", "runs"]
    assert {p.stem for p in (out / "notebooks").iterdir()} == set(done.values()) and len(done) == COUNT
    found = Results(out)
    assert list(found.rows["accuracy"]) == [0.5 + shift for shift in range(COUNT)] == list(found.rows["shift"] + 0.5)
    assert len(found.claims) == 4 * COUNT and set(found.runs["status"]) == {"done"}
    assert_same(out, out)
    assert undisturbed.clean()


def test_a_finished_sweep_is_not_repeated(undisturbed):
    before, marks = {p: p.stat().st_mtime_ns for p in undisturbed.out.rglob("*") if p.is_file()}, undisturbed.marks("begin")
    done = undisturbed.cli()
    assert done.returncode == 0 and done.stdout.startswith(f"0 done, {COUNT} finished before, 0 failed")
    assert undisturbed.marks("begin") == marks and {p: p.stat().st_mtime_ns for p in undisturbed.out.rglob("*") if p.is_file()} == before


def test_only_what_is_new_runs(undisturbed, place):
    shutil.copytree(undisturbed.out, place.out)
    done = place.cli("-g", "seeds=0,1", "-p", "marks=", env={"MARKS": str(place.log)})
    assert done.returncode == 0 and done.stdout.startswith(f"{COUNT} done, {COUNT} finished before"), done.stdout + done.stderr
    assert place.marks("begin") == Counter(range(COUNT)) and len(Results(place.out).runs) == 2 * COUNT


# What is killed

@linux
def test_a_killed_driver_loses_nothing_and_doubles_nothing(place, undisturbed):
    moments, kept = random.Random(0), {}
    for attempt in range(10):
        process, before = place.popen(pause=0.3), sum(place.marks("begin").values())
        if attempt < 4:  # anywhere, mostly while it starts
            time.sleep(moments.uniform(0.2, 6))
        else:
            until(lambda: sum(place.marks("begin").values()) > before or process.poll() is not None)
            time.sleep(moments.uniform(0, 0.7))
        finished, begun = place.finished() if (place.out / "runs").exists() else {}, place.marks("begin")
        process.kill()
        process.communicate()
        kept |= {shift: begun[shift] for shift in finished if shift not in kept}
        until(lambda: not place.processes(), 5)
    done = place.cli()
    assert done.returncode == 0, done.stderr
    assert_same(place.out, undisturbed.out)
    assert {shift: place.marks("begin")[shift] for shift in kept} == kept and kept
    until(place.clean, 5)
    assert place.finished() == undisturbed.finished()


@linux
def test_killed_workers_lose_nothing_and_double_nothing(place, undisturbed):
    process, moments, hit, kills = place.popen(pause=0.5), random.Random(1), set(), 0
    while kills < 10:
        def fresh():  # every time another run, since one whose worker always dies has failed
            return process.poll() is not None or next((s for s, n in place.marks("begin").items() if n == 1 and s not in hit | set(place.marks("end"))), None)

        shift = until(lambda: fresh() is not None and [fresh()])[0]
        assert process.poll() is None, process.communicate()
        hit.add(shift)
        time.sleep(moments.uniform(0, 0.8))
        for delay in [0] if kills % 5 else [0, moments.uniform(0, 2)]:  # the second one falls into a start
            time.sleep(delay)
            workers = place.workers()
            if workers:
                moments.choice(workers).kill()
                kills += 1
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (kills, err)
    assert_same(place.out, undisturbed.out)
    assert place.marks("end").keys() == set(map(float, range(COUNT)))
    until(place.clean, 5)


@linux
def test_a_kernel_killed_from_outside_has_failed_alone(place):
    place.arguments[3] = "shift=0:5"
    process = place.popen(pause=1)
    until(lambda: place.marks("begin")[1])
    os.kill(place.pid(1), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out.startswith("4 done, 0 finished before, 1 failed"), out + err
    (failed,) = [json.loads(p.read_text()) for p in (place.out / "failed").iterdir()]
    assert failed["params"]["shift"] == 1 and "Kernel died" in failed["error"]
    assert place.cli("--retry-failed").returncode == 0 and not [*(place.out / "failed").iterdir()]
    assert place.marks("end") == Counter(range(5))


@linux
def test_a_killed_fork_server_is_replaced(place):
    place.arguments[3] = "shift=0:6"
    process = place.popen(pause=1)
    until(lambda: place.marks("begin")[2])
    os.kill(psutil.Process(place.pid(2)).ppid(), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out.startswith("5 done, 0 finished before, 1 failed"), out + err
    assert place.cli("--retry-failed").returncode == 0 and place.marks("end") == Counter(range(6))


@linux
def test_cold_kernels_end_with_their_killed_worker_and_driver(place):
    place.arguments[3] = "shift=0:2"
    process = place.popen("--cold", pause=60)
    until(lambda: len(place.marks("begin")) == 2)
    kernel, worker = psutil.Process(place.pid(0)), psutil.Process(psutil.Process(place.pid(0)).ppid())
    worker.kill()
    until(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 5)
    process.kill()
    process.communicate()
    until(place.clean, 5)


@linux
def test_a_run_that_kills_its_worker_fails_and_the_others_go_on(tmp_path):
    path = small(tmp_path, "import os, psutil, signal\nif shift == 1:\n    worker = psutil.Process().parent()\n    while 'loky' not in ''.join(worker.cmdline()):\n        worker = worker.parent()\n    worker.kill()", RECORD)
    sweep = Sweep(path, {"shift": [0, 1, 2]}, out=tmp_path / "out")
    results = sweep.run(jobs=2)
    assert list(results.runs.sort_values("shift")["status"]) == ["done", "failed", "done"]
    assert "died 5 times" in results.runs.set_index("shift").loc[1, "error"]


def test_half_written_results_are_skipped_with_a_warning(undisturbed, place):
    shutil.copytree(undisturbed.out, place.out)
    shutil.rmtree(place.out / "results")
    empty, half = sorted((place.out / "runs").iterdir())[:2]
    empty.write_text("")
    half.write_text(half.read_text()[:100])
    with pytest.warns(ResultsWarning, match="was skipped"):
        assert len(Results(place.out).runs) == COUNT - 2


def test_half_written_results_are_made_again(undisturbed, place):
    shutil.copytree(undisturbed.out, place.out)
    shutil.rmtree(place.out / "results")
    empty, half = sorted((place.out / "runs").iterdir())[:2]
    empty.write_text("")
    half.write_text(half.read_text()[:100])
    done = place.cli()
    assert done.returncode == 0 and done.stdout.startswith(f"2 done, {COUNT - 2} finished before"), done.stdout + done.stderr
    assert_same(place.out, undisturbed.out)


def test_a_run_with_a_record_that_no_table_can_hold_is_not_repeated(tmp_path):
    path, log = small(tmp_path, MARK, RECORD.replace("accuracy=0.5 + shift", "accuracy=[shift]")), tmp_path / "marks"
    sweep = Sweep(path, {"shift": [0, 1]}, params={"marks": str(log)}, out=tmp_path / "out")
    for _ in range(2):
        with pytest.warns(ResultsWarning):
            here(sweep)
    assert len(log.read_text().splitlines()) == 2


# Interruptions

@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_finished(place, undisturbed, number):
    process = place.popen(pause=0.3)
    until(lambda: len([*(place.out / "runs").glob("*.json")]) > 2 if (place.out / "runs").exists() else False)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "goes on from here" in err and "left" in out, out + err
    until(place.clean, 3)
    finished, begun = place.finished(), place.marks("begin")
    assert 2 < len(finished) < COUNT and len(tables(place.out)["runs"]) == len(finished)
    assert place.cli().returncode == 0
    assert_same(place.out, undisturbed.out)
    assert all(place.marks("begin")[shift] == begun[shift] == 1 for shift in finished)


@linux
def test_an_interruption_before_the_first_run_is_finished(place):
    process = place.popen(pause=60)
    until(lambda: place.marks("begin"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "goes on from here" in err, out + err
    until(place.clean, 3)


# Two sweeps at once

@linux
def test_two_sweeps_in_one_folder_share_the_runs(place, undisturbed):
    dead = place.popen(pause=30)  # killed while it holds claims
    until(lambda: len(place.marks("begin")) == 2)
    dead.kill()
    dead.communicate()
    until(lambda: not place.processes(), 5)
    place.log.unlink()
    one = place.popen(pause=0.2)
    place.arguments[3] = "shift=" + ",".join(map(str, reversed(range(COUNT))))
    two = place.popen(pause=0.2)
    (first, e1), (second, e2) = one.communicate(timeout=120), two.communicate(timeout=120)
    assert one.returncode == two.returncode == 0, e1 + e2
    assert place.marks("begin") == place.marks("end") == Counter(range(COUNT))
    assert int(first.split()[0]) + int(second.split()[0]) == COUNT, first + second
    assert_same(place.out, undisturbed.out)
    until(place.clean, 5)
    assert not [*(place.out / "locks").iterdir()]


# Full and read-only places

@contextmanager
def _mounted(folder, size):
    folder.mkdir(exist_ok=True)
    if os.name != "posix" or os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("needs leave to mount")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def only_line(done) -> str:
    "The error of a command that was refused."
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.splitlines()[-1] == lines[0]
    return lines[0]


def test_a_full_disk_keeps_earlier_results(place, undisturbed):
    with _mounted(place.out, "200k") as remount:
        line = only_line(place.cli())
        finished = place.finished()
        assert 0 < len(finished) < COUNT and str(place.out) in line and "No space left" in line and f"{len(finished)} of {COUNT} runs are finished" in line
        begun = {shift: place.marks("begin")[shift] for shift in finished}
        assert len(Results(place.out).rows) == len(finished)
        again = only_line(place.cli())
        assert str(place.out) in again and finished.items() <= place.finished().items()
        remount("size=20m")
        assert place.cli().returncode == 0
        assert_same(place.out, undisturbed.out)
        assert {shift: place.marks("begin")[shift] for shift in begun} == begun


def test_a_disk_that_is_full_when_the_tables_are_written(place, undisturbed):
    with _mounted(place.out, "20m") as remount:
        shutil.copytree(undisturbed.out, place.out, dirs_exist_ok=True)
        for path in (place.out / "results").iterdir():
            path.unlink()
        used = shutil.disk_usage(place.out).used
        remount(f"size={used}")
        line = only_line(place.cli())
        assert str(place.out) in line and f"{COUNT} of {COUNT} runs are finished" in line, line
        remount("size=20m")
        assert place.cli().returncode == 0 and not place.marks("begin")
        assert_same(place.out, undisturbed.out)


def test_a_full_folder_for_temporary_files(place, tmp_path):
    with _mounted(place.tmp, "3m"):
        path = small(tmp_path, "import os\nwith open('big', 'wb') as f:\n    f.write(bytes(4_000_000 * (shift == 1)))", RECORD)
        place.arguments = ["sweep", path, "-g", "shift=0,1,2", "-j", 1]
        line = only_line(place.cli())
        assert "temporary files" in line and "No space left" in line
        assert not (place.out / "failed").exists() and len(place.finished()) == 1


def test_a_read_only_folder_is_refused_at_once(place, undisturbed):
    with _mounted(place.out, "20m") as remount:
        shutil.copytree(undisturbed.out, place.out, dirs_exist_ok=True)
        some = sorted((place.out / "runs").iterdir())[:3]
        for path in some:
            path.unlink()
        remount("ro")
        line = only_line(place.cli())
        assert str(place.out) in line and "Read-only" in line and not place.marks("begin")
        assert len(Results(place.out).runs) == COUNT - 3
        remount("rw")
        assert place.cli().returncode == 0
        assert_same(place.out, undisturbed.out)


def test_a_file_in_the_way(place):
    place.out.write_text("mine")
    line = only_line(place.cli())
    assert str(place.out) in line and place.out.read_text() == "mine" and not place.marks("begin")


@linux
def test_a_folder_that_is_lost_on_the_way(place, tmp_path):
    process = place.popen(pause=1)
    until(lambda: place.marks("begin"))
    place.out.rename(tmp_path / "elsewhere")
    place.out.write_text("mine")
    out, err = process.communicate(timeout=30)
    line = only_line(subprocess.CompletedProcess([], process.returncode, out, err))
    assert str(place.out) in line and "runs are finished" in line
    assert until(place.clean, 5)


# Failed runs

FAILURES = {0: "pass", 1: "raise ValueError('bad\\nluck')", 2: "from researchkit.core.errors import InputError\nraise InputError('no data')", 3: "time.sleep(300)", 4: "os._exit(3)",
            5: "import ctypes\nctypes.string_at(0)", 6: "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\nx = bytearray(2**32)", 7: "import sys\nsys.exit('left')"}


@linux
def test_failed_runs_are_kept_and_retried_on_request(tmp_path):
    mended, log = tmp_path / "mended", tmp_path / "marks"
    code = "if not os.path.exists({!r}):\n".format(str(mended)) + "".join(f"    if shift == {k}:\n" + textwrap.indent(v, "        ") + "\n" for k, v in FAILURES.items())
    path, out = small(tmp_path, MARK, "## Falls *here*", code, "## Ends", RECORD), tmp_path / "out"
    sweep = Sweep(path, {"shift": range(8)}, params={"marks": str(log)}, out=out, timeout=6)

    def begun():
        return Counter(float(line.split()[1]) for line in log.read_text().splitlines())

    here(sweep)
    found = {entry["params"]["shift"]: entry for entry in (json.loads(p.read_text()) for p in (out / "failed").iterdir())}
    assert found.keys() == set(range(1, 8)) and len([*(out / "runs").iterdir()]) == 1
    assert {k: e["status"] for k, e in found.items()} == {1: "failed", 2: "refused", 3: "timed out", 4: "failed", 5: "failed", 6: "failed", 7: "failed"}
    assert [found[k]["error"].split(":")[0] for k in (1, 2, 6, 7)] == ["ValueError", "no data", "MemoryError", "SystemExit"]
    assert all("Kernel died" in found[k]["error"] for k in (4, 5))
    assert all(found[k]["heading"] == "Falls *here*" for k in (1, 4, 5, 6, 7)) and "raise ValueError" in found[1]["traceback"]
    assert {(out / "notebooks" / f"{found[k]['id']}.ipynb").exists() for k in (1, 4, 5)} == {True}
    assert begun() == Counter(range(8)) and sorted(sweep.report["failed"]) == sorted(e["id"] for e in found.values())

    here(sweep)
    assert begun() == Counter(range(8)) and len(sweep.report["failed"]) == 7
    mended.touch()
    results = here(sweep, retry_failed=True)
    assert begun() == Counter([*range(8), *range(1, 8)]) and sweep.report["failed"] == [] and sweep.report["done"] == 7
    assert not [*(out / "failed").iterdir()] and set(results.runs["status"]) == {"done"} and len(results.rows) == 8


def test_the_command_names_what_failed(place, tmp_path):
    place.arguments = ["sweep", small(tmp_path, "## Part", "1 / shift", RECORD), "-g", "shift=0,1", "-j", 2]
    done = place.cli()
    assert done.returncode == 1 and done.stdout.startswith("1 done, 0 finished before, 1 failed")
    assert "shift=0: failed in section 'Part': ZeroDivisionError" in done.stderr and "--retry-failed" in done.stderr
    assert place.cli().returncode == 1


# What is kept

@pytest.mark.parametrize("keep,kept", [("all", {0, 1}), ("failed", {0}), ("none", set())])
def test_notebooks_are_kept_as_asked(tmp_path, keep, kept):
    sweep = Sweep(small(tmp_path, "1 / shift", RECORD), {"shift": [0, 1]}, out=tmp_path / "out", keep=keep)
    here(sweep)
    names = {p.stem for p in (tmp_path / "out" / "notebooks").glob("*")}
    assert names == {run.id for run in sweep.runs if run.params["shift"] in kept}


def test_the_notebook_of_a_failure_goes_when_the_run_succeeds(tmp_path):
    flag = tmp_path / "mended"
    sweep = Sweep(small(tmp_path, f"import os\nassert os.path.exists({str(flag)!r})", RECORD), {"shift": [0]}, out=tmp_path / "out", keep="failed")
    here(sweep)
    flag.touch()
    here(sweep, retry_failed=True)
    assert not [*(tmp_path / "out" / "notebooks").iterdir()]


def test_files_of_a_run_are_kept(tmp_path):
    path = small(tmp_path, "import os\nos.mkdir('sub')\nfor name in ('a.txt', 'sub/b.bin', '.hidden'):\n    open(name, 'w').write(f'{shift:g}')", RECORD)
    sweep = Sweep(path, {"shift": [0, 1]}, out=tmp_path / "out")
    here(sweep)
    for run in sweep.runs:
        folder = tmp_path / "out" / "files" / run.id
        assert {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()} == dict.fromkeys(["a.txt", "sub/b.bin"], f"{run.params['shift']:g}")
        assert json.loads((tmp_path / "out" / "runs" / f"{run.id}.json").read_text())["files"] == ["a.txt", "sub/b.bin"]


# Descriptions in files

def described(sweep: Sweep) -> list[str]:
    "The ids of the sweep that the file which a sweep leaves describes."
    sweep._describe()
    (path,) = Path(sweep.store.place).glob("sweep-*.yaml")
    return [run.id for run in Sweep.from_file(path).runs]


def _axes():
    import numpy as np
    from scipy import stats

    return {
        "grid": dict(grid={"shift": [0, 1.5], "seeds": [[0, 1], [2]]}), "text": dict(grid={"shift": "linspace(0,1,3), 7", "marks": "a,b"}), "zip": dict(grid={"seeds": [1, 2]}, zip={"shift": [0, 1], "marks": ["a", "b"]}),
        "range": dict(grid={"shift": range(3)}), "numpy": dict(grid={"shift": np.linspace(0, 1, 3)}, params={"seeds": np.arange(2)}), "numpy scalar": dict(params={"shift": np.float64(0.1)}),
        "numpy lists": dict(grid={"seeds": np.array([[0, 1], [2, 3]])}), "text draws": dict(grid={"shift": "uniform(0.1,0.7)"}, sample=5), "uniform": dict(grid={"shift": stats.uniform(0.1, 0.7 - 0.1)}, sample=5, sample_seed=3),
        "loguniform": dict(grid={"shift": stats.loguniform(1e-5, 0.3), "seeds": stats.randint(2, 9)}, sample=5), "choices": dict(grid={"shift": [1, 2, 3], "marks": "a,b"}, sample=4, sample_seed=1),
        "normal": dict(grid={"shift": stats.norm(0, 1)}, sample=3), "generator": dict(grid={"shift": (x / 2 for x in range(3))}), "set": dict(grid={"seeds": {1, 2}}), "profile": dict(profile="smoke"),
        "tuples": dict(grid={"shift": (1, 2), "seeds": ((0, 1),)}),
    }


@pytest.mark.parametrize("case", _axes())
def test_the_file_that_a_sweep_leaves_starts_the_same_sweep(tmp_path, case):
    sweep = Sweep(small(tmp_path, "1"), out=tmp_path / "out", **_axes()[case])
    assert described(sweep) == [run.id for run in sweep.runs]


def test_a_file_means_the_same_as_the_options(shared, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"paper": "quick", "grid": {"shift": "0:4", "seed": [1, 2]}, "params": {"marks": "x"}, "out": str(tmp_path / "out")}, sort_keys=False))
    file = shared.cli("sweep", path, "--dry-run").stdout
    options = shared.cli("sweep", "quick", "-g", "shift=0:4", "-g", "seed=1,2", "-p", "marks=x", "--dry-run").stdout
    assert file == options and file.endswith("8 runs\n")
    more = shared.cli("sweep", path, "-g", "shift=7", "--dry-run").stdout
    assert more.endswith("2 runs\n")


@pytest.mark.parametrize("pair", [("seed", 3), ("seed", "3"), ("seeds", 3), ("seeds", [3])])
def test_one_seed_is_a_list_of_one(tmp_path, pair):
    path = small(tmp_path, "1")
    assert ids(path, params=dict([pair])) == ids(path, {"seeds": [3]})


# Other places and executors

def test_a_store_in_memory(tmp_path, undisturbed):
    sweep = Sweep(small(tmp_path, "1 / (1 - shift)", RECORD), {"shift": [0, 1, 2]}, out=f"memory://{tmp_path.name}/x")
    results = here(sweep)
    assert sweep.report["done"] == 2 and len(sweep.report["failed"]) == 1 and len(results.rows) == 2
    assert here(sweep).runs.equals(results.runs) and sweep.report["kept"] == 2
    again = Results(f"memory://{tmp_path.name}/x")
    assert again.runs.drop(columns="error").equals(results.runs.drop(columns="error")) and not (tmp_path / "sweeps").exists()


def test_any_store_that_fsspec_knows_gives_the_same(tmp_path):
    path = small(tmp_path, RECORD)
    for out in (tmp_path / "a", f"memory://{tmp_path.name}/b"):
        here(Sweep(path, {"shift": [0, 1]}, out=out))
    a, b = Results(tmp_path / "a"), Results(f"memory://{tmp_path.name}/b")
    pd.testing.assert_frame_equal(a.rows, b.rows)
    pd.testing.assert_frame_equal(a.claims, b.claims)


def test_threads_warm_and_cold_kernels_give_equal_rows(tmp_path):
    path = small(tmp_path, RECORD)
    for name, warm in (("warm", True), ("cold", False)):
        here(Sweep(path, {"shift": range(3)}, out=tmp_path / name), warm=warm)
    assert_same(tmp_path / "warm", tmp_path / "cold")


def test_a_script_without_a_guard_and_with_threads(tmp_path):
    path = small(tmp_path, RECORD)
    script = tmp_path / "script.py"
    script.write_text(f"""print("once")
from concurrent.futures import ThreadPoolExecutor
from researchkit.run.sweep import Sweep
print(len(Sweep({str(path)!r}, {{"shift": [0, 1, 2]}}, out="local").run(jobs=2).rows))
print(len(Sweep({str(path)!r}, {{"shift": [0, 1, 2]}}, out="threads").run(jobs=2, executor=ThreadPoolExecutor(2)).rows))
""")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["once", "3", "3"]), done.stderr
    assert_same(tmp_path / "local", tmp_path / "threads")


def test_a_sweep_inside_a_notebook(tmp_path):
    path = small(tmp_path, RECORD)
    outer = small(tmp_path, f"from researchkit.run.sweep import Sweep\nsweep = Sweep({str(path)!r}, {{{{'shift': [0, 1, 2]}}}}, out={str(tmp_path / 'out')!r})\nprint(len(sweep.run(jobs=2).rows), 'rows')", name="outer", parameters=None)
    done = subprocess.run([sys.executable, "-m", "papermill", str(outer), str(tmp_path / "made.ipynb"), "-k", "python3", "--no-progress-bar"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 rows" in (tmp_path / "made.ipynb").read_text()


# Dask

class Cluster:
    "A scheduler and workers, each a process of its own, on loopback."

    def __init__(self, base: Path, repo: Repo, place: Place):
        self.base, self.repo, self.place, self.processes = base, repo, place, []
        file = base / "scheduler.json"
        self.start("scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file)
        self.address = until(lambda: file.exists() and file.read_text().endswith("}") and json.loads(file.read_text())["address"])

    def start(self, kind, *arguments, **env):
        with open(self.base / f"{kind}.log", "ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "dask", kind, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.base, start_new_session=True,
                                       env=self.repo.environment(**self.place.environment(0.2), **env))
        self.processes.append(process)
        return process

    def worker(self, **env):
        return self.start("worker", self.address, "--host", "127.0.0.1", "--no-nanny", "--nthreads", 1, "--no-dashboard", "--local-directory", self.base, **env)

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(place, tmp_path):
    pytest.importorskip("distributed")
    cluster = Cluster(tmp_path, place.repo, place)
    yield cluster
    cluster.end()


@linux
def test_dask_workers_give_the_same_tables_even_if_one_is_killed(cluster, place, undisturbed):
    one, two = cluster.worker(), cluster.worker()
    process = place.popen("--scheduler", cluster.address)
    until(lambda: len({psutil.Process(psutil.Process(place.pid(s)).ppid()).ppid() for s in place.marks("begin") if psutil.pid_exists(place.pid(s))} & {one.pid, two.pid}) == 2)
    one.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.startswith(f"{COUNT} done"), out + err
    assert_same(place.out, undisturbed.out)


def test_a_scheduler_that_does_not_answer(place):
    pytest.importorskip("distributed")
    since = time.monotonic()
    line = only_line(place.cli("--scheduler", "tcp://127.0.0.1:9"))
    assert "tcp://127.0.0.1:9" in line and time.monotonic() - since < 15 + 5 and not place.marks("begin")


@linux
def test_a_worker_with_another_version_is_refused(cluster, place, tmp_path):
    fake = tmp_path / "fake" / "ipython-0.1.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: ipython\nVersion: 0.1\n")
    (fake / "top_level.txt").write_text("IPython\n")
    cluster.worker(PYTHONPATH=str(fake.parent))
    line = only_line(place.cli("--scheduler", cluster.address))
    assert "ipython 0.1" in line and "same versions" in line and not place.marks("begin")
    assert not [*(place.out / "failed").glob("*")] and not [*(place.out / "runs").glob("*")]


@linux
def test_a_worker_without_this_package_is_refused(cluster, place, tmp_path):
    (tmp_path / "fake" / "researchkit").mkdir(parents=True)
    (tmp_path / "fake" / "researchkit" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'researchkit'\")")
    cluster.worker(PYTHONPATH=str(tmp_path / "fake"))
    only_line(place.cli("--scheduler", cluster.address, timeout=40))
    assert not [*(place.out / "failed").glob("*")]


@linux
def test_a_scheduler_that_is_lost_fails_no_run(cluster, place):
    cluster.worker()
    process = place.popen("--scheduler", cluster.address)
    until(lambda: len([*(place.out / "runs").glob("*.json")]) > 2)
    cluster.processes[0].kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, out + err
    assert not [*(place.out / "failed").glob("*")] and len(place.finished()) > 2


@linux
def test_resources_that_no_worker_has(cluster, place):
    cluster.worker()
    done = place.cli("--scheduler", cluster.address, "--resource", "GPU=1", timeout=20)
    assert "GPU" in only_line(done)


# Many runs

@pytest.fixture(scope="module")
def many(shared, tmp_path_factory) -> Place:
    place = Place(shared, tmp_path_factory.mktemp("many"))
    place.arguments[3] = f"shift=0:{MANY}"
    process = place.popen("--keep", "none", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: sum(place.marks("end").values()) > MANY // 2, 400)
    process.kill()
    process.wait()
    done = place.cli("--keep", "none")
    assert done.returncode == 0, done.stderr
    return place


def test_a_thousand_runs(many):
    rows = tables(many.out)["rows"]
    assert list(rows["shift"]) == list(range(MANY)) and list(rows["accuracy"] - 0.5) == list(range(MANY))
    begun, ended = many.marks("begin"), many.marks("end")
    assert ended.keys() == set(range(MANY)) and sum(begun.values()) <= MANY + 3 and max(begun.values()) <= 2
    assert until(many.clean, 5)


def test_a_thousand_finished_runs_are_passed_over_quickly(many):
    since = time.monotonic()
    done = many.cli("--keep", "none")
    seconds = time.monotonic() - since
    assert done.returncode == 0 and done.stdout.startswith(f"0 done, {MANY} finished before, 0 failed")
    assert seconds < 3 * max(1, os.getloadavg()[0] / os.cpu_count()), seconds
