import json
import os
import subprocess
import sys

import pytest

from conftest import FRONT, HOME
from researchkit.core.errors import DataError, InputError, RecordError, unknown
from researchkit.core.extras import missing, need

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lifelines":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
sys.modules.pop("lifelines", None)
"""


def test_errors_are_value_errors():
    assert issubclass(DataError, InputError) and issubclass(RecordError, InputError) and issubclass(InputError, ValueError)


def test_unknown_lists_few_choices_and_suggests_among_many():
    assert str(unknown("profile", "gpu", ["smoke", "cpu"])) == "unknown profile 'gpu': profiles: smoke, cpu"
    many = ["pcb_merging", "adamg", "censored_erm", "impossible_languages", "ties"]
    assert str(unknown("paper", "pcb_merge", many)).endswith("did you mean pcb_merging?")
    assert all(name in str(unknown("paper", "zzz", many)) for name in many)
    assert "there are no papers here" in str(unknown("paper", "x", []))
    assert "papers and themes: a" in str(unknown("paper or theme", "x", ["a"], plural="papers and themes"))


def test_need_returns_the_module():
    assert need("json", "survival").dumps([1]) == "[1]"
    assert need("os.path", "survival").join("a", "b")


def test_need_names_the_extra_in_one_line():
    with pytest.raises(ImportError) as e:
        need("no_such_module_at_all.part", "survival")
    assert str(e.value) == "no_such_module_at_all.part is not installed: pip install 'researchkit[survival]'"


def test_need_does_not_hide_a_fault_inside_the_module(tmp_path, monkeypatch):
    (tmp_path / "half_broken.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        need("half_broken", "survival")


def test_missing_reads_the_package_metadata(monkeypatch):
    import importlib.metadata as metadata

    assert missing([]) == []
    with pytest.raises(InputError, match="unknown extra 'surviva'.*survival"):
        missing(["surviva"])
    real = metadata.distribution

    def gone(name):
        if name == "lifelines":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "distribution", gone)
    assert missing(["survival"]) == ["lifelines"]


def test_a_paper_without_its_extra_fails_in_one_line_and_the_rest_works(repo, tmp_path):
    module = tmp_path / "needy.py"
    module.write_text("from researchkit.core.extras import need\nlifelines = need('lifelines', 'survival')\n")
    blocked = tmp_path / "block"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(BLOCK)
    env = repo.environment(PYTHONPATH=f"{blocked}:{HOME}:{tmp_path}")
    done = subprocess.run([sys.executable, "-c", "import needy"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "ImportError: lifelines is not installed: pip install 'researchkit[survival]'"
    code = "import sys; from researchkit.cli import main; main(sys.argv[1:])"
    listed = subprocess.run([sys.executable, "-c", code, "list"], env=repo.environment(PYTHONPATH=env["PYTHONPATH"], RESEARCHKIT_HOME=str(HOME)),
                            capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr


def test_every_module_imports_without_the_extras_or_names_the_one_it_needs(tmp_path):
    from researchkit.core.notebook import papers

    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    found = papers(HOME)
    script = ("import importlib, json, sys\nout = {}\nfor name in sys.argv[1:]:\n    try:\n        importlib.import_module(name); out[name] = ''\n"
              "    except ImportError as e:\n        out[name] = str(e)\nprint(json.dumps(out))")
    done = subprocess.run([sys.executable, "-c", script, *(f"researchkit.{p.theme}.{p.slug}" for p in found)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}:{HOME}"})
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout.splitlines()[-1])
    for p in found:
        message = messages[f"researchkit.{p.theme}.{p.slug}"]
        assert message in ("", "lifelines is not installed: pip install 'researchkit[survival]'"), message
        assert not message or "survival" in p.extras


def test_run_refuses_a_paper_whose_extra_is_missing(repo, tmp_path):
    repo.paper("needy", "1", front=FRONT.replace("code: null", "code: null\n  extras: [nothing_at_all]"))
    assert "nothing_at_all" in repo.refused("run", "needy")
