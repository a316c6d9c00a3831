"""Activation checkpointing recomputes layers; the recomputation must equal the first run."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import ofa
from ofa import InputError
from ofa.regularizers.measured_pass import MeasuredPass
from tests import oracle
from tests.device import DEVICE
from tests.ofa.traces import training_model

NAMES = ["llama", "phi", "gpt_neox", "falcon_two_norms", "olmo2", "bert"]
"""Sequential, parallel with one norm and two, in-place sums, branch norms, post norms."""


def gradients(model: nn.Module, loss: Tensor, **options: Any) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(oracle.scales(model).values()), allow_unused=True, **options)
    return [gradient for gradient in found if gradient is not None]


# The held gradient is not recomputed in any wiring; each term alone in one family.
@pytest.mark.parametrize(
    ("name", "weights", "gradient"),
    [
        *((name, (1.0, 1.0), "full") for name in NAMES),
        *(("llama", weights, "full") for weights in ((1.0, 0.0), (0.0, 1.0))),
        *((name, (1.0, 1.0), "preconditioner") for name in ("llama", "phi", "bert")),
    ],
)
def test_accumulated_passes_recompute_their_own_probes(name: str, weights: tuple[float, float], gradient: str) -> None:
    """Two forwards of different lengths, an evaluation and failures, then both backwards, one twice: same gradients.

    Layers are recomputed after other passes were measured, and need the probes and mask of their own pass.
    """
    results = []
    for checkpointing in (False, True):
        model = training_model(name, checkpointing=checkpointing)
        with ofa.fused_regularizers(model, *weights, estimator="hutchinson", gradient=gradient) as reg:
            penalties = []
            for seed, tokens in ((0, 6), (1, 5)):
                given = oracle.batch(name, tokens=tokens, seed=seed)
                mask = torch.ones_like(given["input_ids"])
                mask[0, 4:] = 0
                model(**given, attention_mask=mask)
                penalties.append(reg.penalty())
            with torch.no_grad():
                model(**oracle.batch(name, seed=2))
            # Not an invalid token: on a GPU that would abort the process.
            with pytest.raises(RuntimeError, match="indices"):
                model(input_ids=torch.full((1, 4), 0.5, device=DEVICE))
            handle = list(model.modules())[-1].register_forward_pre_hook(_fail)
            with pytest.raises(OSError, match="device lost"):
                model(**oracle.batch(name, seed=3))
            handle.remove()
            found = [gradients(model, penalties[0], retain_graph=True)]
            found += [gradients(model, penalty) for penalty in penalties]
        results.append([gradient for part in found for gradient in part])
    plain, checkpointed = results
    assert len(plain) == len(checkpointed)
    for one, other in zip(checkpointed, plain, strict=True):
        # The recomputation does the same operations in the same order; only sums of gradients may change their order.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert max(float(gradient.abs().max()) for gradient in plain) > 1e-2


def _fail(module: nn.Module, args: Any) -> None:
    raise OSError("device lost")


@pytest.mark.parametrize("granularity", ["sublayer", "layer"])
@pytest.mark.parametrize("gradient", ["preconditioner", "full"])
def test_checkpointing_changes_neither_loss_nor_gradient(granularity: str, gradient: str) -> None:
    """`into_loss=True` with checkpoints: the same loss and gradients."""
    results = []
    for checkpointing in (False, True):
        model = training_model("llama", checkpointing=checkpointing)
        options = {"estimator": "hutchinson", "gradient": gradient, "granularity": granularity, "into_loss": True}
        with ofa.fused_regularizers(model, 1.0, 1.0, **options):
            loss = model(**oracle.batch("llama")).loss
            results.append([loss.detach(), *gradients(model, loss)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=["both", "ratio", "sharpness"])
@pytest.mark.parametrize("gradient", ["preconditioner", "full"])
@pytest.mark.parametrize("name", ["llama", "phi", "bert"])
def test_recomputed_tensors_are_released(name: str, gradient: str, weights: tuple[float, float]) -> None:
    """After backward nothing references recomputed tensors, which would undo the saving."""
    model = training_model(name, checkpointing=True)
    seen: list[StorageWeakRef] = []
    with ofa.fused_regularizers(model, *weights, estimator="hutchinson", gradient=gradient) as reg:
        for module in model.base_model.modules():
            module.register_forward_hook(lambda module, args, output: _remember(seen, output))
        model(**oracle.batch(name))
        forward = len(seen)
        reg.penalty().backward()
        # A held gradient is not recomputed.
        assert (len(seen) > forward) == (gradient == "full" or weights[0] > 0)
        gc.collect()
        assert all(storage.expired() for storage in seen[forward:])


def _remember(seen: list[StorageWeakRef], output: Any) -> None:
    # Storages, because the graph's saved tensors share them.
    if isinstance(output, Tensor):
        seen.append(StorageWeakRef(output.untyped_storage()))


@pytest.mark.parametrize("inputs_with_gradients", [True, False])
def test_passes_are_forgotten_with_their_streams(inputs_with_gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a pass lives as long as its streams, including leaves and constants."""
    model = training_model("llama", checkpointing=True)
    ofa.tune_norms(model)
    if not inputs_with_gradients:
        model.disable_input_require_grads()
    recalled: list[weakref.ref[MeasuredPass]] = []
    again = MeasuredPass.again

    def remembering(measured: MeasuredPass) -> MeasuredPass:
        second = again(measured)
        recalled.append(weakref.ref(second))
        return second

    monkeypatch.setattr(MeasuredPass, "again", remembering)
    with ofa.fused_regularizers(model) as reg:
        for backward in (True, False, True):
            loss = model(**oracle.batch("llama")).loss + reg.penalty()
            assert recalled[-1]() is not None
            if backward:
                loss.backward()
            del loss
            reg._measured = None
        with torch.no_grad():
            model(**oracle.batch("llama"))
        gc.collect()
        assert [second() for second in recalled] == [None] * 3


def test_reentrant_checkpointing_is_refused() -> None:
    """It runs layers without gradients first, so the penalty would silently have none."""
    model = training_model("llama", checkpointing=True, reentrant=True)
    with (
        ofa.fused_regularizers(model),
        pytest.raises(InputError, match="reentrant activation checkpointing hides"),
    ):
        model(**oracle.batch("llama"))
