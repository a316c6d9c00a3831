"""The page in a real browser: it renders from a file, sorts, fits a phone, and has a dark mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from ofa.report import PAGE, build, write_report
from tests.ofa.report import browser as browser_module
from tests.ofa.report.browser import Browser, find_browser
from tests.ofa.report.synthetic import record, score
from tests.ofa.report.test_page import HOSTILE

RESULTS = "#model-1-results table"
COLUMN = f"return [...document.querySelectorAll('{RESULTS} tbody tr')].map(row => row.cells[arguments[0]].textContent)"
BUTTON = f"return document.querySelectorAll('{RESULTS} thead button')[arguments[0]]"
SORTED = f"return [...document.querySelectorAll('{RESULTS} thead th')].map(th => th.getAttribute('aria-sort'))"


@pytest.fixture(scope="module")
def page(report_folder: Path) -> Path:
    return report_folder / PAGE


@pytest.fixture(scope="module")
def loaded(page: Path, browser: Browser) -> tuple[list[str], list[str]]:
    """The requests and the console's messages after opening the page."""
    browser.open(page)
    return browser.requests(), browser.console()


@pytest.fixture
def opened(loaded: object, browser: Browser) -> Browser:
    """The page in a wide window and light mode, whatever state the last test left."""
    browser.show()
    return browser


@pytest.mark.browser
def test_the_page_renders_from_a_file_without_errors_and_without_asking_for_anything(page, loaded, opened: Browser):
    requests, console = loaded
    assert console == []
    assert [address for address in requests if not address.startswith("data:")] == [page.as_uri()]
    drawn = opened.run(
        "return [...document.querySelectorAll('figure svg')].map(one => one.getBoundingClientRect().height)"
    )
    assert len(drawn) == 5
    assert min(drawn) > 100


@pytest.mark.browser
def test_the_answer_stands_on_the_first_screen(opened: Browser):
    """The tables end above the fold of a small laptop."""
    bottoms = "[...document.querySelectorAll('.answer table')].map(one => one.getBoundingClientRect().bottom + scrollY)"
    assert max(opened.run(f"return {bottoms}")) < 900


@pytest.mark.browser
def test_a_click_sorts_and_a_second_one_turns_round(opened: Browser):
    """By the number, not by its text; rows without a number stay last in both orders."""
    button = opened.run(BUTTON, 1)
    button.click()
    down = opened.run(COLUMN, 1)
    assert opened.run(SORTED)[:3] == [None, "descending", None]
    button.click()
    up = opened.run(COLUMN, 1)
    assert opened.run(SORTED)[1] == "ascending"
    numbers = [float(text.split()[0]) for text in down if text != "–"]
    assert len(numbers) > 20
    assert numbers == sorted(numbers, reverse=True)
    assert [float(text.split()[0]) for text in up if text != "–"] == sorted(numbers)
    assert down[-1] == up[-1] == "–"


@pytest.mark.browser
@pytest.mark.parametrize(("key", "column"), [("ENTER", 0), ("SPACE", 7)])
def test_tables_sort_by_keyboard(opened: Browser, key, column):
    """Tab reaches a column's title, and a key sorts by it: names from A to Z, ranks from the best."""
    from selenium.webdriver.common.keys import Keys

    opened.run("document.querySelector('#model-1-results .scroll').focus()")
    for _ in range(column + 1):
        opened.driver.switch_to.active_element.send_keys(Keys.TAB)
    opened.driver.switch_to.active_element.send_keys(getattr(Keys, key))
    values = opened.run(COLUMN, column)
    assert opened.run(SORTED)[column] == "ascending"
    expected = "return arguments[0].toSorted((a, b) => a.localeCompare(b, undefined, { numeric: true }))"
    assert values == opened.run(expected, values)
    assert len(set(values)) > 10


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_is_never_wider_than_its_window(opened: Browser, width):
    """Tables and figures scroll by themselves, also the confusion matrices once they are opened."""
    opened.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
    opened.show(width=width)
    assert opened.run("return innerWidth") == width
    assert opened.run("return document.documentElement.scrollWidth") <= width
    opened.run("document.querySelectorAll('details').forEach(one => { one.open = false })")


@pytest.mark.browser
def test_dark_is_dark_and_figures_follow(opened: Browser):
    """Paper and ink trade places, in the text and in the figures' own text."""
    light = _luminances(opened)
    opened.show(scheme="dark")
    dark = _luminances(opened)
    assert light[0] > 0.9
    assert dark[0] < 0.1
    # Text on paper, and in the figures, whose background is transparent.
    assert all(light[0] - ink > 0.4 for ink in light[1:])
    assert all(ink - dark[0] > 0.4 for ink in dark[1:])


@pytest.mark.browser
def test_hostile_names_are_text(browser: Browser, tmp_path: Path):
    """Names of tasks, labels and models, and errors, cannot inject scripts or elements."""
    labels = (HOSTILE, "positive")
    fine = {"prompt": score([0, 1], [0, 0], labels)}
    write_report(
        build(
            [
                record("norm-tuning", fine, task=HOSTILE, model=HOSTILE, settings={HOSTILE: HOSTILE}),
                record("ofa", None, task=HOSTILE, model=HOSTILE, error=HOSTILE),
            ]
        ),
        tmp_path,
    )
    browser.open(tmp_path / PAGE)
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.querySelectorAll('img, script, b').length") == 1  # the page's own script
    assert browser.console() == []
    assert HOSTILE in browser.run("return document.body.textContent")


def _luminances(browser: Browser) -> list[float]:
    """Of the paper, the text, and the text of a figure: 0 is black, 1 white."""
    colors = browser.run(
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " getComputedStyle(document.querySelector('figure svg text')).fill]"
    )
    channels = [[int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]] for color in colors]
    return [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in channels]


def test_without_a_browser_the_skip_says_what_to_install(monkeypatch):
    """Skipped, not passed and not failed, with the command to run."""
    monkeypatch.setattr(browser_module.shutil, "which", lambda name: None)
    monkeypatch.delenv(browser_module.REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium chromium-driver"), find_browser():
        pass


def test_where_a_browser_is_required_its_absence_fails(monkeypatch):
    monkeypatch.setattr(browser_module.shutil, "which", lambda name: None)
    monkeypatch.setenv(browser_module.REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="no chromium was found"), find_browser():
        pass
