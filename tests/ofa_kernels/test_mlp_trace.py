"""The reference of mlp_trace against dense float64 Jacobians of whole MLP branches that are written out here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian
from torch.nn import functional as F

from ofa_kernels import reference

EPS = 1e-3
"""Large, so that σ² and the mean square differ: a formula that confuses them fails."""

PYTORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""Not the formulas of the reference."""

over_activations = pytest.mark.parametrize("activation", PYTORCH)
over_gated = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
over_norms = pytest.mark.parametrize("kind", ["rms", "1+w", "layer"])
over_biases = pytest.mark.parametrize("biased", [False, True], ids=["no biases", "biases"])
over_narrow = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Norm:
    """The norm in front of a branch, and what the closed form asks of it: γ, β, σ and G."""

    kind: str
    weight: Tensor
    shift: Tensor | None

    @property
    def scale(self) -> Tensor:
        return 1 + self.weight if self.kind == "1+w" else self.weight

    @property
    def metric(self) -> Tensor:
        """G = Γ² − c γγᵀ/d, c = 1 where the norm takes the mean off."""
        square = torch.diag(self.scale.square())
        if self.kind != "layer":
            return square
        return square - torch.outer(self.scale, self.scale) / len(self.scale)

    def centred(self, z: Tensor) -> Tensor:
        return z - z.mean(-1, keepdim=True) if self.kind == "layer" else z

    def sigma(self, z: Tensor) -> Tensor:
        return (self.centred(z).square().mean(-1) + EPS).sqrt()

    def scaled(self, z: Tensor) -> Tensor:
        """ñ = n − β."""
        return self.scale * self.centred(z) / self.sigma(z).unsqueeze(-1)

    def __call__(self, z: Tensor) -> Tensor:
        return self.scaled(z) if self.shift is None else self.scaled(z) + self.shift

    def of(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """What of W n + bias does not come from n − β."""
        parts = ([] if self.shift is None else [weight @ self.shift]) + ([] if bias is None else [bias])
        return sum(parts) if parts else None


def norm_of(kind: str, width: int, biased: bool, seed: int = 50) -> Norm:
    weight = 0.3 * draw(width, seed=seed)
    shift = 0.4 * draw(width, seed=seed + 1) if biased else None
    return Norm(kind, weight if kind == "1+w" else 1 + weight, shift)


def dense_traces(branch, norm: Norm, z: Tensor) -> Tensor:
    """tr(J_i P_i) of every token of (B, T, d): the own-token blocks of the Jacobian of the whole batch, times γ/σ."""
    blocks = jacobian(branch, z, vectorize=True).diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2)
    own = blocks.diagonal(dim1=0, dim2=1)  # (B, T, d): the diagonal of J_i
    return (own * norm.scale).sum(-1) / norm.sigma(z)


def closed_traces(norm: Norm, z: Tensor, trace: Tensor, along: Tensor) -> Tensor:
    """(tr(A G) − ⟨ñ, A ñ⟩/d)/σ² of every token, from tr(A G) and A ñ."""
    return (trace - (norm.scaled(z) * along).sum(-1) / z.shape[-1]) / norm.sigma(z).square()


def assert_dense(closed: Tensor, dense: Tensor) -> None:
    """Within the design's 1e-8: float64 but for the digits that a sum of both signs loses on the way to a small trace.

    The 1e-12 is for traces that are 0: what is left of terms of size 1 then is rounding. Anything wrong in the formula
    shows in the first digits.
    """
    assert dense.abs().max() > 0.1
    torch.testing.assert_close(closed, dense, rtol=1e-8, atol=1e-12)


@dataclass(frozen=True)
class Mlp:
    """F(z) = W_d (φ(W_g n + b_g) ⊙ (W_u n + b_u)) + b_d, or without u."""

    norm: Norm
    activation: str
    gate: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None] | None
    down: tuple[Tensor, Tensor | None]

    def projected(self, z: Tensor) -> list[Tensor | None]:
        return [None if layer is None else F.linear(self.norm(z), *layer) for layer in (self.gate, self.up)]

    def __call__(self, z: Tensor) -> Tensor:
        gate, up = self.projected(z)
        hidden = PYTORCH[self.activation](gate)
        return F.linear(hidden if up is None else hidden * up, *self.down)

    def closed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(F(z), tr(J_i P_i)) with what mlp_trace returns."""
        gate, up = self.projected(z)
        (hidden, tangent), trace = reference.mlp_trace(
            gate,
            up,
            self.constants(self.gate),
            None if self.up is None else self.constants(self.up),
            self.norm.of(*self.gate),
            None if self.up is None else self.norm.of(*self.up),
            activation=self.activation,
        )
        along = tangent @ self.down[0].T
        return F.linear(hidden, *self.down), closed_traces(self.norm, z, trace, along)

    def constants(self, layer) -> Tensor:
        """(W G W_d)_kk of every hidden unit."""
        return (layer[0] @ self.norm.metric @ self.down[0]).diagonal()


def mlp(kind="rms", activation="silu", gated=True, biased=False, width=6, inner=9) -> Mlp:
    def layer(rows, columns, seed):
        return 0.6 * draw(rows, columns, seed=seed), 0.4 * draw(rows, seed=seed + 1) if biased else None

    up = layer(inner, width, 12) if gated else None
    return Mlp(norm_of(kind, width, biased), activation, layer(inner, width, 10), up, layer(width, inner, 14))


@over_activations
@over_gated
@over_norms
@over_biases
def test_closed_form_is_the_dense_trace(activation, gated, kind, biased):
    branch, z = mlp(kind, activation, gated, biased), 1.5 * draw(2, 3, 6, seed=1)
    output, closed = branch.closed(z)
    assert_dense(closed, dense_traces(branch, branch.norm, z))
    torch.testing.assert_close(output, branch(z), rtol=1e-12, atol=1e-12)  # the same sums, in another order at most


@pytest.mark.parametrize("shifted", ["gate", "up"])
def test_a_bias_of_one_projection_alone_is_taken_off_that_one(shifted):
    plain, biased = mlp(), mlp(biased=True)
    projection = getattr(plain, shifted)[0], getattr(biased, shifted)[1]
    branch, z = replace(plain, **{shifted: projection}), draw(2, 3, 6, seed=1)
    assert_dense(branch.closed(z)[1], dense_traces(branch, branch.norm, z))


def inputs(activation: str, gated: bool, shifted: bool, rows=(2, 3), inner=5) -> list[Tensor | None]:
    """Positional arguments of mlp_trace that require gradients; pre-activations away from the kink of relu."""
    gate = draw(*rows, inner, seed=20)
    gate = gate + 0.2 * gate.sign()
    pairs = [
        (gate, True),
        (draw(*rows, inner, seed=21), gated),
        (draw(inner, seed=22), True),
        (draw(inner, seed=23), gated),
        (draw(inner, seed=24), shifted),
        (draw(inner, seed=25), shifted and gated),
    ]
    return [tensor.requires_grad_() if given else None for tensor, given in pairs]


@over_activations
@over_gated
@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifts"])
def test_gradients(activation, gated, shifted):
    """Of everything that depends on the norm's scale: pre-activations, the constants c, and the shifts."""
    arguments = inputs(activation, gated, shifted)
    given = [tensor for tensor in arguments if tensor is not None]

    def operation(*tensors):
        found = iter(tensors)
        filled = [None if argument is None else next(found) for argument in arguments]
        return reference.mlp_trace(*filled, activation=activation)

    assert gradcheck(operation, given)


@over_activations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_slope_is_that_of_pytorch_far_out_too(activation, dtype):
    """One formula for all of the axis: no overflow, no 0·∞, the tails of both sides, and relu's 0 at its kink."""
    x = torch.cat((torch.linspace(-30, 30, 601), torch.tensor([-6e4, -300.0, 0.0, 300.0, 6e4]))).to(dtype)
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(PYTORCH[activation](wide).sum(), wide)
    slope = reference.mlp_trace(x[:, None], None, torch.ones(1, dtype=dtype), activation=activation)[1]
    # Ten roundings or so of numbers up to 10 (the largest of them is x³ in front of an almost flat tanh).
    unit = torch.finfo(slope.dtype).eps
    torch.testing.assert_close(slope.double(), expected, rtol=0.0, atol=100 * unit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@over_gated
def test_a_given_hidden_is_returned_to_the_bit_with_the_gradient_of_the_formula(dtype, gated):
    """The model's own forward pass must not change, however it rounds; its graph is not needed for the gradient."""
    arguments = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs("silu", gated, True)]
    gate, up = arguments[:2]
    own = F.silu(gate) if up is None else F.silu(gate) * up
    other = (own * 1.01 - 0.003).detach().requires_grad_()
    results = [reference.mlp_trace(*arguments, hidden=x, activation="silu") for x in (None, other)]
    assert torch.equal(results[1][0][0], other)
    assert torch.equal(results[1][0][1], results[0][0][1])
    assert torch.equal(results[1][1], results[0][1])
    given = [x for x in arguments if x is not None]
    weights = draw(*results[0][0].shape, seed=30, dtype=dtype)
    grads = [torch.autograd.grad((stack * weights).sum() + trace.sum(), given) for stack, trace in results]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.autograd.grad(results[1][0].sum(), other, allow_unused=True) == (None,)


@over_activations
@over_gated
@over_narrow
def test_narrow_dtypes(activation, gated, dtype):
    """float32 inside: the trace is never rounded to 16 bits, and what is returned in 16 bits is rounded once."""
    inner = 96
    narrow = [None if x is None else x.detach().to(dtype) for x in inputs(activation, gated, True, (4,), inner)]
    wide = [None if x is None else x.double() for x in narrow]
    (hidden, tangent), trace = reference.mlp_trace(*narrow, activation=activation)
    (true_hidden, true_tangent), true_trace = reference.mlp_trace(*wide, activation=activation)
    assert hidden.dtype == tangent.dtype == dtype
    assert trace.dtype == torch.float32

    g, u, c_g, c_u, b_g, b_u = (0.0 if x is None else x.abs() for x in wide)
    u = 1.0 if not gated else u
    # The largest number on the way to φ' is x³ in gelu_tanh's, and 1 + |x| in the others; to φ it is x.
    slope, phi = 1 + g**3, g
    tangent_size, trace_size = slope * u * (g + b_g) + phi * (u + b_u), slope * u * c_g + phi * c_u
    # An activation and its slope take about twelve roundings, two products and a sum the rest; a sum of f terms
    # rounds ⌈log₂ f⌉ times. The one cast at the end is half a unit in the last place.
    unit, cast = 16 * torch.finfo(torch.float32).eps, 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).smallest_normal  # where float16 is denormal, its steps are as wide as here
    for actual, true, size in ((hidden, true_hidden, phi * u), (tangent, true_tangent, tangent_size)):
        assert ((actual.double() - true).abs() <= unit * size + cast * true.abs() + tiny).all()
    sums = 1 + math.ceil(math.log2(inner)) / 16
    assert ((trace.double() - true_trace).abs() <= sums * unit * trace_size.sum(-1)).all()


@over_gated
def test_rows_are_alone(gated):
    """A batch is its rows, to the bit, and the gradient of one row's trace stays in that row."""
    gate, up, *rest = inputs("silu", gated, True, (3, 4))
    stack, trace = reference.mlp_trace(gate, up, *rest, activation="silu")
    alone = reference.mlp_trace(gate[1, 2], None if up is None else up[1, 2], *rest, activation="silu")
    assert torch.equal(stack[:, 1, 2], alone[0])
    assert torch.equal(trace[1, 2], alone[1])
    for grad in torch.autograd.grad(trace[1, 2], [gate] if up is None else [gate, up]):
        own = torch.zeros_like(grad)
        own[1, 2] = grad[1, 2]
        assert grad[1, 2].abs().min() > 0
        assert torch.equal(grad, own)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (1, 1), (2, 3, 1)], ids=str)
@over_gated
def test_odd_shapes(shape, gated):
    arguments = inputs("gelu", gated, True, shape[:-1], shape[-1])
    stack, trace = reference.mlp_trace(*arguments, activation="gelu")
    assert stack.shape == (2, *shape)
    assert trace.shape == shape[:-1]
    assert stack.isfinite().all()
    assert trace.isfinite().all()


def test_inputs_are_left_as_they_were():
    tensors = [tensor.detach() for tensor in inputs("silu", True, True)]
    before = [tensor.clone() for tensor in tensors]
    reference.mlp_trace(*tensors, hidden=tensors[0], activation="silu")
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


X, C = torch.ones(2, 4), torch.ones(4)
REFUSED = {
    "activation": (lambda: reference.mlp_trace(X, X, C, C, activation="swish"), "silu, gelu, .*, not 'swish'"),
    "up without its trace": (
        lambda: reference.mlp_trace(X, X, C, activation="silu"),
        "up and up_trace belong together",
    ),
    "trace without its up": (lambda: reference.mlp_trace(X, None, C, C, activation="silu"), "belong together"),
    "shift without its up": (lambda: reference.mlp_trace(X, None, C, None, C, C, activation="silu"), "without up"),
    "up that broadcasts": (lambda: reference.mlp_trace(X, X[:1], C, C, activation="silu"), r"up \(1, 4\) .* \(2, 4\)"),
    "hidden": (lambda: reference.mlp_trace(X, None, C, hidden=C, activation="silu"), r"hidden \(4,\) .* \(2, 4\)"),
    "gate_trace": (lambda: reference.mlp_trace(X, X, X, C, activation="silu"), r"gate_trace \(2, 4\) .* width 4"),
    "up_trace": (lambda: reference.mlp_trace(X, X, C, C[:1], activation="silu"), r"up_trace \(1,\) .* width 4"),
    "gate_shift": (lambda: reference.mlp_trace(X, X, C, C, C[1:], activation="silu"), r"gate_shift \(3,\) .* width 4"),
    "up_shift": (lambda: reference.mlp_trace(X, X, C, C, C, C[1:], activation="silu"), r"up_shift \(3,\) .* width 4"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)
