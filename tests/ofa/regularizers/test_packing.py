"""Packed rows are distinguished from padded and shifted ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ofa import InputError
from ofa.regularizers.into_loss import refuse_packed


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": ids([0, 1, 2, 0, 1])},
        {"position_ids": ids([0, 1, 2, 3], [0, 0, 1, 2])},
        {"position_ids": ids([0, 1, 0, 1, 0]), "attention_mask": ids([1, 1, 1, 1, 0])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5])},
    ],
    ids=["restart", "a sequence of one token", "padding behind", "flash attention"],
)
def test_packed_rows_are_refused(given: dict[str, Any]) -> None:
    """J of a packed row differs from the mean of its sequences' J."""
    with pytest.raises(InputError, match=r"several packed sequences.*turn packing and padding_free off"):
        refuse_packed(given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"position_ids": ids([0, 1, 2, 3], [5, 6, 7, 9])},
        {"position_ids": ids([1, 1, 0, 1, 2]), "attention_mask": ids([0, 0, 1, 1, 1])},
        {"position_ids": ids([0, 1, 2, 0, 0]), "attention_mask": ids([1, 1, 1, 0, 0])},
        {"position_ids": torch.zeros(3, 1, 4, dtype=torch.long)},
    ],
    ids=["none", "plain and offset", "padded on the left", "padded on the right", "positions in space"],
)
def test_other_positions_are_fine(given: dict[str, Any]) -> None:
    """Padding repeats positions too, and images have three position axes."""
    refuse_packed(given)
