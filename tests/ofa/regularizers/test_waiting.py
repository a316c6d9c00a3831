"""A measured step asks nothing of the device: an answer would be waited for, and cannot be had in a CUDA graph.

A CPU answers at once; what shows here is whether anything asks.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ofa
from ofa.regularizers.closed_form import attention_interface
from tests import families
from tests.device import DEVICE
from tests.ofa.traces import EVERY

QUESTIONS = ("equal", "_local_scalar_dense", "is_nonzero", "item", "nonzero", "allclose", "unique", "masked_select")
"""Operations whose results depend on data, or are it."""

FROM_THE_HOST = ("lift", "lift_fresh")
"""What a tensor made of Python numbers begins as, before it is copied to its device."""


class Asked(TorchDispatchMode):
    """Counts operations that wait for a device, or that bring something there from the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        moved = name in ("_to_copy", "copy_") and (kwargs or {}).get("device", args[0].device) != args[0].device
        if name in QUESTIONS + FROM_THE_HOST or moved:
            self.found[name] += 1
        return result


def asked(model: nn.Module, given: dict[str, Any], reg: Any = None) -> Counter[str]:
    """What forward and backward pass ask."""
    with Asked() as mode:
        loss = model(**given).logits.float().square().mean()
        (loss if reg is None else loss + reg.penalty()).backward()
    return mode.found


def tuned(name: str, padded: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A family's model whose norms are tuned, and a batch without labels."""
    model = families.build(name)
    ofa.tune_norms(model)
    given = {**families.inputs(name, sequences=2, tokens=4), "use_cache": False}
    given.pop("labels")
    if padded:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][1, -1] = 0
    return model, given


CASES = {
    **EVERY,
    "every step of three": {"estimator": "exact", "every": 3},
    "no radial term": {"estimator": "exact", "radial": "none"},
    "step ratio": {"sharpness": 0.0},
    "last token": {"estimator": "exact", "tokens": "last"},
}


@pytest.mark.parametrize(
    ("name", "padded"), [("llama", False), ("llama", True), ("gpt2", True), ("granite", False), ("gemma2", True)]
)
@pytest.mark.parametrize("case", CASES)
def test_a_measured_step_asks_nothing_of_the_device(name: str, padded: bool, case: str) -> None:
    """After an optimizer's step, which changes the scales; nothing but what the model asks of its own accord."""
    model, given = tuned(name, padded)
    own = asked(model, given)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with ofa.fused_regularizers(model, **CASES[case]) as reg:
        for times in range(3):
            found = asked(model, given, reg)
            if times:
                assert found - own == Counter()
            optimizer.step()


@pytest.mark.parametrize("padded", [False, True])
def test_while_a_graph_is_captured_nothing_is_asked_at_all(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a mask that the model was given, of which nothing is known: it is not taken for causal then."""
    model, given = tuned("llama", padded=False)
    if padded:
        given["attention_mask"] = torch.ones(2, 1, 4, 4, device=DEVICE).tril().bool()
    own = asked(model, given)
    with ofa.fused_regularizers(model, estimator="exact") as reg:
        with monkeypatch.context() as patch:
            patch.setattr(attention_interface, "capturing", lambda tensor: True)
            assert asked(model, given, reg) - own == Counter()
        captured = reg.penalty().detach()
        asked(model, given, reg)
        torch.testing.assert_close(reg.penalty().detach(), captured)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_is_remembered_of_a_mask_is_what_one_would_see(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding on either side, and a mask that is not causal."""
    model, given = tuned("llama", padded=False)
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    given["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]], device=DEVICE)
    own, found = attention_interface._is_causal, []

    def both(mask: Tensor) -> bool:
        # Nothing is known of a copy.
        found.append((own(mask), own(mask.clone())))
        return found[-1][0]

    monkeypatch.setattr(attention_interface, "_is_causal", both)
    with ofa.fused_regularizers(model, estimator="exact"):
        model(**given)
        assert found
        assert all(pair == (True, True) for pair in found)
        found.clear()
        whole = torch.ones(2, 1, 4, 4, dtype=torch.bool, device=DEVICE)
        given["attention_mask"] = whole if implementation == "sdpa" else torch.zeros_like(whole, dtype=torch.float32)
        model(**given)
        assert found
        assert all(pair == (False, False) for pair in found)
