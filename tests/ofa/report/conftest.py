"""A results folder of a realistic size and its page, and a browser to open pages in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ofa.report import build, write_report
from ofa.report.content import Content
from ofa.report.runs import Runs
from tests.ofa.report.browser import Browser, find_browser
from tests.ofa.report.synthetic import realistic

COMMAND = "ofa compare --tasks agnews,emo,sst2,trec --methods all --seeds 42-44 --out results"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: needs chromium and chromedriver; skipped with advice without them")


@pytest.fixture(scope="session")
def content() -> Content:
    """A comparison of 16 methods on 4 tasks with 3 seeds, of which some cells failed and one is missing."""
    return build(realistic(seeds=(42, 43, 46), tests=60), Runs((COMMAND,)))


@pytest.fixture(scope="session")
def report_folder(content: Content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(content, folder)
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with find_browser() as found:
        yield found
