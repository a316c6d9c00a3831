"""Chooses the number of CPU threads: one per core that no other program uses.

Threads that synchronize lose a whole time slice whenever one of them shares its core with another program: on two busy
cores, a step with two threads takes several times as long as with one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SHORTEST = 0.2  # seconds to measure over at least; the kernel counts in hundredths
_ROOT = Path("/")


@dataclass(frozen=True)
class Cores:
    """Cores this process may use, its container's quota (or None), and how many of the cores other programs use."""

    allowed: int
    quota: float | None
    busy: float

    @property
    def free(self) -> int:
        """Whole cores free for this process, at least 1."""
        limit = self.allowed if self.quota is None else min(self.allowed, self.quota)
        return max(1, round(min(limit, self.allowed - self.busy)))


def usable_cores() -> Cores:
    """The cores available now; use by others is a mean since this module was imported."""
    return Cores(len(_allowed()), quota(), _busy_with_others())


def threads_from_environment() -> int | None:
    """OMP_NUM_THREADS, or None if it is not set to a positive number."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else None


def use_threads(threads: int | None) -> Cores | None:
    """Set PyTorch's threads: to `threads`, else OMP_NUM_THREADS, else the number of free cores.

    Returns:
        The cores, if they decided; else None.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif threads_from_environment() is None:
        found = usable_cores()
        torch.set_num_threads(min(found.free, torch.get_num_threads()))
        return found
    return None


def quota(root: Path = _ROOT) -> float | None:
    """CPU quota of this process in cores: the smallest of its control group and all above it; None without a limit."""
    limits: list[float] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts, read = ["unified", ""], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = [controllers, "cpu"], _quota_v1
        else:
            continue
        for mount in mounts:
            top = root / "sys/fs/cgroup" / mount
            group = top / path.lstrip("/")
            # In a container its own group may be mounted at the top, while `path` is the host's.
            groups = [group, *group.parents] if group.is_dir() else [top]
            limits += [limit for one in groups if one.is_relative_to(top) and (limit := read(one)) is not None]
    return min(limits, default=None)


def _quota_v2(group: Path) -> float | None:
    words = " ".join(_lines(group / "cpu.max")).split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _quota_v1(group: Path) -> float | None:
    share, period = (" ".join(_lines(group / f"cpu.cfs_{name}_us")).strip() for name in ("quota", "period"))
    return int(share) / int(period) if share.isdigit() and period.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class _Moment:
    """Seconds so far: wall clock, processor time of the allowed cores, and processor time of this process."""

    clock: float
    used: float
    own: float


def _moment() -> _Moment | None:
    """The counters now; None without /proc/stat, that is outside Linux."""
    used = sum(_used_ticks())
    own = os.times()
    return _Moment(time.monotonic(), used / os.sysconf("SC_CLK_TCK"), own.user + own.system) if used else None


def _used_ticks() -> Iterator[int]:
    allowed = {f"cpu{number}" for number in _allowed()}
    for line in _lines(_ROOT / "proc/stat"):
        name, *counts = line.split()
        if name in allowed:
            user, nice, system, _idle, _waiting, *interrupts = map(int, counts[:8])
            yield user + nice + system + sum(interrupts)


def _busy_with_others() -> float:
    before = _started
    if before is None:
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    time.sleep(max(0.0, _SHORTEST - (time.monotonic() - before.clock)))
    now = _moment()
    assert now is not None
    return max(0.0, (now.used - before.used) - (now.own - before.own)) / (now.clock - before.clock)


_started = _moment()
