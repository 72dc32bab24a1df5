"""The built site in headless Chromium: what a reader sees, clicks and types."""
import csv
import functools
import http.server
import io
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from sites import ROOT

from researchkit.core.notebook import papers
from researchkit.run.doctor import BROWSERS
from researchkit.run.overview import ledger_files, ledger_rows, records, verdict_counts

PAPERS = papers(ROOT)
PAPER = PAPERS[0].page
KINDS = ["index.html", "papers.html", "ledger.html", PAPER, "guide/read.html", "guide/contribute.html", "api/index.html", "api/core.study.html", "core/study.html", "benchmarks.html"]


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


@pytest.fixture(scope="session")
def served(site):
    "The site behind a web server."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def visit(browser, served):
    "Open a page, by its place on the site or by its whole address; what it says on the console is in `page.said`."
    opened = []

    def go(href: str, width: int = 1280, scheme: str = "light", **options):
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, **options)
        opened.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.said, page.asked = [], []
        page.on("console", lambda m: page.said.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: page.said.append(str(e)))
        page.on("request", lambda r: page.asked.append(r.url))
        page.goto(href if ":" in href else f"{served}/{href}")
        return page

    yield go
    for context in opened:
        context.close()


def test_navigation(visit, served):
    page = visit("index.html")
    page.get_by_role("navigation", name="Main").get_by_role("link", name="Papers").click()
    page.wait_for_url(f"{served}/papers.html")
    page.locator(".rk-card a").first.click()
    page.wait_for_url(f"{served}/{records(ROOT)[0][0].page}")
    here = page.get_by_role("navigation", name="Pages", exact=True).locator("[aria-current=page]")
    assert here.is_visible() and here.text_content() == records(ROOT)[0][0].title
    page.locator(".rk-byline + .rk-verdicts a").click()
    page.wait_for_url("**#at-a-glance")
    page.get_by_role("navigation", name="On this page").get_by_role("link", name="Claims").click()
    page.wait_for_url("**#claims")
    assert page.locator("#claims").bounding_box()["y"] >= 40, "not under the bar"
    here = page.url.partition("#")[0]
    page.get_by_role("navigation", name="Pages before and after").locator("[rel=next]").click()
    page.wait_for_url(lambda url: url.partition("#")[0] != here)
    page.get_by_role("navigation", name="Pages before and after").locator("[rel=prev]").click()
    page.wait_for_url(here)
    page.locator(".rk-facts").get_by_role("link", name="API reference").click()
    page.wait_for_url("**/api/*")
    page.locator("main").get_by_role("link").first.click()
    assert not page.said and all(url.startswith((served, "data:")) for url in page.asked)


def test_search(visit, served):
    page = visit(PAPER)
    assert not any("search.js" in url for url in page.asked), "the words are loaded when they are needed"
    page.keyboard.press("/")
    box, found = page.get_by_label("Search this site"), page.locator(".found li")
    assert box.evaluate("e => e === document.activeElement")
    box.fill("PCB merging")
    found.first.wait_for()
    assert 1 <= found.count() <= 12 and any("reuse/pcb_merging.html" in (a.get_attribute("href") or "") for a in found.locator("a").all()[:3])
    assert found.locator("mark").first.text_content().lower() in ("pcb", "merging")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    second = found.nth(1).locator("a")
    assert second.evaluate("e => e === document.activeElement")
    page.keyboard.press("Escape")
    assert not found.first.is_visible() and box.evaluate("e => e === document.activeElement")
    box.fill("xyzzy [(")
    assert page.locator(".found .said").text_content() == "Nothing was found."
    box.fill("bootstrap interval")
    target = found.first.locator("a").get_attribute("href")
    box.press("Enter")
    page.wait_for_url(lambda url: not url.endswith(PAPER))
    assert target.rpartition("../")[2].partition("#")[0] in page.url and not page.said


def test_site_opened_as_files(visit, site):
    page = visit((site / "papers.html").as_uri())
    page.get_by_label("Search this site").fill("unlearnable")
    page.locator(".found a").first.wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="partly").click()
    assert page.locator(".rk-card:visible").count() < len(PAPERS)
    page.locator(".rk-card:visible a").first.click()
    assert page.locator("h1").is_visible() and not page.said
    assert all(url.startswith(("file:", "data:")) for url in page.asked)


def test_gallery_filters(visit):
    page = visit("papers.html")
    cards, said = page.locator(".rk-card:visible"), page.locator(".rk-filter output")
    facts = [(p, verdict_counts(r)) for p, r in records(ROOT)]
    assert cards.count() == len(facts) and said.text_content() == f"{len(facts)} of {len(facts)} papers"
    page.get_by_label("Theme").select_option("efficiency")
    assert cards.count() == sum(p.theme == "efficiency" for p, _ in facts)
    assert all("efficiency" in text for text in cards.locator(".rk-small").all_text_contents())
    page.get_by_label("Theme").select_option("")
    for verdict in ("reproduced", "not reproduced"):
        page.locator(f".rk-chip[data-verdict='{verdict}']").click()
        assert cards.count() == sum(verdict in counts for _, counts in facts)
    assert "verdict=not+reproduced" in page.url
    page.reload()
    assert cards.count() == sum("not reproduced" in counts for _, counts in facts), "the address keeps the choice"
    assert page.locator(".rk-chip[aria-pressed=true]").text_content().endswith("not reproduced")
    page.get_by_role("button", name="Reset").click()
    page.locator(".rk-filter").get_by_label("Search").fill("Language MODEL")
    assert 0 < cards.count() < len(facts)
    page.locator(".rk-filter").get_by_label("Search").fill("nothing like this")
    assert cards.count() == 0 and page.get_by_text("Nothing fits").is_visible()
    page.get_by_role("button", name="Reset").click()
    assert cards.count() == len(facts) and not page.url.endswith("?") and not page.said


def test_home_links_to_the_ledger_by_verdict(visit):
    page = visit("index.html")
    wanted = [r for r in ledger_rows(ROOT) if r["verdict"] == "not reproduced"]
    assert f"{len(PAPERS)} papers" in page.locator(".rk-state").text_content()
    page.locator(".rk-state .rk-not-reproduced").click()
    page.wait_for_url("**/ledger.html?verdict=not+reproduced")
    assert page.locator("#rk-ledger tbody tr:visible").count() == len(wanted)


def test_ledger(visit):
    page, rows = visit("ledger.html"), ledger_rows(ROOT)
    shown = page.locator("#rk-ledger tbody tr:visible")
    assert shown.count() == len(rows)

    def column(i):
        return page.evaluate("i => [...document.querySelectorAll('#rk-ledger tbody tr:not(.rk-none)')].map(r => r.cells[i].dataset.sort ?? r.cells[i].textContent.trim())", i)

    before = column(0)
    head = page.get_by_role("columnheader", name="Measured")
    head.get_by_role("button").click()
    numbers = [float(x) for x in column(3) if x != ""]
    assert numbers == sorted(numbers) and column(3)[len(numbers):] == [""] * (len(rows) - len(numbers)) and head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").press("Enter")
    assert [float(x) for x in column(3) if x != ""] == numbers[::-1] and head.get_attribute("aria-sort") == "descending"
    assert column(3)[-1] == "" or "" not in column(3), "what was not measured stays last"
    page.get_by_role("columnheader", name="Verdict").get_by_role("button").click()
    ranks = list(map(int, column(5)))
    assert ranks == sorted(ranks) and head.get_attribute("aria-sort") == "none"
    page.locator(".rk-chip[data-verdict='partly']").click()
    theme = next(r["theme"] for r in rows if r["verdict"] == "partly")
    page.get_by_label("Theme").select_option(theme)
    assert shown.count() == sum(r["verdict"] == "partly" and r["theme"] == theme for r in rows)
    assert set(shown.locator(".rk-badge").all_text_contents()) == {"~ partly"}
    page.get_by_role("button", name="Reset").click()
    assert column(0) == before and not page.said
    files = ledger_files(ROOT)
    for name, kind in (("CSV", "ledger.csv"), ("JSON", "ledger.json")):
        with page.expect_download() as waiting:
            page.get_by_role("link", name=name, exact=True).click()
        assert waiting.value.suggested_filename == kind
        assert Path(waiting.value.path()).read_text() == files[kind]
    assert len(list(csv.DictReader(io.StringIO(files["ledger.csv"])))) == len(rows) == len(json.loads(files["ledger.json"])["claims"])


def test_code_folds(visit):
    page = visit(PAPER)
    folds = page.locator("details.code")
    first = folds.first
    assert page.locator("details.code[open]").count() == 0 and not first.locator("pre").is_visible()
    first.locator("summary").click()
    assert first.locator("pre").is_visible()
    page.get_by_role("button", name="Show all code").click()
    assert page.locator("details.code[open]").count() == folds.count() > 5
    page.get_by_role("button", name="Hide all code").click()
    assert page.locator("details.code[open]").count() == 0
    first.locator("summary").press("Enter")
    assert first.locator("pre").is_visible() and not page.said


def test_copy(visit):
    page = visit(PAPER, permissions=["clipboard-read", "clipboard-write"])
    block = page.locator("#run-it ~ .box").first
    block.hover()
    block.get_by_role("button", name="Copy").click()
    block.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == f"researchkit run {PAPERS[0].slug}"


@pytest.mark.parametrize("width", [1280, 390])
def test_figures_open_in_full_size(visit, width):
    page = visit(PAPER, width=width)
    image = page.locator(".cell figure img").first
    image.scroll_into_view_if_needed()
    small = image.bounding_box()["width"]
    image.click()
    dialog = page.get_by_role("dialog")
    large = dialog.locator("img")
    assert large.bounding_box()["width"] > small and large.get_attribute("alt") == image.get_attribute("alt") and large.bounding_box()["width"] >= 800
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    button = page.locator(".cell figure").first.get_by_role("button", name="Enlarge")
    button.press("Enter")
    dialog.get_by_role("button", name="Close").click()
    dialog.wait_for(state="detached")
    assert not page.said


def test_light_and_dark(visit):
    def ground(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = visit("index.html"), visit("index.html", scheme="dark")
    assert ground(light) == "rgb(255, 255, 255)" and ground(dark) not in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
    light.get_by_role("button", name="Dark mode").click()
    assert ground(light) == ground(dark)
    light.get_by_role("navigation", name="Main").get_by_role("link", name="Ledger").click()
    light.wait_for_url("**/ledger.html")
    assert ground(light) == ground(dark), "the next page remembers"
    light.get_by_role("button", name="Light mode").click()
    assert ground(light) == "rgb(255, 255, 255)"
    page = visit(PAPER, scheme="dark")
    assert page.evaluate("[...document.querySelectorAll('.cell img')].every(i => getComputedStyle(i).backgroundColor === 'rgb(255, 255, 255)')"), "figures keep a white ground"


def test_without_scripts(visit):
    page = visit("ledger.html", java_script_enabled=False)
    assert page.locator("#rk-ledger tbody tr:visible").count() == len(ledger_rows(ROOT))
    assert not page.locator(".rk-filter").is_visible() and not page.locator(".find").is_visible()
    page.get_by_role("navigation", name="Main").get_by_role("link", name="Papers").click()
    page.locator(".rk-card a").first.click()
    page.locator("details.code summary").first.click()
    assert page.locator("details.code pre").first.is_visible()


def test_keyboard(visit):
    page = visit("papers.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip" and page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    page.wait_for_url("**#content")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("!!document.activeElement.closest('.rk-card')"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    page.locator(".rk-byline").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_quiet_and_fits_a_phone(visit, served, site, scheme):
    hrefs = [p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html"))]
    page = visit("index.html", width=390, scheme=scheme)
    faults = []
    for href in hrefs if scheme == "light" else KINDS:
        page.goto(f"{served}/{href}")
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        worst = page.evaluate("""[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 391 && !e.closest('pre,.html-out,.table-box,.eq')).slice(0, 2).map(e => e.outerHTML.slice(0, 100))""")
        missing = page.evaluate("[...document.images].filter(i => i.loading !== 'lazy' && !(i.complete && i.naturalWidth)).length")
        twice = page.evaluate("(ids => ids.filter((x, i) => ids.indexOf(x) !== i))([...document.querySelectorAll('[id]')].map(e => e.id))")
        if wide > 390 or missing or twice or page.said:
            faults.append((href, wide, worst, missing, twice, page.said[:]))
        page.said.clear()
    assert not faults, faults
    assert all(url.startswith((served, "data:")) for url in page.asked)


@pytest.mark.parametrize("width", [1280, 1200, 1000, 860, 600])
def test_verdicts_are_in_view_at_every_width(visit, width):
    for href in (PAPER, "ledger.html"):
        page = visit(href, width=width)
        hidden = page.evaluate("""[...document.querySelectorAll('main td .rk-badge')].filter(b => {
            const r = b.getBoundingClientRect(), box = (b.closest('.html-out') ?? document.documentElement).getBoundingClientRect();
            return r.width === 0 || r.right > Math.min(box.right, innerWidth) + 1; }).length""")
        assert hidden == 0, (href, width)


def test_phone_menu_and_ledger(visit):
    page = visit("index.html", width=390)
    menu = page.locator("nav.side")
    assert not menu.is_visible()
    page.locator("label[for=menu]").click()
    assert menu.is_visible()
    menu.get_by_role("link", name="Ledger").click()
    page.wait_for_url("**/ledger.html")
    page.get_by_label("Sort by").select_option("verdict")
    ranks = page.evaluate("[...document.querySelectorAll('#rk-ledger tbody tr')].map(r => +r.cells[5].dataset.sort)")
    assert ranks == sorted(ranks)
    page.get_by_label("Search this site").fill("shapley merging adam")
    page.get_by_label("Search this site").fill("merging")
    found = page.locator(".found")
    box = found.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_formulas_are_laid_out(visit):
    page = visit(PAPER)
    boxes = page.evaluate("[...document.querySelectorAll('main math')].slice(0, 30).map(m => m.getBoundingClientRect().height)")
    assert boxes and min(boxes) > 5
    reference = page.locator("a.xref").first
    label = reference.get_attribute("href")
    assert re.match("#(eq|fig|tbl)-", label)
    reference.click()
    assert page.locator(label).is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("href", KINDS)
def test_axe_finds_nothing_serious(visit, href, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    page = visit(href, width=1280 if scheme == "light" else 390, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d, i) => d.open = i % 4 === 0)")
    found = axe.run(page, options={"resultTypes": ["violations"], "rules": {"target-size": {"enabled": True}}}).response["violations"]
    told = [(v["id"], v["impact"], v["nodes"][0]["html"][:160], v["nodes"][0].get("failureSummary", "")[:300], len(v["nodes"])) for v in found if v["impact"] in ("serious", "critical")]
    assert not told, told
