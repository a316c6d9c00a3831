"""Plain words: errors have one form, and neither code nor pages use words that readers stumble over."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [file for name in ("ofa", "ofa_kernels") for file in sorted((ROOT / name).rglob("*.py"))]
SOURCES = [*PACKAGES, *(file for name in ("benchmarks", "examples", "tests") for file in (ROOT / name).rglob("*.py"))]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]

STUMBLES = re.compile(
    r"\b(nobody|somebody|whoever|anew|behind|in vain|inside of|lets? go of|goes its way|lend|hired?|"
    r"what is \w+ is|it is \w+ that)\b",
    re.IGNORECASE,
)
"""Say: "after" for "behind", "again" for "anew", "release" for "let go of"; subject first for "what is … is"."""

ERRORS = ("InputError", "Diverged", "DoesNotCompile")


def message_of(node: ast.AST) -> str:
    """The text of a string expression, with {} for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(message_of, parts))
        case ast.BinOp(left=left, right=right):
            return message_of(left) + message_of(right)
    return "{}"


def errors(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=kind), args=[message, *_])) if kind in ERRORS:
                yield node.lineno, message_of(message)


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Docstrings, comments and errors of a source file, or the lines of a page without code."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        code = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
        yield from enumerate(code.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    yield from errors(file)


def place(file: Path, line: int, text: str) -> str:
    return f"{file.relative_to(ROOT)}:{line}: {text}"


def test_errors_say_what_is_wrong_and_what_to_do():
    """One sentence or two without a full stop at the end, as in "what is wrong, where; what to do".

    What to do follows a semicolon or colon, or is what the value must be, or is filled in at the end.
    """
    form = re.compile(r"(?!.*; [A-Z][a-z])(?!.*[.?] [A-Z].*[.?] [A-Z])(?=.*([;:] |must |\{\}\)?$)).*[^.]")
    found = [place(file, *error) for file in PACKAGES for error in errors(file) if not form.fullmatch(error[1])]
    assert found == []


@pytest.mark.parametrize("files", [SOURCES, PAGES], ids=["sources", "pages"])
def test_no_word_makes_the_reader_stumble(files: list[Path]):
    """Names of code, in backticks, are free."""
    found = [
        place(file, line, word[0])
        for file in files
        if file != Path(__file__)
        for line, text in prose(file)
        for word in STUMBLES.finditer(re.sub(r"`[^`]*`|\"[^\"]*\"", "", text))
    ]
    assert found == []
