import copy
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
import uuid
import warnings

import fsspec
import jsonschema
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from conftest import PARAMETERS, RECORD, notebook, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from researchkit.core.errors import InputError, RecordError
from researchkit.core.notebook import MIME
from researchkit.core.study import RECORD_SCHEMA, mean_interval, validate_record
from researchkit.run.results import TABLES, Results, ResultsWarning, find_results, log_to_mlflow
from researchkit.run.store import Store, StoreError

VALID = jsonschema.Draft202012Validator(RECORD_SCHEMA)  # `validate_record` looks at the schema itself each time
TIMES = ["started", "seconds", "wall_seconds", "cpu_seconds", "peak_rss_bytes"]


def record(rows=None, params=None, paper="p", claims=2, tolerances=None, **more) -> dict:
    "A record of the shape that the notebooks of the tests emit."
    found = dict(schema=1, paper=paper, profile="cpu", params=params or {}, seeds=[0], versions={"python": "3.11.7"}, hardware={"cores": 2, "gpu": None},
                 wall_seconds=1.0, cpu_seconds=1.5, peak_rss_bytes=10**8, code_hash="c0de", tolerances=tolerances or {}, rows=rows if rows is not None else [],
                 claims=[dict(id=f"C{i}", statement="a beats [b]", paper="+10 points", measured=0.5, interval=[0.4, 0.6], criterion="a > b", verdict="reproduced",
                              units=3, note="") for i in range(1, claims + 1)])
    VALID.validate(found | more)
    return found | more


def run(number, params=None, rows=None, paper="p", **more) -> dict:
    "The document of a finished run."
    params = {"profile": "cpu", **(params or {})}
    own = {k: more.pop(k) for k in ("claims", "tolerances") if k in more}
    hardware = {"hardware": more.pop("hardware")} if "hardware" in more else {}
    return dict(schema=1, id=f"{number:016x}", paper=paper, profile="cpu", params=params, code_hash="c0de", versions={"python": "3.11.7"}, status="done",
                started="2026-11-21T12:00:00+00:00", seconds=2.0, record=record(rows, params, paper, **own, **hardware), files=[]) | more


def failure(number, params=None, status="failed", error="ValueError: no", **more) -> dict:
    return run(number, params) | dict(status=status, record=None, error=error, heading="The method", traceback="Traceback") | more


def put(store, *documents) -> Store:
    store = store if isinstance(store, Store) else Store(store)
    for d in documents:
        store.write(f"{'runs' if d['status'] == 'done' else 'failed'}/{d['id']}.json", json.dumps(d))
    return store


def accuracy(seed=0, method="a", value=0.5, **more) -> dict:
    return dict(method=method, seed=seed, accuracy=value, **more)


def equal(a: Results, b: Results, times=True):
    for name in TABLES:
        x, y = (getattr(r, name) for r in (a, b))
        drop = [] if times else [c for c in TIMES if c in x]
        pd.testing.assert_frame_equal(x.drop(columns=drop), y.drop(columns=drop))


@pytest.fixture
def memory():
    name = f"results-{uuid.uuid4().hex[:8]}"
    yield Store(f"memory://{name}")
    if fsspec.filesystem("memory").exists(f"/{name}"):
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path, memory):
    return Store(tmp_path / "sweep") if request.param == "folder" else memory


# ---------------------------------------------------------------- columns


def test_the_three_tables(store):
    validate_record(run(1, {"ratio": 0.2}, [accuracy()])["record"])
    put(store, run(1, {"ratio": 0.2, "seeds": [0, 1]}, [accuracy(0), accuracy(1)]), failure(2, {"ratio": 2.0, "seeds": [0]}))
    r = Results(store)
    assert list(r.runs) == ["run", "paper", "status", "error", "heading", "started", "seconds", "wall_seconds", "cpu_seconds", "peak_rss_bytes", "code_hash",
                            "profile", "ratio", "seeds", "version.python", "hardware.cores", "hardware.gpu"]
    assert list(r.rows) == ["run", "paper", "code_hash", "profile", "ratio", "seeds", "method", "seed", "accuracy"]
    assert list(r.claims) == ["run", "paper", "code_hash", "profile", "ratio", "seeds", "claim", "statement", "verdict", "measured", "low", "high", "units",
                              "criterion", "note", "paper_reports"]
    assert r.runs["run"].tolist() == [f"{1:016x}", f"{2:016x}"] and r.runs["status"].tolist() == ["done", "failed"]
    assert r.runs["seeds"].tolist() == ["0,1", "0"] and r.rows["seed"].tolist() == [0, 1] and r.claims["claim"].tolist() == ["C1", "C2"]
    assert r.runs["error"].isna().tolist() == [True, False] and r.runs.loc[1, "heading"] == "The method" and math.isnan(r.runs.loc[1, "cpu_seconds"])
    assert r.runs["started"].iloc[0] == pd.Timestamp("2026-11-21T12:00:00Z")
    assert r.claims[["low", "measured", "high"]].iloc[0].tolist() == [0.4, 0.5, 0.6] and r.claims["paper_reports"].iloc[0] == "+10 points"
    assert repr(r) == "Results(1 done, 1 failed, 2 rows, 2 claims)"
    assert "1 runs done, 1 failed" in r._repr_html_()


def test_names_that_clash(tmp_path):
    put(tmp_path, run(1, {"ratio": 0.2, "status": "x", "units": 3}, [dict(ratio=0.3, run="r", profile="q", cpu_seconds=1.0, **{"row.run": 5})]))
    r = Results(tmp_path)
    assert list(r.rows) == ["run", "paper", "code_hash", "profile", "param.ratio", "param.status", "param.units", "ratio", "row.row.run", "row.profile", "cpu_seconds", "row.run"]
    assert r.rows.iloc[0][["param.ratio", "ratio", "row.row.run", "row.run"]].tolist() == [0.2, 0.3, "r", 5]
    assert r.runs["param.ratio"].tolist() == [0.2] and r.runs["param.status"].tolist() == ["x"] and r.claims["units"].tolist() == [3, 3]
    assert len(r.where("row.cpu_seconds>2").rows) == 0 and len(r.where("cpu_seconds>2").runs) == 0 and len(r.where("row.cpu_seconds=1").rows) == 1
    r.save()
    equal(Results(tmp_path), r)


def test_names_that_differ_in_case_only(tmp_path):
    put(tmp_path, run(1, {"K": 3}, [dict(k=0.3)]))
    assert Results(tmp_path).sql("SELECT * FROM rows").iloc[0].tolist()[-2:] == [3, 0.3]


def test_lists_are_what_one_types(tmp_path):
    lists = [[], [0, 1, 2], [0.5], ["a", "b"], ["a,b", "c"], [""], [True, False], ["[x"], [1.0, 2.5]]
    put(tmp_path, *(run(i, {"n": i, "items": items}, []) for i, items in enumerate(lists)))
    assert Results(tmp_path).runs["items"].tolist() == ["[]", "0,1,2", "0.5", "a,b", '["a,b", "c"]', '[""]', "True,False", '["[x"]', "1,2.5"]
    from researchkit.core.notebook import Parameter, coerce

    for text, items in zip(Results(tmp_path).runs["items"], lists):
        kind = type(items[0]).__name__ if items else "int"
        assert coerce(Parameter("items", f"list[{kind}]", []), text) == items


def test_types(tmp_path):
    put(tmp_path,
        run(1, {"p": 1, "flag": True}, [dict(i=1, f=1, m=1, s="x", n=None, acc=None, b=True, big=2**70, bm=True), dict(i=2, gap=7)], tolerances={"acc": None}),
        run(2, {"p": 2, "flag": False}, [dict(i=3, f=0.5, m="t", b=False, big=1, bm=0.25)]))
    r = Results(tmp_path)
    kinds = {c: str(t) for c, t in r.rows.dtypes.items()}
    assert [kinds[c] for c in ("i", "f", "m", "s", "n", "acc", "b", "big", "gap", "bm", "p", "flag")] == [
        "Int64", "float64", "string", "string", "string", "float64", "boolean", "float64", "Int64", "string", "Int64", "boolean"]
    assert r.rows["m"].tolist()[::2] == ["1", "t"] and r.rows["bm"].tolist()[::2] == ["True", "0.25"] and r.rows["gap"].isna().tolist() == [True, False, True]
    assert r.rows["big"].iloc[0] == 2.0**70 and r.rows["n"].isna().all()
    r.save()
    again = pd.read_parquet(tmp_path / "results/rows.parquet")
    pd.testing.assert_frame_equal(again, r.rows)
    equal(Results(tmp_path), r)


def test_nothing_logged_and_no_record(tmp_path):
    put(tmp_path, run(1) | {"record": None}, run(2, rows=[], claims=0))
    r = Results(tmp_path)
    assert len(r.runs) == 2 and len(r.rows) == len(r.claims) == len(r.summary()) == len(r.verdicts()) == 0
    r.save()
    equal(Results(tmp_path), r)
    assert r._repr_html_()


# ---------------------------------------------------------------- order


def test_numbers_sort_as_numbers(tmp_path):
    cases = [(10, "m-2", [10]), (9, "m-10", [9]), (9, "m-2", [10]), (9, "m-2", [9, 1]), (-1, "z", []), (9, "m-2", [9])]
    put(tmp_path, *(run(99 - i, {"k": k, "model": m, "seeds": s}, []) for i, (k, m, s) in enumerate(cases)), run(1, {"z": 1}, paper="a"))
    found = Results(tmp_path).runs[["paper", "k", "model", "seeds"]].fillna(0).values.tolist()
    assert found == [["a", 0, 0, 0], ["p", -1, "z", "[]"], ["p", 9, "m-2", "9"], ["p", 9, "m-2", "9,1"], ["p", 9, "m-2", "10"], ["p", 9, "m-10", "9"],
                     ["p", 10, "m-2", "10"]]


value = st.one_of(st.integers(-3, 3), st.sampled_from([0.5, 1.0, -2.25]), st.sampled_from(["x", "1", ""]), st.booleans(), st.none())
logged = st.lists(st.dictionaries(st.sampled_from(["acc", "loss", "run", "k"]), value, max_size=3), max_size=3)
sweeps = st.lists(st.tuples(st.sampled_from(["p", "q"]), st.dictionaries(st.sampled_from(["k", "ratio", "seeds"]), st.one_of(value.filter(lambda v: v is not None), st.lists(st.integers(0, 12), max_size=2)),
                                                                         max_size=2), logged, st.booleans()), min_size=1, max_size=7)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sweeps, st.randoms(use_true_random=False))
@example([("p", {"k": 1}, [{"acc": 1}], True), ("p", {"k": 0.5}, [{"acc": 0.5}], True), ("p", {"k": "x"}, [{"acc": "x"}], True)], random.Random(0))
@example([("p", {"k": 1}, [{"acc": 1}], True), ("p", {"k": 2}, [{"k": 0.5}], False)], random.Random(1))
def test_tables_do_not_depend_on_the_way_there(tmp_path_factory, cases, rng):
    documents = [run(i, p, rows, paper) if fine else failure(i, p, paper=paper) for i, (paper, p, rows, fine) in enumerate(cases)]
    straight, winding = (Store(f"memory://results-{uuid.uuid4().hex}") for _ in range(2))
    put(straight, *documents)
    for d in rng.sample(documents, len(documents)):
        if d["status"] == "done" and rng.random() < 0.4:  # it failed first
            put(winding, failure(int(d["id"], 16), {"k": 1}, error="first"))
            Results(winding).save()
        if rng.random() < 0.3:  # a run that is removed again
            put(winding, run(77, {"extra": "e", "k": 0.25}, [{"acc": 0.75, "more": 1, "loss": "text"}]))
            Results(winding).save()
            winding.remove(f"runs/{77:016x}.json")
        put(winding, d)
        if rng.random() < 0.5:
            Results(winding).save()
            if rng.random() < 0.3:  # cut off between two files
                winding.remove(f"results/{rng.choice(TABLES)}.parquet")
    a, b = Results(straight), Results(winding)
    equal(a, b)
    b.save()
    equal(a, Results(winding))
    a.save()
    assert [straight.read(f"results/{t}.parquet") for t in TABLES] == [winding.read(f"results/{t}.parquet") for t in TABLES]
    fsspec.filesystem("memory").store.clear()


def test_the_rows_of_a_run_stay_in_logged_order(tmp_path):
    rows = [accuracy(s, m, i / 10) for i, (s, m) in enumerate([(2, "b"), (0, "a"), (1, "z"), (0, "b")])]
    put(tmp_path, run(2, {"k": 1}, rows), run(1, {"k": 2}, rows))
    Results(tmp_path).save()
    put(tmp_path, run(3, {"k": 0}, rows[::-1]))
    assert Results(tmp_path).rows["accuracy"].tolist() == [0.3, 0.2, 0.1, 0.0] + [0.0, 0.1, 0.2, 0.3] * 2


def test_times_may_differ(tmp_path):
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        put(tmp_path / name, run(1, {"k": 1}, [accuracy()], seconds=seconds, started=f"2026-11-21T12:00:0{int(seconds)}+00:00"))
    a, b = Results(tmp_path / "a"), Results(tmp_path / "b")
    equal(a, b, times=False)
    with pytest.raises(AssertionError):
        equal(a, b)


# ---------------------------------------------------------------- saving


class Counting:
    "The JSON files that are read through a store."

    def __init__(self, monkeypatch):
        self.names, read, read_many = [], Store.read, Store.read_many
        monkeypatch.setattr(Store, "read", lambda s, name: (self.names.append(name), read(s, name))[1] if s.remote or not self.inside else read(s, name))
        monkeypatch.setattr(Store, "read_many", lambda s, names: self.many(s, names, read_many))
        self.inside = False

    def many(self, store, names, read_many):
        self.names += names
        self.inside = True
        try:
            return read_many(store, names)
        finally:
            self.inside = False

    def take(self) -> list[str]:
        found, self.names = sorted({n for n in self.names if n.endswith(".json")}), []
        return found


def test_only_new_files_are_read(store, monkeypatch):
    put(store, *(run(i, {"k": i}, [accuracy()]) for i in range(20)), failure(50, {"k": 50}))
    Results(store).save()
    counting = Counting(monkeypatch)
    Results(store).rows
    assert counting.take() == [f"failed/{50:016x}.json"]
    put(store, run(50, {"k": 50}, [accuracy()]), run(21, {"k": -1}, [accuracy()]))
    store.remove(f"runs/{3:016x}.json")
    Results(store).save()
    assert counting.take() == [f"runs/{21:016x}.json", f"runs/{50:016x}.json"]
    r = Results(store)
    assert len(r.runs) == 21 and (r.runs["status"] == "done").all() and counting.take() == [] and r.rows["k"].tolist()[0] == -1
    r.save()
    r.runs.index
    for name in TABLES:
        store.remove(f"results/{name}.parquet")
    equal(Results(store), r)


def test_failed_then_done(store):
    put(store, failure(1, {"k": 1}), failure(2, {"k": 2}, status="timed out"), failure(3, {"k": 3}, status="refused"))
    Results(store).save()
    put(store, run(1, {"k": 1}, [accuracy()]), failure(2, {"k": 2}, error="another"))  # failed/1 is still there
    r = Results(store)
    assert r.runs["status"].tolist() == ["done", "failed", "refused"] and r.runs["error"].fillna("").tolist() == ["", "another", "ValueError: no"]
    assert r.rows["run"].tolist() == [f"{1:016x}"]


def test_nothing_new_is_not_written_again(tmp_path, monkeypatch):
    put(tmp_path, run(1, {"k": 1}, [accuracy()]), failure(2))
    Results(tmp_path).save()
    monkeypatch.setattr(Store, "write", lambda *a: pytest.fail("written"))
    Results(tmp_path).save()


def test_runs_that_finish_while_it_saves(tmp_path, monkeypatch):
    put(tmp_path, run(1, {"k": 1}, [accuracy()]))
    write_, waiting = Store.write, [run(2, {"k": 2}, [accuracy()]), run(3, {"k": 3}, [accuracy()])]

    def writing(self, name, data):
        if name.endswith("runs.parquet") and waiting:
            document = waiting.pop(0)
            write_(self, f"runs/{document['id']}.json", json.dumps(document))
        write_(self, name, data)

    monkeypatch.setattr(Store, "write", writing)
    Results(tmp_path).save()
    assert not waiting and pq.read_table(tmp_path / "results/rows.parquet")["k"].to_pylist() == [1, 2, 3]
    assert len(pq.read_table(tmp_path / "results/runs.parquet")) == 3


def test_two_processes_save_at_once(tmp_path):
    put(tmp_path, *(run(i, {"k": i}, [accuracy()]) for i in range(10)))
    code = f"from researchkit.run.results import Results\nfor _ in range(3): Results({str(tmp_path)!r}).save()"
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for i in range(10, 30):
        put(tmp_path, run(i, {"k": i}, [accuracy()]))
    assert [p.communicate()[1] for p in both] == [b"", b""] and [p.returncode for p in both] == [0, 0]
    Results(tmp_path).save()
    assert pq.read_table(tmp_path / "results/runs.parquet")["k"].to_pylist() == list(range(30))


def test_a_damaged_or_foreign_dataset_is_made_anew(tmp_path):
    put(tmp_path, run(1, {"k": 1}, [accuracy()]), run(2, {"k": 2}, [accuracy()]))
    good = Results(tmp_path)
    good.save()
    before = {t: (tmp_path / f"results/{t}.parquet").read_bytes() for t in TABLES}
    for t in TABLES:
        for damage in (b"", before[t][:len(before[t]) // 2], b"PAR1" + os.urandom(64) + b"PAR1"):
            (tmp_path / f"results/{t}.parquet").write_bytes(damage)
            equal(Results(tmp_path), good)
        pq.write_table(pa.table({"run": ["x"]}), tmp_path / f"results/{t}.parquet")
        equal(Results(tmp_path), good)
        (tmp_path / f"results/{t}.parquet").write_bytes(before[t])
    put(tmp_path, run(3, {"k": 0}, [accuracy()]))
    Results(tmp_path).save()
    (tmp_path / "results/rows.parquet").write_bytes(before["rows"])  # of the save before
    assert Results(tmp_path).rows["k"].tolist() == [0, 1, 2]
    Results(tmp_path).save()
    assert pq.read_table(tmp_path / "results/rows.parquet")["k"].to_pylist() == [0, 1, 2]


def test_a_newer_version_is_refused(tmp_path):
    put(tmp_path, run(1, {"k": 1}, [accuracy()]))
    Results(tmp_path).save()
    assert pq.read_schema(tmp_path / "results/rows.parquet").metadata[b"researchkit"] == b"1"
    assert pq.ParquetFile(tmp_path / "results/rows.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    for t in TABLES:
        path = tmp_path / f"results/{t}.parquet"
        table, before = pq.read_table(path), path.read_bytes()
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"researchkit": b"2"}), path)
        for ask in (lambda: Results(tmp_path).runs, Results(tmp_path).save):
            with pytest.raises(RecordError, match=f"results/{t}.parquet has schema 2.*update researchkit"):
                ask()
        path.write_bytes(before)
    put(tmp_path, run(2) | {"schema": 2})
    with pytest.raises(RecordError, match="has schema 2"):
        Results(tmp_path).runs


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1, "id"', "[]", "null", "7", '"x"', "\x00\x01", '{"schema": 1}', "{}"])
def test_corrupt_files_are_skipped_with_a_warning(store, text):
    put(store, run(1, {"k": 1}, [accuracy()]))
    store.write(f"runs/{2:016x}.json", text)
    store.write(f"failed/{3:016x}.json", b"\xff\xfe")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        r = Results(store)
        assert r.runs["run"].tolist() == [f"{1:016x}"]
    lines = [str(w.message) for w in caught if w.category is ResultsWarning]
    assert len(lines) == 2 and all("\n" not in line for line in lines) and sum(f"runs/{2:016x}.json" in line for line in lines) == 1
    assert sum(f"failed/{3:016x}.json" in line for line in lines) == 1


def broken():
    base = run(2, {"k": 1}, [accuracy()])
    for path, bad in [(("paper",), 3), (("params",), []), (("params", "k"), {"a": 1}), (("record",), "x"), (("record", "rows"), {"a": 1}), (("record", "rows", 0, "accuracy"), [1]),
                      (("record", "claims", 0), {}), (("record", "claims", 0, "measured"), "much"), (("record", "claims", 0, "units"), 1.5), (("record", "peak_rss_bytes"), 2**80),
                      (("started",), "yesterday"), (("seconds",), "long"), (("record", "rows", 0, "accuracy"), 10**400), (("versions",), [1]), (("record", "hardware"), 4)]:
        d = at = copy.deepcopy(base)
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = bad
        yield pytest.param(d, id="-".join(map(str, path)))


@pytest.mark.parametrize("document", broken())
def test_files_of_the_wrong_shape_are_skipped(tmp_path, document):
    put(tmp_path, run(1, {"k": 1}, [accuracy()]))
    put(tmp_path, document)
    with pytest.warns(ResultsWarning, match=f"runs/{2:016x}.json was skipped"):
        r = Results(tmp_path)
        assert len(r.runs) == 1 and len(r.rows) == 1


def test_a_full_disk_keeps_what_was_saved(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        filler = open(place / "filler", "wb", buffering=0)
        put(place, *(run(i, {"k": i}, [accuracy()]) for i in range(20)))
        Results(place).save()
        before = {p.name: p.read_bytes() for p in (place / "results").iterdir()}
        put(place, run(99, {"k": 99}, [accuracy()]))
        with filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        with pytest.raises(StoreError, match="cannot be written"):
            Results(place).save()
        assert {p.name: p.read_bytes() for p in (place / "results").iterdir()} == before and set(before) == {f"{t}.parquet" for t in TABLES}
        assert len(Results(place).runs) == 21
        (place / "filler").unlink()
        Results(place).save()
        assert len(pq.read_table(place / "results/runs.parquet")) == 21
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_write_that_fails_is_one_error(tmp_path, monkeypatch):
    put(tmp_path, run(1, {"k": 1}, [accuracy()]))
    Results(tmp_path).save()
    put(tmp_path, run(2, {"k": 2}, [accuracy()]))
    write_ = Store.write
    for broken_table in TABLES:
        def failing(self, name, data):
            if broken_table in name.split("/")[-1]:
                raise StoreError("'there' cannot be written: Read-only file system")
            write_(self, name, data)

        monkeypatch.setattr(Store, "write", failing)
        with pytest.raises(StoreError, match="Read-only"):
            Results(tmp_path).save()
        assert Results(tmp_path).rows["k"].tolist() == [1, 2]
    monkeypatch.setattr(Store, "write", write_)
    Results(tmp_path).save()
    assert pq.read_table(tmp_path / "results/rows.parquet")["k"].to_pylist() == [1, 2]


def test_other_programs_read_the_files(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    put(tmp_path, run(1, {"k": 1, "seeds": [0]}, [accuracy(extra=None), accuracy(1, value=None, extra=3)]), failure(2, {"k": 2, "seeds": [1]}))
    r = Results(tmp_path)
    r.save()
    for t in TABLES:
        path = tmp_path / f"results/{t}.parquet"
        pd.testing.assert_frame_equal(pd.read_parquet(path), getattr(r, t))
        assert pa.dataset.dataset(path).count_rows() == len(getattr(r, t)) == duckdb.sql(f"SELECT count(*) FROM '{path}'").fetchall()[0][0]
        assert not any(pa.types.is_null(field.type) for field in pq.read_schema(path))
    assert duckdb.sql(f"SELECT extra FROM '{tmp_path}/results/rows.parquet'").fetchall() == [(None,), (3,)]


# ---------------------------------------------------------------- places


def test_no_runs(tmp_path, memory):
    for place in (tmp_path, tmp_path / "none", memory, str(tmp_path / "x"), [tmp_path, memory]):
        with pytest.raises(InputError, match="no runs in '.*researchkit sweep"):
            Results(place)
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="no runs in"):
        Results(tmp_path)


def test_reading_writes_nothing(tmp_path):
    put(tmp_path, run(1, {"k": 1}, [accuracy()]))
    before = sorted(tmp_path.rglob("*"))
    Results(tmp_path).summary()
    assert sorted(tmp_path.rglob("*")) == before


def test_several_papers(tmp_path):
    put(tmp_path, run(1, {"k": 1, "z": "q"}, [accuracy(s, value=0.1 * s) for s in range(3)], paper="b"), run(2, {"k": 2, "z": "q"}, [accuracy(0)], paper="b"),
        run(3, {"m": 0.5}, [dict(model="x", seed=0, loss=2.0)], paper="a"))
    r = Results(tmp_path)
    assert r.rows["paper"].tolist() == ["a"] + ["b"] * 4 and list(r.runs)[12:15] == ["m", "k", "z"]
    assert r.varying() == ["k"] and list(r.summary()) == ["paper", "k", "model", "method", "metric", "n", "mean", "low", "high"]
    assert r.verdicts().iloc[:, :3].fillna(0).values.tolist() == [["a", 0, "C1"], ["a", 0, "C2"], ["b", 1, "C1"], ["b", 1, "C2"], ["b", 2, "C1"], ["b", 2, "C2"]]
    assert r.versions_mixed == (0, 0)


def test_several_sweeps(tmp_path):
    put(tmp_path / "a", run(1, {"k": 1}, [accuracy()]), failure(2, {"k": 2}), failure(4, {"k": 4}))
    put(tmp_path / "b", run(1, {"k": 1}, [accuracy()]), run(2, {"k": 0.5}, [accuracy(value="x")]), run(3, {"k": 3}, [accuracy()]), failure(4, {"k": 4}))
    Results(tmp_path / "a").save()
    r = Results([tmp_path / "a", tmp_path / "b"])
    assert r.runs["run"].tolist() == [f"{i:016x}" for i in (2, 1, 3, 4)] and r.runs["status"].tolist() == ["done"] * 3 + ["failed"]
    assert r.rows["accuracy"].tolist() == ["x", "0.5", "0.5"]
    r.save()
    equal(Results([tmp_path / "a", tmp_path / "b"]), r)


def test_mixed_versions(tmp_path):
    put(tmp_path, run(1, {"k": 1}), run(2, {"k": 2}, code_hash="other"), run(3, {"k": 3}, versions={"python": "3.12.0"}), failure(4, code_hash="third"))
    r = Results(tmp_path)
    assert r.versions_mixed == (1, 1) and r.where("code_hash=c0de").versions_mixed == (0, 1) and r.where("version.python>3.9").versions_mixed == (1, 1)
    assert len(r.where("version.python<3.12").runs) == 3


def test_reload(tmp_path):
    put(tmp_path, run(1, {"k": 1}, [accuracy()]))
    r = Results(tmp_path)
    some = r.where("k>0")
    put(tmp_path, run(2, {"k": 2}, [accuracy()]), run(3, {"k": -1}, [accuracy()]))
    assert len(r.runs) == len(some.runs) == 1 and len(r.reload().runs) == 3 and some.reload().runs["k"].tolist() == [1, 2]
    assert len(r.runs) == 3 and len(some.where("k=2").reload().rows) == 1


# ---------------------------------------------------------------- conditions


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    documents = [run(i, {"ratio": ratio, "k": k, "seeds": seeds, "fast": k > 1, "model": "m-" + "ab"[k % 2]},
                     [accuracy(s, m, ratio + k + 0.1 * s, step=s) for m in ("A", "B") for s in seeds])
                 for i, (ratio, k, seeds) in enumerate((r, k, s) for r in (0.1, 0.2, 0.1 + 0.2) for k in (1, 2) for s in ([0], [0, 1, 2]))]
    return Results(put(tmp_path_factory.mktemp("found"), *documents, failure(77, {"ratio": 5.0, "k": 1, "seeds": [0], "fast": False, "model": "m-a"})))


@pytest.mark.parametrize("condition, runs", [
    ("ratio=0.2", 4), ("ratio=0.1,0.2", 8), ("ratio>0.1", 9), ("ratio>=0.1", 13), ("ratio<0.2", 4), ("ratio<=0.2", 8), ("ratio!=0.1", 9), ("ratio = 0.3", 4), ("ratio==0.3", 4),
    ("seeds!=0", 6), ("seeds=0", 7), ("seeds=0,1,2", 6), ("seeds=0,9", 7), ("status=failed", 1), ("status!=done", 1), ("k=1", 7), ("fast=true", 6), ("fast=False", 7),
    ("model=m-a", 7), ("model>m-a", 6), ("error=", 12), ("error!=", 1), ("started>2026-11-20", 13), ("started<2026-11-21T11:00", 0), ("ratio=", 0), ("profile=cpu,full", 13)])
def test_conditions_on_runs(found, condition, runs):
    some = found.where(condition)
    assert len(some.runs) == runs and set(some.rows["run"]) <= set(some.runs["run"]) and len(some.claims) == 2 * (some.runs["status"] == "done").sum()
    assert some.rows["run"].nunique() == (some.runs["status"] == "done").sum()


def test_conditions_on_one_table(found):
    some = found.where("method=A", "accuracy>2", k=[2, 3])
    assert set(some.rows["method"]) == {"A"} and some.rows["accuracy"].min() > 2 and len(some.runs) == 6 and set(some.rows["k"]) == {2}
    assert found.where(claim="C1").claims["claim"].unique().tolist() == ["C1"] and len(found.where(claim="C1").rows) == len(found.rows)
    assert len(found.where(seeds=[0, 1, 2]).runs) == 6 and len(found.where(ratio=0.1, fast=True).runs) == 2 and len(found.where(error=None).runs) == 12
    assert len(found.where("ratio=0.1").where("k=1").runs) == 2 and len(found.where("ratio=9").runs) == 0 and len(found.where("ratio=9").summary()) == 0
    assert len(found.runs) == 13 and len(found.where().runs) == 13


@pytest.mark.parametrize("condition, message", [
    ("ratoi=1", "unknown column 'ratoi': did you mean ratio"), ("ratio=high", "column ratio holds numbers, not 'high'"), ("ratio>", "column ratio holds numbers, not ''"),
    ("fast=maybe", "column fast holds true or false, not 'maybe'"), ("started>soon", "column started holds times, not 'soon'"), ("ratio", "a condition is written name=value"),
    ("=3", "a condition is written"), ("row.nothing=3", "unknown column 'row.nothing'"), ("", "a condition is written")])
def test_conditions_that_are_refused(found, condition, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        found.where(condition)


# ---------------------------------------------------------------- summary


def test_summary_by_hand(found):
    s = found.summary()
    assert list(s) == ["ratio", "k", "fast", "model", "method", "metric", "n", "mean", "low", "high"] and len(s) == 12 and set(s["metric"]) == {"accuracy"}
    line = s[(s["ratio"] == 0.2) & (s["k"] == 2) & (s["method"] == "B")].iloc[0]
    values = [2.2, 2.3, 2.4]  # seed 0 was logged by two runs: averaged first
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert line["n"] == 3 and np.allclose([line["mean"], line["low"], line["high"]], [2.3, low, high]) and np.allclose(mean_interval(values), (low, high))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.one_of(st.none(), st.integers(0, 12)), st.floats(-5, 5).map(lambda v: round(v, 3))), min_size=1, max_size=30))
def test_summary_is_mean_interval_over_seeds(log):
    r = Results.from_records([({}, record([dict(method=m, seed=s, acc=v) for m, s, v in log]))])
    s = r.summary("acc", "method").set_index("method")
    for method in {m for m, *_ in log}:
        units = {}
        for i, (m, seed, v) in enumerate(log):
            if m == method:
                units.setdefault(("row", i) if seed is None else seed, []).append(v)
        values = sorted(np.mean(v) for v in units.values())
        line = s.loc[method]
        assert line["n"] == len(values) and math.isclose(line["mean"], np.mean(values), abs_tol=1e-9)
        if len(values) == 1:
            assert math.isnan(line["low"]) and math.isnan(line["high"])
        elif len(values) < 10:
            assert np.allclose([line["low"], line["high"]], mean_interval(values))
        else:
            assert line["low"] <= line["mean"] <= line["high"]


def test_summary_chooses(found, tmp_path):
    assert list(found.summary(by="method")) == ["method", "metric", "n", "mean", "low", "high"] and found.summary(by="method")["n"].tolist() == [3, 3]
    assert list(found.summary(by=[])) == ["metric", "n", "mean", "low", "high"] and len(found.summary(by=())) == 1
    assert found.summary(["accuracy", "step"], "k")["metric"].tolist() == ["accuracy"] * 2 + ["step"] * 2
    with pytest.raises(InputError, match="unknown metric 'accurcy'.*accuracy"):
        found.summary("accurcy")
    with pytest.raises(InputError, match="unknown metric 'method'"):
        found.summary("method")
    with pytest.raises(InputError, match="unknown column 'metod'.*method"):
        found.summary(by="metod")
    with pytest.raises(InputError, match="both"):
        found.summary("accuracy", "accuracy")
    part, total = found.head(limit=5)
    pd.testing.assert_frame_equal(part, found.summary().head(5))
    assert total == 12
    put(tmp_path, run(1, {"seed": 0, "k": 1}, [dict(n=3, loss=2, t="x", acc=0.5, flag=True)], tolerances={"loss": None}), run(2, {"seed": 1, "k": 1}, [dict(n=4, loss=4, t="x", acc=1)]))
    r = Results(tmp_path)
    assert r.metrics == ["loss", "acc"] and r.varying() == [] and r.varying(seeds=True) == ["seed"]
    assert r.summary()[["metric", "n", "mean"]].values.tolist() == [["loss", 2, 3.0], ["acc", 2, 0.75]]


def test_verdicts(tmp_path):
    documents = [run(i, {"k": i % 2, "seeds": [i]}, [accuracy()]) for i in range(4)]
    documents[3]["record"]["claims"][1]["verdict"] = "void"
    v = Results(put(tmp_path, *documents)).verdicts()
    assert list(v) == ["paper", "k", "claim", "reproduced", "partly", "not reproduced", "void", "not tested"]
    assert v.values.tolist() == [["p", 0, "C1", 2, 0, 0, 0, 0], ["p", 0, "C2", 2, 0, 0, 0, 0], ["p", 1, "C1", 2, 0, 0, 0, 0], ["p", 1, "C2", 1, 0, 0, 1, 0]]


# ---------------------------------------------------------------- SQL and files


def test_sql(found):
    pytest.importorskip("duckdb")
    by_hand = found.rows.groupby("k")["accuracy"].mean()
    answer = found.sql("SELECT k, avg(accuracy) AS mean, count(*) AS n FROM rows GROUP BY k ORDER BY k")
    assert np.allclose(answer["mean"], by_hand) and str(answer["n"].dtype) == "Int64" and answer["k"].tolist() == [1, 2]
    assert found.sql("SELECT count(*) FROM runs JOIN claims USING (run)").iloc[0, 0] == 24
    assert found.where("k=1").sql("SELECT DISTINCT k FROM rows").values.tolist() == [[1]]
    assert found.sql("SELECT started FROM runs LIMIT 1").iloc[0, 0] == pd.Timestamp("2026-11-21T12:00:00Z")
    assert found.sql("FROM rows LIMIT 0").empty


def test_sql_reaches_no_file(found, tmp_path):
    pytest.importorskip("duckdb")
    secret, target = tmp_path / "secret.csv", tmp_path / "out.csv"
    secret.write_text("a\n1\n")
    frame = pd.DataFrame({"a": [1]})  # noqa: F841 (a variable that a query must not see)
    for query in (f"SELECT * FROM '{secret}'", f"SELECT * FROM read_csv('{secret}')", f"SELECT * FROM read_text('{secret}')", f"SELECT * FROM glob('{tmp_path}/*')",
                  f"COPY runs TO '{target}'", f"ATTACH '{tmp_path}/x.db'", f"EXPORT DATABASE '{tmp_path}/db'", "SET enable_external_access = true",
                  "SET lock_configuration = false", "INSTALL httpfs", "LOAD httpfs", "SELECT * FROM frame", "SELECT * FROM found", f"SET enable_external_access=true; COPY runs TO '{target}'",
                  "SELECT getenv('HOME')"):
        with pytest.raises(InputError, match="^SQL: [^\n]+$"):
            found.sql(query)
    assert sorted(tmp_path.iterdir()) == [secret]


@pytest.mark.parametrize("query", ["", " ", "-- nothing", "SELEC 1", "SELECT nothing FROM rows", "SELECT * FROM nowhere", "SELECT 1/", "SELECT error('a\nb')"])
def test_sql_errors_are_one_line(found, query):
    pytest.importorskip("duckdb")
    with pytest.raises(InputError, match="^SQL: [^\n]+$"):
        found.sql(query)


def test_files(found, tmp_path):
    for table in (*TABLES, "summary", "verdicts"):
        frame = getattr(found, table)() if table in ("summary", "verdicts") else getattr(found, table)
        for suffix in (".csv", ".json", ".parquet", ".md"):
            path = tmp_path / f"{table}{suffix}"
            path.write_text("old")
            found.to_file(table, path)
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{table}.parquet"), frame)
        read = pd.read_csv(tmp_path / f"{table}.csv")
        assert list(read) == list(frame) and len(read) == len(frame)
        records = json.loads((tmp_path / f"{table}.json").read_text(), parse_constant=pytest.fail)
        assert len(records) == len(frame) and all(list(r) == list(frame) for r in records)
        lines = (tmp_path / f"{table}.md").read_text().splitlines()
        assert len(lines) == len(frame) + 2 and {line.replace(r"\|", "").count("|") for line in lines} == {frame.shape[1] + 1}
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["accuracy"] for r in rows] == found.rows["accuracy"].tolist()
    assert json.loads((tmp_path / "runs.json").read_text())[0]["started"] == "2026-11-21T12:00:00+00:00"
    found.to_file(found.rows.head(3), tmp_path / "three.CSV")
    assert len(pd.read_csv(tmp_path / "three.CSV")) == 3


def test_files_that_are_refused(found, tmp_path):
    for name in ("x.xlsx", "x", ".csv", "x.csv.gz"):
        with pytest.raises(InputError, match="a table is written to .csv, .json, .parquet or .md"):
            found.to_file("rows", tmp_path / name)
    with pytest.raises(InputError, match="unknown table 'row'.*rows"):
        found.to_file("row", tmp_path / "x.csv")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        found.to_file("rows", tmp_path / "none" / "x.csv")
    with pytest.raises(InputError, match="unknown form 'parquet'"):
        found.to_text("rows", "parquet")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- sources


def test_records(tmp_path):
    r = Results.from_records([({"k": 1}, record([accuracy()], {"k": 1})), ({"k": 1}, record([accuracy()], {"k": 1}))])
    assert len(r.runs) == 2 and r.runs["run"].nunique() == 2 and r.rows["k"].tolist() == [1, 1] and r.runs["started"].isna().all()
    assert len(r.where("k=1").reload().runs) == 2
    with pytest.raises(InputError, match="made from records"):
        r.save()
    with pytest.raises(RecordError):
        Results.from_records([({}, {"schema": 1})])


def test_find(repo, monkeypatch):
    monkeypatch.setenv("RESEARCHKIT_HOME", str(repo.root))
    monkeypatch.chdir(repo.base)
    with pytest.raises(InputError, match="no sweeps in ./sweeps: researchkit sweep SLUG"):
        find_results()
    path = repo.paper("alpha", RECORD)
    with pytest.raises(InputError, match="carries no record"):
        find_results("alpha")
    nb = notebook("alpha", RECORD, theme="theory")
    nb["cells"][-1]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {MIME: record([accuracy()], {"k": 1}, "alpha")}}]
    write(nb, path)
    for source in ("alpha", str(path), path):
        assert find_results(source).rows["k"].tolist() == [1]
    put(repo.base / "sweeps/alpha", run(1, {"k": 5}, [accuracy()], paper="alpha"))
    put(repo.base / "sweeps/other", run(2, {"k": 6}, [accuracy()]))
    (repo.base / "sweeps/empty").mkdir()
    assert find_results("alpha").rows["k"].tolist() == [5] and find_results().rows["k"].tolist() == [5, 6] and find_results("sweeps/other").rows["k"].tolist() == [6]
    for source, message in (("alpah", "unknown sweep or paper 'alpah'.*alpha"), ("no/where", "'no/where' is no folder"), ("x.ipynb", "there is no such notebook"), ("sweeps/empty", "no runs in")):
        with pytest.raises(InputError, match=message):
            find_results(source)


# ---------------------------------------------------------------- size


def test_a_thousand_runs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    store = Store(tmp_path)
    (tmp_path / "runs").mkdir()

    plain = run(0, {}, [], versions={"python": "3.11.7", "torch": "2.6.0"})

    def document(i):
        rows = [dict(method="AB"[j % 2], task=f"t{j % 5}", seed=i // 50, step=j, accuracy=a, loss=2 * a) for j, a in enumerate(rng.random(100).tolist())]
        return plain | {"id": f"{i:016x}", "params": {"profile": "cpu", "ratio": (i % 50) / 50, "k": i % 7, "seeds": [i // 50]}, "record": plain["record"] | {"rows": rows}}

    for i in range(1000):
        (tmp_path / "runs" / f"{i:016x}.json").write_text(json.dumps(document(i)))
    clock = time.process_time()
    Results(store).save()
    built, clock = time.process_time() - clock, time.process_time()
    r = Results(store)
    assert len(r.runs) == 1000 and len(r.rows) == 100_000 and len(r.claims) == 2000
    loaded = time.process_time() - clock
    for i in range(1000, 1010):
        (tmp_path / "runs" / f"{i:016x}.json").write_text(json.dumps(document(i)))
    counting, clock = Counting(monkeypatch), time.process_time()
    Results(store).save()
    added = time.process_time() - clock
    assert len(counting.take()) == 10
    print(f"built {built:.2f} s, loaded {loaded:.2f} s, ten added in {added:.2f} s")
    assert built < 5 and loaded < 1 and added < 2


# ---------------------------------------------------------------- MLflow


@pytest.fixture(scope="module")
def mlflow():
    return pytest.importorskip("mlflow", reason="mlflow is not installed")


def client(mlflow, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return mlflow.tracking.MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def sweep(tmp_path):
    store = Store(tmp_path / "sweep")
    rows = [accuracy(s, m, v, task=t) for m, v in (("a/b", 0.25), ("c [d]", 0.75)) for s in (0, 1) for t in ("x", None)] + [accuracy(method="..", value=1.0)]
    put(store, *(run(i, {"k": i, "seeds": [0, 1]}, rows) for i in range(3)), failure(9))
    store.write(f"notebooks/{0:016x}.ipynb", "{}")
    return Results(store)


def test_mlflow_logs_every_run_once(mlflow, sweep, tmp_path, monkeypatch):
    uri = f"file://{tmp_path}/mlflow"
    before = dict(os.environ)
    assert log_to_mlflow(sweep, uri) == 3 and log_to_mlflow(sweep, uri) == 0 and os.environ == before
    c = client(mlflow, uri, monkeypatch)
    experiment = c.get_experiment_by_name("researchkit/p")
    runs = sorted(c.search_runs([experiment.experiment_id]), key=lambda r: r.data.params["k"])
    assert [r.data.tags["researchkit.run"] for r in runs] == [f"{i:016x}" for i in range(3)] and {r.info.status for r in runs} == {"FINISHED"}
    first = runs[0]
    assert first.data.params == {"profile": "cpu", "k": "0", "seeds": "0,1"} and first.data.tags["paper"] == "p" and first.data.tags["C1.verdict"] == "reproduced"
    assert first.data.tags["version.python"] == "3.11.7" and first.data.tags["code_hash"] == "c0de"
    assert first.data.metrics == {"accuracy/a_b x": 0.25, "accuracy/a_b": 0.25, "accuracy/c _d_ x": 0.75, "accuracy/c _d_": 0.75, "accuracy/_": 1.0, "C1.measured": 0.5, "C2.measured": 0.5}
    begin = int(pd.Timestamp("2026-11-21T12:00:00Z").timestamp() * 1000)
    assert (first.info.start_time, first.info.end_time) == (begin, begin + 2000)
    assert [a.path for a in c.list_artifacts(first.info.run_id)] == ["p.ipynb"] and c.list_artifacts(runs[1].info.run_id) == []
    assert log_to_mlflow(sweep.where("k>0"), uri, experiment="mine", artifacts=False) == 2


def test_mlflow_a_run_that_was_cut_off_is_replaced(mlflow, sweep, tmp_path, monkeypatch):
    uri = f"file://{tmp_path}/mlflow"
    real, count = mlflow.tracking.MlflowClient.set_terminated, []

    def cut(self, *a, **k):
        if len(count) == 1:
            raise KeyboardInterrupt
        count.append(1)
        real(self, *a, **k)

    monkeypatch.setattr(mlflow.tracking.MlflowClient, "set_terminated", cut)
    with pytest.raises(KeyboardInterrupt):
        log_to_mlflow(sweep, uri)
    monkeypatch.setattr(mlflow.tracking.MlflowClient, "set_terminated", real)
    assert log_to_mlflow(sweep, uri) == 2
    c = client(mlflow, uri, monkeypatch)
    runs = c.search_runs([c.get_experiment_by_name("researchkit/p").experiment_id])
    assert sorted(r.data.tags["researchkit.run"] for r in runs) == [f"{i:016x}" for i in range(3)] and {r.info.status for r in runs} == {"FINISHED"}


def test_mlflow_that_cannot_be_reached(mlflow, sweep, monkeypatch):
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    with socket.socket() as deaf:  # it accepts and never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        port = deaf.getsockname()[1]
        for uri in (f"http://me:secret@127.0.0.1:{port}", "http://127.0.0.1:9", "nosuch://x"):
            begin = time.monotonic()
            with pytest.raises(InputError, match="^MLflow at '[^\n]+$") as caught:
                log_to_mlflow(sweep, uri)
            assert time.monotonic() - begin < 10 and "secret" not in str(caught.value), uri
            if uri.startswith("http"):
                assert "cannot be reached" in str(caught.value)


# ---------------------------------------------------------------- the command

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    "The command line in this process, in a folder with one sweep: three ratios, two seeds, and a failure."
    from researchkit import cli

    monkeypatch.chdir(tmp_path)
    put("sweeps/p", *(run(i, {"ratio": r, "seeds": [s]}, [accuracy(s, value=r + s / 10)]) for i, (r, s) in enumerate((r, s) for r in (0.1, 0.2, 0.4) for s in (0, 1))),
        failure(9, {"ratio": 0.8, "seeds": [0]}))

    def call(*arguments):
        with pytest.raises(SystemExit) as e:
            cli.main(["results", *map(str, arguments)])
        out, err = capsys.readouterr()
        return e.value.code or 0, out, err

    return call


def test_the_command_shows_what_there_is(command):
    for source in ((), ("sweeps/p",), ("p",)):
        code, out, err = command(*source)
        assert (code, err) == (0, "") and "6 runs done, 1 failed" in out and "ValueError: no" in out and "0.15" in out and "accuracy" in out


def test_the_command_filters_and_asks(command, tmp_path):
    assert json.loads(command("-w", "ratio>0.1", "--json")[1])[0]["mean"] == pytest.approx(0.25)
    (answer,) = json.loads(command("--sql", "SELECT count(*) AS n, max(ratio) AS top FROM runs WHERE status = 'done'", "--json")[1])
    assert answer == {"n": 6, "top": 0.4}
    code, out, _ = command("--table", "rows", "-w", "seeds=1", "-o", "rows.csv")
    assert code == 0 and "3 lines" in out and sorted(pd.read_csv(tmp_path / "rows.csv")["ratio"]) == [0.1, 0.2, 0.4]
    assert "nothing meets" in command("-w", "ratio=7", "--table", "runs")[1]


@pytest.mark.parametrize("arguments,words", [
    (["nowhere"], "nowhere"), (["-w", "ratoi=1"], "ratio"), (["-w", "ratio"], "name=value"), (["--table", "rwos"], "rows"), (["--sql", "SELEC 1"], "SQL"),
    (["--sql", "SELECT 1", "--by", "ratio"], "--sql"), (["-o", "x.doc"], ".csv"), (["--metric", "acuracy"], "accuracy")])
def test_the_command_refuses_in_one_line(command, arguments, words):
    code, out, err = command(*arguments)
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ") and words in err
