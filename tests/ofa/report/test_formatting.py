"""Numbers as a reader sees them."""

from __future__ import annotations

import pytest

from ofa.report import formatting as shown
from ofa.report.statistics import Interval, Spread


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (shown.percent_spread(Spread(0.7126, 0.0321, 3)), "71.3 ± 3.2"),
        (shown.percent_spread(Spread(1.0, None, 1)), "100.0"),
        (shown.percent_spread(None), "–"),
        (shown.points(0.0123), "+1.2"),
        (shown.points(-0.0123), "−1.2"),
        (shown.points(-0.0001), "0.0"),
        (shown.points_interval(Interval(-0.05, 0.001)), "[−5.0, +0.1]"),
        (shown.seconds(0), "0 s"),
        (shown.seconds(0.0042), "4.2 ms"),
        (shown.seconds(0.48), "480 ms"),
        (shown.seconds(3.25), "3.2 s"),
        (shown.seconds(599), "599 s"),
        (shown.seconds(750), "12 min"),
        (shown.size(0), "0 B"),
        (shown.size(2304), "2.3 kB"),
        (shown.size(1.45e9), "1.4 GB"),
        (shown.integer(35136), "35,136"),
        (shown.ratio(1.372), "1.37 ×"),
        (shown.plural(1, "seed"), "1 seed"),
        (shown.plural(1200, "cell"), "1,200 cells"),
        (shown.listed([]), ""),
        (shown.listed(["a"]), "a"),
        (shown.listed(["a", "b", "c"]), "a, b and c"),
        (shown.moment("2026-11-21T19:30:05+01:00"), "2026-11-21 18:30 UTC"),
        (shown.moment("yesterday"), "yesterday"),
        (shown.moment(""), ""),
    ],
)
def test_a_number_is_shown_with_its_unit(given, text):
    assert given == text
