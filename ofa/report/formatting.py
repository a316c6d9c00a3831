"""Format the numbers of a report: percent, points, seconds, bytes."""

from __future__ import annotations

from datetime import UTC, datetime

from ofa.report.statistics import Interval, Spread

NOTHING = "–"


def percent(share: float) -> str:
    """A share between 0 and 1 in percent, one decimal."""
    return f"{100 * share:.1f}"


def percent_spread(spread: Spread | None) -> str:
    """Mean ± standard deviation in percent; only the mean of a single number."""
    if spread is None:
        return NOTHING
    return percent(spread.mean) + (f" ± {percent(spread.deviation)}" if spread.deviation is not None else "")


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign unless it is zero."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def points_interval(interval: Interval | None) -> str:
    """Both ends of an interval in percentage points."""
    return f"[{points(interval.low)}, {points(interval.high)}]" if interval else ""


def seconds(value: float) -> str:
    """A duration: milliseconds below a second, minutes from ten minutes."""
    if value == 0:
        return "0 s"
    if value < 1:
        return f"{_short(1000 * value)} ms"
    if value < 600:
        return f"{_short(value)} s"
    return f"{_short(value / 60)} min"


def size(count: float) -> str:
    """A number of bytes with a decimal prefix."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{_short(count / power)} {unit}"
    return f"{count:.0f} B"


def integer(count: float) -> str:
    """A number without decimals, with separated thousands."""
    return f"{count:,.0f}"


def ratio(value: float) -> str:
    """A factor with two decimals."""
    return f"{value:.2f} ×"


def moment(timestamp: str) -> str:
    """An ISO 8601 time to the minute, in UTC; any other text unchanged."""
    try:
        return datetime.fromisoformat(timestamp).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return timestamp


def plural(count: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1] if names else ""]))


def _short(value: float) -> str:
    """At least two digits: one decimal below ten."""
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
