"""Links and file names in the pages exist, and generated parts are up to date and complete."""

from __future__ import annotations

import pkgutil
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

import ofa
import ofa_kernels
from benchmarks import pages
from ofa.cli import app
from tests.ofa.command_line import done

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""Without the changelog, which names what is gone."""

_FENCE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_FILE = re.compile(r"(?<![\w./~-])(?:docs|tests|ofa|ofa_kernels|benchmarks|examples|scripts)/[\w./-]+\w")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as on GitHub."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(next(name for n in range(len(found) + 1) if (name := f"{slug}-{n}" if n else slug) not in found))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Also in commands and in the text."""
    named = {name for name in _FILE.findall(page.read_text(encoding="utf-8")) if "NAME" not in name}
    assert sorted(name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))) == []


def test_generated_parts_are_up_to_date() -> None:
    """After changing a docstring or an option, run `python -m benchmarks.pages`."""
    architecture = pages.ARCHITECTURE.read_text(encoding="utf-8")
    assert pages.with_modules(architecture) == architecture
    assert pages.reference() == pages.REFERENCE.read_text(encoding="utf-8")


def test_the_reference_leaves_nothing_out() -> None:
    """Every exported name has a heading, every command a section with each of its options."""
    page = pages.REFERENCE.read_text(encoding="utf-8")
    headings = set(_HEADING.findall(_FENCE.sub("", page)))
    exported = [f"ofa.{name}" for name in ofa.__all__] + [f"ofa_kernels.{name}" for name in ofa_kernels.__all__]
    assert {f"`{name}`" for name in exported} - headings == {"`ofa_kernels.reference`"}  # a module
    sections = dict(re.findall(r"^### `ofa (\w+)`\n(.*?)(?=^### |\Z)", page, re.DOTALL | re.MULTILINE))
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {name: _options(command) for name, command in commands.items()} == {
        name: set(re.findall(r"^\* `(?:-\w, )?(--[\w-]+)", text, re.MULTILINE)) - {"--help"}
        for name, text in sections.items()
    }


def test_options_that_the_pages_name_exist() -> None:
    """In commands of `ofa`, and alone in backticks; a page outlives an option easily."""
    group = typer.main.get_command(app)
    parts = [part for command in (group, *group.commands.values()) for part in command.params]  # type: ignore[attr-defined]
    known = {flag for part in parts for flag in (*part.opts, *part.secondary_opts)} | {"--help"}
    named = {
        (page.name, flag)
        for page in CURRENT
        for code in re.findall(r"(?:`|^(?:\$ )?)((?:ofa |--)[^`\n]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    assert {(page, flag) for page, flag in named if flag not in known} == set()


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_the_packages_on_a_page_exist(page: Path) -> None:
    """Such as `ofa.regularizers.attached`; files are checked above."""
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"(?<![\w./-])ofa(?:_kernels)?(?:\.[A-Za-z_]\w*)+", text)):
        pkgutil.resolve_name(name)


def _options(command: typer.core.TyperCommand) -> set[str]:
    return {
        next(flag for flag in part.opts if flag.startswith("--")) for part in command.params if "--" in str(part.opts)
    }


def test_the_quickstart_can_be_followed(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `ofa` command of sections 1 to 5, in order, on a tiny model and for two steps, with the page's files."""
    page, *_ = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8").partition("## 6.")
    sessions = "\n".join(re.findall(r"```console\n(.*?)```", page, re.DOTALL))
    (tmp_path / "new.csv").write_text(re.search(r"\$ cat new.csv\n(.*?)(?=\$ )", sessions, re.DOTALL)[1])  # type: ignore[index]
    (tmp_path / "ofa").symlink_to(ROOT / "ofa")
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in re.findall(r"^\$ ofa (.*)$", sessions, re.MULTILINE)]
    assert [command for command, *_ in commands] == ["fit", "evaluate", "predict", "predict", "merge"]
    for command in commands:
        done(*command, *(["--model", tiny_folder, "--max-steps", 2] if command[0] == "fit" else []))
    assert len((tmp_path / "labelled.csv").read_text().splitlines()) == 3
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()


def test_twenty_texts_become_a_running_gguf_file_in_four_commands(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 6 of the quickstart, on a tiny model and for two steps; without llama.cpp the file is not run."""
    *_, section = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8").partition("## 6.")
    lines = re.findall(r"^\$ (.*)$", section, re.MULTILINE)
    commands = [shlex.split(line.removeprefix("ofa ")) for line in lines if line.startswith("ofa ")]
    assert [command for command, *_ in commands] == ["fit", "evaluate", "merge", "predict"]
    (tmp_path / "ofa").symlink_to(ROOT / "ofa")
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_gguf, "base.gguf")
    (data,) = (line for line in lines if line.endswith("> tickets.jsonl"))
    subprocess.run(data, shell=True, check=True)
    assert len(Path("tickets.jsonl").read_text().splitlines()) == 20
    *before, last = commands
    for command in before:
        done(*command, *(["--max-steps", 2] if command[0] == "fit" else []))
    assert Path("tuned.gguf").stat().st_size == tiny_gguf.stat().st_size
    pytest.importorskip("llama_cpp", reason="the fourth command needs llama-cpp-python; the three before it ran")
    assert "Billing" in done(*last, "--json").out
