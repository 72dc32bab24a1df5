import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbformat.v4 import new_code_cell, new_notebook
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from conftest import alive
from researchkit.core.errors import InputError
from researchkit.run import warm
from researchkit.run.warm import ForkServer, ServerGone, imported, possible, server_for, warm_manager

pytestmark = pytest.mark.skipif(not possible(), reason="needs Linux")

ENV = {**{k: v for k, v in os.environ.items() if not k.startswith(("JPY_", "MPL", "PYTEST_"))}, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "0",
       "PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONPATH": str(Path(__file__).parent)}
IMPORTS = "import json, os, random, signal, sys, threading\nimport numpy as np\nimport torch\nfrom matplotlib import pyplot as plt"


def ordinary():
    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))


def book(*cells):
    return new_notebook(cells=[new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})


def run(manager, folder, *cells, env=None, **options):
    "The outputs of each cell, of a notebook that papermill executes with this manager."
    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **_):
            client = PapermillNotebookClient(nb_man, kernel_name="python3", startup_timeout=30, timeout=None)
            client.km = manager
            return client.execute(env={**ENV, "IPYTHONDIR": str(folder / ".ipython"), **(env or {})}, cwd=str(folder), **{"stderr": subprocess.DEVNULL, **options})

    name, source = f"warm-{id(manager)}", folder / f"{id(manager)}.ipynb"
    nbformat.write(book(*cells), source)
    papermill_engines.register(name, Engine)
    try:
        nb = papermill.execute_notebook(source, None, engine_name=name, kernel_name="python3", language="python", progress_bar=False)
    finally:
        papermill_engines._engines.pop(name)
        source.unlink()
    return [cell.outputs for cell in nb.cells]


def printed(*arguments, **options):
    "What the last cell prints, read as JSON."
    return json.loads("".join(o["text"] for o in run(*arguments, **options)[-1] if o["output_type"] == "stream" and o["name"] == "stdout"))


def gone(*pids, within=2.0):
    until = time.monotonic() + within
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


def command(file="/nowhere.json"):
    return [sys.executable, "-m", "ipykernel_launcher", "-f", file]


def wait(server, pid, within=10.0):
    until = time.monotonic() + within
    while server.poll(pid) is None and time.monotonic() < until:
        time.sleep(0.01)
    return server.poll(pid)


@pytest.fixture(scope="module")
def server():
    with ForkServer(imported(book(IMPORTS), names=True), ENV) as server:
        assert server.safe
        yield server
    assert not alive(server.pid)


@pytest.fixture(scope="module")
def small():
    with ForkServer([], ENV) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_left():
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    if warm._current and warm._current[1]:
        warm._current[1].close()
    warm._current = None
    assert not gone(*({p.pid for p in psutil.Process().children(recursive=True)} - before), within=3)


def test_imported():
    nb = book("%matplotlib inline\nimport numpy as np, os.path\nimport numpy", "!ls\nfrom a.b import c, d as e\nfrom . import here\nfrom .there import x\nfrom star import *",
              "if True:\n    import under_if\ntry:\n    import under_try\nexcept ImportError:\n    pass\ndef f():\n    import under_f", "%%bash\nimport shell", "import (", "%time import timed\nx = '\\d'", "out = !ls\nimport last")
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("import markdown"))
    assert imported(nb) == ["numpy", "os.path", "a.b", "star", "last"]
    assert imported(nb, names=True) == ["numpy", "os.path", "a.b", "a.b:c", "a.b:d", "star", "last"]
    assert imported({"cells": [{"cell_type": "code", "source": ["import one\n", "import two"]}]}) == ["one", "two"]
    with pytest.raises(InputError, match="list of cells"):
        imported({})


TRACES = """torch.manual_seed(1); np.random.seed(1); random.seed(1)
json.trace = 1; os.environ['TRACE'] = '1'; os.environ.pop('HOME', None); os.chdir('/'); sys.path.insert(0, '/trace'); trace = 1
signal.signal(signal.SIGUSR1, lambda *_: None); torch.set_num_threads(1); np.trace_of = 1; plt.rcParams['lines.linewidth'] = 9
import time
threading.Thread(target=time.sleep, args=[600], daemon=True).start()
here = os.environ['IPYTHONDIR'] + '/../'
file = open(here + 'written', 'w'); file.write('to the end')
class Ends:
    def __del__(self, here=here):
        open(here + 'ended', 'w').write('yes')
ends = Ends(); cycle = [Ends()]; cycle.append(cycle)"""
STATE = """print(json.dumps([hasattr(json, 'trace'), 'TRACE' in os.environ, 'HOME' in os.environ, os.getcwd(), '/trace' in sys.path, 'trace' in globals(),
  str(signal.getsignal(signal.SIGUSR1)), torch.get_num_threads(), hasattr(np, 'trace_of'), plt.rcParams['lines.linewidth'], sorted(t.name.split('-')[0] for t in threading.enumerate()),
  torch.rand(1).item(), np.random.rand(), random.random()]))"""


def test_no_run_sees_another(server, tmp_path):
    first = printed(warm_manager(server), tmp_path, IMPORTS, STATE)
    run(warm_manager(server), tmp_path, IMPORTS, TRACES)
    assert (tmp_path / "written").read_text() == "to the end" and (tmp_path / "ended").exists()
    then = printed(warm_manager(server), tmp_path, IMPORTS, STATE)
    assert then[:-3] == first[:-3] and not any(a == b for a, b in zip(then[-3:], first[-3:]))


FACTS = """import asyncio, gc, locale, re, resource
print(json.dumps(dict(argv=[a for a in sys.argv if not a.endswith('.json')], original=[a for a in sys.orig_argv if not a.endswith('.json')], path=sys.path, flags=str(sys.flags), options=sys._xoptions, name=__name__,
  signals={int(s): str(signal.getsignal(s)).split(' at ')[0] for s in signal.valid_signals()}, mask=[int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
  backend=plt.get_backend(), mpl=os.environ.get('MPLBACKEND'), rc={k: str(v) for k, v in plt.rcParams.items()}, torch=[torch.get_num_threads(), torch.get_num_interop_threads()],
  environ={k: v for k, v in os.environ.items() if k not in ('JPY_PARENT_PID', 'JPY_SESSION_NAME')}, parent=os.environ['JPY_PARENT_PID'] == str(os.getppid()), cwd=os.getcwd(), hash=hash('x'), main=sys.modules['__main__'].__dict__ is globals(),
  loop=type(asyncio.get_event_loop()).__name__, gc=[gc.isenabled(), gc.get_threshold()], session=os.getsid(0) == os.getpid() == os.getpgid(0), stdin=sys.stdin is None or sys.stdin.read(), threads=sorted(re.sub('[0-9]+', '', t.name) for t in threading.enumerate()),
  main_thread=threading.current_thread() is threading.main_thread(), umask=os.umask(0o22), limits=resource.getrlimit(resource.RLIMIT_NOFILE), encoding=locale.getpreferredencoding(), recursion=sys.getrecursionlimit(),
  hooks=[type(sys.displayhook).__name__, type(sys.stdout).__name__, sys.__stdout__.encoding], fds=sorted(os.readlink(f'/proc/self/fd/{f}').split(':')[0] for f in (1, 2)),
  history=get_ipython().history_manager.hist_file, rows=torch.ones(400, 400).mm(torch.ones(400, 400)).sum().item(), blas=float((np.ones((400, 400)) @ np.ones((400, 400))).sum()))))"""
FIGURE = "fig, ax = plt.subplots(figsize=(2, 2))\nax.plot(np.arange(5))\nax.set_title('a')"


def test_a_forked_kernel_is_as_a_started_one(server, tmp_path):
    cells = [IMPORTS, FIGURE, "fig", "%matplotlib inline\n%config InlineBackend.figure_formats = ['svg', 'png']\nplt.plot([1, 2]); plt.close()", "import os\nos.system('echo out'); print('err', file=sys.stderr); 1 / 0 if False else 3", FACTS]
    managers = [ordinary(), warm_manager(server)]
    with ThreadPoolExecutor(2) as pool:
        cold, forked = pool.map(lambda m: run(m, tmp_path, *cells, stdout=subprocess.DEVNULL), managers)
    facts = [json.loads(outputs[-1][0]["text"]) for outputs in (cold, forked)]
    assert facts[0]["parent"] and facts[0]["stdin"] == ""
    for name in facts[0]:
        assert facts[0][name] == facts[1][name], name
    # what a program of the system prints comes through a thread, in no fixed order
    assert [sorted(o["output_type"] for o in cell) for cell in cold[:-1]] == [sorted(o["output_type"] for o in cell) for cell in forked[:-1]]
    pictures = [[o["data"]["image/png"] for cell in outputs for o in cell if "image/png" in o.get("data", {})] for outputs in (cold, forked)]
    assert len(pictures[0]) >= 2 and pictures[0] == pictures[1]


def test_environment_that_imports_set(tmp_path):
    (tmp_path / "sets.py").write_text("import os\nos.environ['SET'] = 'x'\nos.environ.setdefault('KEPT', 'x')\nos.environ.pop('DROPPED', None)\nprint('lost')")
    env = {**ENV, "PYTHONPATH": str(tmp_path), "DROPPED": "1"}
    code = "import os, json, sets\nprint(json.dumps({k: os.environ.get(k) for k in ('SET', 'KEPT', 'DROPPED', 'OWN')}))"
    with ForkServer(["sets"], env) as server:
        found = json.loads(run(warm_manager(server), tmp_path, code, env={**env, "KEPT": "run", "OWN": "1"})[0][0]["text"])
    assert found == {"SET": "x", "KEPT": "run", "DROPPED": None, "OWN": "1"}


def test_a_run_that_falls_harms_no_other(small, tmp_path):
    ends = {"os._exit(7)": 7, "import ctypes; ctypes.string_at(0)": -signal.SIGSEGV, "os.kill(os.getpid(), 9)": -9}
    managers = [warm_manager(small) for _ in ends]

    def falls(manager, end):
        with pytest.raises(Exception, match="Kernel died"):
            run(manager, tmp_path, "import os", end)
        pid = manager.provisioner.pid
        return small.poll(pid), small.usage(pid)[1] > 1e6, alive(pid)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(falls, managers, ends)) == [(code, True, False) for code in ends.values()]
    assert printed(warm_manager(small), tmp_path, "print(2)") == 2


def test_what_the_kernel_writes_itself_and_what_it_leaves(small, tmp_path):
    manager = warm_manager(small)
    with open(tmp_path / "err", "w") as err:
        run(manager, tmp_path, "import os, sys\nos.write(2, b'')\nsys.__stderr__.flush()\nimport atexit; atexit.register(lambda: open('left', 'w').write('x'))", stderr=err, stdout=subprocess.DEVNULL)
    assert "IPKernelApp" in (tmp_path / "err").read_text() and (tmp_path / "left").exists()
    assert not Path(manager.connection_file).exists() and not alive(manager.provisioner.pid) and small.poll(manager.provisioner.pid) == 0
    seconds, peak = small.usage(manager.provisioner.pid)
    assert 0.01 < seconds < 5 and 2e7 < peak < 2e9


def test_usage_counts_the_run(small, tmp_path):
    manager = warm_manager(small)
    run(manager, tmp_path, "import time\nx = bytearray(200_000_000)\nwhile time.process_time() < 1: pass")
    seconds, peak = manager.provisioner.usage
    assert 1 <= seconds < 2 and 2e8 < peak < 5e8


def test_interrupt(small, tmp_path):
    manager = warm_manager(small)

    def interrupt():
        while not (tmp_path / "there").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        os.killpg(manager.provisioner.pid, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    cells = ["import time\ntry:\n    open('there', 'w')\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('\"stopped\"')"]
    assert printed(manager, tmp_path, *cells) == "stopped"
    thread.join()


def test_many_threads_fork_at_once(small, tmp_path):
    folders = [tmp_path / str(i) for i in range(4)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda f: printed(warm_manager(small), f, "import os, json\nprint(json.dumps([os.getpid(), os.getcwd()]))"), folders))
    assert [f[1] for f in found] == [str(f) for f in folders] and len({f[0] for f in found}) == 4


def test_a_kernel_that_cannot_start(small, tmp_path):
    with open(tmp_path / "err", "w") as err:
        pid = small.fork(command(), ENV, tmp_path / "none", subprocess.DEVNULL, err)
    assert wait(small, pid) == 1 and "No such file" in (tmp_path / "err").read_text()
    with pytest.raises(InputError, match="only an ipykernel"):
        small.fork(["sleep", "1"], ENV)
    with pytest.raises(InputError, match="not forked here"):
        small.poll(1)


SLEEPER = """
import os, subprocess, sys, time
from researchkit.run.warm import ForkServer
server = ForkServer({modules}, dict(os.environ))
pids = []
if {children}:
    for i in range(2):
        r, w = os.pipe()
        pids.append(server.fork([sys.executable, "-m", "ipykernel_launcher", "-f", os.path.join(sys.argv[1], f"{{i}}.json")], dict(os.environ), sys.argv[1], subprocess.DEVNULL, subprocess.DEVNULL, w))
        os.close(w)
        os.read(r, 1)
print(server.pid, *pids, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("modules, children", [([], True), (["sleeps_at_import"], False)])
def test_the_owner_is_killed(tmp_path, modules, children):
    (tmp_path / "sleeps_at_import.py").write_text("import time; time.sleep(60)")
    env = {**ENV, "PYTHONPATH": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", SLEEPER.format(modules=modules, children=children), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env) as owner:
        pids = [int(p) for p in owner.stdout.readline().split()]
        assert len(pids) == 1 + 2 * children and all(alive(p) for p in pids)
        owner.kill()
    assert not gone(*pids)


def test_the_server_is_killed(tmp_path):
    first = server_for([], ENV)
    assert server_for([], ENV) is first
    pid = first.fork(command(str(tmp_path / "k.json")), ENV, tmp_path, subprocess.DEVNULL, subprocess.DEVNULL)
    manager = warm_manager(first)
    assert first.poll(pid) is None and first.usage(pid) is None
    os.kill(first.pid, signal.SIGKILL)
    assert not gone(pid, first.pid)
    assert first.poll(pid) == -signal.SIGKILL and first.usage(pid) is None and not first.alive
    with pytest.raises(ServerGone):
        first.fork(command(), ENV)
    assert printed(manager, tmp_path, "print(1)") == 1  # by an ordinary kernel
    second = server_for([], ENV)
    assert second is not first and second.safe and printed(warm_manager(second), tmp_path, "print(1)") == 1


def test_the_server_is_killed_during_a_run(tmp_path):
    server = server_for([], ENV)
    threading.Timer(1, os.kill, (server.pid, signal.SIGKILL)).start()
    with pytest.raises(Exception, match="Kernel died"):
        run(warm_manager(server), tmp_path, "import time; time.sleep(60)")


def test_one_server_at_a_time(tmp_path):
    first = server_for([], ENV, "a")
    pid = first.fork(command(str(tmp_path / "k.json")), ENV, tmp_path, subprocess.DEVNULL, subprocess.DEVNULL)
    second = server_for([], ENV, "b")
    assert second is not first and first.alive and second.alive  # the first still has a run
    os.kill(pid, signal.SIGKILL)
    assert wait(first, pid) == -9 and not first.alive and not gone(first.pid)
    second.retire()
    assert not gone(second.pid)


def test_imports_that_fail_or_start_a_thread(tmp_path):
    for name, code in {"fails": "1 / 0", "exits": "raise SystemExit(3)", "prints": "import os; print('x'); os.system('echo y')", "leaves": "import os; os._exit(3)",
                       "starts": "import threading, time; threading.Thread(target=time.sleep, args=[60]).start()"}.items():
        (tmp_path / f"{name}.py").write_text(code)
    env = {**ENV, "PYTHONPATH": str(tmp_path)}
    server = server_for(["fails", "exits", "prints", "not_there", "json:not_there", "json:tool"], env)
    assert server.safe
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run(warm_manager(server), tmp_path, "import fails", env=env)
    for module in ("starts", "leaves"):
        since = time.monotonic()
        assert server_for([module], env) is None
        assert server_for([module], env) is None and time.monotonic() - since < 8
    with ForkServer(["starts"], env) as unsafe:
        assert not unsafe.safe
        with pytest.raises(InputError, match="threads"):
            unsafe.fork(command(), env)


def test_close_leaves_nothing(tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env = {**ENV, "TMPDIR": str(temporary), "MPLCONFIGDIR": "", "HOME": "/proc", "XDG_CONFIG_HOME": "/proc/x", "XDG_CACHE_HOME": "/proc/x", "IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    files = len(os.listdir("/proc/self/fd"))
    server = ForkServer(["matplotlib.pyplot"], env)
    assert server.safe and os.listdir(temporary)  # matplotlib's own folder
    pid = server.fork(command(str(tmp_path / "k.json")), env, tmp_path, subprocess.DEVNULL, subprocess.DEVNULL)
    run(warm_manager(server), tmp_path, "from matplotlib import pyplot as plt\nimport tempfile\nmine = tempfile.TemporaryDirectory()", env=env)
    assert len(os.listdir(temporary)) == 1
    server.close()
    assert not alive(server.pid) and not gone(pid) and server.poll(pid) == -9
    assert os.listdir(temporary) == [] and len(os.listdir("/proc/self/fd")) <= files + 4
    server.close()


def test_files_of_the_owner_stay_with_it(small, tmp_path):
    with open(tmp_path / "open", "w"):
        with ForkServer([], ENV) as server:
            assert server.safe
            names = {os.path.realpath(f"/proc/{server.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{server.pid}/fd")}
    assert str(tmp_path / "open") not in names and {n for n in names if n.startswith("/dev/")} == {"/dev/null"}
    assert os.getsid(small.pid) == small.pid


def test_a_fork_of_the_owner_leaves_the_server_alone(small):
    pid = os.fork()
    if not pid:
        try:
            small.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert small.alive and small.safe


def test_it_is_faster(small, tmp_path):
    seconds = []
    for _ in range(5):
        since = time.monotonic()
        run(warm_manager(small), tmp_path, "1 + 1")
        seconds.append(time.monotonic() - since)
    assert min(seconds) < 1, seconds
