"""How many CPU threads to compute with: as many as there are cores that nothing else uses.

Threads that wait for one another lose a whole time slice whenever one of them shares its core with another program: two
threads on two busy cores take a step in several times the time of one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SHORTEST = 0.2  # seconds to look at least; the kernel counts in hundredths
_ROOT = Path("/")


@dataclass(frozen=True)
class Cores:
    """The cores this process may use, the quota of its container (or None), and how many of them others keep busy."""

    allowed: int
    quota: float | None
    busy: float

    @property
    def free(self) -> int:
        """Whole cores to compute on, at least one."""
        limit = self.allowed if self.quota is None else min(self.allowed, self.quota)
        return max(1, round(min(limit, self.allowed - self.busy)))


def usable_cores() -> Cores:
    """The cores as they are now; what others use is a mean since this module was imported."""
    return Cores(len(_allowed()), quota(), _busy_with_others())


def threads_from_environment() -> int | None:
    """OMP_NUM_THREADS, which says for any program how many threads it may have; None where it is not set."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else None


def use_threads(threads: int | None) -> Cores | None:
    """Let PyTorch compute with so many threads, or where None with OMP_NUM_THREADS, or with as many as are free.

    Returns the cores where they decided.
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
    """The cores that the control groups of this process leave it, the least of those above it; None without a limit."""
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
            # A container may see its group as the top, and the path that the machine has for it.
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
    """Seconds so far: on the clock, of processor time of the allowed cores, and of this process's own part of it."""

    clock: float
    used: float
    own: float


def _moment() -> _Moment | None:
    """None where the system does not count, which is everywhere but on Linux."""
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
