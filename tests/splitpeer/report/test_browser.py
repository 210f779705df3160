"""The page in a real browser: quiet, complete, sortable, at desk and phone width, in light and dark."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitpeer.report.build import write_report
from splitpeer.report.store import FRONTIER

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        text = f"no browser: none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to run as root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    points = [
        {
            "name": f"image/voxel-noise:{i}",
            "dice": 0.8 - 0.05 * i,
            "leakage": 1 - 0.1 * i,
            "floor": 0.2,
            "front": True,
        }
        for i in range(5)
    ]
    (folder / FRONTIER).write_text(json.dumps({"points": points}))
    write_report([run_folder, folder], folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """`visit(width=..., scheme=..., scripts=...)`: the page, checked to be silent when the test ends."""
    contexts, noise = [], []

    def open_page(width: int = 1280, scheme: str = "light", scripts: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: noise.append(request.url) if request.url != address
                and not request.url.startswith("data:") else None)  # fmt: skip
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert noise == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_shows(visit: Any, width: int, scheme: str) -> None:
    page = visit(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.locator("img").evaluate_all("all => all.map(one => [one.naturalWidth, one.alt])")
    assert len(images) > 20
    assert all(pixels > 0 and alt.strip() for pixels, alt in images)
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == (dark if scheme == "dark" else light)
    # Truth and reconstruction lie beside each other: in rows at a desk, in columns on a phone.
    boxes = [page.locator(".tiles").first.locator("img").nth(i).bounding_box() for i in (0, 4)]
    assert (boxes[0]["x"] == boxes[1]["x"]) == (width == 1280)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit: Any, scheme: str) -> None:
    """Contrast of 4.5 at least (WCAG 2.2, 1.4.3) of every text against the colour behind it."""
    found = visit(scheme=scheme).evaluate(
        """() => {
          const parse = (text) => text.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const behind = (one) => {
            for (let at = one; at; at = at.parentElement) {
              const colour = parse(getComputedStyle(at).backgroundColor);
              if (colour.length < 4 || colour[3] > 0) return colour;
            }
            return [255, 255, 255];
          };
          return [...document.querySelectorAll("body *")]
            .filter((one) => [...one.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())
              && !one.closest("script, style, svg, title") && !one.matches(".dots"))
            .map((one) => {
              const [a, b] = [light(parse(getComputedStyle(one).color)), light(behind(one))];
              return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.textContent.slice(0, 40)];
            })
            .filter(([contrast]) => contrast < 4.5);
        }"""
    )
    assert found == []


def test_tables_sort_by_click_and_by_key(visit: Any) -> None:
    page = visit()
    table = page.locator("table.sortable").first
    header = table.locator("thead th", has_text="Octets up")

    def column() -> list[str]:
        place = header.evaluate("one => one.cellIndex")
        return table.locator("tbody tr").evaluate_all(
            "(rows, i) => rows.map(r => r.cells[i].dataset.value)", place
        )

    assert column() == ["32768", "8192", "0"]
    assert header.get_attribute("aria-sort") is None
    header.locator("button").click()
    assert (header.get_attribute("aria-sort"), column()) == ("ascending", ["0", "8192", "32768"])
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert (header.get_attribute("aria-sort"), column()) == ("descending", ["32768", "8192", "0"])
    table.locator("thead th", has_text="Level").locator("button").click()
    assert header.get_attribute("aria-sort") is None
    # Numbers as numbers, -0.01 before 0; what has no value stays last either way.
    table = page.locator("table.sortable", has_text="Band of images")
    dice = table.locator("thead th", has_text="Dice").first
    for _ in range(2):
        dice.locator("button").click()
        values = table.locator("tbody tr").evaluate_all("rows => rows.map(row => row.cells[1].textContent)")
        assert values[-1] == "–" and values[0] != "–"


def test_text_sorts_as_text(visit: Any) -> None:
    table = visit().locator("table.sortable").first
    table.locator("thead th", has_text="Precision").first.locator("button").click()
    values = table.locator("tbody tr").evaluate_all("rows => rows.map(row => row.cells[3].textContent)")
    assert values == sorted(values, key=lambda value: (value == "–", value)) or values[0] == "–"


def test_it_reads_without_scripts(visit: Any) -> None:
    page = visit(scripts=False)
    assert page.locator("table.sortable").count() >= 4
    assert page.locator("thead button").count() == 0
    assert page.locator("h1").inner_text() == "What leaks: demo"
    page.locator("summary").first.click()
    assert page.locator("details[open]").count() == 1


def test_hostile_text_is_shown_and_does_nothing(visit: Any) -> None:
    page = visit()
    assert page.locator("p", has_text="<script>alert(1)</script>").count() >= 1
    assert page.locator("script").count() == 1


def test_every_link_leads_somewhere_and_every_picture_has_its_size(visit: Any) -> None:
    page = visit()
    lost = page.locator("a").evaluate_all(
        "all => all.map(a => a.getAttribute('href')).filter(h => !document.getElementById(h.slice(1)))"
    )
    assert lost == []
    wrong = page.locator("img").evaluate_all(
        "all => all.filter(i => i.naturalWidth !== +i.getAttribute('width') "
        "|| i.naturalHeight !== +i.getAttribute('height')).length"
    )
    assert wrong == 0


def test_it_prints_in_black_on_white_with_everything_open(visit: Any) -> None:
    page = visit(scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.locator("nav").is_visible()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert page.pdf(format="A4")[:4] == b"%PDF"
