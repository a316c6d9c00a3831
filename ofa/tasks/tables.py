"""Read the rows of the user's files one at a time: CSV, TSV, JSON lines, JSON lists, parquet, plain text, or .gz.

`csv` and `json` of the standard library read text formats: pandas silently fills short rows, pyarrow silently closes an
open quote, and both change the number types of columns with gaps.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources.abc import Traversable
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ofa.errors import InputError, first_sentence, refuse_surrogates
from ofa.files import at_home

FilePath = str | os.PathLike[str] | Traversable
Row = dict[str, object]

SUFFIXES = (".jsonl", ".csv", ".tsv", ".json", ".ndjson", ".json-lines", ".parquet")
"""Suffixes of tables, each optionally followed by .gz."""
TEXT_SUFFIXES = (".txt", "")
STANDARD_INPUT = "-"

_SEPARATORS = ",;\t|"
_SAMPLE = 1 << 16
_BATCH = 1024
_NAMED_SEPARATORS = {"tab": "\t", r"\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
_ENCODINGS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32"} | {
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


@dataclass(frozen=True)
class Table:
    """A file of rows. Each iteration reads it from the start, a few rows at a time, except that a JSON list is whole.

    `separator` is that of a CSV or TSV file; None detects it. With `texts`, the name of a column, a plain text file is
    a table too, one row a line. Iterating yields (where the row stands, its values by column), and raises `InputError`
    for data that cannot be read.
    """

    path: FilePath
    separator: str | None = None
    texts: str | None = None

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        """Each row as (where it stands, values by column); empty lines of CSV and JSON lines are skipped."""
        file, suffix = self._file, self._suffix
        with _readable(file):
            if suffix == ".parquet":
                yield from _parquet_rows(file)
            elif suffix in (".csv", ".tsv"):
                yield from _csv_rows(file, _separator(self.separator) or ("\t" if suffix == ".tsv" else None))
            elif suffix in TEXT_SUFFIXES:
                yield from _text_rows(file, self.texts or "")
            elif suffix == ".json" and _first_character(file) == "[":
                yield from _list_rows(file)
            else:
                yield from _json_rows(file)

    @cached_property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the integers 0, 1, … of each class column, from a parquet file that `datasets` wrote."""
        if self._suffix != ".parquet":
            return {}
        with _readable(self._file), _parquet(self._file) as parquet:
            schema = parquet.schema_arrow
        if b"huggingface" not in (schema.metadata or {}):
            return {}
        from datasets import ClassLabel, Features

        features = Features.from_arrow_schema(schema)
        return {name: tuple(kind.names) for name, kind in features.items() if isinstance(kind, ClassLabel)}

    @property
    def _suffix(self) -> str:
        suffix = suffix_of(self.path)
        known = (*SUFFIXES, *TEXT_SUFFIXES) if self.texts else SUFFIXES
        if suffix not in known:
            raise InputError(f'{self.path} has the unknown suffix "{suffix}": use {", ".join(filter(None, known))}')
        return suffix

    @cached_property
    def _file(self) -> Traversable:
        if self.texts and self.path == STANDARD_INPUT:
            return _standard_input()
        file = located(self.path)
        # A pipe can be read only once.
        return _Piped(file.read_bytes(), str(file)) if isinstance(file, Path) and file.is_fifo() else file  # type: ignore[return-value]


def located(path: FilePath) -> Traversable:
    """A path of any kind as one that can be opened, with ~ expanded."""
    return at_home(path) if isinstance(path, str | os.PathLike) else path


def suffix_of(path: FilePath) -> str:
    """The suffix of a file's format, in lower case, without .gz."""
    name = located(path).name.lower()
    return "" if name == STANDARD_INPUT else Path(name.removesuffix(".gz")).suffix


def is_table(path: FilePath) -> bool:
    """True if the name has the suffix of a table."""
    return suffix_of(path) in SUFFIXES


def parse_json(content: str, file: object, first_line: int = 1) -> object:
    """Parse JSON.

    Raises:
        InputError: it is invalid, repeats a name within an object, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(content, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{file}, line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{where} is broken JSON ({error.msg}): correct it") from error
    except _Repeated as error:
        raise InputError(f'{file}, line {first_line} has two values for "{error}": keep one of them') from error
    except (ValueError, RecursionError) as error:
        # Valid JSON that Python cannot represent: a number of thousands of digits, or nesting thousands deep.
        raise InputError(f"{file}, line {first_line} is JSON that cannot be read ({error}): simplify it") from error
    if "\\u" in content:
        refuse_surrogates(json.dumps(value, ensure_ascii=False), f"{file}, line {first_line}")
    return value


def read_text(file: Traversable) -> str:
    """The whole file as text."""
    with _readable(file), _text_stream(file) as stream:
        return stream.read()


class _Repeated(Exception):
    """A JSON object has a name twice."""


@dataclass(frozen=True)
class _Piped:
    """Piped content as a file that can be read several times."""

    content: bytes
    name: str = STANDARD_INPUT

    def is_file(self) -> bool:
        return True

    def open(self, mode: str) -> IO[bytes]:
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return "standard input" if self.name == STANDARD_INPUT else self.name


def _standard_input() -> Any:
    buffer = getattr(sys.stdin, "buffer", None)
    return _Piped(buffer.read() if buffer else sys.stdin.read().encode())


@contextmanager
def _readable(file: Traversable) -> Iterator[None]:
    """Raise `InputError` if the file does not exist, cannot be opened, or does not match its suffix."""
    if not file.is_file():
        raise InputError(f"{file} does not exist or is not a file: check the path")
    try:
        try:
            yield
        except UnicodeDecodeError as error:
            where = _undecodable(file) if error.encoding.startswith("utf-8") else str(file)
            encoding = error.encoding.upper()
            raise InputError(f"{where} is not {encoding} text: save the file with UTF-8 encoding") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file} is not a complete gzip file ({error}): copy or compress it again") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}): check its permissions") from error


def _undecodable(file: Traversable) -> str:
    """The first line that is not UTF-8."""
    with _stream(file) as stream:
        for line, content in enumerate(stream, start=1):
            try:
                content.decode()
            except UnicodeDecodeError:
                return f"{file}, line {line}"
    return str(file)


def _stream(file: Traversable) -> io.BufferedReader:
    raw: Any = file.open("rb")
    if file.name.lower().endswith(".gz"):
        raw = gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(raw)


@contextmanager
def _text_stream(file: Traversable, newline: str = "\n") -> Iterator[io.TextIOWrapper]:
    """The text of a file, in the encoding of its byte-order mark, else in UTF-8."""
    with _stream(file) as stream:
        start = stream.peek(4)[:4]
        encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), "utf-8")
        if encoding == "utf-8" and b"\0" in start:
            raise InputError(f"{file} is not UTF-8 text but may be UTF-16: save the file with UTF-8 encoding")
        yield io.TextIOWrapper(stream, encoding=encoding, newline=newline)


def _first_character(file: Traversable) -> str:
    with _text_stream(file) as stream:
        while part := stream.read(_BATCH):
            if part.strip():
                return part.strip()[0]
    return ""


def _text_rows(file: Traversable, column: str) -> Iterator[tuple[str, Row]]:
    """One row a line; blank lines between texts are rows, blank lines at the end are not."""
    blank: list[tuple[str, Row]] = []
    with _text_stream(file) as stream:
        for line, text in enumerate(stream, start=1):
            blank.append((f"{file}, line {line}", {column: text.removesuffix("\n").removesuffix("\r")}))
            if text.strip():
                yield from blank
                blank.clear()


def _json_rows(file: Traversable) -> Iterator[tuple[str, Row]]:
    with _text_stream(file) as stream:
        for line, record in enumerate(stream, start=1):
            if record.strip():
                yield _as_row(
                    parse_json(record.rstrip(), file, line), f"{file}, line {line}", "object with its columns per line"
                )


def _list_rows(file: Traversable) -> Iterator[tuple[str, Row]]:
    items = parse_json(read_text(file), file)
    assert isinstance(items, list)
    for number, item in enumerate(items, start=1):
        yield _as_row(item, f"{file}, item {number}", "list of objects with their columns")


def _as_row(value: object, where: str, form: str) -> tuple[str, Row]:
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object: write one {form}")
    return where, value


def _object(pairs: list[tuple[str, object]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(next(name for name in names if names.count(name) > 1))
    return row


def _csv_rows(file: Traversable, separator: str | None) -> Iterator[tuple[str, Row]]:
    # The default is 128 KiB per cell, for the whole process; none of our readers needs a limit.
    csv.field_size_limit(2**31 - 1)
    separator = separator or _sniffed(file)
    header: list[str] | None = None
    line = 1
    with _text_stream(file, newline="") as stream:
        records = csv.reader(stream, delimiter=separator, strict=True)
        try:
            for record in records:
                # `line_num` is the last line of the record, which may span lines; report its first.
                where, line = f"{file}, line {line}", records.line_num + 1
                if _is_empty_line(record):
                    continue
                if header is None:
                    header = _header(record, where)
                    continue
                if len(record) != len(header):
                    raise InputError(
                        f"{where} has {len(record)} cells but the header has {len(header)}: put texts that contain the "
                        f"separator {separator!r} in double quotes, or name the right one with --separator"
                    )
                yield where, dict(zip(header, record, strict=True))
        except csv.Error as error:
            raise InputError(
                f"{file}, line {line} is broken CSV ({error}): close the quotes and double those inside a text, or "
                "name the separator with --separator"
            ) from error


def _is_empty_line(record: Sequence[str]) -> bool:
    """True if a line has only blanks; a pair of quotes is an empty cell."""
    return not record or (len(record) == 1 and record[0] != "" and not record[0].strip(" \t"))


def _header(record: Sequence[str], where: str) -> list[str]:
    """The names of the columns; unnamed ones get pandas' names."""
    names = [name.strip() or f"Unnamed: {position}" for position, name in enumerate(record)]
    refuse_repeated(names, where)
    return names


def refuse_repeated(names: Sequence[str], where: str) -> None:
    """Raise `InputError` where two columns have the same name."""
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f'{where} has two columns "{repeated}": rename one of them')


def _separator(named: str | None) -> str | None:
    separator = _NAMED_SEPARATORS.get(named, named) if named else None
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise InputError(f'the separator "{named}" is not one character: write one such as ";", or tab')
    return separator


def _sniffed(file: Traversable) -> str:
    """The separator that gives the first rows as many cells as the header, and of these the most cells."""
    with _text_stream(file, newline="") as stream:
        sample = stream.read(_SAMPLE)
    whole = sample if len(sample) < _SAMPLE else sample[: sample.rfind("\n") + 1] or sample

    sizes = {separator: list(_sizes(whole, separator)) for separator in _SEPARATORS}
    several = [separator for separator in _SEPARATORS if sizes[separator] and sizes[separator][0] > 1]
    return max(several, key=lambda one: (len(set(sizes[one])) == 1, sizes[one][0]), default=",")


def _sizes(sample: str, separator: str) -> Iterator[int]:
    records = csv.reader(io.StringIO(sample, newline=""), delimiter=separator, strict=True)
    try:
        yield from (len(record) for record in islice(records, 20) if not _is_empty_line(record))
    except csv.Error:
        return


@contextmanager
def _parquet(file: Traversable) -> Iterator[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with _stream(file) as stream:
        # Reading parquet starts at its end, so a compressed file must be decompressed first.
        packed = file.name.lower().endswith(".gz")
        source = pyarrow.BufferReader(stream.read()) if packed or not stream.seekable() else stream
        try:
            with ParquetFile(source) as parquet:
                yield parquet
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(
                f"{file} cannot be read as parquet ({first_sentence(error)}): copy or write it again"
            ) from error


def _parquet_rows(file: Traversable) -> Iterator[tuple[str, Row]]:
    with _parquet(file) as parquet:
        refuse_repeated(parquet.schema_arrow.names, str(file))
        number = 0
        for batch in parquet.iter_batches(_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
