"""The site: every page, its links, its mathematics, and what a browser makes of it."""
import json
import os
import re
import shutil
import stat
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml

from researchkit.core.errors import InputError
from researchkit.core.notebook import MIME, find_root, papers
from researchkit.run.doctor import BROWSERS
from researchkit.run.site import (Link, api_pages, build_site, cell_options, cell_summary, gallery_html, ledger_chart, ledger_table, mathml,
                                  navigation, number_labels, quarto_config, readme, render_page, results_table, site_inputs)

ROOT = find_root(Path(__file__).parent)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


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
        if tag == "link":
            self.loaded.append(given.get("href", ""))
        if tag == "img":
            self.alts.append(given.get("alt"))


def record(slug: str, verdicts) -> dict:
    claims = [dict(id=f"C{i}", statement=f"claim {i} of {slug} & <more>", paper="+1 (Table 1)", measured=0.5 * i, interval=[0.1, 0.9] if i % 2 else None,
                   criterion="accuracy: A − B > 0", verdict=v, units=5, note="" if i % 2 else "a note") for i, v in enumerate(verdicts, 1)]
    return dict(schema=1, paper=slug, profile="cpu", params={}, seeds=[0, 1, 2], versions={}, hardware={}, wall_seconds=1.0, cpu_seconds=63.0,
                peak_rss_bytes=2**29, code_hash="0" * 16, tolerances={}, rows=[], claims=claims)


def notebook(slug: str, theme: str, verdicts=("reproduced", "partly", "not reproduced", "void", "not tested")) -> dict:
    new = nbformat.v4
    front = dict(title=f"{slug}: a method", description="What it does.", categories=[theme, "test"], image=f"{slug}.svg",
                 paper=dict(slug=slug, title="A Paper", authors=["A. Author"], year=2024, venue="A Venue", arxiv="2401.00001", code=None))
    figure = new.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    table = "<table class='dataframe'><tr>" + "".join(f"<td>column_{i}</td>" for i in range(40)) + "</tr></table>"
    told = new.new_output("display_data", {MIME: record(slug, verdicts), "text/html": "<p>claims</p>", "text/plain": "claims"})
    cells = [
        new.new_raw_cell("---\n" + yaml.safe_dump(front, sort_keys=False) + "---"),
        new.new_code_cell(f"#| default_exp {theme}.{slug}"),
        new.new_markdown_cell(f"## The idea\n\n![A grey box]({slug}.svg)\n\nA sum $\\sum_i x_i$ and $a_b * c_d$, costs \\$5, `$not math$`.\n\n"
                              "$$\n\\hat\\mu = \\frac1n \\sum_{i=1}^n x_i ,\n$$ {#eq-mean}\n\nSee @eq-mean, @fig-one and [the API](../index.ipynb#results).[^n]\n\n[^n]: A note.\n\n"
                              "| a | b |\n|---|---|\n| $x$ | 2 |\n\n: Numbers {#tbl-numbers}\n\n::: {.callout-note}\nInside @tbl-numbers.\n:::"),
        new.new_code_cell("def mean(x):\n    \"\"\"The mean of @eq-mean.\"\"\"\n    return sum(x) / len(x)  # " + "long " * 40),
        new.new_code_cell('#| label: fig-one\n#| fig-cap: "One pixel: $x$"\n#| fig-alt: "A pixel"\nshow()', outputs=[figure]),
        new.new_code_cell("#| hide\nsecret = 1"),
        new.new_code_cell("wide", outputs=[new.new_output("execute_result", {"text/html": table, "text/plain": "wide"})]),
        new.new_markdown_cell("## Claims"),
        new.new_code_cell("study.conclude()", outputs=[told]),
    ]
    return new.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360"><rect width="640" height="360" fill="#eee"/></svg>'


def small_tree(folder: Path, with_papers: bool = True) -> Path:
    "A repository with this one's pages and configuration, and two made-up papers or none."
    root = folder / "tree"
    shutil.copytree(ROOT / "nbs", root / "nbs", symlinks=True, ignore=shutil.ignore_patterns(*{p.theme for p in papers(ROOT)}, ".ipynb_checkpoints", "benchmarks*.ipynb"))
    for name in ("settings.ini", "_quarto.yml"):
        shutil.copy(ROOT / name, root / name)
    for name in ("index", "papers", "ledger", "guide/scale"):  # their outputs show this repository's papers
        page = nbformat.read(root / "nbs" / f"{name}.ipynb", as_version=4)
        for cell in page.cells:
            if cell.cell_type == "code":
                cell.outputs = []
        nbformat.write(page, root / "nbs" / f"{name}.ipynb")
    page = root / "nbs" / "guide" / "sweep.ipynb"  # it links to one of them
    page.write_text(page.read_text(encoding="utf-8").replace("../reuse/pcb_merging.ipynb", "../reuse/beta.ipynb"), encoding="utf-8")
    package = root / "researchkit"
    shutil.copytree(ROOT / "researchkit" / "core", package / "core", ignore=shutil.ignore_patterns("__pycache__"))
    for theme, slug in (("theory", "alpha"), ("reuse", "beta")) if with_papers else ():
        (root / "nbs" / theme).mkdir(exist_ok=True)
        nbformat.write(notebook(slug, theme), root / "nbs" / theme / f"{slug}.ipynb")
        (root / "nbs" / theme / f"{slug}.svg").write_text(SVG)
        (package / theme).mkdir()
        (package / theme / f"{slug}.py").write_text(
            f'__all__ = ["Mean{slug}", "mean_{slug}"]\n\n\nclass Mean{slug}:\n    "A class."\n\n    def fit_it(self, x: int):\n        "Fit."\n\n\n'
            f'def mean_{slug}(\n    x: list | None = None,  # the numbers\n    *,\n    trim: float = 0.1,  # share\n) -> float:\n'
            '    """The mean of @eq-mean.\n\n    Raises\n    ------\n    ValueError\n        if there is none\n    """\n')
    return root


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site of this repository, made without Quarto."
    return build_site(ROOT, tmp_path_factory.mktemp("site") / "out", quarto=False)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "A small site with two made-up papers."
    folder = tmp_path_factory.mktemp("small")
    return build_site(small_tree(folder), folder / "out", quarto=False)


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
        assert "script" not in page.tags
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
    for wanted in ('<dl class="rk-facts">', "A. Author", "arXiv:2401.00001", "researchkit run alpha", "1 not reproduced", "63 CPU-seconds", "512 MiB",
                   'href="../api/theory.alpha.html"', 'id="eq-mean"', 'href="#eq-mean">Equation', 'href="#fig-one">Figure', "Figure 1: One pixel",
                   'alt="A pixel"', "Table 1: Numbers", "<figcaption>A grey box</figcaption>", "costs $5", "<code>$not math$</code>", 'href="../index.html#results"',
                   "Code: mean", "callout-note", 'id="claims"'):
        assert wanted in text, wanted
    for unwanted in ("#|", "secret", "default_exp", ".ipynb#", "a_b *"):
        assert unwanted not in re.sub(r'href="https[^"]*"', "", text), unwanted
    assert 'href="../theory/alpha.html"' in (small / "api" / "theory.alpha.html").read_text()


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
    for make in (results_table, gallery_html, ledger_chart, ledger_table):
        assert re.search(r"No (paper|claim) has been", make(root))
    assert (build_site(root, tmp_path / "out", quarto=False) / "papers.html").is_file()


def test_fragments_show_failures_as_clearly_as_successes(tmp_path):
    root = small_tree(tmp_path)
    table, chart = ledger_table(root), ledger_chart(root)
    assert table.count("<tr data-paper") == 10
    for verdict in ("reproduced", "partly", "not reproduced", "void", "not tested"):
        assert f'data-verdict="{verdict}"' in table and f"2 {verdict}" in chart
    assert "&lt;more&gt;" in table and "<more>" not in table
    assert "10 claims of 2 papers" in chart
    assert gallery_html(root).count('class="rk-card"') == 2
    assert "[alpha](theory/alpha.ipynb) | theory | ✓ 1 reproduced" in results_table(root)


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


def test_with_quarto(tmp_path, monkeypatch):
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
    assert sources[1].startswith("```{=html}\n<style>") and 'class="rk-facts"' in sources[1]
    assert any(s.startswith('#| code-summary: "Code: mean"\ndef mean') for s in sources), "exported code stays on the page"
    assert not any("default_exp" in s or "secret" in s for s in sources)
    assert not any(MIME in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    assert {p: p.read_bytes() for p in (root / "nbs").rglob("*.ipynb")} == before

    program.write_text("#!/bin/sh\necho the reason\nexit 1\n")
    with pytest.raises(InputError, match="(?s)quarto failed with exit code 1.*the reason"):
        build_site(root, tmp_path / "out")
    assert (tmp_path / "out" / "index.html").is_file(), "the old site stays when the new one fails"


def test_quarto_asked_for_but_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="quarto.org"):
        build_site(ROOT, tmp_path / "out", quarto=True)


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope="session")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


def visit(browser, path: Path, width: int = 1280, scheme: str = "light"):
    page = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme).new_page()
    page.said, page.asked = [], []
    page.on("console", lambda m: page.said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.said.append(str(e)))
    page.on("request", lambda r: page.asked.append(r.url))
    page.goto(path.as_uri())
    return page


def paper_page(site, small) -> Path:
    published = [site / p.page for p in papers(ROOT)]
    return published[0] if published else small / "theory" / "alpha.html"


def test_paper_in_browser(browser, site, small):
    page = visit(browser, paper_page(site, small))
    assert page.said == [] and all(url.startswith(("file:", "data:")) for url in page.asked)
    code = page.locator("details.code").first
    assert not code.locator("pre").is_visible()
    code.locator("summary").click()
    assert code.locator("pre").is_visible()
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.locator("math").first.bounding_box()["height"] > 5
    page.get_by_role("link", name="API", exact=True).last.click()
    assert "/api/" in page.url


def test_phone(browser, site, small):
    paths = [site / "index.html", site / "papers.html", site / "ledger.html", site / "guide" / "run.html", site / "api" / "core.study.html",
             small / "theory" / "alpha.html", small / "papers.html", small / "ledger.html", *(site / p.page for p in papers(ROOT))]
    for path in paths:
        page = visit(browser, path, width=390)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        worst = page.evaluate("[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 391 && !e.closest('pre,.html-out,.table-box,.eq')).slice(0, 3).map(e => e.outerHTML.slice(0, 120))")
        assert wide <= 390, (path.name, wide, worst)
        assert page.said == [], path.name
        page.context.close()
    page = visit(browser, site / "index.html", width=390)
    menu = page.locator("nav.side")
    assert not menu.is_visible()
    page.locator("label[for=menu]").click()
    assert menu.is_visible()
    menu.get_by_role("link", name="Ledger").click()
    assert page.url.endswith("/ledger.html")


def test_dark_mode(browser, small):
    ground = {s: visit(browser, small / "index.html", scheme=s).evaluate("getComputedStyle(document.body).backgroundColor") for s in ("light", "dark")}
    assert ground["light"] == "rgb(255, 255, 255)" and ground["dark"] != ground["light"]
