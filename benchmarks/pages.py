"""Writes the pages generated from the code: docs/reference.md, and the list of modules in docs/architecture.md.

python -m benchmarks.pages                  writes both
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REFERENCE, ARCHITECTURE = ROOT / "docs" / "reference.md", ROOT / "docs" / "architecture.md"

RETURNED = (
    "ofa.regularizers.Regularizers",
    "ofa.regularizers.attached",
    "ofa.regularizers.objectives.Measurements",
    "ofa.adapters.Adapter",
    "ofa.models.LoadedModel",
    "ofa.evaluation.Metrics",
    "ofa.evaluation.CompletionMetrics",
    "ofa.methods.Predictor",
    "ofa.training.TrainingResult",
    "ofa.training.StepRecord",
    "ofa.training.graphed_step.GraphedStep",
    "ofa.training.graphed_step.StepValues",
    "ofa.probing.results.Probe",
    "ofa.probing.results.Readout",
    "ofa.probing.results.Steps",
    "ofa.probing.results.Value",
)
"""Classes that public functions return and that have no public name."""

SETTINGS = "ofa.training.TrainingConfig"

_HEAD = """\
# Reference

Made from the docstrings and the command line by `python -m benchmarks.pages`; edit those, not this page.

In the examples `model` and `tokenizer` are a causal language model of transformers and its tokenizer
(`loaded = ofa.load_model()` gives them as `loaded.model` and `loaded.tokenizer`), `batch` is a tokenized batch with
labels, `folder` a `pathlib.Path`, and `gguf` the path of a GGUF file.

- Python: [`ofa`](#ofa) · [returned objects](#returned-objects) · [settings of a run](#settings-of-a-run) ·
  [`ofa_kernels`](#ofa_kernels)
- Command line: COMMANDS
"""
_SECTIONS = {name: name for name in ("Attributes", "Returns", "Yields", "Raises", "Example")} | {"Args": "Arguments"}
_MODULES = re.compile(r"(<!-- modules -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write both pages."""
    REFERENCE.write_text(reference(), encoding="utf-8")
    ARCHITECTURE.write_text(with_modules(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")


def reference() -> str:
    """The page of every public name and every option."""
    commands = command_line()
    names = re.findall(r"^### `(ofa \w+)`$", commands, re.MULTILINE)
    links = " · ".join(f"[`{name}`](#{name.replace(' ', '-')})" for name in names)
    parts = [_HEAD.replace("COMMANDS", links), "## `ofa`\n"]
    parts += [_entry(name, _found(name)) for name in public("ofa")]
    parts += ["## Returned objects\n", *(_entry(name, _found(name)) for name in RETURNED)]
    parts += ["## Settings of a run\n", _settings(_found(SETTINGS))]
    parts += ["## `ofa_kernels`\n", *(_entry(name, _found(name)) for name in public("ofa_kernels"))]
    return "\n".join([*parts, "## Command line\n", commands])


def public(package: str) -> list[str]:
    """The full names that a package exports, without modules."""
    module = import_module(package)
    return [f"{package}.{name}" for name in module.__all__ if not inspect.ismodule(getattr(module, name))]


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class itself defines, in the order of its body."""
    for name, value in vars(kind).items():
        if not name.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
            yield name, value


def command_line() -> str:
    """Every command and option as typer describes them, one level of headings lower."""
    import typer
    from typer.cli import get_docs_for_click

    from ofa.cli import app

    group = typer.main.get_command(app)
    with group.make_context("ofa", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=group, ctx=context, name="ofa")
    return re.sub(r"^## ", "### ", text[text.index("\n## ") + 1 :], flags=re.MULTILINE).rstrip() + "\n"


def with_modules(page: str) -> str:
    """The page of the architecture with the current modules, from the top floor down."""
    from tests.test_floors import FLOORS

    rooms = [ROOT / "ofa" / room for floor in FLOORS for room in floor.split()]
    lines = [line for room in [*rooms, ROOT / "ofa_kernels"] for line in _room(room)]
    listing = "\n".join(["```", *lines, "```", ""])
    return _MODULES.sub(lambda found: found[1] + listing + found[2], page)


def _room(room: Path) -> list[str]:
    """A package with its modules, or a module alone."""
    if not room.is_dir():
        return [_line(f"{room.relative_to(ROOT)}.py", room.with_suffix(".py"))]
    files = [file for file in sorted(room.rglob("*.py")) if file.name != "__init__.py"]
    inside = [_line(f"  {file.relative_to(room)}", file) for file in files]
    return [_line(f"{room.relative_to(ROOT)}/", room / "__init__.py"), *inside]


def _line(name: str, file: Path) -> str:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=[^.])\.(?:\s|$)", " ".join(doc.split("\n\n")[0].split()))[0]
    return f"{name:38}  {sentence}"


def _found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def _entry(name: str, value: Any) -> str:
    heading = f"### `{name}`\n"
    if not inspect.isclass(value):
        return "\n".join([heading, _signature(name, value), _markdown(value)])
    return "\n".join([heading, *_constructor(name, value), _markdown(value), *_members(name, value)])


def _constructor(name: str, kind: type) -> list[str]:
    """How users make one; fields are listed for dataclasses, and what `RETURNED` names is made by functions."""
    if dataclasses.is_dataclass(kind):
        return [*(f"- `{field.name}: {field.type}`" for field in dataclasses.fields(kind)), ""]
    return [] if name in RETURNED else [_signature(name, kind)]


def _members(name: str, kind: type) -> Iterator[str]:
    """Properties as a list, methods with a heading each."""
    found = list(members(kind))
    told = [(member, value.__doc__ or "") for member, value in found if isinstance(value, property)]
    yield from (f"- `.{member}`: {doc.split(chr(10) * 2)[0]}" for member, doc in told)
    if told:
        yield ""
    for member, value in found:
        function = value.__func__ if isinstance(value, classmethod) else value
        if not isinstance(function, property):
            yield from (f"#### `{name.rpartition('.')[2]}.{member}`\n", _signature(member, function))
            yield _markdown(function)


def _signature(name: str, function: Any) -> str:
    parameters = [part for part in inspect.signature(function).parameters.values() if part.name not in ("self", "cls")]
    result = inspect.signature(function).return_annotation
    arrow = "" if result is inspect.Signature.empty or inspect.isclass(function) else f" -> {result}"
    shown = [_parameter(part) for part in parameters]
    first = next((n for n, part in enumerate(parameters) if part.kind is part.KEYWORD_ONLY), None)
    if first is not None and not any(part.kind is part.VAR_POSITIONAL for part in parameters):
        shown.insert(first, "*")
    line = f"{name}({', '.join(shown)}){arrow}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){arrow}"
    return f"```python\n{line}\n```\n"


def _parameter(part: inspect.Parameter) -> str:
    stars = {part.VAR_POSITIONAL: "*", part.VAR_KEYWORD: "**"}.get(part.kind, "")
    annotation = "" if part.annotation is part.empty else f": {part.annotation}"
    default = "" if part.default is part.empty else f"{' = ' if annotation else '='}{part.default!r}"
    return f"{stars}{part.name}{annotation}{default}"


def _settings(config: Any) -> str:
    rows = [
        f"| `{name}` | `{field.default!r}` | {field.description or ''} |" for name, field in config.model_fields.items()
    ]
    return "\n".join([_markdown(config), "| setting | default | |", "|---|---|---|", *rows, ""])


def _markdown(value: Any) -> str:
    """A docstring as Markdown: sections become bold words, arguments and errors bullets, examples code."""
    lines, section = [], ""
    for line in inspect.cleandoc(value.__doc__ or "").splitlines():
        head = re.fullmatch(r"(\w+):", line)
        if head and head[1] in _SECTIONS:
            section = head[1]
            lines.append(f"**{_SECTIONS[section]}**\n" + ("\n```python" if section == "Example" else ""))
        elif section and line.startswith("    "):
            lines.append(_item(line[4:], section))
        else:
            if section == "Example":
                lines.append("```")
            section = section if not line.strip() and section != "Example" else ""
            lines.append(line)
    return "\n".join([*lines, *(["```"] if section == "Example" else [])]).strip() + "\n"


def _item(line: str, section: str) -> str:
    if section in ("Example", "Returns", "Yields"):
        return line
    name, colon, rest = line.partition(": ")
    return f"- `{name}`: {rest}" if colon and not line.startswith(" ") else f"  {line.strip()}"


if __name__ == "__main__":
    main()
