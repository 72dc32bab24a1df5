"""The command line through its real entry point, in processes of its own."""
import json
import os
import pty
import resource
import select
import signal
import subprocess
import time

import pytest

from conftest import COMMAND, FRONT, HOME, RECORD, Repo, alive, notebook, one_line, tree, write
from researchkit import cli
from researchkit.core.errors import InputError
from researchkit.core.notebook import MIME, find_record
from researchkit.run.check import publish
from researchkit.run.runner import Result, plan

SLEEPER = """import os, subprocess, time
if os.environ.get("SLEEP"):
    child = subprocess.Popen(["sleep", "300"])
    open(os.environ["SLEEP"], "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(300)"""
MISSING = "from researchkit.core import data\ndata.DIGITS_FILE = 'no/such/file.gz'\ndata.digits()"
ALTERED = "from researchkit.core import data\ndata.DIGITS_SHA256 = '0' * 64\ndata.digits()"


@pytest.fixture(scope="module")
def few(shared) -> Repo:
    "Four small papers."
    shared.paper("light", "## Numbers", RECORD)
    shared.paper("other", "## Numbers", RECORD)
    shared.paper("broken", "## Good", "1", "## Where it breaks", "raise ArithmeticError('no [/b] sum')", theme="reuse")
    shared.paper("no_parameters", "1", parameters=None, theme="safety")
    return shared


@pytest.fixture
def refused(monkeypatch, capsys):
    "As `Repo.refused`, in this process."
    def refused(repo, *arguments):
        monkeypatch.setenv("RESEARCHKIT_HOME", str(repo.root))
        monkeypatch.chdir(repo.root)
        before = repo.tree()
        with pytest.raises(SystemExit) as e:
            cli.main(list(map(str, arguments)))
        return one_line(e.value.code, *capsys.readouterr(), before, repo.tree())
    return refused


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def test_list_is_quick_and_light(few):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = few.cli("list")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and all(slug in done.stdout for slug in ("light", "other", "broken")) and "unpublished" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    timed = few.popen("list", env={"PYTHONPROFILEIMPORTTIME": "1"}).communicate()[1]
    imported = {line.rsplit("|", 1)[-1].strip() for line in timed.splitlines() if "|" in line}
    assert "researchkit.core.notebook" in imported
    assert not {"torch", "transformers", "numpy", "pandas", "papermill", "jupyter_client"} & imported


def test_list_as_json_and_by_theme(few):
    rows = json.loads(few.cli("list", "--json").stdout)
    assert [(r["slug"], r["theme"], r["claims"]) for r in rows] == [
        ("broken", "reuse", None), ("no_parameters", "safety", None), ("light", "theory", None), ("other", "theory", None)]
    assert [r["slug"] for r in json.loads(few.cli("list", "reuse", "--json").stdout)] == ["broken"]


def test_show_prints_brackets_as_they_are(few):
    done = few.cli("show", "light")
    assert done.returncode == 0 and "not published yet" in done.stdout
    assert "seeds: list[int] = [0, 1, 2]   one run each" in done.stdout and "researchkit.theory.light" in done.stdout


def test_a_reader_that_goes_away_is_no_error(few):
    done = subprocess.run(f"{COMMAND} list --json | head -c 1", shell=True, env=few.environment(), capture_output=True, text=True)
    assert done.stdout == "[" and done.stderr == ""


@pytest.mark.parametrize("arguments, words", [
    (["run", "ligth"], ["unknown paper or theme 'ligth'", "light"]),
    (["show", "ligth"], ["unknown paper 'ligth'", "light"]),
    (["verify", "ligth"], ["ligth"]),
    (["publish", "ligth"], ["ligth"]),
    (["verify", "light"], ["light is not published"]),
    (["verify"], ["name papers"]),
    (["list", "theorie"], ["unknown theme 'theorie'", "theory"]),
    (["new", "Tiny", "--theme", "theory"], ["lower-case"]),
    (["new", "light", "--theme", "theory"], ["light exists"]),
    (["new", "tiny", "--theme", "theorie"], ["unknown theme"]),
    (["check", "none.ipynb"], ["none.ipynb"]),
    (["run", "light", "-p", "shfit=1"], ["light", "unknown parameter 'shfit'", "did you mean shift?", "profile: str = 'cpu'",
                                         "seeds: list[int] = [0, 1, 2]", "shift: float = 0.0"]),
    (["run", "light", "-p", "shift=x"], ["shift takes float", "'x'"]),
    (["run", "light", "-p", "seeds=1,b"], ["seeds takes list[int]"]),
    (["run", "light", "-p", "shift"], ["name=value"]),
    (["run", "light", "other", "-p", "nothing=1"], ["light", "nothing"]),
    (["run", "light", "--profile", "gpu"], ["unknown profile 'gpu'", "smoke, cpu, full"]),
    (["run", "light", "-p", "profile=gpu"], ["unknown profile 'gpu'"]),
    (["run", "light", "-j", "0"], ["at least 1"]),
    (["run", "light", "-j", "many"], ["--jobs"]),
    (["run", "light", "--timeout", "-1"], ["timeout must be positive"]),
    (["run", "light", "--out", "settings.ini/x"], ["output folder", "not writable"]),
    (["run", "light", "--out", "/proc/researchkit"], ["output folder", "not writable"]),
    (["run", "light", "no_parameters"], ["no_parameters.ipynb", "no cell is tagged 'parameters'"]),
    (["show", "no_parameters"], ["no_parameters.ipynb", "no cell is tagged 'parameters'"]),
    (["publish", "no_parameters"], ["no_parameters.ipynb", "no cell is tagged 'parameters'"]),
    (["run", "light", "--fast"], ["--fast"]),
    (["run"], ["SLUG"]),
    (["rnu", "light"], ["rnu"]),
    (["run", "security"], ["security"]),
])
def test_what_cannot_be_meant_is_refused_in_one_line(few, refused, arguments, words):
    line = refused(few, *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("arguments", [["run", "ligth"], ["run", "light", "-p", "shfit=1"], ["run", "light", "-p", "shift=x"], ["run", "light", "--fast"],
                                       ["run", "light", "--profile", "gpu"], ["run", "light", "--out", "settings.ini/x"], ["run", "no_parameters"]])
def test_the_same_through_the_entry_point(few, refused, arguments):
    assert few.refused(*arguments) == refused(few, *arguments)


def test_read_only_output_folder(few, refused, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", locked], capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("root may write everywhere and nothing can be mounted here")
    else:
        locked.chmod(0o555)
    try:
        assert "not writable" in refused(few, "run", "light", "--out", locked)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", locked], check=True)
        else:
            locked.chmod(0o755)


@pytest.mark.parametrize("old, new", [('title: "bad: a test"', "title: bad: a test"), ("year: 2024", "year: 2024-13-45"), ("\n---", "\n")])
@pytest.mark.parametrize("command", ["list", "run", "show"])
def test_malformed_front_matter_is_refused_with_file_and_line(repo, refused, command, old, new):
    text = FRONT.format(slug="bad", theme="theory")
    assert old in text
    path = repo.paper("bad", "1", front=text.replace(old, new))
    line = refused(repo, command, *(["bad"] if command != "list" else []))
    place = line.removeprefix("error: ").split(": ")[0]
    assert place.rpartition(":")[0] == str(path) and place.rpartition(":")[2].isdigit(), line


def broken_record(repo, record):
    nb = notebook("one", "1")
    nb["cells"][3]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {MIME: record}}]
    return write(nb, repo.root / "nbs" / "theory" / "one.ipynb")


@pytest.mark.parametrize("command", ["list", "show", "run", "verify"])
def test_a_record_of_a_newer_schema_is_refused(repo, refused, command):
    path = broken_record(repo, {"schema": 99})
    line = refused(repo, command, *(["one"] if command != "list" else []))
    assert str(path) in line and "schema 99" in line and "update researchkit" in line


@pytest.mark.parametrize("command", ["list", "show", "verify"])
def test_a_malformed_record_is_refused(repo, refused, command):
    broken_record(repo, {"schema": 1})
    assert "record" in refused(repo, command, *(["one"] if command != "list" else []))


@pytest.mark.parametrize("cell, words", [(MISSING, ["digits are missing", "no/such/file.gz"]), (ALTERED, ["digits are altered", "SHA-256"])])
def test_a_dataset_that_is_missing_or_altered_is_refused(repo, cell, words):
    repo.paper("needs_data", "## Data", cell)
    line = repo.refused("run", "needs_data", "--out", "deep/er/out", "--profile", "smoke")
    assert all(word in line for word in ["needs_data", *words]), line


def test_debug_shows_the_traceback_wherever_it_stands(few, monkeypatch):
    monkeypatch.setattr(cli, "_state", {"debug": False})
    done = few.cli("show", "ligth", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr and "InputError" in done.stderr
    with pytest.raises(InputError):
        cli.main(["--debug", "show", "ligth"])


def test_several_papers_and_a_failure(few, tmp_path):
    done = few.cli("run", "theory", "broken", "light", "-j", "2", "--profile", "smoke", "--out", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    partial = tmp_path / "out" / "broken" / "smoke" / "broken.partial.ipynb"
    assert lines(done.stderr)[-3:] == ["broken failed in section 'Where it breaks'", "  ArithmeticError: no [/b] sum", f"  partial notebook: {partial}"]
    assert json.loads(partial.read_text())["cells"][-1]["outputs"][0]["ename"] == "ArithmeticError"
    progress = done.stderr.splitlines()
    for slug in ("light", "other", "broken"):
        assert any(line.startswith(slug) and "started (smoke)" in line for line in progress)
    assert any("0:0" in line and "Where it breaks" in line for line in progress) and "\x1b" not in done.stderr + done.stdout
    for slug in ("light", "other"):
        for suffix in ("ipynb", "html", "record.json"):
            path = tmp_path / "out" / slug / "smoke" / f"{slug}.{suffix}"
            assert path.exists() and str(path) in done.stdout
    assert json.loads((tmp_path / "out" / "light" / "smoke" / "light.record.json").read_text())["profile"] == "smoke"
    assert len(list((tmp_path / "out").rglob("*.*"))) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children_keeps_what_finished_and_resumes(repo, number):
    repo.paper("quick", "## Numbers", RECORD)
    repo.paper("sleeper", "## Sleep", SLEEPER)
    pids = repo.base / "pids"
    process = repo.popen("run", "quick", "sleeper", "-j", "2", "--out", "out", env={"SLEEP": str(pids)})
    quick = repo.root / "out" / "quick" / "cpu" / "quick.ipynb"
    deadline = time.monotonic() + 60
    while not (quick.exists() and pids.exists() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    children = [int(pid) for pid in pids.read_text().split()]
    assert all(map(alive, children))
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err
    assert lines(err)[-1] == "interrupted; finished: quick; cancelled: sleeper"
    assert not any(map(alive, children)) and not list(repo.tmp.iterdir())
    if number == signal.SIGTERM:
        return
    stamp = quick.stat().st_mtime_ns
    done = repo.cli("run", "quick", "sleeper", "--out", "out", "--resume")
    assert done.returncode == 0 and quick.stat().st_mtime_ns == stamp
    assert "quick (finished before)" in done.stdout and "started" not in "".join(x for x in lines(done.stderr) if x.startswith("quick"))
    assert sorted(p.name for p in (repo.root / "out" / "sleeper" / "cpu").iterdir()) == ["sleeper.html", "sleeper.ipynb"]


def test_how_the_ends_of_runs_are_reported(few, capsys):
    jobs = [plan(few.root / "nbs" / "theory" / f"{slug}.ipynb", "out") for slug in ("light", "other")]
    assert cli._report([Result(jobs[0], "timed out", 6.2)]) == 1
    assert capsys.readouterr().err == f"light timed out after 6 s; partial notebook: {jobs[0].partial}\n"
    assert cli._report([Result(jobs[0], "refused", error="no data"), Result(jobs[1], "failed", error="E: x", heading="H")]) == 2
    assert capsys.readouterr().err.startswith("error: light: no data\n\nother failed in section 'H'\n  E: x\n")
    assert cli._report([Result(jobs[0], "cancelled"), Result(jobs[1], "failed", error="E: x")]) == 130


def test_a_terminal_shows_heading_and_time_live(few, tmp_path):
    few.paper("slow", "## A heading to see", "import time; time.sleep(2.5)", theme="science")
    master, slave = pty.openpty()
    process = few.popen("run", "slow", "--out", tmp_path, stdin=slave, stdout=slave, stderr=slave, text=False, env={"TERM": "xterm-256color", "COLUMNS": "100"})
    os.close(slave)
    seen = b""
    while True:
        ready, _, _ = select.select([master], [], [], 60)
        try:
            chunk = os.read(master, 65536) if ready else b""
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    text = seen.decode(errors="replace")
    assert process.wait(60) == 0, text
    assert "\x1b[" in text and "A heading to see" in text and "done" in text
    assert len({second for second in range(1, 9) if f"0:0{second}" in text}) >= 2, text
    assert "slow.ipynb" in text
    (few.root / "nbs" / "science" / "slow.ipynb").unlink()


def test_doctor(few):
    done = few.cli("doctor")
    assert done.returncode == 0 and "Python" in done.stdout and "4 papers" in done.stdout and "kernel" in done.stdout


def test_help_names_every_command(few):
    done = few.cli("--help")
    assert done.returncode == 0
    assert all(f" {c} " in done.stdout for c in "list show run verify publish check new docs doctor".split())
    assert few.cli().returncode in (0, 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Repo:
    "A repository with one paper, started by `new` and otherwise as the template has it."
    repo = Repo(tmp_path_factory.mktemp("tiny"))
    done = repo.cli("new", "tiny", "--theme", "theory")
    assert done.returncode == 0, done.stderr
    assert "nbs/theory/tiny.ipynb" in done.stdout and "researchkit/theory/tiny.py" in done.stdout
    return repo


def test_new_passes_check_but_for_its_facts(tiny):
    done = tiny.cli("check")
    found = [line for line in lines(done.stdout) if not line.startswith("README.md")]
    assert done.returncode == 1 and len(found) == 2, done.stdout
    assert found[0] == "nbs/theory/tiny.ipynb: front matter still has the template's title, description, paper.title, paper.authors, paper.venue: write the paper's own"
    claims = find_record(tiny.root / "nbs" / "theory" / "tiny.ipynb")["claims"]
    assert [c["verdict"] for c in claims] == ["reproduced"] * 3 + ["not tested"]
    module = (tiny.root / "researchkit" / "theory" / "tiny.py").read_text()
    assert "def trimmed_mean" in module and "matplotlib" not in module
    assert not list(tiny.tmp.iterdir()) and not list(tiny.home.iterdir())


def test_publish_check_verify(repo):
    one, two = (repo.paper(slug, "## Claims", "#| export\nfrom researchkit.core.errors import InputError", "#| export\ndef f(): return 1", RECORD, "## Use it on your own model", "print(object())") for slug in ("one", "two"))
    for slug in ("one", "two"):
        (one.parent / f"{slug}.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    home = notebook("index", "# Home", parameters=None, front="---\ntitle: t\ndescription: d\n---")
    write(home | {"cells": [c for c in home["cells"] if c["cell_type"] != "code"]}, repo.root / "nbs" / "index.ipynb")
    done = repo.cli("publish", "theory", "-j", "2")
    assert done.returncode == 0 and "published one\npublished two" in done.stdout, done.stderr
    record = find_record(one)
    assert record["profile"] == "cpu" and [c["verdict"] for c in record["claims"]] == ["reproduced"] * 4
    assert not list(repo.tmp.iterdir()) and not list(repo.home.iterdir()) and not (repo.root / "runs").exists()
    assert "<object object>" in one.read_text() and "def f()" in (repo.root / "researchkit" / "theory" / "one.py").read_text()
    assert repo.cli("check").stdout.strip().endswith("nothing to complain about")
    assert repo.cli("list").stdout.count("✓4") == 2
    shown = repo.cli("show", "one").stdout
    assert "a beats [b]" in shown and "see [/b] there" in shown

    two.write_text(two.read_text().replace('"verdict": "reproduced"', '"verdict": "partly"', 1).replace('"accuracy": 0.5', '"accuracy": 0.4'))
    before = tree(repo.root)
    done = repo.cli("verify", "all", "-j", "2")
    assert done.returncode == 1 and tree(repo.root) == before
    first, second, *reasons = lines(done.stdout)
    assert (first, second) == ("one: agrees with what is published", "two: DISAGREES")
    assert "C1: published 'partly', now 'reproduced'" in reasons[0] and "accuracy" in reasons[1] and "0.4 to 0.5" in reasons[1]

    one.write_text(one.read_text().replace("def f(): return 1", "def f(): return 2"))
    done = repo.cli("check")
    assert done.returncode == 1 and "one.ipynb: its record belongs to other code" in done.stdout
    assert "researchkit/theory/one.py: differs from its notebook" in done.stdout


def test_publish_leaves_a_notebook_that_fails_as_it_was(repo):
    path = repo.paper("one", "## Claims", "raise ValueError('boom')")
    text = path.read_text()
    (result,) = publish([path], repo.root)
    assert result.status == "failed" and result.heading == "Claims" and path.read_text() == text


def test_publish_keeps_what_others_did_when_one_notebook_changes_meanwhile(repo):
    one = repo.paper("one", "print('one')")
    two = repo.paper("two", f"p = {str(one)!r}\ntext = open(p).read()\nopen(p, 'w').write(text.replace(\"print('one')\", \"print('other')\"))\nprint('two')")
    first, second = publish([one, two], repo.root, parallel=1)
    assert (first.status, second.status) == ("failed", "done") and "changed while it ran" in first.error
    assert "two\\n" in two.read_text() and "print('other')" in one.read_text() and '"outputs": []' in one.read_text()


def test_the_package_imports_nothing_heavy():
    script = "import sys, researchkit; print(sorted({'torch', 'numpy', 'transformers', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([COMMAND.with_name("python"), "-c", script], capture_output=True, text=True, cwd=HOME)
    assert done.stdout.strip() == "[]", done.stderr
