"""A model that accelerate spreads over devices is compared like any other; here there is one device to spread over."""

from __future__ import annotations

import pytest

from ofa.comparison.cell import CellRunner
from ofa.errors import InputError
from ofa.models.load import load_model
from tests.ofa.comparison.conftest import QUICK, but_for_times


def test_a_spread_model_gives_the_same_results(tiny_folder, make_plan):
    plan = make_plan(methods={"icl": None, "norm-tuning": QUICK})
    whole, spread = (CellRunner(load_model(str(tiny_folder), device_map=given)) for given in (None, "auto"))
    for cell in plan.cells:
        first, second = (runner.run(plan.job(cell)) for runner in (whole, spread))
        assert first.intact
        assert second.intact
        assert first.record.done
        assert but_for_times(second.record) == but_for_times(first.record)


def test_a_gguf_file_is_not_spread(tiny_gguf):
    with pytest.raises(InputError, match="GGUF file, which is loaded on one device; leave out the device map"):
        load_model(str(tiny_gguf), device_map="auto")
