"""Shots in front of the prompts of some training steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.training.batches import Batches
from ofa.training.config import TrainingConfig
from tests.ofa.training.test_loop import EXAMPLES, OPEN, OPEN_EXAMPLES, TASK


@pytest.mark.parametrize(("task", "examples"), [(TASK, EXAMPLES), (OPEN, OPEN_EXAMPLES)], ids=["labels", "open"])
def test_a_demonstrated_step_has_other_shots_in_front_as_a_test_has(tiny_model, task, examples):
    """The same examples and targets as without; in front stand two shots of other batches, as the scorer puts them."""
    encoder = Encoder(tiny_model[1], task, None)
    plain, shown = (
        Batches(encoder, examples, TrainingConfig(batch_size=1, demonstrated_steps=share)) for share in (0.0, 1.0)
    )
    fronts = {
        tuple(encoder.encode_demonstrations([one, other])): {one, other}
        for one in examples
        for other in examples
        if one is not other
    }
    for step in range(2 * len(examples)):
        [bare], [long] = plain.of(step), shown.of(step)
        own = examples[plain.data.index(bare)]
        rest = encoder.encode_prompt(own.text, demonstrations=[0])
        assert replace(long, prompt=bare.prompt) == bare
        assert long.prompt[-len(rest) :] == tuple(rest)
        assert own not in fronts[long.prompt[: -len(rest)]]


def test_the_share_of_demonstrated_steps_is_as_set_and_follows_the_seed(tiny_model):
    """Within three standard deviations of 200 draws at 0.3, on the same steps in a second run."""
    encoder = Encoder(tiny_model[1], TASK, None)
    runs = [Batches(encoder, EXAMPLES, TrainingConfig(demonstrated_steps=0.3, seed=seed)) for seed in (1, 1, 2)]
    demonstrated = [[not set(batches.of(step)) <= set(batches.data) for step in range(200)] for batches in runs]
    assert abs(sum(demonstrated[0]) - 60) < 3 * (200 * 0.3 * 0.7) ** 0.5
    assert demonstrated[0] == demonstrated[1] != demonstrated[2]


def test_a_chat_has_no_turns_for_demonstrations(tiny_model):
    """Refused before the first step, not in the middle of a run."""
    encoder = Encoder(tiny_model[1], replace(TASK, chat=True), None)
    with pytest.raises(InputError, match="demonstrations are not turns of a chat"):
        Batches(encoder, EXAMPLES, TrainingConfig(demonstrated_steps=0.5))
