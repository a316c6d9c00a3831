"""What only the kernels of mlp_trace have: activations, halves of one projection, a model's own hidden, constants."""

from __future__ import annotations

import pytest
import torch

from ofa_kernels import reference
from ofa_kernels.ops.mlp_trace import mlp_trace
from tests.ofa_kernels.calls import DEVICE, Call, draw, weights_like
from tests.ofa_kernels.test_kernels import assert_close, relative_error, roundings

OUTPUTS = ("stack", "trace")

over_activations = pytest.mark.parametrize("activation", reference.ACTIVATIONS)
over_kinds = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def tensors(gated, shape=(3, 40), dtype=torch.float32):
    """gate, up, gate_trace, up_trace; and the shifts by name."""
    gate, up = 2 * draw(*shape, seed=1), draw(*shape, seed=2)
    vectors = [draw(shape[-1], dtype=torch.float32, seed=i) for i in range(3, 7)]
    gate_trace, up_trace, gate_shift, up_shift = (x if gated or i in (0, 2) else None for i, x in enumerate(vectors))
    inputs = gate.to(dtype), up.to(dtype) if gated else None, gate_trace, up_trace
    return inputs, {"gate_shift": gate_shift, "up_shift": up_shift}


def trace_call(inputs, **settings):
    return Call(mlp_trace, reference.mlp_trace, inputs, OUTPUTS, settings)


@over_activations
@over_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_activation(activation, gated, dtype):
    inputs, shifts = tensors(gated, dtype=dtype)
    assert_close(trace_call(inputs, activation=activation, **shifts), 40, dtype)


@over_activations
@over_kinds
def test_pre_activations_of_any_size(activation, gated):
    """Nothing overflows on the way; where φ is flat or straight, its derivatives are exactly that."""
    sizes = torch.tensor([0.0, 1e-30, 1e-4, 0.5, 3.0, 8.0, 20.0, 90.0, 1e3, 1e4])
    gate = torch.cat((sizes, -sizes)).to(DEVICE)
    inputs, shifts = tensors(gated, (1, 20))
    case = trace_call((gate.expand(1, 20), *inputs[1:]), activation=activation, **shifts)
    actual, oracle = case.run(mlp_trace).tensors(), case.run(reference.mlp_trace, dtype=torch.float64).tensors()
    for name, value in actual.items():
        # Element by element, so that large ones hide nothing.
        error = (value.double() - oracle[name].double()).abs()
        assert (error <= 2e-6 * oracle[name].double().abs().clamp_min(1.0)).all(), name


@over_activations
def test_not_a_number_stays_not_a_number(activation):
    gate = torch.tensor([[1.0, float("nan")]], device=DEVICE)
    stack, trace = mlp_trace(gate, None, torch.ones(2, device=DEVICE), activation=activation)
    assert stack[:, 0, 0].isfinite().all()
    assert stack[0, 0, 1].isnan()
    assert activation == "relu" or trace.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_halves_of_one_projection(dtype):
    """Columns are dense, rows two widths apart; the gradients are those of separate tensors."""
    (gate, up, *traces), _ = tensors(True, (2, 3, 40), dtype)
    both = torch.cat((gate, up), -1).requires_grad_()
    halves = both.chunk(2, -1)
    apart = [x.detach().requires_grad_() for x in (gate, up)]
    outputs, expected = (mlp_trace(*pair, *traces, activation="silu") for pair in (halves, apart))
    grads = [weights_like(output, seed=i) for i, output in enumerate(outputs)]
    (found,) = torch.autograd.grad(outputs, both, grads)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert torch.equal(found, torch.cat(torch.autograd.grad(expected, apart, grads), -1))


@pytest.mark.parametrize("which", [0, 1], ids=["gate", "up"])
def test_rows_of_gate_and_up_are_as_far_apart_as_each_has_them(which):
    inputs, _ = tensors(True)
    apart = [torch.cat((x, x), -1)[:, :40] if i == which else x for i, x in enumerate(inputs)]
    dense, found = (trace_call(given, activation="silu") for given in (inputs, apart))
    expected, actual = dense.run(mlp_trace).tensors(), found.run(mlp_trace).tensors()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@over_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_models_own_hidden_passes_through_to_the_bit(gated, dtype):
    """It gets no gradient of its own; gate and up get those of the formula."""
    inputs, shifts = tensors(gated, (2, 3, 40), dtype)
    hidden = draw(2, 3, 80, dtype=dtype, seed=9)[..., :40].requires_grad_()
    without = trace_call(inputs, activation="silu", **shifts)
    given = trace_call(inputs, activation="silu", hidden=hidden, **shifts)
    alone, behind = without.run(mlp_trace), given.run(mlp_trace)
    assert torch.equal(behind.outputs["stack"][0], hidden)
    assert torch.equal(behind.outputs["stack"][1], alone.outputs["stack"][1])
    assert torch.equal(behind.outputs["trace"], alone.outputs["trace"])
    assert all(torch.equal(a, b) for a, b in zip(behind.gradients, alone.gradients, strict=True))
    constants = [None if x is None else x.detach() for x in inputs]
    assert not mlp_trace(*constants, hidden=hidden, activation="silu")[0].requires_grad


@over_kinds
def test_a_gradient_of_the_traces_alone(gated):
    """What a sharpness measure asks for: the pre-activations are constants, and the stack has no gradient."""
    (gate, up, *traces), _ = tensors(gated, (5, 70))
    found = []
    for function, dtype in ((mlp_trace, torch.float32), (reference.mlp_trace, torch.float64)):
        wide = [None if x is None else x.to(dtype) for x in (gate, up)]
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in traces]
        _, trace = function(*wide, *leaves, activation="gelu")
        found.append(torch.autograd.grad(trace, [x for x in leaves if x is not None], weights_like(trace, seed=7)))
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) <= roundings(70, torch.float32)


def test_a_gradient_of_the_stack_alone_is_none_for_the_traces():
    (gate, up, *traces), _ = tensors(True)
    leaves = [x.requires_grad_() for x in (gate, *traces)]
    stack, _ = mlp_trace(gate, up, *traces, activation="silu")
    grads = torch.autograd.grad(stack.sum(), leaves, allow_unused=True)
    assert [grad is None for grad in grads] == [False, True, True]


def test_no_rows_have_traces_of_zero_gradient():
    (gate, up, *traces), _ = tensors(True, (0, 8))
    leaves = [x.requires_grad_() for x in traces]
    _, trace = mlp_trace(gate, up, *traces, activation="silu")
    assert all(torch.equal(grad, torch.zeros(8, device=DEVICE)) for grad in torch.autograd.grad(trace.sum(), leaves))


def test_traces_and_shifts_of_any_stride_and_dtype():
    inputs, shifts = tensors(True)
    vectors = [*inputs[2:], *shifts.values()]
    apart = [torch.stack((x, x), -1)[:, 0] for x in vectors]
    expected, found = (mlp_trace(*inputs[:2], *given, activation="silu") for given in (vectors, apart))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    narrow = [x.half().requires_grad_() for x in vectors[:2]]
    _, trace = mlp_trace(*inputs[:2], *narrow, activation="silu")
    assert {grad.dtype for grad in torch.autograd.grad(trace.sum(), narrow)} == {torch.float16}


@pytest.mark.parametrize("name", ["gate_shift", "up_shift"])
def test_a_shift_that_requires_a_gradient_is_refused(name):
    """Leaving its gradient out would be wrong without a word."""
    inputs, shifts = tensors(True)
    shifts[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} requires a gradient"):
        mlp_trace(*inputs, **shifts, activation="silu")
    with torch.no_grad():
        mlp_trace(*inputs, **shifts, activation="silu")


def test_an_unknown_activation_is_refused():
    inputs, _ = tensors(True)
    with pytest.raises(ValueError, match="not 'swish'"):
        mlp_trace(*inputs, activation="swish")
