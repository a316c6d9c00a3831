"""`torch.compile` before and after attaching: the same numbers as eager, nothing silently unmeasured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ofa
from tests.families import build, inputs

BACKEND = "eager"
"""Dynamo decides which hooks and numbers are in the code. One test has AOTAutograd too; inductor takes a minute."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def model_of(layers: int = 1) -> nn.Module:
    """A llama with few layers and tuned norms; tracing a layer takes seconds."""
    model: Any = build("llama")
    model.model.layers = model.model.layers[:layers]
    ofa.tune_norms(model)
    return model


def passes(
    call: Callable[..., Any], model: nn.Module, reg: ofa.Regularizers, count: int
) -> list[tuple[float, float, Tensor]]:
    """Loss, penalty and the gradient of their sum, of some passes."""
    found = []
    for _ in range(count):
        model.zero_grad()
        loss, penalty = call(**inputs("llama")).loss, reg.penalty()
        (loss + penalty).backward()
        gradient = torch.cat([p.grad.clone() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), penalty.item(), gradient))
    return found


def compiled(model: nn.Module) -> Callable[..., Any]:
    """The wrapper of `torch.compile`."""
    return torch.compile(model, backend=BACKEND)  # type: ignore[no-any-return]


def compiled_in_place(model: nn.Module) -> Callable[..., Any]:
    """`model.compile()`: the model itself, without a wrapper."""
    model.compile(backend=BACKEND)
    return model


def compiled_layers(model: Any) -> Callable[..., Any]:
    """Every decoder layer compiled separately."""
    for layer in model.model.layers:
        layer.compile(backend=BACKEND)
    return model  # type: ignore[no-any-return]


def same(
    found: list[tuple[float, float, Tensor]], expected: list[tuple[float, float, Tensor]], times: float = 1.0
) -> bool:
    """Equal up to another order of sums, 2⁻²³ times a few hundred terms; `times` that in gradients."""
    return all(
        one[0] == pytest.approx(other[0], rel=1e-5)
        and one[1] == pytest.approx(other[1], rel=1e-5)
        and torch.allclose(one[2], other[2], rtol=1e-4, atol=times * 1e-5 * float(other[2].abs().max()))
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(("compile_it", "layers"), [(compiled, 1), (compiled_in_place, 1), (compiled_layers, 2)])
def test_a_model_compiled_and_run_before_is_measured_as_an_eager_one(
    compile_it: Callable[[nn.Module], Callable[..., Any]], layers: int
) -> None:
    """Compiled code contains the hooks of inner modules: hooks attached later must not be silently skipped.

    Attaching and tuning take the wrapper of `torch.compile` for its model.
    """
    model = model_of(layers)
    with ofa.fused_regularizers(model, estimator="exact") as reg:
        expected = passes(model, model, reg, 2)
    plain = model(**inputs("llama")).logits
    call: Any = compile_it(model)
    call(**inputs("llama"))
    scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(p is q for p, q in zip(ofa.tune_norms(call), scales, strict=True)), "they were tuned already"
    reg = ofa.fused_regularizers(call, estimator="exact")
    assert same(passes(call, model, reg, 2), expected)
    reg.close()
    torch.testing.assert_close(call(**inputs("llama")).logits, plain)


def test_the_closed_form_is_one_graph() -> None:
    """The eager numbers without a graph break in the forward pass, or a recompilation after an optimizer step."""
    model = model_of()
    with ofa.fused_regularizers(model, estimator="exact") as reg:
        expected = passes(model, model, reg, 1)
    reg = ofa.fused_regularizers(model, estimator="exact")
    call = torch.compile(model, backend="aot_eager")
    assert same(passes(call, model, reg, 1), expected)
    assert dict(counters["graph_break"]) == {}
    first = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    passes(call, model, reg, 2)
    assert counters["stats"]["unique_graphs"] == first == 1
    reg.close()
    torch.testing.assert_close(call(**inputs("llama")).logits, model(**inputs("llama")).logits)


def test_probes_differ_from_pass_to_pass_inside_a_graph() -> None:
    """The pass number must not be a constant of the compiled code."""
    model = model_of(layers=1)
    with ofa.fused_regularizers(model, estimator="hutchinson") as reg:
        expected = passes(model, model, reg, 3)
    with ofa.fused_regularizers(model, estimator="hutchinson") as reg:
        found = passes(compiled(model), model, reg, 3)
    assert len({penalty for _, penalty, _ in expected}) == 3
    # A finite difference divides roundings by ε; 2.6 times the rounding of a sum was measured.
    assert same(found, expected, times=10)
