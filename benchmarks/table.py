"""Tables of results as CSV files in long form: a dataclass is a row, and says where and from what it was measured."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@contextmanager
def writing(file: Path, kind: type) -> Iterator[Callable[[Iterable[Any]], None]]:
    """A new table whose columns are the fields of a dataclass; yields the function that adds rows to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()

        def write(rows: Iterable[Any]) -> None:
            for row in rows:
                writer.writerow(asdict(row))
            # What took minutes to measure is worth keeping if the next measurement is interrupted.
            stream.flush()

        yield write


def significant(value: float) -> float:
    """The value as tables hold it, six digits."""
    return float(f"{value:.6g}")


def cpu() -> str:
    """The CPU in words."""
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def device_name(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu()


def triton_version() -> str:
    """As installed, or "none"."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """The commit that is checked out, abbreviated."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() if found.returncode == 0 else "uncommitted"
