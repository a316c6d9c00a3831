"""The references of attention_trace and attention_moments against attention branches that are written out here.

The branches are float64: loops over heads, rotary as complex numbers, a softmax by hand, and dense Jacobians of it all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from ofa_kernels.reference import HeadNorm, Rotary, attention_moments, attention_trace
from tests.ofa_kernels.test_mlp_trace import EPS, Norm, assert_dense, closed_traces, dense_traces, draw, norm_of

WIDTH, HEADS, SHARED, D, E = 10, 4, 2, 6, 4
"""d of the stream; query heads, key heads; widths of a query or key head and of a value head, which may differ."""
BATCH, T = 2, 5
SCALE = 0.7

over_norms = pytest.mark.parametrize("kind", ["rms", "1+w", "layer"])
over_biases = pytest.mark.parametrize("biased", [False, True], ids=["no biases", "biases"])
over_head_norms = pytest.mark.parametrize("head_norms", [False, True], ids=["", "q/k-norms"])
over_narrow = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@dataclass(frozen=True)
class Spin:
    """Rotary embedding: how many channel pairs turn, how they are laid out, and by what they are stretched."""

    pairs: int = 0
    interleaved: bool = False
    stretch: float = 1.0

    def turns(self, positions: Tensor) -> Tensor:
        """(B or 1, T, pairs), one complex number per pair."""
        frequencies = 0.4 ** torch.arange(self.pairs, dtype=torch.float64)
        angles = positions.double().unsqueeze(-1) * frequencies
        return torch.polar(torch.full_like(angles, self.stretch), angles)

    def __call__(self, heads: Tensor, positions: Tensor) -> Tensor:
        """R_i of every row of (B, H, T, D)."""
        if not self.pairs:
            return heads
        count = self.pairs
        x, y = heads[..., :count], heads[..., count : 2 * count]
        if self.interleaved:
            x, y = heads[..., : 2 * count : 2], heads[..., 1 : 2 * count : 2]
        turned = torch.complex(x, y) * self.turns(positions).unsqueeze(1)
        both = torch.stack((turned.real, turned.imag), -1 if self.interleaved else -2).flatten(-2)
        return torch.cat((both, heads[..., 2 * count :]), -1)

    def rotary(self, positions: Tensor) -> Rotary | None:
        turns = self.turns(positions)
        return Rotary(turns.real, turns.imag, self.interleaved) if self.pairs else None


SPINS = {
    "none": Spin(),
    "full": Spin(D // 2),
    "partial": Spin(D // 2 - 1),
    "interleaved": Spin(D // 2, interleaved=True),
    "partial, interleaved": Spin(D // 2 - 1, interleaved=True),
    "scaled": Spin(D // 2, stretch=1.3),
}
"""`scaled` multiplies cos and sin, as yarn does: R is no rotation then, and RᵀR is not 1."""


class Which:
    """Which key j a query i attends to, and how it is told to the operation.

    `rule(b, h, i, j)` is what is added to the score, None where i does not attend to j.
    """

    def __init__(self, rule, positions=None, mask=None, **told: Any) -> None:
        self.positions = torch.arange(T).unsqueeze(0) if positions is None else torch.tensor(positions)
        self.told = told if mask is None else {**told, "mask": mask(rule) if callable(mask) else mask}
        self.added = table(rule)


def table(rule, heads: int = HEADS) -> Tensor:
    """`rule` as a float mask (B, heads, T, T) with −inf."""
    rows = [[[[rule(b, h, i, j) for j in range(T)] for i in range(T)] for h in range(heads)] for b in range(BATCH)]
    values = [-math.inf if x is None else x for x in flat(rows)]
    return torch.tensor(values, dtype=torch.float64).view(BATCH, heads, T, T)


def flat(rows):
    return [x for row in rows for x in flat(row)] if isinstance(rows, list) else [rows]


def boolean(rule) -> Tensor:
    return table(rule, 1) > -math.inf


def floating(rule) -> Tensor:
    return table(rule)


def keys(real: list[list[int]]) -> Tensor:
    """(B, 1, 1, T): padding as a mask of the keys alone."""
    return torch.tensor(real, dtype=torch.bool).view(BATCH, 1, 1, T)


def attends(condition):
    return lambda b, h, i, j: 0.0 if condition(b, i, j) else None


LEFT, RIGHT = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
PACKS = [[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]]
causal = attends(lambda b, i, j: j <= i)
WHICH = {
    "causal": Which(causal, causal=True),
    "bidirectional": Which(attends(lambda b, i, j: True)),
    "window": Which(attends(lambda b, i, j: i - 2 < j <= i), causal=True, window=2),
    "window, bidirectional": Which(attends(lambda b, i, j: abs(i - j) < 3), window=3),
    "itself alone": Which(attends(lambda b, i, j: i == j), causal=True, window=1),
    "left padding": Which(
        attends(lambda b, i, j: j <= i and LEFT[b][j]),
        positions=[[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]],
        mask=keys(LEFT),
        causal=True,
    ),
    "right padding": Which(attends(lambda b, i, j: j <= i and RIGHT[b][j]), mask=keys(RIGHT), causal=True),
    "right padding, bidirectional": Which(attends(lambda b, i, j: RIGHT[b][j]), mask=keys(RIGHT)),
    "padded rows attend to nothing": Which(
        attends(lambda b, i, j: j <= i and RIGHT[b][j] and RIGHT[b][i]), mask=boolean
    ),
    "padding and window": Which(
        attends(lambda b, i, j: i - 3 < j <= i and LEFT[b][j]), mask=keys(LEFT), causal=True, window=3
    ),
    "packed": Which(
        attends(lambda b, i, j: j <= i and PACKS[b][i] == PACKS[b][j]),
        positions=[[0, 1, 0, 1, 2], [0, 0, 1, 2, 0]],
        mask=boolean,
        causal=True,
    ),
    "a token that does not see itself": Which(attends(lambda b, i, j: j < i or i == 0), mask=boolean),
    "added to the scores": Which(
        lambda b, h, i, j: -0.3 * (h + 1) * (i - j) + 0.1 * b if j <= i and LEFT[b][j] else None, mask=floating
    ),
    "added, and causal": Which(
        lambda b, h, i, j: 0.2 * (h - j) if j <= i else None,
        mask=0.2 * (torch.arange(HEADS).view(1, -1, 1, 1) - torch.arange(T)).double(),
        causal=True,
    ),
}


@dataclass(frozen=True)
class Branch:
    """F(z) = Σ_h W_o o_i + b_o: norm, projections, q/k-norms, rotary, masked softmax."""

    norm: Norm
    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    head_norms: dict[str, Tensor]
    spin: Spin
    which: Which

    def heads(self, name: str, n: Tensor) -> Tensor:
        return F.linear(n, self.weights[name], self.biases[name]).unflatten(-1, (COUNT[name], -1)).transpose(1, 2)

    def normed(self, name: str, heads: Tensor) -> Tensor:
        if name not in self.head_norms:
            return heads
        return self.head_norms[name] * heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt()

    def attention(self, z: Tensor) -> dict[str, Tensor]:
        """q̄, k̄ as they enter their norms; q, k as they enter the scores; v and o."""
        found = {name: self.heads(name, self.norm(z)) for name in COUNT}
        q, k = (self.spin(self.normed(name, found[name]), self.which.positions) for name in ("query", "key"))
        outputs = []
        for head in range(HEADS):
            shared = head * SHARED // HEADS
            scores = SCALE * torch.einsum("bid,bjd->bij", q[:, head], k[:, shared]) + self.which.added[:, head]
            seen = self.which.added[:, head] > -math.inf
            raised = torch.where(seen, scores.exp(), 0.0)
            total = raised.sum(-1, keepdim=True)
            outputs.append(raised / torch.where(total > 0, total, 1.0) @ found["value"][:, shared])
        entering = {"entering query": found["query"], "entering key": found["key"]}
        return {**entering, "query": q, "key": k, "value": found["value"], "output": torch.stack(outputs, 1)}

    def out(self, heads: Tensor) -> Tensor:
        """Σ_h W_o o of (B, H, T, E)."""
        return heads.transpose(1, 2).flatten(-2) @ self.weights["output"].T

    def __call__(self, z: Tensor) -> Tensor:
        return self.out(self.attention(z)["output"])

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """M_q, M_k and c_v of every query head, from the weights alone."""
        pieces = {name: self.weights[name].unflatten(0, (count, -1)) for name, count in COUNT.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in COUNT}
        for head in range(HEADS):
            out = self.weights["output"][:, head * E : (head + 1) * E]
            for name, count in COUNT.items():
                found[name].append(pieces[name][head * count // HEADS] @ self.norm.metric @ out)
        m_q, m_k, m_v = (torch.stack(found[name]) for name in COUNT)
        return m_q, m_k, m_v.diagonal(dim1=1, dim2=2).sum(-1)

    def closed(self, z: Tensor) -> Tensor:
        """tr(J_i P_i) with what attention_trace returns."""
        found = self.attention(z)
        tangent, trace = attention_trace(
            *(found[name] for name in ("query", "key", "value", "output")),
            *self.constants(),
            scale=SCALE,
            rotary=self.spin.rotary(self.which.positions),
            **{f"{name}_shift": self.shift(name) for name in COUNT},
            **{
                f"{name}_norm": HeadNorm(found[f"entering {name}"], weight, EPS)
                for name, weight in self.head_norms.items()
            },
            **self.which.told,
        )
        return closed_traces(self.norm, z, trace, self.out(tangent))

    def shift(self, name: str) -> Tensor | None:
        shift = self.norm.of(self.weights[name], self.biases[name])
        return None if shift is None else shift.view(COUNT[name], -1)


COUNT = {"query": HEADS, "key": SHARED, "value": SHARED}
EACH = {"query": D, "key": D, "value": E}


def attention(
    kind: str = "rms",
    biased: bool = False,
    spin: str = "full",
    head_norms: bool = False,
    which: str = "causal",
) -> Branch:
    weights = {name: 0.5 * draw(COUNT[name] * EACH[name], WIDTH, seed=i) for i, name in enumerate(COUNT)}
    return Branch(
        norm_of(kind, WIDTH, biased),
        weights | {"output": 0.5 * draw(WIDTH, HEADS * E, seed=3)},
        {name: 0.4 * draw(COUNT[name] * EACH[name], seed=i + 4) if biased else None for i, name in enumerate(COUNT)},
        {name: 1 + 0.3 * draw(D, seed=i + 7) for i, name in enumerate(("query", "key"))} if head_norms else {},
        SPINS[spin],
        WHICH[which],
    )


def stream(seed: int = 11) -> Tensor:
    return 1.5 * draw(BATCH, T, WIDTH, seed=seed)


@over_norms
@over_biases
@pytest.mark.parametrize("spin", SPINS)
@over_head_norms
def test_closed_form_is_the_dense_trace(kind, biased, spin, head_norms):
    """The algebra: every term of every kind of branch, with grouped heads and causal."""
    branch, z = attention(kind, biased, spin, head_norms), stream()
    assert_dense(branch.closed(z), dense_traces(branch, branch.norm, z))


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    "branch", [("rms", False, "full", False), ("layer", True, "partial", True)], ids=["Llama", "all options"]
)
def test_masks_enter_through_the_weights_alone(which, branch):
    branch, z = attention(*branch, which=which), stream()
    closed = branch.closed(z)
    assert_dense(closed, dense_traces(branch, branch.norm, z))
    nothing = (branch.which.added == -math.inf).all(-1).all(1)
    assert (closed[nothing] == 0).all()


@pytest.mark.parametrize("shifted", COUNT)
@over_head_norms
def test_a_bias_of_one_projection_alone_is_taken_off_that_one(shifted, head_norms):
    """Whisper's keys have no bias, Qwen's three have; each of the shifts may be missing."""
    branch, z = attention(head_norms=head_norms), stream()
    branch = replace(branch, biases=branch.biases | {shifted: attention(biased=True).biases[shifted]})
    assert_dense(branch.closed(z), dense_traces(branch, branch.norm, z))


@pytest.mark.parametrize("normed", ["query", "key"])
@over_biases
def test_a_norm_of_the_queries_or_of_the_keys_alone(normed, biased):
    branch, z = attention(biased=biased, head_norms=True), stream()
    branch = replace(branch, head_norms={normed: branch.head_norms[normed]})
    assert_dense(branch.closed(z), dense_traces(branch, branch.norm, z))


# What the operations are given, without a model around them.


def tensors(
    seed: int = 0, *, heads: int = HEADS, shared: int = SHARED, rows: int = T, batch: int = BATCH, **which: Any
) -> dict[str, Tensor]:
    """Inputs of attention_trace: q, k, v, the attention output, the constants, the shifts."""
    shapes = {
        "query": (batch, heads, rows, D),
        "key": (batch, shared, rows, D),
        "value": (batch, shared, rows, E),
        "query_trace": (heads, D, E),
        "key_trace": (heads, D, E),
        "value_trace": (heads,),
        "query_shift": (heads, D),
        "key_shift": (shared, D),
        "value_shift": (shared, E),
        "query_weight": (D,),
        "key_weight": (D,),
    }
    found = {name: draw(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    found["output"] = output_of(found["query"], found["key"], found["value"], **which)
    return found


def output_of(query: Tensor, key: Tensor, value: Tensor, mask=None, causal=False, window=None) -> Tensor:
    """The model's own attention; 0 where a query attends to nothing."""
    rows, heads = query.shape[-2], query.shape[1]
    allowed = torch.ones(rows, rows, dtype=torch.bool).tril() if causal else torch.ones(rows, rows, dtype=torch.bool)
    if window is not None:
        allowed = allowed & torch.ones_like(allowed).triu(1 - window)
    allowed = allowed if mask is None else allowed & mask
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, k, v, attn_mask=allowed, scale=SCALE).nan_to_num()


def ask(given: dict[str, Tensor], *, spin: Spin | None = None, shifted=False, normed=False, **settings: Any):
    """attention_trace of `tensors`; with norms, what enters them are the queries and keys of another seed."""
    positions = settings.pop("positions", torch.arange(given["query"].shape[2]).unsqueeze(0))
    options = {name: given[name] for name in ("query_shift", "key_shift", "value_shift")} if shifted else {}
    if normed:
        for name in ("query", "key"):
            entering = given.get(f"entering_{name}", given[name])
            options[f"{name}_norm"] = HeadNorm(entering, given[f"{name}_weight"], EPS)
    if spin is not None:
        rotary = spin.rotary(positions)
        wide = torch.promote_types(given["query"].dtype, torch.float32)
        options["rotary"] = Rotary(rotary.cos.to(wide), rotary.sin.to(wide), rotary.interleaved)
    return attention_trace(*(given[name] for name in NEEDED), scale=SCALE, **options, **settings)


@pytest.mark.parametrize(
    ("spin", "shifted", "normed", "which"),
    [
        (None, False, False, {"causal": True}),
        (Spin(2), False, False, {"causal": True}),
        (Spin(3, stretch=1.3), True, False, {"window": 2}),
        (Spin(2, interleaved=True), False, True, {"causal": True, "window": 2}),
        (Spin(2), True, True, {"causal": True, "mask": torch.tensor([False, True, True])}),
    ],
    ids=["plain", "rotary", "shifts", "norms", "all, and a query that attends to nothing"],
)
def test_gradients(spin, shifted, normed, which):
    """In everything that γ reaches: q, k, v, o, what enters the head norms, M_q, M_k, c_v, the shifts, their scale."""
    given = tensors(heads=2, shared=1, rows=3, batch=1, **which)
    if normed:
        given |= {f"entering_{name}": draw(*given[name].shape, seed=40) for name in ("query", "key")}
    names = [name for name in given if (shifted or "shift" not in name) and (normed or "weight" not in name)]

    def operation(*values):
        return ask(given | dict(zip(names, values, strict=True)), spin=spin, shifted=shifted, normed=normed, **which)

    assert gradcheck(operation, [given[name].requires_grad_() for name in names])


def moment_inputs(own_tangent: bool, rows: int = 4) -> list[Tensor | None]:
    """Arguments of attention_moments: any output, angle, turn and aim, not those of a model."""
    heads, shared = (BATCH, 2, rows), (BATCH, 1, rows)
    shapes = [(*heads, D), (*shared, D), (*shared, E), (*heads, E), (1, rows, 3), (*heads, 3), (*heads, D), (*heads, D)]
    found = [draw(*shape, seed=60 + i) for i, shape in enumerate(shapes)]
    return [*found[:-1], found[-1] if own_tangent else None]


MOMENT_WHICH = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": 2},
    "mask": {
        "causal": True,
        "mask": torch.tensor([[True, True, False, True], [False, True, True, True]])[:, None, None],
    },
    "added": {"mask": draw(4, 4, seed=80)},
}
over_tangents = pytest.mark.parametrize("own_tangent", [False, True], ids=["q", "tangent"])
over_moment_which = pytest.mark.parametrize("which", MOMENT_WHICH.values(), ids=MOMENT_WHICH)


@over_tangents
@over_moment_which
def test_moments_are_their_definitions(own_tangent, which):
    """One query at a time, in scalars, for any output, tangent and bilinear form, not only those of a model."""
    q, k, v, o, angle, turn, aim, t = arguments = moment_inputs(own_tangent)
    lse, mean, covariance = attention_moments(*arguments, scale=SCALE, **which)
    t = q if t is None else t
    mask = which.get("mask")
    mask = None if mask is None else mask.expand(2, 2, 4, 4)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(4)).tolist():
        raised, forms, moved = [], [], []
        for j in range(4):
            added = 0.0 if mask is None or mask.dtype == torch.bool else mask[b, h, i, j]
            hidden = (which.get("causal") and j > i) or (
                mask is not None and mask.dtype == torch.bool and not mask[b, h, i, j]
            )
            hidden = hidden or ("window" in which and abs(i - j) >= which["window"])
            raised.append(
                torch.zeros((), dtype=torch.float64) if hidden else (SCALE * q[b, h, i].dot(k[b, 0, j]) + added).exp()
            )
            forms.append(angle[0, i].dot(turn[b, h, j]) - aim[b, h, i].dot(k[b, 0, j]))
            moved.append(SCALE * t[b, h, i].dot(k[b, 0, j]) * (v[b, 0, j] - o[b, h, i]))
        total = torch.stack(raised).sum()
        weights = torch.stack(raised) / (total if total > 0 else 1.0)
        # Sums of four terms of size 1 in another order: some roundings of float64.
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(lse[b, h, i], total.log(), **close)
        torch.testing.assert_close(mean[b, h, i], weights.dot(torch.stack(forms)), **close)
        torch.testing.assert_close(covariance[b, h, i], weights @ torch.stack(moved), **close)


@over_tangents
@over_moment_which
def test_gradients_of_the_moments(own_tangent, which):
    arguments = moment_inputs(own_tangent)
    if which.get("mask") is not None and which["mask"].dtype == torch.bool:
        # lse is −inf for the query that attends to nothing, which has no difference quotient.
        which = which | {"mask": which["mask"] | torch.eye(4, dtype=torch.bool)}
    angle = arguments.pop(4)
    given = [x.requires_grad_() for x in arguments if x is not None]

    def operation(*values):
        return attention_moments(*values[:4], angle, *values[4:], scale=SCALE, **which)

    assert gradcheck(operation, given)


def test_the_attention_part_of_the_gradient_is_not_zero():
    """Taking the attention weights as constants would be cheaper, and a different penalty."""
    given = tensors(causal=True)
    _, trace = ask(given, spin=Spin(3), causal=True)
    names = ("query", "key", "value", "query_trace", "key_trace")
    grads = gradients(given, names, spin=Spin(3), causal=True)[1]
    lengths = {name: grad.norm().item() for name, grad in zip(names, grads, strict=True)}
    # Rounding would leave 1e-14 of these tensors, whose entries are of size 1 as the trace's are.
    assert min(lengths.values()) > 0.1 * trace.abs().max() > 0.1, lengths

    # With M_q = 0 and c_v = 0 what is left is a_ii q_iᵀ M_k (v_i − o_i): k is in its weight alone.
    nothing = {name: torch.zeros_like(given[name]) for name in ("query_trace", "value_trace")}
    weight_only = gradients(given | nothing, ("key",), spin=Spin(3), causal=True)[1][0]
    assert weight_only.norm() > 0.1


def gradients(given: dict[str, Tensor], names, *, rows=slice(None), **settings: Any):
    """The trace, and the gradients of its sum over `rows`."""
    inputs = given | {name: given[name].detach().requires_grad_() for name in names}
    trace = ask(inputs, **settings)[1]
    chosen = trace[rows] if isinstance(rows, Tensor) else trace[:, rows]
    return trace.detach(), torch.autograd.grad(chosen.sum(), [inputs[name] for name in names])


PER_TOKEN = ("query", "key", "value", "output")
NEEDED = (*PER_TOKEN, "query_trace", "key_trace", "value_trace")
ALL_OPTIONS = {"shifted": True, "normed": True}
over_options = pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])


@over_options
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_sequences_alone(side, options):
    real = keys(LEFT if side == "left" else RIGHT)
    first = real.view(BATCH, T).int().argmax(-1, keepdim=True)
    positions = (torch.arange(T) - first).clamp(min=0)
    where = {"mask": real, "causal": True}
    given, options = tensors(**where), {**options, "spin": Spin(2)}
    tangent, trace = ask(given, positions=positions, **where, **options)
    for b, rows in enumerate(real.view(BATCH, T)):
        alone = given | {name: given[name][b : b + 1, :, rows] for name in PER_TOKEN}
        own_tangent, own_trace = ask(alone, causal=True, **options)
        # The products are cut differently, so that sums of float64 may be taken in another order.
        torch.testing.assert_close(tangent[b, :, rows], own_tangent[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(trace[b, rows], own_trace[0], rtol=1e-12, atol=1e-12)


@over_options
@pytest.mark.parametrize("kind", ["keys alone", "rows too", "added"])
def test_what_stands_in_padding_does_not_matter(kind, options):
    """To the bit, in the trace and in its gradients, and padding is reached by no gradient."""
    real = torch.tensor(LEFT, dtype=torch.bool)
    mask = keys(LEFT) if kind != "rows too" else keys(LEFT) & real.view(BATCH, 1, T, 1)
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    where = {"causal": True, "mask": added if kind == "added" else mask}
    given, options = tensors(causal=True, mask=mask), {**options, "spin": Spin(2), **where}
    other = dict(given)
    for name in PER_TOKEN:
        noise = 1e3 * draw(*given[name].shape, seed=90)
        other[name] = torch.where(real.view(BATCH, 1, T, 1), given[name], noise)
    found = [gradients(inputs, NEEDED, rows=real, **options) for inputs in (given, other)]
    assert torch.equal(found[0][0][real], found[1][0][real])
    for name, left, right in zip(NEEDED, found[0][1], found[1][1], strict=True):
        assert left.isfinite().all()
        assert torch.equal(left, right), name
        if name in PER_TOKEN:
            assert (left.transpose(1, 2)[~real] == 0).all(), name
            assert (left.transpose(1, 2)[real] != 0).any(), name


@over_options
def test_a_causal_trace_does_not_depend_on_later_tokens(options):
    given, options = tensors(causal=True), {**options, "spin": Spin(2), "causal": True}
    seen = 3
    other = dict(given)
    for name in PER_TOKEN:
        other[name] = torch.cat((given[name][:, :, :seen], draw(*given[name].shape, seed=91)[:, :, seen:]), 2)
    for left, right in zip(ask(given, **options), ask(other, **options), strict=True):
        left, right = (x if x.dim() == 2 else x.transpose(1, 2) for x in (left, right))
        assert torch.equal(left[:, :seen], right[:, :seen])
        assert not torch.equal(left[:, seen:], right[:, seen:])
    for grad in gradients(given, PER_TOKEN, rows=slice(0, seen), **options)[1]:
        assert (grad[:, :, seen:] == 0).all()
        assert (grad[:, :, :seen] != 0).any()


def test_packed_sequences_do_not_see_each_other():
    """The second of two packed sequences has the traces it has alone, positions from 0."""
    cut = 2
    block = torch.arange(T) >= cut
    where = {"causal": True, "mask": block[:, None] == block}
    given = tensors(**where)
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    _, trace = ask(given, spin=Spin(2), positions=positions, **where)
    alone = given | {name: given[name][:, :, cut:] for name in PER_TOKEN}
    expected = ask(alone, spin=Spin(2), causal=True)[1]
    torch.testing.assert_close(trace[:, cut:], expected, rtol=1e-12, atol=1e-12)  # sums in another order


@over_narrow
@over_tangents
def test_narrow_dtypes_of_the_moments(dtype, own_tangent):
    """float32 inside; the covariance is rounded once, and what enters the trace not at all."""
    narrow = [None if x is None else x.to(dtype) for x in moment_inputs(own_tangent)]
    wide = [None if x is None else x.double() for x in narrow]
    found, true = (attention_moments(*x, scale=SCALE) for x in (narrow, wide))
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype]

    q, k, v, o, angle, turn, aim, t = (None if x is None else x.abs() for x in wide)
    weights = F.softmax(SCALE * wide[0] @ wide[1].mT, -1)
    forms = angle.unsqueeze(1) @ turn.mT + aim @ k.mT
    moved = SCALE * (q if t is None else t) @ k.mT
    differences = v.unsqueeze(2) + o.unsqueeze(3)
    unit = (20 + 2 * SCALE * (q @ k.mT).max()) * torch.finfo(torch.float32).eps  # see `test_narrow_dtypes`
    cast = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert ((found[0].double() - true[0]).abs() <= unit * (1 + true[0].abs())).all()
    assert ((found[1].double() - true[1]).abs() <= unit * (weights * forms).sum(-1)).all()
    size = torch.einsum("bhij,bhije->bhie", weights * moved, differences)
    assert ((found[2].double() - true[2]).abs() <= unit * size + cast * true[2].abs()).all()


@over_options
@over_narrow
def test_narrow_dtypes(dtype, options):
    """float32 inside: the trace is never rounded to 16 bits, and what is returned in 16 bits is rounded once."""
    given = {name: x.to(dtype) for name, x in tensors(causal=True).items()}
    constants = ("query_trace", "key_trace", "value_trace")
    given |= {name: given[name].float() for name in constants}
    wide = {name: x.double() for name, x in given.items()}
    options = {**options, "causal": True}
    tangent, trace = ask(given, **options)
    true_tangent, true_trace = ask(wide, **options)
    assert tangent.dtype == dtype
    assert trace.dtype == torch.float32

    # Errors are relative to the sizes of what is summed. A score is a sum of D products, an error of a score is a
    # relative one of its weight, and behind it come sums over T keys, E and D channels and H heads: ⌈log₂⌉ roundings
    # each, and twenty for everything that is not a sum (σ, the exponential, products).
    tangent_size, own_size, trace_size, covariance_size = sizes(wide, **options)
    logs = sum(math.ceil(math.log2(n)) for n in (D, T, E, D, HEADS))
    largest_score = SCALE * (wide["query"].abs().sum(-1).max() * wide["key"].abs().max())
    unit = (logs + 20 + 2 * largest_score) * torch.finfo(torch.float32).eps
    cast = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    # The covariance is rounded on its way, which head norms carry into the trace, and so is the tangent at the end.
    assert ((trace.double() - true_trace).abs() <= unit * trace_size + cast * covariance_size).all()
    # (No larger than the tangent and what is added to the covariance there.)
    casts = cast * (2 * true_tangent.abs() + own_size)
    assert ((tangent.double() - true_tangent).abs() <= unit * tangent_size + casts).all()


def sizes(given: dict[str, Tensor], *, causal: bool, shifted: bool = False, normed: bool = False):
    """The formulas for heads that are not rotated, with every sign a plus.

    Sizes of the tangent, of what a token's own key and value have in it, of the trace, and of what C has in that.
    """
    a = F.softmax((SCALE * given["query"] @ repeat(given["key"]).mT).masked_fill(~TRIL, -math.inf), -1)
    size = {name: x.abs() for name, x in given.items()}
    q, k, v, o = size["query"], repeat(size["key"]), repeat(size["value"]), size["output"]
    shift = {name: size[f"{name}_shift"].unsqueeze(-2) if shifted else 0.0 for name in COUNT}
    q_moved, k_moved, v_moved = (size[name] + shift[name] for name in COUNT)
    rstd_q = torch.ones(())
    if normed:
        (rstd_q, hat_q, q_moved), (rstd_k, hat_k, k_moved) = (
            pushed(size[name], moved, size[f"{name}_weight"]) for name, moved in (("query", q_moved), ("key", k_moved))
        )
    differences = v.unsqueeze(2) + o.unsqueeze(3)  # (B, H, i, j, E)
    own = a.diagonal(dim1=2, dim2=3).unsqueeze(-1)
    covariance, moved = (torch.einsum("bhij,bhid,bhjd,bhije->bhie", SCALE * a, x, k, differences) for x in (q, q_moved))
    along = SCALE * (q * repeat(k_moved)).sum(-1, keepdim=True)
    own_tangent = own * (along * (v + o) + repeat(v_moved))
    weight_q = size["query_weight"] if normed else torch.ones(D)
    mapped = torch.einsum("hde,bhije->bhijd", size["query_trace"], differences) * weight_q
    mean = rstd_q.squeeze(-1) * SCALE * torch.einsum("bhij,bhjd,bhijd->bhi", a, k, mapped)
    matched = (v + o) @ size["key_trace"].mT
    if normed:
        matched = (
            repeat(rstd_k) * size["key_weight"] * (matched + repeat(hat_k) * (repeat(hat_k) * matched).mean(-1, True))
        )
    own_terms = own.squeeze(-1) * (size["value_trace"][:, None] + SCALE * (q * matched).sum(-1))
    from_covariance = (rstd_q * hat_q * (covariance @ size["query_trace"].mT)).mean(-1) if normed else 0.0 * mean
    return moved + own_tangent, own_tangent, (mean + own_terms + from_covariance).sum(1), from_covariance.sum(1)


TRIL = torch.ones(T, T, dtype=torch.bool).tril()


def repeat(shared: Tensor) -> Tensor:
    return shared.repeat_interleave(HEADS // SHARED, 1)


def pushed(entering: Tensor, direction: Tensor, weight: Tensor):
    """(1/σ, hat, |D| direction) of a head norm, signs all plus."""
    rstd = (entering.square().mean(-1, keepdim=True) + EPS).rsqrt()
    hat = entering * rstd
    return rstd, hat, rstd * weight * (direction + hat * (hat * direction).mean(-1, keepdim=True))


@pytest.mark.parametrize("which", [{}, {"causal": True}, {"causal": True, "window": 1}, {"window": 1}], ids=str)
@over_options
def test_one_token_alone_sees_itself(which, options):
    """a = 1 and o = v: the value's part is all that is left, whatever the scores are."""
    given = tensors(rows=1, heads=1, shared=1, **which)
    tangent, trace = ask(given, spin=Spin(2), **options, **which)
    shift = given["value_shift"][:, None] if options else 0.0
    # v − o is 0 up to a rounding of a softmax over one key.
    torch.testing.assert_close(tangent, given["value"] - shift, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trace, given["value_trace"].expand(BATCH, 1), rtol=1e-12, atol=1e-12)


@over_options
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_queries_that_attend_to_nothing_have_zeros(kind, options):
    """Finite ones, with gradients of 0: a whole row of padding is no NaN in the model's weights."""
    allowed = torch.zeros(T, T, dtype=torch.bool)
    mask = allowed if kind == "bool" else torch.full((T, T), -math.inf, dtype=torch.float64)
    given = tensors(mask=allowed)
    given = {name: x.requires_grad_() for name, x in given.items()}
    tangent, trace = ask(given, spin=Spin(2), mask=mask, **options)
    assert (tangent == 0).all()
    assert (trace == 0).all()
    used = [x for name, x in given.items() if options or name in NEEDED]
    for grad in torch.autograd.grad(tangent.sum() + trace.sum(), used):
        assert (grad == 0).all()
    lse, mean, covariance = attention_moments(*moment_inputs(False), scale=SCALE, mask=torch.zeros(4, 4).bool())
    assert (lse == -math.inf).all()
    assert (mean == 0).all()
    assert (covariance == 0).all()


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("rows", [1, 2])
def test_odd_shapes(batch, rows):
    given = tensors(batch=batch, rows=rows, heads=3, shared=1, causal=True)
    tangent, trace = ask(given, spin=Spin(3), causal=True, **ALL_OPTIONS)
    assert tangent.shape == (batch, 3, rows, E)
    assert trace.shape == (batch, rows)
    assert trace.isfinite().all()


def test_large_scores_do_not_overflow():
    """exp of a score of 1e4 is no float; a softmax that is sure of one key has zero covariance."""
    given = tensors(causal=True)
    given = given | {name: 100 * given[name] for name in ("query", "key")}
    given["output"] = output_of(given["query"], given["key"], given["value"], causal=True)
    trace, grads = gradients(given, NEEDED, causal=True)
    assert trace.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def test_inputs_are_left_as_they_were():
    given = tensors(causal=True)
    before = {name: x.clone() for name, x in given.items()}
    ask(given, spin=Spin(2), causal=True, **ALL_OPTIONS)
    assert all(torch.equal(given[name], copy) for name, copy in before.items())


def moments_with(**other: Tensor):
    """attention_moments of four rows with some of its arguments replaced."""
    names = ("query", "key", "value", "output", "angle", "turn", "aim", "tangent")
    arguments = dict(zip(names, moment_inputs(True), strict=True)) | other
    return lambda: attention_moments(*(arguments[name] for name in names), scale=SCALE)


REFUSED = {
    "query": (moments_with(query=torch.ones(2, 4, D)), r"query \(2, 4, 6\) and key \(2, 1, 4, 6\) are not"),
    "width of the keys": (moments_with(key=torch.ones(2, 1, 4, 3)), r"key \(2, 1, 4, 3\) are not"),
    "sequences": (moments_with(key=torch.ones(1, 1, 4, D)), r"key \(1, 1, 4, 6\) are not"),
    "heads": (moments_with(query=torch.ones(2, 3, 4, D), key=torch.ones(2, 2, 4, D)), "3 query heads .* 2 key heads"),
    "no key heads": (moments_with(key=torch.ones(2, 0, 4, D)), "2 query heads .* 0 key heads"),
    "value": (moments_with(value=torch.ones(2, 2, 4, E)), r"value \(2, 2, 4, 4\) should be \(2, 1, 4, 4\)"),
    "output": (moments_with(output=torch.ones(2, 2, 4, D)), r"output .* should be \(2, 2, 4, 4\)"),
    "angle": (moments_with(angle=torch.ones(1, 3, 3)), r"angle .* should be \(1, 4, 3\)"),
    "turn": (moments_with(turn=torch.ones(2, 1, 4, 3)), r"turn .* should be \(2, 2, 4, 3\)"),
    "aim": (moments_with(aim=torch.ones(2, 2, 4, E)), r"aim .* should be \(2, 2, 4, 6\)"),
    "tangent": (moments_with(tangent=torch.ones(2, 2, 1, D)), r"tangent .* should be \(2, 2, 4, 6\)"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


TRACE_REFUSED = {
    "3 query heads": {"query": (BATCH, 3, T, D), "output": (BATCH, 3, T, E)},
    "key ": {"key": (BATCH, SHARED, T, D + 1)},
    "value ": {"value": (BATCH, SHARED, T - 1, E)},
    "output": {"output": (BATCH, HEADS, T, E + 1)},
    "query_trace": {"query_trace": (HEADS, E, D)},
    "key_trace": {"key_trace": (HEADS - 1, D, E)},
    "value_trace": {"value_trace": (1,)},
    "query_shift": {"query_shift": (D,)},
    "key_shift": {"key_shift": (HEADS, D)},
    "value_shift": {"value_shift": (SHARED, 1)},
}


@pytest.mark.parametrize(("message", "other"), TRACE_REFUSED.items(), ids=TRACE_REFUSED)
def test_attention_trace_refuses_what_does_not_fit_in_one_sentence(message, other):
    given = tensors(causal=True) | {name: torch.ones(shape).double() for name, shape in other.items()}
    with pytest.raises(ValueError, match=message) as refused:
        ask(given, causal=True, shifted=True)
    assert "\n" not in str(refused.value)
