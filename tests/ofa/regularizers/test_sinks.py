"""Attention sinks do not count for the step ratio: the first token of a sequence, and tokens with a massive step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ofa
from ofa.regularizers.sinks import packed_starts
from tests import families
from tests.device import DEVICE

MASSIVE = 63
"""The token into which `with_sinks` writes a massive activation, as pretrained models do into their first."""


def with_sinks() -> nn.Module:
    """A Llama whose first MLP writes an update a thousand times as long as its others at every MASSIVE token."""
    model: Any = families.build("llama")
    seen: dict[str, Tensor] = {}
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda _, args, update: torch.where((seen["input_ids"] == MASSIVE).unsqueeze(-1), 1000 * update, update)
    )
    return model


def measured(model: nn.Module, given: dict[str, Tensor], tokens: str = "no-sinks") -> Any:
    given = {name: value.to(DEVICE) for name, value in given.items()}
    with ofa.fused_regularizers(model, 1.0, 0.0, tokens=tokens) as reg, torch.no_grad(), reg.measuring():
        model(**given)
        return reg.measurements


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("bos", [True, False], ids=["with a bos", "without"])
def test_the_first_real_token_and_massive_ones_are_left_out(bos: bool, side: str) -> None:
    """A beginning-of-sequence token or the first word, padding on either side, and a massive token further on."""
    start = [MASSIVE] if bos else [7]
    ids = torch.tensor([[*start, 5, 9, MASSIVE, 11, 12, 4]])
    expected = [[False, True, True, False, True, True, True]]
    mask = torch.ones_like(ids)
    if side != "none":
        sizes = (2, 0) if side == "left" else (0, 2)
        ids, mask = (nn.functional.pad(one, sizes) for one in (ids, mask))
        expected = [[False] * sizes[0] + expected[0] + [False] * sizes[1]]
    model = with_sinks()
    found = measured(model, {"input_ids": ids, "attention_mask": mask})
    assert found.counted.tolist() == expected
    all_tokens = measured(model, {"input_ids": ids, "attention_mask": mask}, "all")
    assert all_tokens.ratios.max() > 10 * found.ratios.max()


def test_the_first_token_of_every_packed_sequence_is_left_out() -> None:
    """Positions restart within a row; the first token of a model without massive ones is left out by its place."""
    given = {"input_ids": torch.tensor([[5, 9, 11, 12, 4, 8]]), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]])}
    assert measured(families.build("llama"), given).counted.tolist() == [[False, True, True, True, False, True]]


def test_a_sequence_of_one_token_keeps_it() -> None:
    """Its step ratio is that of its only token, not of nothing."""
    given = {
        "input_ids": torch.tensor([[MASSIVE, 5, 9], [7, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 3, [1, 0, 0]]),
    }
    alone = {"input_ids": torch.tensor([[7]])}
    model = with_sinks()
    together = measured(model, given)
    assert together.counted.tolist() == [[False, True, True], [True, False, False]]
    torch.testing.assert_close(together.step_norms[:, 1:], measured(model, alone, "all").step_norms)


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([0, 1, 2, 0, 1], None, [0, 0, 0, 1, 0]),
        ([3, 4, 5, 6, 7], None, [0, 0, 0, 0, 0]),
        ([1, 1, 0, 1, 2], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]),
    ],
    ids=["packed", "offset", "padded on the left"],
)
def test_packed_sequences_begin_where_positions_restart(
    positions: list[int], mask: list[int] | None, expected: list[int]
) -> None:
    """Padding repeats positions too and begins nothing."""
    given = {"position_ids": torch.tensor([positions])} | (
        {} if mask is None else {"attention_mask": torch.tensor([mask])}
    )
    found = packed_starts(given)
    assert found is not None
    assert found.int().tolist() == [expected]
