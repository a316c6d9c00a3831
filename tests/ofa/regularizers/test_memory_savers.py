"""Activation checkpointing of every kind, offloaded tensors and accumulation change no estimator's gradient."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import ofa
from tests import families, oracle
from tests.cases import over_pairs
from tests.ofa.traces import EVERY
from tests.ofa.trainers import without_dropout

BRANCHES = ["llama", "gpt2", "phi", "falcon", "falcon_two_norms", "qwen3", "gpt_neox", "opt", "cohere", "phi3"]
"""Gated and plain, parallel with one norm and two, norms on heads, fused and interleaved projections, sums in place."""


def tuned(name: str) -> nn.Module:
    """The family's model in float64 and training mode, where only norm scales train, so that traces are exact."""
    model = without_dropout(families.build(name)).double().train()
    ofa.tune_norms(model)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def by_the_model(model: nn.Module) -> None:
    model.gradient_checkpointing_enable()


def by_hand(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def by_wrappers(model: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    layers = set(layers_of(model))
    apply_activation_checkpointing(model, check_fn=lambda module: module in layers)


def selectively(model: nn.Module) -> None:
    """Keep attention's output and recompute the rest."""
    aten = torch.ops.aten
    # On a GPU, float64 attention is made of plain operations: keep the softmax.
    kept = (aten._scaled_dot_product_flash_attention_for_cpu.default, aten._safe_softmax.default)

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    for layer in layers_of(model):
        layer.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, layer.forward, use_reentrant=False, context_fn=contexts
        )


def by_hand_with_gradients_of_inputs(model: nn.Module) -> None:
    model.enable_input_require_grads()
    by_hand(model)


def passed_around(value: Tensor) -> Tensor:
    """Unpacking returns a copy of the tensor."""
    return value.detach().clone()


SAVERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "save_on_cpu": save_on_cpu,
    "copies": lambda: saved_tensors_hooks(passed_around, passed_around),
}


def accumulated(
    name: str, prepare: Callable[[nn.Module], None] | None, saver: Callable[[], Any] = nullcontext, *, kind: str
) -> list[Tensor]:
    """Gradients of two passes of different lengths, one with padding; both backwards run after both forwards."""
    model = tuned(name)
    with ofa.fused_regularizers(model, 1.0, 1.0, **EVERY[kind]) as reg:
        if prepare is not None:
            prepare(model)
        losses = []
        for seed, tokens in ((0, 6), (1, 5)):
            given = oracle.batch(name, tokens=tokens, seed=seed)
            mask = torch.ones_like(given["input_ids"])
            mask[0, 4:] = 0
            with saver():
                losses.append(model(**given, attention_mask=mask).loss + reg.penalty())
        for loss in losses:
            (loss / 2).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@functools.cache
def plainly(name: str, kind: str) -> list[Tensor]:
    gradients = accumulated(name, None, kind=kind)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-2
    return gradients


def check(found: list[Tensor], name: str, kind: str) -> None:
    for one, other in zip(found, plainly(name, kind), strict=True):
        # The recomputation does the same operations in the same order; only sums of gradients may change their order.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "prepare"),
    [*((name, by_the_model) for name in BRANCHES), *product(("gpt2", "falcon"), (by_hand, by_wrappers))],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_checkpoints_leave_exact_traces_exact(name: str, prepare: Callable[[nn.Module], None]) -> None:
    """Taps inside a branch see the recomputation too, and must collect the same."""
    check(accumulated(name, prepare, kind="exact, full"), name, "exact, full")


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", ["gpt2"])
def test_selective_checkpoints_change_nothing(name: str, kind: str) -> None:
    """Selective checkpoints, as in TRL: measuring runs the same operations both times."""
    check(accumulated(name, selectively, kind=kind), name, kind)


@over_pairs(name=["llama", "gpt2"], kind=EVERY, saver=SAVERS)
def test_saved_tensors_may_be_offloaded(name: str, kind: str, saver: str) -> None:
    """Our autograd functions save tensors by `save_for_backward`, so that hooks may return copies."""
    check(accumulated(name, None, SAVERS[saver], kind=kind), name, kind)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_checkpoints_may_be_offloaded(name: str, kind: str) -> None:
    """The restored stream is a copy; the recomputation still finds the probes and mask of its pass."""
    check(accumulated(name, by_the_model, SAVERS["copies"], kind=kind), name, kind)


def test_offloaded_checkpoints_by_hand_need_gradients_of_inputs() -> None:
    """A copied constant cannot be identified: PyTorch raises, and the model's own switch helps."""
    check(
        accumulated("llama", by_hand_with_gradients_of_inputs, SAVERS["copies"], kind="exact, full"),
        "llama",
        "exact, full",
    )
    with pytest.raises(CheckpointError, match="different number of tensors"):
        accumulated("llama", by_hand, SAVERS["copies"], kind="exact, full")


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_offloaded_activations_are_not_kept_alive(name: str, kind: str) -> None:
    """After a forward pass with offloaded saved tensors, nothing references a layer's activations."""
    model = tuned(name)
    seen: list[StorageWeakRef] = []
    for layer in layers_of(model):
        for module in layer.modules():
            module.register_forward_hook(lambda module, args, output: seen.extend(_storages(output)))
    with ofa.fused_regularizers(model, 1.0, 1.0, **EVERY[kind]) as reg, SAVERS["copies"]():
        loss = model(**oracle.batch(name)).loss + reg.penalty()
        gc.collect()
        assert len(seen) > 20
        assert sum(not storage.expired() for storage in seen) == 0
    loss.backward()


@over_pairs(name=["llama", "gpt2", "falcon"], kind=EVERY, checkpointing=[False, True])
def test_no_tensor_needs_the_garbage_collector(name: str, kind: str, checkpointing: bool) -> None:
    """A tensor in a reference cycle keeps its graph alive, and with it the memory that checkpoints free."""
    model = tuned(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with ofa.fused_regularizers(model, **EVERY[kind]) as reg:
        for _ in range(2):  # the first step also creates caches
            gc.collect()
            model(**oracle.batch(name))
            reg.penalty().backward()
        assert _collected_tensors() == []


def _collected_tensors() -> list[tuple[int, ...]]:
    """Shapes of the tensors that only the garbage collector frees."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [tuple(one.shape) for one in gc.garbage if isinstance(one, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def _storages(output: Any) -> Iterator[StorageWeakRef]:
    values = output if isinstance(output, tuple) else (output,)
    return (StorageWeakRef(value.untyped_storage()) for value in values if isinstance(value, Tensor))
