"""Print results on standard output, and notices, progress and errors on standard error."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ofa.errors import InputError, in_words
from ofa.files import at_home
from ofa.logs import quiet_libraries

if TYPE_CHECKING:
    from ofa.training.records import StepRecord

P = ParamSpec("P")
R = TypeVar("R")

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


_quiet = False

_LINE_EVERY = 30.0
"""Seconds between two progress lines without a terminal."""

_WHOLE_RUN = 1e9
"""Window in seconds for the estimated speed: the whole run, since steps may take minutes."""


def set_quiet(quiet: bool) -> bool:
    """Callback of `--quiet`: suppress notices and progress, but not results, warnings and errors."""
    global _quiet
    _quiet = quiet
    return quiet


def notice(text: str) -> None:
    """Print a line on standard error, unless `--quiet`."""
    if not _quiet:
        _say(text)


def warn(text: str) -> None:
    """Print a warning on standard error, also with `--quiet`."""
    _say(f"ofa: {text}")


def _say(text: str) -> None:
    _stderr().print(text, soft_wrap=True)


@functools.cache
def _stderr() -> Console:
    """The console of messages and of progress: only the one that draws a bar can print above it."""
    return _plain(stderr=True)


def tell_truncated(count: int, of: str = "texts") -> None:
    """Warn of the number of texts that were cut to the model's window, if there were any."""
    if count:
        warn(f"{count} of the {of} did not fit the model's window and were cut")


def show(value: Table | str) -> None:
    """Print a result on standard output; without a terminal, tables may be 160 columns wide."""
    width = None if sys.stdout.isatty() else 160
    _plain(width=width).print(value, soft_wrap=isinstance(value, str))


def show_table(
    columns: Sequence[str], rows: Iterable[Iterable[object]], *, title: str | None = None, left: int | None = None
) -> None:
    """Print a table; only the first `left` columns are aligned to the left, or all. Without columns it has no head."""
    table = Table(title=title, show_header=bool(columns))
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if left is None or place < left else "right")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    show(table)


def show_json(value: object) -> None:
    """Print a result as one JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _plain(**options: Any) -> Console:
    """A console without markup: labels and paths may have brackets and colons."""
    return Console(highlight=False, markup=False, emoji=False, **options)


def fail(error: InputError) -> NoReturn:
    """Print the sentence of an error and exit with status 2."""
    warn(str(error))
    raise SystemExit(2)


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a command's exceptions into one sentence and an exit status; with OFA_DEBUG=1, print the traceback too."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        quiet_libraries()
        try:
            return command(*args, **{name: _at_home(value) for name, value in kwargs.items()})
        except InputError as error:
            fail(error)
        except KeyboardInterrupt as error:
            warn(str(error) or "interrupted")
            raise SystemExit(_INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader of our output has closed the pipe; typer then exits silently
        except Exception as error:
            if os.environ.get("OFA_DEBUG"):
                traceback.print_exc()
            warn(f"unexpected {in_words(error)}; run again with OFA_DEBUG=1 to see where")
            raise SystemExit(1) from error

    return run


def _at_home(value: object) -> Any:
    """Expand ~ in paths among the options."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return at_home(value) if isinstance(value, Path) else value


def was_interrupted(error: BaseException) -> bool:
    """True if Ctrl-C caused the error: interrupted code, such as an import, may raise another one from it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def losses_told(update: Callable[[int, int, str], None]) -> Callable[[StepRecord, int], None]:
    """The `progress` of a training run that tells a bar each step's loss."""
    return lambda record, total: update(record.step, total, f"loss {record.loss:.4f}")


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error, or a line every half minute without a terminal: update(done, total, remark)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = _stderr()
    in_log = _quiet or not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns,
        TextColumn("{task.fields[remark]}"),
        console=console,
        transient=True,
        disable=in_log,
        speed_estimate_period=_WHOLE_RUN,
        get_time=time.monotonic,
    ) as progress:
        task = progress.add_task(description, total=None, remark="")
        told = time.monotonic()

        def update(done: int, total: int, remark: str) -> None:
            nonlocal told
            progress.update(task, completed=done, total=total, remark=remark)
            if in_log and time.monotonic() - told >= _LINE_EVERY:
                told = time.monotonic()
                minutes = (progress.tasks[0].time_remaining or 0) / 60
                left = "less than a minute" if minutes < 1 else f"about {minutes:.0f} min"
                notice(f"ofa: {description}: {done:,} of {total:,}{f', {remark}' if remark else ''}, {left} left")

        yield update
