import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import FRONT, notebook, write
from researchkit.core.errors import InputError, RecordError
from researchkit.core.notebook import (MIME, PROFILES, Parameter, code_hash, coerce, find_clone, find_paper, find_record, find_root, front_matter,
                                       is_packaged, is_paper, load_notebook, paper_paths, parameters, read_paper, settle)
from researchkit.core.study import Study

front = FRONT.format(slug="one", theme="theory")


def save(tmp_path, text=front, **options):
    nb = notebook("one", "1 + 1", front=None, **options)
    nb["cells"].insert(0, {"cell_type": "raw", "id": "raw", "metadata": {}, "source": text.splitlines(keepends=True)})
    return write(nb, tmp_path / "nbs" / "theory" / "one.ipynb")


def test_front_matter_is_read(tmp_path):
    path = save(tmp_path)
    assert front_matter(path)["paper"]["year"] == 2024
    paper = read_paper(path)
    assert (paper.slug, paper.theme, paper.authors, paper.arxiv, paper.page) == ("one", "theory", ["A. Author"], "", "theory/one.html")


def test_a_notebook_without_front_matter_has_no_facts(tmp_path):
    assert front_matter(write(notebook("one", "1", front=None), tmp_path / "one.ipynb")) == {}


@pytest.mark.parametrize("broken, word", [
    (front.replace('title: "one: a test"', "title: one: a test"), "mapping values"),
    (front.replace("year: 2024", "year: [2024"), "expected"),
    (front.replace("year: 2024", "year: 2024-13-45"), "month"),
    (front[:-3], "the closing --- is missing"),
    ("---\n- a\n- b\n---", "mapping"),
    ("---", "the closing --- is missing"),
])
def test_malformed_front_matter_names_file_and_line(tmp_path, broken, word):
    path = save(tmp_path, broken)
    with pytest.raises(InputError, match=word) as e:
        front_matter(path)
    place, line = str(e.value).split(": front matter")[0].rsplit(":", 1)
    assert place == str(path) and "\n" not in str(e.value)
    assert 1 <= int(line) <= len(path.read_text().splitlines())


def test_the_line_is_the_line_in_the_file(tmp_path):
    path = save(tmp_path, front.replace('description: "A notebook of the tests."', "description: a: b"))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "description" in text)
    with pytest.raises(InputError, match=rf"one.ipynb:{line}: "):
        front_matter(path)


@pytest.mark.parametrize("old, new, word", [
    ('title: "one: a test"', "title: 3", "title"),
    ("paper:\n", "papers:\n", "paper:"),
    ("year: 2024", 'year: "2024"', "paper.year"),
    ('authors: ["A. Author"]', 'authors: "A. Author"', "paper.authors"),
    ('authors: ["A. Author"]', "authors: [1]", "paper.authors"),
    ("slug: one", "slug: two", "'two'.*'one'"),
    ("arxiv: null", "arxiv: 2101.5", "paper.arxiv"),
    ("code: null", "code: null\n  colour: red", "colour"),
    ("code: null", "code: null\n  extras: survival", "extras"),
    ("  venue: \"Venue\"\n", "", "paper.venue"),
])
def test_wrong_facts_are_refused(tmp_path, old, new, word):
    assert old in front
    path = save(tmp_path, front.replace(old, new))
    with pytest.raises(InputError, match=word) as e:
        read_paper(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"cells": 3}', b'{"cells": []}', "é".encode("latin-1"), b'{"cells": [{"cell_type": "raw"'])
def test_what_is_no_notebook_is_refused(tmp_path, data):
    path = tmp_path / "nbs" / "theory" / "one.ipynb"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with pytest.raises(InputError, match="one.ipynb"):
        read_paper(path)
    if data != b'{"cells": []}':
        with pytest.raises(InputError, match="one.ipynb"):
            load_notebook(path)


@pytest.mark.parametrize("cell", [{}, 1, {"cell_type": "code", "metadata": {}}, {"source": "x"}])
def test_a_cell_that_is_no_cell_is_refused(tmp_path, cell):
    nb = notebook("one", "1")
    nb["cells"].append(cell)
    with pytest.raises(InputError, match="one.ipynb"):
        load_notebook(write(nb, tmp_path / "one.ipynb"))


def test_find_root(tmp_path, monkeypatch):
    (tmp_path / "nbs" / "theory").mkdir(parents=True)
    (tmp_path / "settings.ini").touch()
    monkeypatch.delenv("RESEARCHKIT_HOME", raising=False)
    assert find_root(tmp_path / "nbs" / "theory") == tmp_path.resolve()
    monkeypatch.setenv("RESEARCHKIT_HOME", str(tmp_path))
    assert find_root("/") == tmp_path.resolve()
    monkeypatch.setenv("RESEARCHKIT_HOME", str(tmp_path / "nbs"))
    with pytest.raises(InputError, match="RESEARCHKIT_HOME"):
        find_root()


def test_the_notebooks_of_an_installed_package_are_read_only(tmp_path, monkeypatch):
    monkeypatch.delenv("RESEARCHKIT_HOME", raising=False)
    inside = tmp_path / "researchkit" / "_repository"
    (inside / "nbs" / "theory").mkdir(parents=True)
    (inside / "settings.ini").write_text("[DEFAULT]\nlib_name = researchkit\n")
    assert not is_packaged(inside) and find_clone(inside) == inside.resolve()  # only a folder of this name
    (tmp_path / "researchkit" / "__init__.py").touch()
    assert is_packaged(inside) and is_packaged(inside / "nbs" / "theory" / "one.ipynb") and not is_packaged(tmp_path)
    for home in ("", str(inside)):
        monkeypatch.setenv("RESEARCHKIT_HOME", home)
        assert find_root(inside / "nbs") == inside.resolve()
        with pytest.raises(InputError, match="needs a clone.*read-only") as e:
            find_clone(inside / "nbs")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, own", [("researchkit", True), ("other", False), ("%(repo)s", False)])
def test_another_library_that_is_written_with_nbdev_is_passed_over(tmp_path, monkeypatch, name, own):
    monkeypatch.delenv("RESEARCHKIT_HOME", raising=False)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text(f"[DEFAULT]\nrepo = x\nlib_name = {name}\n")
    assert (find_root(tmp_path) == tmp_path.resolve()) == own
    monkeypatch.setenv("RESEARCHKIT_HOME", str(tmp_path))
    if not own:
        with pytest.raises(InputError, match="of researchkit"):
            find_root()


def test_a_copy_may_have_any_name_and_takes_its_theme_from_its_categories(tmp_path):
    nb = load_notebook(save(tmp_path))
    copy = write(nb, tmp_path / "theory" / "mine.ipynb")  # a folder of this name makes no theme
    paper = read_paper(copy)
    assert is_paper(copy) and (paper.slug, paper.theme, paper.page, paper.path) == ("one", "theory", "theory/one.html", copy)
    for categories, theme in (("[a, safety, theory]", "safety"), ("[a]", ""), ("[]", "")):
        nb["cells"][0]["source"] = front.replace("categories: [theory]", f"categories: {categories}").splitlines(keepends=True)
        assert read_paper(write(nb, copy)).theme == theme
    assert read_paper(copy).page == "one.html"
    with pytest.raises(InputError, match="'one'.*'mine'"):
        read_paper(write(nb, tmp_path / "nbs" / "theory" / "mine.ipynb"))


def test_what_is_a_paper(tmp_path, monkeypatch):
    assert not is_paper(write(notebook("one", "1", front=None), tmp_path / "one.ipynb"))
    assert not is_paper(tmp_path / "missing.ipynb")
    for name in ("nbs/theory/one.ipynb", "elsewhere/one.ipynb"):
        path = write(notebook("one", "1", front=None), tmp_path / name)
        path.write_text(save(tmp_path / "bad", front.replace("year: 2024", "year: [2024")).read_text())
        with pytest.raises(InputError, match="one.ipynb:.*expected"):
            is_paper(path) and read_paper(path)
    path = write(notebook("one", "1", front=None), tmp_path / "nbs" / "theory" / "one.ipynb")
    monkeypatch.chdir(path.parent)
    assert is_paper("one.ipynb")  # so that what it lacks is said
    with pytest.raises(InputError, match="'title' is missing"):
        read_paper("one.ipynb")


def test_a_study_reads_the_copy_that_runs(tmp_path, monkeypatch):
    published = save(tmp_path / "repo")
    (tmp_path / "repo" / "settings.ini").touch()
    monkeypatch.setenv("RESEARCHKIT_HOME", str(tmp_path / "repo"))
    nb = load_notebook(published)
    nb["cells"][-1]["source"] = ["edited"]
    copy = write(nb, tmp_path / "mine.ipynb")
    broken = write(nb, tmp_path / "broken.ipynb")
    broken.write_text(broken.read_text().replace("year: 2024", "year: [2024"))
    other = write(notebook("two", "2"), tmp_path / "two.ipynb")
    assert code_hash(load_notebook(copy)) != code_hash(load_notebook(published))
    for given, read in ((copy, copy), (published, published), ("", published), (other, published), (broken, published),
                        (tmp_path / "missing.ipynb", published)):
        monkeypatch.setenv("RESEARCHKIT_NOTEBOOK", str(given))
        assert Study(paper="one")._hash == code_hash(load_notebook(read))


def test_papers_are_found_in_the_order_of_the_themes(tmp_path):
    for theme, slug in (("science", "a"), ("reuse", "z"), ("reuse", "y"), ("guide", "g"), ("reuse", "_hidden"), ("reuse", ".x")):
        write(notebook(slug, "1", theme=theme), tmp_path / "nbs" / theme / f"{slug}.ipynb")
    assert list(paper_paths(tmp_path)) == ["y", "z", "a"]
    assert find_paper("z", tmp_path).name == "z.ipynb"
    with pytest.raises(InputError, match="unknown paper 'zz'"):
        find_paper("zz", tmp_path)


def declared(source):
    return parameters(notebook("one", "1", parameters=source), "one")


def test_parameters_are_read_with_type_default_and_comment():
    found = declared('profile: str = "a#b"  # one of three\nn: int = -3\nxs: list[float] = [1.0, 2e-3]\nlong: list[str] = [\n    "a",\n]  # several lines')
    assert [str(p) for p in found.values()] == ["profile: str = 'a#b'", "n: int = -3", "xs: list[float] = [1.0, 0.002]", "long: list[str] = ['a']"]
    assert [p.comment for p in found.values()] == ["one of three", "", "", "several lines"]
    assert declared('x: str = "éééééééé"  # after accents')["x"].comment == "after accents"


@pytest.mark.parametrize("source, word", [
    ("x = 1", "line 1.*name: type = literal"), ("x: int = 1\nimport os", "line 2"), ("x: int = 1 + n", "literal"), ("x: int", "name: type"),
    ("x: dict = {}", "dict"), ("x: list[list[int]] = []", "list"), ("x: int = (", "line 1"), ("x: int = {[]: 1}", "literal"),
    ('x: int = "a"', "default 'a'.*int"), ("x: list[int] = 3", "default 3.*list"),
])
def test_parameter_cells_that_are_refused(source, word):
    with pytest.raises(InputError, match=word) as e:
        declared(source)
    assert str(e.value).startswith("one: ")


def test_exactly_one_parameters_cell():
    with pytest.raises(InputError, match="no cell is tagged 'parameters'"):
        parameters(notebook("one", "1", parameters=None))
    nb = notebook("one", "1")
    nb["cells"] += [c for c in nb["cells"] if c["metadata"]]
    with pytest.raises(InputError, match="2 cells are tagged"):
        parameters(nb)


SCALARS = {"int": st.integers(), "float": st.floats(allow_nan=False, allow_infinity=False), "bool": st.booleans(),
           "str": st.text(st.characters(exclude_categories=["Cs"]), max_size=8)}


@given(st.data(), st.sampled_from(list(SCALARS)))
def test_values_and_their_text_are_coerced_alike(data, kind):
    value = data.draw(SCALARS[kind])
    p = Parameter("x", kind, value)
    assert coerce(p, value) == value and type(coerce(p, value)).__name__ == kind
    assert coerce(p, value if kind == "str" else str(value)) == value
    many = Parameter("x", f"list[{kind}]", [])
    assert coerce(many, [value, value]) == [value, value]
    if kind != "str":
        assert coerce(many, f"{value},{value}") == coerce(many, f"[{value}, {value}]") == [value, value]


@given(st.one_of(st.text(max_size=6), st.none(), st.integers(), st.floats(), st.booleans(), st.lists(st.text(max_size=3), max_size=2),
                 st.dictionaries(st.text(max_size=2), st.integers(), max_size=1)),
       st.sampled_from(["int", "float", "bool", "str", "list[int]", "list[float]", "list[bool]", "list[str]"]))
def test_coerce_gives_the_type_or_an_input_error(value, kind):
    p = Parameter("x", kind, None)
    try:
        got = coerce(p, value)
    except InputError as e:
        assert "x takes" in str(e) and kind in str(e)
        return
    inner = kind[5:-1] if kind.startswith("list") else kind
    items = got if kind.startswith("list") else [got]
    assert all(type(item).__name__ == inner for item in items)


@pytest.mark.parametrize("kind, value", [("int", 1.5), ("int", True), ("int", "1.0"), ("float", True), ("float", "x"), ("bool", 1), ("bool", "yes"),
                                         ("str", 3), ("list[int]", "1,x"), ("list[int]", "[1, true]"), ("list[int]", 3), ("list[bool]", "[1"),
                                         ("float", "nan"), ("float", float("inf")), ("list[float]", "1,inf")])
def test_wrong_types_are_refused(kind, value):
    with pytest.raises(InputError, match="parameter x takes"):
        coerce(Parameter("x", kind, None), value)


def test_settle():
    d = declared('profile: str = "cpu"\nratio: float = 0.2\nseeds: list[int] = [0]')
    assert settle(d, {"ratio": "1", "seeds": "3,4"}) == {"ratio": 1.0, "seeds": [3, 4]}
    with pytest.raises(InputError) as e:
        settle(d, {"ration": 1})
    assert all(part in str(e.value) for part in ("'ration'", "did you mean ratio?", "ratio: float = 0.2", "seeds: list[int] = [0]"))
    with pytest.raises(InputError, match=", ".join(PROFILES)):
        settle(d, {"profile": "gpu"})


lines = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.sampled_from(["code", "markdown", "raw"]), lines), min_size=1, max_size=5), st.data())
def test_code_hash_sees_code_and_nothing_else(cells, data):
    def nb(cells):
        return {"cells": [{"cell_type": k, "metadata": {}, "source": [f"{line}\n" for line in text]} for k, text in cells]}

    base = nb(cells)
    other = json.loads(json.dumps(base))
    for cell in other["cells"]:
        cell["source"] = "".join(cell["source"]) + "\n\n"
        if cell["cell_type"] == "code":
            cell.update(outputs=[{"output_type": "stream", "text": "x"}], execution_count=7)
        else:
            cell["source"] += data.draw(st.text(max_size=3))
    other["cells"].insert(data.draw(st.integers(0, len(cells))),
                          {"cell_type": "code", "metadata": {"tags": ["injected-parameters"]}, "source": "n = 3"})
    assert code_hash(other) == code_hash(base) and len(code_hash(base)) == 16
    code = [c for c in other["cells"] if c["cell_type"] == "code" and not c["metadata"]]
    if code:
        code[0]["source"] = "x" + code[0]["source"].strip()
        assert code_hash(other) != code_hash(base)


def test_code_hash_keeps_cells_apart():
    def nb(*sources):
        return {"cells": [{"cell_type": "code", "metadata": {}, "source": s} for s in sources]}

    assert len({code_hash(nb(*s)) for s in (("a", "b"), ("b", "a"), ("ab",), ("a\nb",), ("a", "", "b"))}) == 5


def with_record(record, path, *more):
    nb = notebook("one", "1", f'print("{MIME}")', *more)
    nb["cells"][3]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {MIME: record, "text/html": "<b>x</b>"}}]
    return write(nb, path)


def test_find_record(tmp_path):
    path = tmp_path / "one.ipynb"
    assert find_record(write(notebook("one", f'mime = "{MIME}"'), path)) is None
    assert find_record(with_record({"schema": 1, "text": f'a "{MIME}" {{'}, path)) == {"schema": 1, "text": f'a "{MIME}" {{'}
    with pytest.raises(RecordError, match=r"one.ipynb: record has schema 99.*update researchkit"):
        find_record(with_record({"schema": 99}, path))


def test_find_record_in_a_broken_file(tmp_path):
    path = with_record({"schema": 1, "rows": [1, 2, 3]}, tmp_path / "one.ipynb")
    path.write_text(path.read_text().split("rows")[0])
    with pytest.raises(InputError, match="one.ipynb"):
        find_record(path)
