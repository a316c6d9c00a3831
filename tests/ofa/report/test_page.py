"""The HTML page as a document: well-formed, self-contained, escaped and complete."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from ofa.report import PAGE, build
from ofa.report.page import page
from ofa.report.runs import Runs
from ofa.report.svg import COLORS
from tests.ofa.report.conftest import COMMAND
from tests.ofa.report.synthetic import record, score, with_accuracy

HOSTILE = (
    """</title></style><img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>&amp;'"$x^2$ """.strip()
)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Outline(HTMLParser):
    """Elements, ids, addresses and text of a document; fails where an end tag closes another element."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def document(report_folder) -> str:
    return (report_folder / PAGE).read_text(encoding="utf-8")


def test_the_document_is_well_formed_and_its_ids_are_its_own(document):
    """Matplotlib gives all figures on the page the same ids."""
    outline = Outline(document)
    assert document.startswith("<!DOCTYPE html>")
    assert len(outline.ids) > 100
    assert len(set(outline.ids)) == len(outline.ids)
    inside = [address[1:] for address in outline.addresses if address.startswith("#")]
    assert set(inside) <= set(outline.ids)


def test_nothing_outside_the_file_is_referred_to(document):
    """No style sheet, font, script or picture from anywhere; names of XML vocabularies are not addresses."""
    outline = Outline(document)
    assert [address for address in outline.addresses if not address.startswith(("#", "data:"))] == []
    assert set(re.findall(r"https?://[^\s\"'<>]+", document)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in document


def test_figures_take_their_colors_from_the_page(document):
    """Every placeholder was replaced, and every property that stands for one is defined for light and for dark."""
    assert not any(color in document for color in COLORS.values())
    for name in COLORS:
        assert f"var(--{name})" in document
        assert document.count(f"--{name}: #") == 2


@pytest.mark.parametrize(
    "told",
    [
        "Which method, at what cost",
        "What OFA's terms add to norm tuning",
        "label-anchor",
        "failed: the demonstrations take 2,113 tokens and the model's window holds 2,048: ask for fewer shots",
        "not run",
        COMMAND,
        "2.13.0",
        "The paper has no known results for this model",
    ],
)
def test_the_page_tells(document, told):
    assert told in " ".join("".join(Outline(document).text).split())


def test_markup_in_names_is_text():
    """Task, label, model, setting, error, version and command may contain any text."""
    labels = (HOSTILE, "positive")
    fine = {"prompt": score([0, 1], [0, 0], labels)}
    versions = {HOSTILE: HOSTILE}
    records = [
        record("norm-tuning", fine, task=HOSTILE, model=HOSTILE, settings={HOSTILE: HOSTILE}, versions=versions),
        record("ofa", None, task=HOSTILE, model=HOSTILE, error=HOSTILE, versions=versions, finished=HOSTILE),
    ]
    outline = Outline(page(build(records, Runs((HOSTILE,)))))
    assert "img" not in outline.tags
    assert "b" not in outline.tags
    assert outline.tags.count("script") == 1
    assert "".join(outline.text).count(HOSTILE) > 10


def test_the_paper_stands_beside_the_models_it_reports():
    fine = {"prompt": with_accuracy(9), "demonstrations": with_accuracy(8)}
    told = "".join(Outline(page(build([record("ofa", fine, model="meta-llama/Llama-2-7b-hf")]))).text)
    assert "Llama2-7B in the paper" in told
    assert "95.84" in told
    assert "90.0" in told


def test_several_models_have_a_part_each():
    records = [record("ofa", {"prompt": with_accuracy(5)}, model=model) for model in ("one", "two")]
    outline = Outline(page(build(records)))
    assert {"model-1-results", "model-2-results"} <= set(outline.ids)
    assert len(set(outline.ids)) == len(outline.ids)


@pytest.mark.parametrize(
    "records",
    [
        [record("ofa", {"prompt": with_accuracy(5)})],
        [record("ofa", None, error="out of memory")],
        [record("ofa", {"prompt": with_accuracy(5)}, versions={}, finished="")],
        [record("ofa", {"prompt": with_accuracy(5)}, task=task, seed=seed) for task, seed in (("a", 1), ("b", 2))],
    ],
    ids=["one cell", "only a failure", "nothing known of the run", "no seed with every task"],
)
def test_a_single_record_makes_a_page(records):
    Outline(page(build(records)))
