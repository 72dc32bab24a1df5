"""What the tests of the site share: a small repository with made-up papers."""
import shutil
from pathlib import Path

import nbformat
import yaml

from researchkit.core.notebook import MIME, find_root, papers

ROOT = find_root(Path(__file__).parent)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def record(slug: str, verdicts) -> dict:
    claims = [dict(id=f"C{i}", statement=f"claim {i} of {slug} & <more>", paper="+1 (Table 1)", measured=0.5 * i, interval=[0.1, 0.9] if i % 2 else None,
                   criterion="accuracy: A − B > 0", verdict=v, units=5, note="" if i % 2 else "a note") for i, v in enumerate(verdicts, 1)]
    return dict(schema=1, paper=slug, profile="cpu", params={}, seeds=[0, 1, 2], versions={}, hardware={}, wall_seconds=1.0, cpu_seconds=63.0,
                peak_rss_bytes=2**29, code_hash="0" * 16, tolerances={}, rows=[], claims=claims)


def notebook(slug: str, theme: str, verdicts=("reproduced", "partly", "not reproduced", "void", "not tested")) -> dict:
    new = nbformat.v4
    front = dict(title=f"{slug}: a method", description="What it does.", categories=[theme, "test"], image=f"{slug}.svg",
                 paper=dict(slug=slug, title="A Paper", authors=["A. Author"], year=2024, venue="A Venue", arxiv="2401.00001", code=None,
                            use=f"from researchkit.{theme}.{slug} import mean_{slug}\n\nprint(mean_{slug}([1, 2, 3]))\n"))
    figure = new.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    table = "<table class='dataframe'><tr>" + "".join(f"<td>column_{i}</td>" for i in range(40)) + "</tr></table>"
    told = new.new_output("display_data", {MIME: record(slug, verdicts), "text/html": "<p>claims</p>", "text/plain": "claims"})
    cells = [
        new.new_raw_cell("---\n" + yaml.safe_dump(front, sort_keys=False) + "---"),
        new.new_code_cell(f"#| default_exp {theme}.{slug}"),
        new.new_markdown_cell(f"## The idea\n\n![A grey box]({slug}.svg)\n\nA sum $\\sum_i x_i$ and $a_b * c_d$, costs \\$5, `$not math$`.\n\n"
                              "$$\n\\hat\\mu = \\frac1n \\sum_{i=1}^n x_i ,\n$$ {#eq-mean}\n\nSee @eq-mean, @fig-one and [the API](../index.ipynb#the-collection).[^n]\n\n[^n]: A note.\n\n"
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
    "A repository with this one's pages and configuration, and three made-up papers or none."
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
    for theme, slug in (("theory", "alpha"), ("reuse", "beta"), ("theory", "gamma")) if with_papers else ():
        (root / "nbs" / theme).mkdir(exist_ok=True)
        nbformat.write(notebook(slug, theme), root / "nbs" / theme / f"{slug}.ipynb")
        (root / "nbs" / theme / f"{slug}.svg").write_text(SVG)
        (package / theme).mkdir(exist_ok=True)
        (package / theme / f"{slug}.py").write_text(
            f'__all__ = ["Mean{slug}", "mean_{slug}"]\n\n\nclass Mean{slug}:\n    "A class."\n\n    def fit_it(self, x: int):\n        "Fit."\n\n\n'
            f'def mean_{slug}(\n    x: list | None = None,  # the numbers\n    *,\n    trim: float = 0.1,  # share\n) -> float:\n'
            '    """The mean of @eq-mean.\n\n    Raises\n    ------\n    ValueError\n        if there is none\n    """\n')
    return root
