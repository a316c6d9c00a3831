"""A headless Chromium for tests of pages; without one, the test is skipped with a hint what to install."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUIRED = "OFA_REQUIRE_BROWSER"
ADVICE = (
    "the report's page was not tried in a browser: {missing}; on Debian and Ubuntu run "
    "`apt-get install chromium chromium-driver`, and `pip install -e .[test]` for selenium"
)


class Browser:
    """A page at a time, in a window 900 pixels high."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        """Load a file as a reader would, without a server, and forget what earlier pages wrote to the console."""
        self.show()
        self.console()
        self.requests()
        self.driver.get(page.resolve().as_uri())

    def show(self, *, width: int = 1280, scheme: str = "light") -> None:
        """Give the window another width, or the reader another liking, while the page stays open."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        # A click must not hit a page that is still scrolling.
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        self._send("Emulation.setDeviceMetricsOverride", **metrics)
        self._send(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in media.items()]
        )

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self.driver.execute_script(script, *arguments)

    def console(self) -> list[str]:
        """The page's console messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The URLs requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]

    def _send(self, command: str, **arguments: Any) -> None:
        self.driver.execute_cdp_cmd(command, arguments)


@contextmanager
def find_browser() -> Iterator[Browser]:
    """A browser for the tests of a session; skips where there is none, or fails where one is required."""
    driver = _start()
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def _start() -> Any:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    chromedriver = shutil.which("chromedriver")
    if program is None or chromedriver is None:
        give_up("no chromium was found" if program is None else "no chromedriver was found")
    try:
        from selenium import webdriver
    except ImportError:
        give_up("selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Containers run as root and have little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=chromedriver))


def give_up(missing: str) -> None:
    """Skip with advice; with OFA_REQUIRE_BROWSER=1 in the environment, fail with it."""
    advice = ADVICE.format(missing=missing)
    if os.environ.get(REQUIRED, "0") not in ("", "0"):
        pytest.fail(f"{REQUIRED} is set, but {advice}")
    pytest.skip(advice)
