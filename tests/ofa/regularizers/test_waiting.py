"""A measured step never syncs with the device, which would wait, and is impossible in a CUDA graph.

Checked on the CPU by the operations that would sync on a GPU.
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
"""Operations that read values, or whose shapes depend on them."""

FROM_THE_HOST = ("lift", "lift_fresh")
"""Operations by which a tensor is made from Python numbers, before the copy to its device."""


class Asked(TorchDispatchMode):
    """Counts operations that sync with a device, or copy to it from host memory."""

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
    """Count the syncs of a forward and backward pass."""
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


# Full product: each case takes another path through the estimators, and so does each kind of mask and norm.
@pytest.mark.parametrize(("name", "padded"), [("llama", True), ("gpt2", True), ("granite", False), ("gemma2", True)])
@pytest.mark.parametrize("case", CASES)
def test_a_measured_step_does_not_sync(name: str, padded: bool, case: str) -> None:
    """After an optimizer step, which changes the scales; only the model's own syncs are allowed."""
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
def test_capturing_a_cuda_graph_does_not_sync(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a mask from the caller, which then counts as not causal."""
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
def test_cached_causality_equals_the_masks_own(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding on either side, and a mask that is not causal."""
    model, given = tuned("llama", padded=False)
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    given["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]], device=DEVICE)
    own, found = attention_interface._is_causal, []

    def both(mask: Tensor) -> bool:
        # A copy is not in the cache.
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
