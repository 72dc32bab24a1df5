"""The site: every page, its links, its mathematics, and what a browser makes of it."""
import json
import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from sites import ROOT, SVG, small_tree

from researchkit.core.errors import InputError
from researchkit.core.notebook import MIME, Paper, papers
from researchkit.run.navigation import navigation, quarto_config, site_inputs
from researchkit.run.overview import (COLUMNS, bibtex, collection_html, gallery_html, ledger_chart, ledger_files, ledger_rows, ledger_table,
                                      results_table)
from researchkit.run.page import Link, cell_options, cell_summary, mathml, number_labels, render_page
from researchkit.run.reference import api_pages
from researchkit.run.site import build_site, readme


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.path, self.ids, self.links, self.loaded, self.alts, self.tags = path, set(), [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        if given.get("id"):
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given.get("href", ""))
        if tag == "img":
            self.alts.append(given.get("alt"))


@pytest.fixture(scope="session")
def pages(site, small):
    return {p: Page(p) for folder in (site, small) for p in sorted(folder.rglob("*.html"))}


def test_every_document_has_its_page(site):
    expected = {re.sub(r"\.ipynb$", ".html", p) for p in site_inputs(ROOT / "nbs", quarto_config(ROOT)) if p.endswith(".ipynb")}
    expected |= {p.replace(".qmd", ".html") for p in api_pages(ROOT)}
    assert {p.relative_to(site).as_posix() for p in site.rglob("*.html")} == expected
    assert {"index.html", "papers.html", "ledger.html", "guide/read.html", "guide/run.html", "guide/contribute.html", "api/index.html"} <= expected
    assert {p.page for p in papers(ROOT)} <= expected


def test_links_and_anchors_resolve(pages):
    broken = []
    for path, page in pages.items():
        for href in page.links:
            parts = urlsplit(href)
            if parts.scheme:
                assert parts.scheme in ("https", "mailto", "http"), href
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            found = pages.get(target) or pages.get(Path(os.path.normpath(target)))
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in found.ids):
                broken.append(f"{path.name}: {href}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(pages):
    for path, page in pages.items():
        assert all(src.startswith("data:") for src in page.loaded), (path.name, [s[:80] for s in page.loaded if not s.startswith("data:")])
        assert not re.search(r"@import|url\((?!['\"]?data:)", "".join(re.findall(r"<style[^>]*>(.*?)</style>", path.read_text(), re.S)))
        assert all(alt is not None for alt in page.alts), path.name


def test_mathematics_is_mathml(pages):
    for path in pages:
        text = path.read_text()
        assert '<code class="tex">' not in text, (path.name, re.findall(r'<code class="tex">[^<]*', text))
        shown = re.sub(r"<(pre|code|style|math)\b.*?</\1>", "", text, flags=re.S)
        assert "$$" not in shown and not re.search(r"\{#(eq|fig|tbl|sec)-|\?@", shown), path.name
        assert "\ue000" not in text


def test_a_paper_page(small):
    text = (small / "theory" / "alpha.html").read_text()
    for wanted in ('<dl class="rk-facts">', "A. Author", "arXiv:2401.00001", "researchkit run alpha", "1 not reproduced", "63 CPU-seconds", "512 MiB", "3 seeds",
                   'href="../api/theory.alpha.html"', 'id="at-a-glance"', 'id="use-it"', 'id="cite-it"', "author2024paper", "researchkit_alpha", 'id="eq-mean"', 'href="#eq-mean">Equation', 'href="#fig-one">Figure', "Figure 1: One pixel",
                   'alt="A pixel"', "Table 1: Numbers", "<figcaption>A grey box</figcaption>", "costs $5", "<code>$not math$</code>", 'href="../index.html#the-collection"',
                   "Code: mean", "callout-note", 'id="claims"'):
        assert wanted in text, wanted
    for unwanted in ("#|", "secret", "default_exp", ".ipynb#", "a_b *"):
        assert unwanted not in re.sub(r'href="https[^"]*"', "", text), unwanted
    assert 'href="../theory/alpha.html"' in (small / "api" / "theory.alpha.html").read_text()


def test_parts_of_a_paper_page_stand_in_order(small):
    text = (small / "theory" / "alpha.html").read_text()
    places = [text.index(part) for part in ('class="rk-byline"', 'id="the-idea"', "<figcaption>A grey box", 'id="at-a-glance"', "Code: mean", 'id="claims"', 'id="run-use-cite"', 'class="rk-theme"')]
    assert places == sorted(places)
    table = text[text.index('id="at-a-glance"'):text.index('class="rk-facts"')]
    for verdict in ("reproduced", "partly", "not reproduced", "void", "not tested"):
        assert f"{verdict}</span>" in table
    assert "mean_alpha([1, 2, 3])" in re.sub("<[^>]*>", "", text[text.index('id="use-it"'):text.index('id="cite-it"')])
    assert "paper 1 of 2" in text and 'href="gamma.html" rel="next"' in text and 'rel="prev">← ' in (small / "theory" / "gamma.html").read_text()
    assert "with one paper so far" in (small / "reuse" / "beta.html").read_text()


def test_every_paper_page_is_complete(site):
    for p in papers(ROOT):
        text = (site / p.page).read_text()
        for part in ('class="rk-byline"', 'id="at-a-glance"', 'class="rk-facts"', 'id="claims"', 'id="use-it"', 'id="cite-it"', f"researchkit run {p.slug}", f"/nbs/{p.theme}/{p.slug}.ipynb",
                     f"api/{p.theme}.{p.slug}.html", "class=\"rk-theme\"", "CPU-seconds", "MiB of memory"):
            assert part in text, (p.slug, part)
        shown = re.findall(r'id="(eq-[\w-]+)"', text)
        unreferred = [label for label in shown if f'href="#{label}"' not in text]
        assert shown and not unreferred and text.count('role="math"') == len(shown), (p.slug, unreferred)
        assert all(alt and alt.strip() and alt != "Output of the code above" for alt in Page(site / p.page).alts), p.slug


def test_bibtex():
    facts = dict(title="", description="", path=Path("x"), theme="theory", year=2024, authors=["Ada B. Müller", "Bo Li"], arxiv="2401.00001")
    conference = bibtex(Paper(slug="a", paper_title="On A & B: Gains of 5%", venue="ICML 2024", **facts))
    assert conference.startswith("@inproceedings{muller2024gains,") and r"{{On A \& B: Gains of 5\%}}" in conference and "Ada B. Müller and Bo Li" in conference and "archiveprefix" in conference
    assert bibtex(Paper(slug="a", paper_title="T", venue="arXiv preprint", **facts)).startswith("@misc{")
    journal = bibtex(Paper(slug="a", paper_title="T", venue="Journal of Things 3(1)", **{**facts, "arxiv": ""}))
    assert journal.startswith("@article{muller2024a,") and "journal" in journal and "eprint" not in journal
    for p in papers(ROOT):
        entry = bibtex(p)
        assert entry.count("{") == entry.count("}") and str(p.year) in entry, p.slug


def test_ledger_files(tmp_path, site):
    import csv
    import io

    root = small_tree(tmp_path)
    rows, files = ledger_rows(root), ledger_files(root)
    assert len(rows) == 15 and all(list(r) == COLUMNS for r in rows)
    assert json.loads(files["ledger.json"])["claims"] == rows
    table = list(csv.DictReader(io.StringIO(files["ledger.csv"])))
    assert [r["statement"] for r in table] == [r["statement"] for r in rows] and table[1]["interval_low"] == "" and float(table[0]["interval_low"]) == 0.1
    assert json.loads((site / "ledger.json").read_text())["claims"] == ledger_rows(ROOT) and (site / "ledger.csv").read_text() == ledger_files(ROOT)["ledger.csv"]


def test_maps_of_the_site(site):
    url = "https://researchkit.github.io/researchkit"
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")}
    listed = re.findall(rf"<loc>{url}/([^<]*)</loc>", (site / "sitemap.xml").read_text())
    assert set(listed) == pages and len(listed) == len(pages)
    text = (site / "llms.txt").read_text()
    assert text.startswith("# researchkit\n\n> ") and re.findall(r"^## (.*)$", text, re.M) == ["Papers", "Results", "Guide", "Reference", "Optional"]
    for link in re.findall(rf"\]\({url}/([^)]*)\)", text):
        assert (site / link).is_file(), link
    assert all(p.page in text for p in papers(ROOT))


def test_pictures_for_links(site):
    from PIL import Image

    for path in site.rglob("*.html"):
        head = path.read_text().partition("</head>")[0]
        tags = dict(re.findall(r'<meta property="([^"]*)" content="([^"]*)">', head))
        assert tags["og:title"] and tags["twitter:card"] == "summary_large_image" and tags["og:url"].endswith(path.relative_to(site).as_posix())
        picture = site / tags["og:image"].removeprefix("https://researchkit.github.io/researchkit/")
        with Image.open(picture) as image:
            assert image.size == (1200, 630)


def test_what_has_not_changed_is_kept(tmp_path, capsys):
    root, out = small_tree(tmp_path), tmp_path / "out"
    build_site(root, out, quarto=False)

    def stamps():
        return {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".html", ".png")}

    first = stamps()
    capsys.readouterr()
    build_site(root, out, quarto=False)
    assert stamps() == first and "0 of" in capsys.readouterr().out
    fresh = build_site(root, tmp_path / "fresh", quarto=False)
    assert {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()} == {p.relative_to(fresh).as_posix(): p.read_bytes() for p in fresh.rglob("*") if p.is_file()}

    def changed():
        build_site(root, out, quarto=False)
        now = stamps()
        told = {p for p in now if now[p] != first.get(p)} | (first.keys() - now.keys())
        first.clear()
        first.update(now)
        return told

    path = root / "nbs" / "theory" / "alpha.ipynb"
    path.write_text(path.read_text().replace("costs", "is worth"))
    assert changed() == {"theory/alpha.html", "og/theory-alpha.png"}
    (root / "nbs" / "theory" / "alpha.svg").write_text(SVG.replace("eee", "ddd"))
    assert changed() == {"theory/alpha.html", "og/theory-alpha.png"}
    path.write_text(path.read_text().replace("alpha: a method", "omega: a method"))
    pages = changed()
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.html")} <= pages, "its title stands in every page's navigation"
    (out / ".build.json").write_text("{")
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.html")} <= changed(), "without the hashes all is made again"


def test_reference_pages():
    pages = api_pages(ROOT)
    text = pages["api/core.errors.qmd"]
    assert "## unknown {#unknown}" in text and "what was looked for" in text and "#L" in text
    for name, page in pages.items():
        assert page.startswith("---\ntitle:"), name


def test_reference_reads_both_kinds_of_documentation(tmp_path):
    text = api_pages(small_tree(tmp_path))["api/theory.alpha.qmd"]
    assert "mean_alpha(x: list | None = None, *, trim: float = 0.1) -> float" in text
    assert "the numbers" in text and "share" in text
    assert "**Raises**\n\n- `ValueError`: if there is none" in text
    assert "[Equation 1](../theory/alpha.ipynb#eq-mean)" in text
    assert "### Meanalpha.fit_it {#Meanalpha.fit_it}" in text


def test_reference_has_methods_that_were_added_later(tmp_path):
    root = small_tree(tmp_path)
    module = root / "researchkit" / "theory" / "alpha.py"
    module.write_text(module.read_text() + '\n\n@patch\ndef predict_it(self: Meanalpha, x: list) -> float:\n    "Said later."\n')
    text = api_pages(root)["api/theory.alpha.qmd"]
    assert "### Meanalpha.predict_it {#Meanalpha.predict_it}" in text and "predict_it(x: list) -> float" in text and "Said later." in text


def test_without_papers(tmp_path):
    root = small_tree(tmp_path, with_papers=False)
    for make in (results_table, gallery_html, collection_html, ledger_chart, ledger_table):
        assert re.search(r"No (paper|claim) has been", make(root))
    assert (build_site(root, tmp_path / "out", quarto=False) / "papers.html").is_file()


def test_fragments_show_failures_as_clearly_as_successes(tmp_path):
    root = small_tree(tmp_path)
    table, chart = ledger_table(root), ledger_chart(root)
    assert table.count("<tr data-theme") == 15
    for verdict in ("reproduced", "partly", "not reproduced", "void", "not tested"):
        assert f'data-verdicts="{verdict}"' in table and f"3 {verdict}" in chart and f"3 {verdict}" in collection_html(root)
    assert "&lt;more&gt;" in table and "<more>" not in table
    assert "15 claims of 3 papers" in chart
    assert gallery_html(root).count('class="rk-card"') == 3
    assert "[alpha](theory/alpha.ipynb) | theory | ✓\u00a01\u00a0reproduced" in results_table(root)


def test_readme(tmp_path):
    root = small_tree(tmp_path)
    text = readme(root)
    assert text.startswith("# researchkit\n") and "make run" in text and "make test" in text
    assert not re.search(r"^---$|^#\||<div|:::", text, re.M)
    for href in re.findall(r"\]\(([^)]+)\)", text):
        if not href.startswith("http"):
            assert (root / href.partition("#")[0]).exists() or href.startswith("nbs/"), href


@pytest.mark.parametrize("tex, wanted", [
    (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "<mtable"), (r"\mathbf{1}\{x\}", "\U0001d7cf"), (r"\operatorname*{arg\,min}_x f", "arg\u2009min"),
    (r"\sum_{i=1}^n", "munderover"), (r"a \sim b", "<mo>∼</mo>"), (r"\boldsymbol\beta", "\U0001d737"), (r"x \le \frac12", "mfrac"),
    (r"p \in \mathbb R^D", "ℝ"), (r"j=\arg\min_{i} x", "munder"), (r"\mathbb E\,\mathbb{N}", "𝔼"), (r"\mathfrak H", "ℌ")])
def test_mathml(tex, wanted):
    assert wanted in mathml(tex, display=True)


def test_what_is_no_formula_stays_readable():
    assert mathml(r"\frac{1") == r'<code class="tex">\frac{1</code>' or "<math" in mathml(r"\frac{1")
    assert mathml(r"\unheardof{x}") == r'<code class="tex">\unheardof{x}</code>'


def test_cell_options_and_summary():
    options, code = cell_options('#| export\n#| label: fig-x\n#| fig-cap: "a: b"\n#| echo: false\nx = 1\n')
    assert options == {"export": True, "label": "fig-x", "fig-cap": "a: b", "echo": False} and code == "x = 1"
    assert cell_summary("import os\nfrom a import b") == "Imports"
    assert cell_summary("x: int = 1", ["parameters"]) == "Parameters"
    assert cell_summary("def f(): pass\nclass G: pass\ndef _h(): pass") == "Code: f, G"
    assert cell_summary("1 +") == "Code"


def test_labels_in_code_are_not_counted():
    nb = {"cells": [{"cell_type": "markdown", "source": "```\n$$ a $$ {#eq-no}\n```\n\n`{#eq-no2}`\n\n$$ b $$ {#eq-yes}"}]}
    assert number_labels(nb) == {"eq-yes": ("Equation", "1")}


def test_navigation_reads_auto_entries_as_quarto_does(tmp_path):
    for path, front in {"index.ipynb": "title: Home", "a/one.ipynb": "title: One", "a/two.ipynb": "title: Two\norder: 1", "b_c/three.ipynb": "title: Three", "_x/no.ipynb": "title: No"}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_raw_cell(f"---\n{front}\n---")]), tmp_path / path)
    site = dict(title="T", **{"repo-url": "https://x", "repo-branch": "main"}, sidebar=dict(contents=[
        "index.ipynb", {"auto": "{a,b_c,none}/*.ipynb"}, {"section": "S", "contents": "a/*.ipynb"}, {"section": "Empty", "contents": [{"auto": "none/*.ipynb"}]}]))
    home, a, b, s = navigation(tmp_path, dict(project={}, website=site)).side
    assert home == Link("Home", "index.html")
    assert (a.text, [i.text for i in a.items]) == ("A", ["Two", "One"]) and a.items[0].href == "a/two.html"
    assert (b.text, [i.href for i in b.items]) == ("B C", ["b_c/three.html"])
    assert [i.text for i in s.items] == ["Two", "One"]


def test_bad_input_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="no such notebook"):
        render_page(tmp_path / "none.ipynb", tmp_path / "out.html")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="something else than a site"):
        build_site(ROOT, tmp_path / "full", quarto=False)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


# ---------------------------------------------------------------- Quarto

# What Quarto 1.7 documents, as far as this site could want it.
KNOWN = {
    "": {"project", "website", "format", "execute", "metadata-files"},
    "project": {"type", "title", "render", "output-dir", "lib-dir", "execute-dir", "resources", "preview", "pre-render", "post-render"},
    "execute": {"enabled", "echo", "eval", "output", "warning", "error", "include", "cache", "freeze", "keep-ipynb"},
    "website": {"title", "description", "favicon", "image", "site-url", "site-path", "repo-url", "repo-subdir", "repo-branch", "repo-actions", "issue-url",
                "reader-mode", "search", "navbar", "sidebar", "body-header", "body-footer", "page-navigation", "back-to-top-navigation", "bread-crumbs",
                "page-footer", "open-graph", "twitter-card", "other-links", "announcement", "draft-mode", "drafts"},
    "website.navbar": {"title", "logo", "logo-alt", "logo-href", "background", "foreground", "search", "pinned", "collapse", "collapse-below", "left", "right",
                       "toggle-position", "tools-collapse", "tools"},
    "website.sidebar": {"id", "title", "subtitle", "logo", "logo-alt", "search", "tools", "contents", "style", "type", "background", "foreground", "border",
                        "alignment", "collapse-level", "pinned", "header", "footer"},
    "item": {"href", "file", "text", "url", "icon", "id", "menu", "section", "contents", "auto", "aria-label", "rel", "target"},
    "format": {"html"},
    "format.html": {"theme", "css", "toc", "toc-depth", "toc-location", "toc-title", "toc-expand", "number-sections", "anchor-sections", "smooth-scroll",
                    "html-math-method", "html-table-processing", "code-fold", "code-summary", "code-overflow", "code-copy", "code-line-numbers", "code-link",
                    "code-tools", "highlight-style", "fig-responsive", "fig-width", "fig-height", "page-layout", "link-external-newwindow", "lightbox",
                    "embed-resources", "include-in-header", "include-after-body", "include-before-body", "mainfont", "fontsize", "linestretch",
                    "title-block-style", "title-block-banner", "grid", "lang"},
}


def test_quarto_configuration():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink() and (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"

    def keys(node, name):
        assert set(node) <= KNOWN[name], set(node) - KNOWN[name]

    def items(nodes):
        for node in nodes:
            if isinstance(node, dict):
                keys(node, "item")
                if isinstance(node.get("contents"), list):
                    items(node["contents"])

    assert config["format"]["html"]["code-tools"].keys() <= {"source", "toggle", "caption"}
    for name in KNOWN:
        node = config
        for part in filter(None, name.split(".")):
            node = node.get(part, {}) if name != "item" else {}
        keys(node, name)
    items(config["website"]["sidebar"]["contents"])
    items(config["website"]["navbar"]["left"] + config["website"]["navbar"]["right"])
    assert config["execute"] == {"enabled": False}
    assert "nbdev.yml" in config["metadata-files"]
    derived = yaml.safe_load((ROOT / "nbs" / "nbdev.yml").read_text())
    merged = quarto_config(ROOT)["website"]
    assert all(merged[key] == derived["website"][key] for key in ("title", "description", "repo-url", "repo-branch"))


def test_with_quarto(tmp_path, monkeypatch, small):
    root, tools = small_tree(tmp_path), tmp_path / "bin"
    tools.mkdir()
    program = tools / "quarto"
    program.write_text('#!/bin/sh\necho "$@" > called\ntest -f _quarto.yml && test -f nbdev.yml && test -f api/index.qmd || exit 3\n'
                       "mkdir _docs && echo '<html></html>' > _docs/index.html\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    before = {p: p.read_bytes() for p in (root / "nbs").rglob("*.ipynb")}
    assert [p.name for p in build_site(root, tmp_path / "out").iterdir()].count("index.html") == 1
    proc = root / "_proc"
    assert (proc / "called").read_text().split() == ["render", "--no-execute"]
    assert not (proc / "_quarto.yml").is_symlink() and (proc / "theory" / "alpha.svg").is_file()
    cells = json.loads((proc / "theory" / "alpha.ipynb").read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells]
    assert sources[1].startswith("```{=html}\n<style>") and 'class="rk-byline"' in sources[1]
    assert any(s.startswith("## At a glance") and 'class="rk-facts"' in s for s in sources) and sources[-1].startswith("## Run it, use it, cite it")
    page = (small / "theory" / "alpha.html").read_text()
    text = "\n\n".join(s for c, s in zip(cells, sources) if c["cell_type"] == "markdown")
    plain = re.sub(r"```.*?```", "", text, flags=re.S)
    shown = [re.sub("<[^>]*>", "", re.sub(r'<a class="anchor".*?</a>', "", h)) for h in re.findall(r"<h[23][^>]*>(.*?)</h[23]>", page)]
    assert [re.sub(r" \{.*\}$", "", h) for h in re.findall(r"^###? (.*)$", plain, re.M)] == shown, "both renderers show the same sections in the same order"
    assert all(raw.strip() in page for raw in re.findall(r"```\{=html\}\n(?:<style>.*?</style>\n)?(.*?)\n```", text, re.S)), "and the same computed parts"
    assert sum(bool(o.get("data", {}).keys() & {"image/png", "text/html"}) for c in cells for o in c.get("outputs", [])) == page.count("data:image/png") + page.count('class="html-out"')
    assert page.count('<details class="code">') == sum(c["cell_type"] == "code" for c in cells)
    front = yaml.safe_load(sources[0].strip("-\n"))
    assert front["image"] == "../og/theory-alpha.png" and (proc / "og" / "theory-alpha.png").is_file() and front["title"] == "alpha: a method"
    assert (proc / "ledger.csv").is_file() and (proc / "ledger.json").is_file() and (proc / "llms.txt").is_file()
    assert any(s.startswith('#| code-summary: "Code: mean"\ndef mean') for s in sources), "exported code stays on the page"
    assert not any("default_exp" in s or "secret" in s for s in sources)
    assert not any(MIME in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    assert {p: p.read_bytes() for p in (root / "nbs").rglob("*.ipynb")} == before

    program.write_text('#!/bin/sh\necho "$@" >> called\n')
    build_site(root, tmp_path / "out")
    assert not (proc / "called").exists(), "nothing has changed"
    path = root / "nbs" / "theory" / "alpha.ipynb"
    path.write_text(path.read_text().replace("costs", "is worth"))
    build_site(root, tmp_path / "out")
    assert (proc / "called").read_text().splitlines() == ["render theory/alpha.ipynb --no-execute"]
    program.write_text("#!/bin/sh\necho the reason\nexit 1\n")
    path.write_text(path.read_text().replace("alpha: a method", "omega: a method"))
    with pytest.raises(InputError, match="(?s)quarto failed with exit code 1.*the reason"):
        build_site(root, tmp_path / "out")
    assert (tmp_path / "out" / "index.html").is_file(), "the old site stays when the new one fails"


def test_quarto_asked_for_but_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="quarto.org"):
        build_site(ROOT, tmp_path / "out", quarto=True)
