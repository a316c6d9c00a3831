"""The public docstrings: their examples run, and functions say what they return and what they raise.

In the examples `model` and `tokenizer` are a tiny model and its tokenizer, `batch` is a tokenized batch with labels,
`folder` a folder of their own, and `gguf` a GGUF file; docs/reference.md says so to its readers.
"""

from __future__ import annotations

import doctest
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import ofa
import ofa_kernels
from benchmarks import pages

NAMES = (*pages.public("ofa"), *pages.public("ofa_kernels"), *pages.RETURNED)
NEVER_RAISES = (
    "ofa.unfuse_layers",
    "ofa.regularizers.attached",
)
OVERRIDDEN = ("shared_prefix", "batches")
"""Methods of `Scorer` that methods of adaptation override, and users do not call."""


def found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def documents(name: str) -> dict[str, str]:
    """The docstrings that tell of a name: its own, and those of its methods."""
    value = found(name)
    own = {name: inspect.getdoc(value) or ""}
    if inspect.isclass(value):
        return own | {f"{name}.{member}": inspect.getdoc(part) or "" for member, part in pages.members(value)}
    return own


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Each on a model of its own."""
    model, tokenizer = request.getfixturevalue("tiny_model")
    batch = dict(tokenizer(["a warm film", "slow and dull"], return_tensors="pt", padding=True).to(model.device))
    names = {"ofa": ofa, "ofa_kernels": ofa_kernels, "torch": torch, "folder": tmp_path}
    names |= {"model": model, "tokenizer": tokenizer, "batch": {**batch, "labels": batch["input_ids"]}}
    if name == "ofa.merge_gguf":
        names["gguf"] = request.getfixturevalue("tiny_gguf")
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for where, text in documents(name).items():
        runner.run(parser.get_doctest(text, {**names}, where, None, 0))
    assert runner.tries > 0, f"{name} has no example"
    assert runner.failures == 0


def test_every_public_name_has_an_example_and_functions_say_what_comes_back() -> None:
    """A method is shown by itself or in the example of its class."""
    assert {name: missing for name in NAMES if (missing := missing_of(name))} == {}


def missing_of(name: str) -> list[str]:
    """The methods without an example, or the sections that a function's docstring lacks."""
    value, texts = found(name), documents(name)
    if inspect.isclass(value):
        shown = "".join(re.findall(r"^ *(?:>>>|\.\.\.).*$", "\n".join(texts.values()), re.MULTILINE))
        methods = [member for member, part in pages.members(value) if not isinstance(part, property)]
        return [member for member in methods if member not in OVERRIDDEN and f".{member}(" not in shown]
    returns = inspect.signature(value).return_annotation not in (None, "None")
    wanted = ["Returns"] * returns + ["Raises"] * (name not in NEVER_RAISES) + ["Example"]
    return [section for section in wanted if f"\n{section}:\n" not in "\n".join(texts.values())]
