"""A loop that lacks a line is warned once, with the line; a complete loop is not."""

from __future__ import annotations

import logging

import pytest
import torch

import ofa

TUNE = "params = ofa.tune_norms(model)"
ADD = "loss = model(**batch).loss + reg.penalty()"


@pytest.fixture
def batch():
    ids = torch.arange(3, 15).reshape(2, 6)
    return {"input_ids": ids, "labels": ids}


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ofa.regularizers.reminders"]


def penalty(reg):
    reg.penalty()


def measurements(reg):
    assert reg.measurements.step_ratio is not None


def nothing(reg):
    pass


@pytest.mark.parametrize(
    ("tunes", "uses", "options", "expected"),
    [
        (True, penalty, {}, []),
        (True, measurements, {}, []),
        (True, nothing, {"into_loss": True}, []),
        (False, penalty, {}, [TUNE]),
        (True, nothing, {}, [ADD]),
        (False, nothing, {}, [TUNE, ADD]),
    ],
)
@pytest.mark.parametrize("passes", [1, 9])
def test_forgotten_lines_are_named_once(tiny_model, batch, caplog, tunes, uses, options, expected, passes):
    """For any length of the loop, at the latest at its end."""
    model = tiny_model[0].cpu()
    if tunes:
        ofa.tune_norms(model)
    with (
        caplog.at_level(logging.WARNING, logger="ofa"),
        ofa.fused_regularizers(model, estimator="hutchinson", **options) as reg,
    ):
        for _ in range(passes):
            model(**batch)
            uses(reg)
    messages = told(caplog)
    assert len(messages) == len(expected)
    assert all(line in message for line, message in zip(expected, messages, strict=True))


def test_passes_without_gradients_warn_of_nothing(tiny_model, batch, caplog):
    """A model that is only measured or evaluated does not train."""
    model = tiny_model[0].cpu()
    with (
        caplog.at_level(logging.WARNING, logger="ofa"),
        ofa.fused_regularizers(model, estimator="hutchinson") as reg,
        torch.no_grad(),
    ):
        model(**batch)
        with reg.measuring():
            model(**batch)
    assert told(caplog) == []
