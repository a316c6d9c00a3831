"""Random files give the rows of a reference reader, or an error of one sentence; never a traceback or other rows.

The suite tries a few hundred files; OFA_RANDOM_FILES=10000 tries that many.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from ofa.errors import InputError
from ofa.tasks import Table, read_file

SEPARATORS = ",;\t|"
# The C engine loses an empty cell that follows a carriage return alone, the other one every NUL.
ENGINES = ("c", "python")
FILES = int(os.environ.get("OFA_RANDOM_FILES", "300"))

AWKWARD = st.text(st.sampled_from("ab é,;|\t\n\r\"'\\{}\u2028\x85\x0b\x1e\ufeff\x00😀0"), max_size=8)
WORDS = st.sampled_from(
    ["happy", "sad", "0", "1", "1.0", "true", "NA", "null", "nan", "a, b", "2024-01-01", "x" * 200_000]
)
CELLS = st.one_of(WORDS, AWKWARD, st.text(max_size=6))
VALUES = st.one_of(CELLS, st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.just(["a"]))
NAMES = st.sampled_from(["text", "label", "Text", "LABEL", " text", "id", "", "prompt", "Unnamed: 0", "é"])
ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252"])
COLUMNS = st.one_of(st.permutations(["text", "label"]), st.lists(NAMES, min_size=1, max_size=4))


@dataclass(frozen=True)
class Made:
    """A random file; with header and rows if it is a valid CSV file."""

    name: str
    content: bytes
    separator: str = ","
    rows: list[list[str]] | None = None


@st.composite
def csv_files(draw: st.DrawFn) -> Made:
    separator, suffix = draw(st.sampled_from([(",", "csv"), (";", "csv"), ("\t", "csv"), ("|", "csv"), ("\t", "tsv")]))
    header = draw(COLUMNS)
    rows = draw(st.lists(st.lists(CELLS, min_size=len(header), max_size=len(header)), max_size=4))
    line_end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    encoding = draw(ENCODINGS)
    if draw(st.booleans()):
        file = io.StringIO(newline="")
        quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))
        # A carriage return is quoted as long as it is in the line end.
        csv.writer(file, delimiter=separator, quoting=quoting, lineterminator="\r\n").writerows([header, *rows])
        content, known = file.getvalue(), True
    else:
        content, known = line_end.join(separator.join(row) for row in [header, *rows]), False
    data, spoiled = _spoiled(draw, content.encode(encoding, errors="replace"))
    whole = (
        known
        and not spoiled
        and encoding.startswith(("utf-8", "utf-16"))
        and encoding != "utf-16-le"
        and content.encode(encoding, errors="ignore").decode(encoding) == content
    )
    return Made(f"a.{suffix}", data, separator, [header, *rows] if whole else None)


@st.composite
def json_files(draw: st.DrawFn) -> Made:
    header = draw(COLUMNS)
    rows = draw(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(header, VALUES)), max_size=4))
    suffix = draw(st.sampled_from(["json", "jsonl", "ndjson"]))
    escaped = draw(st.booleans())
    if suffix == "json" and draw(st.booleans()):
        content = json.dumps(rows, ensure_ascii=escaped, indent=draw(st.sampled_from([None, 1])))
    else:
        end = draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
        content = "".join(json.dumps(row, ensure_ascii=escaped) + end for row in rows)
    encoding = draw(ENCODINGS)
    data, _ = _spoiled(draw, content.encode(encoding, errors="surrogatepass" if "utf-8" in encoding else "replace"))
    return Made(f"a.{suffix}", data)


@st.composite
def parquet_files(draw: st.DrawFn) -> Made:
    header = draw(st.lists(NAMES, min_size=1, max_size=3))
    count = draw(st.integers(0, 3))
    kinds = [CELLS, st.integers(-5, 5), st.booleans(), st.floats(), st.none(), st.binary(max_size=3)]
    columns = [draw(st.lists(draw(st.sampled_from(kinds)), min_size=count, max_size=count)) for _ in header]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], header), file)
    return Made("a.parquet", _spoiled(draw, file.getvalue())[0])


def _spoiled(draw: st.DrawFn, content: bytes) -> tuple[bytes, bool]:
    """The content unchanged, cut short, or with a few bytes replaced."""
    how = draw(st.sampled_from(["whole", "whole", "whole", "cut", "bytes"]))
    place = draw(st.integers(0, len(content)))
    if how == "cut":
        return content[:place], True
    if how == "bytes":
        return content[:place] + draw(st.binary(min_size=1, max_size=3)) + content[place:], True
    return content, False


@st.composite
def files(draw: st.DrawFn) -> Made:
    made = draw(st.one_of(csv_files(), csv_files(), json_files(), parquet_files()))
    if draw(st.integers(0, 4)):
        return made
    packed, _ = _spoiled(draw, gzip.compress(made.content))
    return Made(f"{made.name}.gz", packed, made.separator)


def reference(made: Made, separator: str, engine: str) -> list[list[Any]] | None:
    """Header and rows by pandas, `json` and pyarrow; None if they cannot read the file."""
    content = made.content
    try:
        if made.name.endswith(".gz"):
            content = gzip.decompress(content)
        kind = made.name.split(".")[1]
        if kind == "parquet":
            table = pyarrow.parquet.read_table(io.BytesIO(content))
            return [[list(row.items()) for row in table.to_pylist()]]
        text = _decoded(content)
        if kind in ("csv", "tsv"):
            frame = pandas.read_csv(
                io.StringIO(text, newline=""),
                sep=separator,
                header=None,
                dtype=str,
                keep_default_na=False,
                engine=engine,
            )
            header, *rows = frame.to_numpy().tolist()
            return [[str(name).strip() for name in header], *rows]
        rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(x) for x in text.split("\n") if x.strip()]
        return [[list(row.items()) for row in rows]]
    except Exception:
        return None


def _decoded(content: bytes) -> str:
    if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return content.decode("utf-32")
    return content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")


def rows_of(made: Made, path: Path) -> list[list[Any]]:
    rows = [row for _, row in Table(path)]
    if "sv" not in made.name:
        return [[list(row.items()) for row in rows]]
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


@settings(
    max_examples=FILES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    # The suite uses the same files every time; OFA_RANDOM_FILES searches others.
    derandomize="OFA_RANDOM_FILES" not in os.environ,
)
@given(made=files())
def test_a_random_file_gives_the_reference_s_rows_or_one_sentence(
    made: Made, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / made.name
    path.write_bytes(made.content)
    try:
        found = rows_of(made, path)
    except InputError as refused:
        event(f"{made.name.split('.')[1]}: refused")
        assert_one_sentence(refused)
        assert made.rows is None or has_a_name_twice(made.rows[0])
    else:
        event(f"{made.name.split('.')[1]}: read")
        # Text that was joined without quotes, or corrupted, may look like a file with another separator.
        separators = SEPARATORS if made.rows is None else made.separator
        readings = (reference(made, separator, engine) for separator in separators for engine in ENGINES)
        assert any(is_same(found, rows) for rows in readings)
        # A blank line is no row, for pandas too.
        written = [row for row in made.rows or [] if len(row) > 1 or row[0] == "" or row[0].strip(" \t")]
        assert made.rows is None or len(made.rows) == 1 or found[1:] == written[1:]
    for template in ("{text}:", None):
        try:
            examples = read_file(path, template=template).train
        except InputError as refused:
            assert_one_sentence(refused)
        else:
            assert len(examples) <= len(rows_of(made, path)[-1 if "sv" not in made.name else slice(1, None)])


def assert_one_sentence(refused: InputError) -> None:
    assert len(str(refused).splitlines()) == 1
    assert len(str(refused)) < 1000


def is_same(found: list[list[Any]], expected: list[list[Any]] | None) -> bool:
    """Compare by `repr`, so that NaN equals NaN; a header alone has no rows."""
    if expected is not None and found and len(found[0]) == len(expected[0]):
        expected[0] = [name or known for name, known in zip(expected[0], found[0], strict=True)]
    return repr(found) == repr(expected) or (not found and (expected is None or len(expected) == 1))


def has_a_name_twice(header: list[str]) -> bool:
    names = [name.strip() for name in header if name.strip()]
    return len(set(names)) < len(names) or ("" in map(str.strip, header) and "Unnamed: 0" in names)
