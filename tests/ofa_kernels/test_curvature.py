"""The token sums of the reference against dense own-token Jacobians, by automatic differentiation in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from ofa_kernels import reference
from ofa_kernels.reference import Attends, HeadNorm, Move, Rotary
from tests.ofa_kernels.calls import draw

SEQUENCES, TOKENS, WIDTH = 2, 5, 6
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""Rounding of float64 sums of some hundreds of terms near 1 in two orders."""


def drawn(*shape: int, seed: int) -> Tensor:
    return draw(*shape, seed=seed).cpu()


@dataclass(frozen=True)
class Attention:
    """An attention between its projections, from plain operations for one sequence at a time."""

    heads: int = 2
    shared: int = 1
    head: int = 4
    value: int = 4
    pairs: int = 0
    interleaved: bool = False
    norm: str = ""
    biased: bool = False
    mask: Any = None
    sinks: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> list[Tensor]:
        """W_q, W_k, W_v, (heads, width, d), and W_o, (heads, d, width)."""
        shapes = [(self.heads, self.head), (self.shared, self.head), (self.shared, self.value)]
        given = [drawn(*shape, WIDTH, seed=i) for i, shape in enumerate(shapes)]
        return [*given, drawn(WIDTH, self.heads * self.value, seed=3).unflatten(1, (self.heads, -1)).transpose(0, 1)]

    def biases(self) -> list[Tensor]:
        return [drawn(len(w), w.shape[1], seed=4 + i) * self.biased for i, w in enumerate(self.weights()[:3])]

    def scales(self) -> list[Tensor | None]:
        """γ of the norms on queries and keys."""
        if not self.norm:
            return [None, None]
        joint = self.norm == "joint"
        return [
            drawn(count, 1, self.head, seed=8 + i) if joint else drawn(self.head, seed=8 + i)
            for i, count in enumerate((self.heads, self.shared))
        ]

    def rotary(self) -> Rotary | None:
        """cos and sin with a factor, so that Rᵀ differs from R⁻¹."""
        if not self.pairs:
            return None
        angle = drawn(SEQUENCES, TOKENS, self.pairs, seed=10)
        return Rotary(1.3 * angle.cos(), 1.3 * angle.sin(), self.interleaved)

    def attends(self) -> Attends:
        mask = None if self.mask is None else self.mask()
        sinks = drawn(self.heads, seed=11) if self.sinks else None
        return Attends(**{"scale": 0.7, "mask": mask, "sinks": sinks, **self.settings})

    def heads_of(self, entering: Tensor, sequence: int) -> list[Tensor]:
        """q, k and v as they enter the scores, (H or K, T, ·), of rows (T, width)."""
        found = [entering @ w.mT + b.unsqueeze(1) for w, b in zip(self.weights()[:3], self.biases(), strict=True)]
        for i, scale in enumerate(self.scales()):
            if scale is not None:
                over = (0, 2) if self.norm == "joint" else 2
                found[i] = scale * found[i] * torch.rsqrt(found[i].square().mean(over, keepdim=True) + 1e-5)
        if (rotary := self.rotary()) is not None:
            one = Rotary(rotary.cos[sequence, None], rotary.sin[sequence, None], self.interleaved)
            found[:2] = [one.turn(x.unsqueeze(0)).squeeze(0) for x in found[:2]]
        return found

    def output(self, entering: Tensor, sequence: int) -> Tensor:
        """o of every head and token, (H, T, e), by a softmax from plain operations."""
        q, k, v = self.heads_of(entering, sequence)
        k, v = (x.repeat_interleave(self.heads // self.shared, 0) for x in (k, v))
        attends = self.attends()
        scores = attends.scale * q @ k.mT
        if attends.softcap is not None:
            scores = attends.softcap * torch.tanh(scores / attends.softcap)
        row, column = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None]
        allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
        if attends.causal:
            allowed = allowed & (column <= row)
        if attends.window is not None:
            allowed = allowed & ((row - column).abs() < attends.window)
        if attends.mask is not None:
            mask = attends.mask.expand(SEQUENCES, self.heads, TOKENS, TOKENS)[sequence]
            allowed, scores = (allowed & mask, scores) if mask.dtype == torch.bool else (allowed, scores + mask)
        powers = torch.where(allowed, scores, -torch.inf).exp()
        total = powers.sum(-1, keepdim=True)
        if attends.sinks is not None:
            total = total + attends.sinks.exp().view(-1, 1, 1)
        return powers / torch.where(total > 0, total, 1) @ v

    def branch(self, row: Tensor, entering: Tensor, sequence: int, token: int) -> Tensor:
        """F of one token as a function of its own n, `row`; the other tokens are constant."""
        changed = torch.where(torch.arange(TOKENS)[:, None] == token, row, entering)
        output = self.output(changed, sequence)[:, token]
        return (self.weights()[3] @ output.unsqueeze(-1)).sum(0).squeeze(-1)


def each():
    """(B, 1, T, T), with one query fully masked."""
    mask = drawn(SEQUENCES, 1, TOKENS, TOKENS, seed=20) > -0.7
    mask[:, :, 2] = False
    return mask


ATTENTIONS = {
    "all keys": Attention(),
    "causal, shared keys": Attention(heads=4, shared=2, settings={"causal": True}),
    "window": Attention(pairs=2, settings={"window": 2}),
    "causal window": Attention(pairs=2, settings={"window": 3, "causal": True}),
    "mask": Attention(pairs=2, mask=each),
    "added mask": Attention(mask=lambda: drawn(2, TOKENS, TOKENS, seed=21)),
    "soft-caps": Attention(pairs=2, settings={"softcap": 0.8, "causal": True}),
    "sinks": Attention(pairs=2, sinks=True, settings={"causal": True}),
    "pairs beside each other": Attention(pairs=2, interleaved=True, value=3),
    "some channels turn": Attention(head=5, pairs=1, biased=True),
    "norms on heads": Attention(heads=4, shared=2, pairs=2, norm="own", biased=True, settings={"causal": True}),
    "a norm of all heads": Attention(heads=4, shared=2, pairs=2, norm="joint", settings={"causal": True}),
    "everything": Attention(
        pairs=1, norm="own", sinks=True, biased=True, mask=each, settings={"softcap": 1.5, "window": 4}
    ),
}


def entering():
    """n and the tokens' weights, one of them 0 as at padding."""
    weights = drawn(SEQUENCES, TOKENS, seed=31).abs()
    weights[1, -1] = 0
    return drawn(SEQUENCES, TOKENS, WIDTH, seed=30), weights


def call(case: Attention, rows: Tensor, weights: Tensor):
    """The sums, δo along n without biases in every channel, and the inputs."""
    parts = [torch.stack(x) for x in zip(*(case.heads_of(rows[b], b) for b in range(SEQUENCES)), strict=True)]
    output = torch.stack([case.output(rows[b], b) for b in range(SEQUENCES)])
    rotary, norms = case.rotary(), [None, None]
    plain = [rows.unsqueeze(1) @ w.mT for w in case.weights()[:3]]
    moves = []
    for i, scale in enumerate(case.scales()):
        moved = plain[i]
        if scale is not None:
            norms[i] = HeadNorm(plain[i] + case.biases()[i].unsqueeze(1), scale, 1e-5)
            moved = norms[i].push(moved)
        moves.append(moved if rotary is None else rotary.turn(moved))
    move = Move(*moves, plain[2], parts[2], output)
    found = reference.attention_curvature(
        *parts, output, weights, case.attends(), rotary=rotary, query_norm=norms[0], key_norm=norms[1], move=move
    )
    return found, parts, output, norms


def jacobians(case: Attention, rows: Tensor) -> Tensor:
    """A_i of every token, (B, T, width, width)."""
    found = [jacrev(case.branch)(rows[b, i], rows[b], b, i) for b, i in product(range(SEQUENCES), range(TOKENS))]
    return torch.stack(found).view(SEQUENCES, TOKENS, WIDTH, WIDTH)


@pytest.mark.parametrize("case", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(case):
    """Σ_i w_i A_i = Σ_h W_o (ā W_v + C W_q + K W_k), A_iñ_i, and A_iᵀ applied to a vector, token by token."""
    rows, weights = entering()
    dense = jacobians(case, rows)
    sums, parts, output, norms = call(case, rows, weights)
    query, key, value, last = case.weights()
    key, value = (w.repeat_interleave(case.heads // case.shared, 0) for w in (key, value))
    inner = sums.value[..., None, None] * value + sums.query @ query + sums.key @ key
    total = (last @ inner).sum(1)
    for pull, norm, weight in ((sums.query_pull, norms[0], query), (sums.key_pull, norms[1], key)):
        if pull is not None:
            # A norm over all heads: each head's pull is multiplied by the whole projection.
            hat = norm.hat()[0].transpose(1, 2).flatten(2) @ weight[:: case.heads // norm.entering.shape[1]].flatten(
                0, 1
            )
            left = (pull.transpose(1, 2).flatten(2)) @ last.transpose(0, 1).flatten(1).mT
            total = total - left.mT @ hat / norm.width
    torch.testing.assert_close(total, torch.einsum("bt,btij->bij", weights, dense), **CLOSE)
    moved = sums.moved.transpose(1, 2).flatten(2) @ last.transpose(0, 1).flatten(1).mT
    torch.testing.assert_close(moved, (dense @ rows.unsqueeze(-1)).squeeze(-1), **CLOSE)

    vector = drawn(SEQUENCES, TOKENS, WIDTH, seed=40)
    pulled = vector.unsqueeze(1) @ last
    back = list(reference.attention_adjoint(*parts, output, pulled, case.attends()))
    groups = case.heads // case.shared
    back[1:] = [x.unflatten(1, (case.shared, groups)).sum(2) for x in back[1:]]
    if (rotary := case.rotary()) is not None:
        back[:2] = [rotary.turn(x, -1.0) for x in back[:2]]
    back[:2] = [x if norm is None else norm.pull(x) for x, norm in zip(back[:2], norms, strict=True)]
    found = sum((x @ w).sum(1) for x, w in zip(back, case.weights(), strict=False))
    torch.testing.assert_close(found, (dense.mT @ vector.unsqueeze(-1)).squeeze(-1), **CLOSE)


def test_blocks_of_scores_change_nothing(monkeypatch):
    """Blocks of queries, as in long sequences; the window excludes keys on both sides of a block."""
    import sys

    case = Attention(pairs=2, norm="own", settings={"window": 20, "causal": True})
    shape = 1, 2, 50, 4
    query, key, value, output = (drawn(*shape, seed=i) for i in range(4))
    norm = HeadNorm(query, drawn(4, seed=5), 1e-5)
    given = query, key, value, output, drawn(1, 50, seed=6), case.attends()
    whole = reference.attention_curvature(*given, query_norm=norm, key_norm=norm)
    monkeypatch.setattr(sys.modules["ofa_kernels.reference.attention_curvature"], "BLOCK", 1)
    for found, expected in zip(
        reference.attention_curvature(*given, query_norm=norm, key_norm=norm), whole, strict=True
    ):
        if expected is not None:
            torch.testing.assert_close(found, expected, **CLOSE)


@dataclass(frozen=True)
class Mlp:
    """An MLP, token by token."""

    activation: str = "silu"
    gated: bool = True
    limit: float | None = None
    biased: bool = False

    def weights(self) -> list[Tensor]:
        return [drawn(7, WIDTH, seed=i) for i in range(1 + self.gated)]

    def biases(self) -> list[Tensor]:
        return [drawn(7, seed=5 + i) * self.biased for i in range(1 + self.gated)]

    def inner(self, rows: Tensor) -> list[Tensor]:
        return [rows @ w.mT + b for w, b in zip(self.weights(), self.biases(), strict=True)]

    def branch(self, row: Tensor) -> Tensor:
        gate, *up = self.inner(row)
        gate = gate if self.limit is None else gate.clamp(max=self.limit)
        hidden = PHI[self.activation](gate)
        if up:
            hidden = hidden * (up[0] if self.limit is None else up[0].clamp(-self.limit, self.limit) + 1)
        return down() @ hidden

    def between(self, slopes: list[Tensor]) -> Tensor:
        """Σ W_d diag(p) W over the input projections."""
        return sum(down() @ (p.unsqueeze(-1) * w) for p, w in zip(slopes, self.weights(), strict=True))


PHI = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def down():
    return drawn(WIDTH, 7, seed=9)


MLPS = {
    **{f"gated {name}": Mlp(name) for name in PHI},
    "plain": Mlp("gelu", gated=False),
    "biases": Mlp(biased=True),
    "plain with a bias": Mlp("relu", gated=False, biased=True),
}
CLAMPED = Mlp("quick_gelu", limit=0.6, biased=True)


def test_every_activation_is_tested():
    assert set(PHI) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("case", MLPS.values(), ids=MLPS)
@pytest.mark.parametrize("block", [1, 1 << 20], ids=["tokens one by one", "all at once"])
def test_mlp(case, block, monkeypatch):
    """Ā, its diagonal and image, and the change of every token."""
    import sys

    for module in ("mlp_curvature", "branch_diagonal"):
        monkeypatch.setattr(sys.modules[f"ofa_kernels.reference.{module}"], "BLOCK", block)
    rows, weights = entering()
    dense = torch.stack([jacrev(case.branch)(row) for row in rows.flatten(0, 1)]).view(SEQUENCES, TOKENS, WIDTH, WIDTH)
    total = torch.einsum("bt,btij->bij", weights, dense)
    gate, up = (*case.inner(rows), None)[:2]
    shifts = dict(zip(("gate_shift", "up_shift"), case.biases(), strict=False)) if case.biased else {}
    read = down().unsqueeze(0)
    *sums, moved = reference.mlp_curvature(gate, up, weights, activation=case.activation, read=read, **shifts)
    sums = [x for x in sums if x is not None]
    torch.testing.assert_close(case.between(sums), total, **CLOSE)
    torch.testing.assert_close(moved, (dense @ rows.unsqueeze(-1)).squeeze(-1), **CLOSE)
    scale = drawn(WIDTH, seed=12)
    diagonal, image = reference.mlp_diagonal(case.weights(), down(), sums, scale)
    torch.testing.assert_close(diagonal, total.diagonal(dim1=1, dim2=2), **CLOSE)
    torch.testing.assert_close(image, total @ scale, **CLOSE)
    assert reference.mlp_diagonal(case.weights(), down(), sums)[1] is None


@pytest.mark.parametrize("case", [MLPS["plain"], MLPS["biases"], CLAMPED], ids=["plain", "gated", "clamped"])
def test_slopes_of_an_mlp_token_by_token(case):
    rows, _ = entering()
    dense = torch.stack([jacrev(case.branch)(row) for row in rows.flatten(0, 1)])
    gate, up = (*case.inner(rows.flatten(0, 1)), None)[:2]
    slopes = [x for x in reference.mlp_slopes(gate, up, case.activation, case.limit) if x is not None]
    torch.testing.assert_close(case.between(slopes), dense, **CLOSE)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_traces_and_diagonals_of_an_attention(centred):
    """tr(Ā G), Ā's diagonal and its image, against dense products; heads are narrower than values, keys are shared."""
    case = Attention(heads=4, shared=2, head=3, value=5)
    query, key, value, last = case.weights()
    sums = [drawn(SEQUENCES, 4, 5, 3, seed=13), drawn(SEQUENCES, 4, 5, 3, seed=14), drawn(SEQUENCES, 4, seed=15)]
    shared = [w.repeat_interleave(2, 0) for w in (key, value)]
    dense = last @ (sums[0] @ query + sums[1] @ shared[0] + sums[2][..., None, None] * shared[1])
    factor, gamma = drawn(WIDTH, seed=16), drawn(WIDTH, seed=17)
    middle = torch.diag(factor) - centred * torch.outer(gamma, gamma) / WIDTH
    scale = gamma if centred else None
    expected = torch.einsum("bhij,ji->b", dense, middle)
    found = reference.attention_trace(query, key, value, last, sums, factor, scale)
    torch.testing.assert_close(found, expected, **CLOSE)
    diagonal, image = reference.attention_diagonal(query, key, value, last, [x[1] for x in sums], gamma)
    torch.testing.assert_close(diagonal, dense[1].sum(0).diagonal(), **CLOSE)
    torch.testing.assert_close(image, dense[1].sum(0) @ gamma, **CLOSE)


HEADS, TOKEN_WEIGHTS, GATE = torch.ones(1, 2, 3, 4), torch.ones(1, 3), torch.ones(1, 3, 7)
PROJECTION = torch.ones(2, 4, WIDTH)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: attend(key=HEADS[..., :3]), "are not"),
        (lambda: attend(key=torch.ones(1, 3, 3, 4)), "evenly"),
        (lambda: attend(value=HEADS[:, :, :2]), "value"),
        (lambda: attend(output=HEADS[..., :2]), "output"),
        (lambda: attend(weights=TOKEN_WEIGHTS[:, :2]), "weights"),
        (lambda: attend(attends=Attends(1.0, window=0)), "window"),
        (lambda: reference.mlp_curvature(GATE, None, TOKEN_WEIGHTS, activation="tanh"), "activation"),
        (lambda: reference.mlp_curvature(GATE, GATE[..., :2], TOKEN_WEIGHTS, activation="silu"), "up"),
        (lambda: reference.mlp_curvature(GATE, None, TOKEN_WEIGHTS[:, :2], activation="silu"), "weights"),
        (lambda: reference.mlp_diagonal([GATE[0]], GATE[0], [GATE[0]]), "MLP"),
        (lambda: reference.attention_diagonal(PROJECTION, *[PROJECTION] * 3, (HEADS,) * 3), "output"),
        (lambda: reference.attention_diagonal(PROJECTION, *[PROJECTION[:, :3]] * 3, (HEADS,) * 3), "fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def attend(**other):
    given = {"query": HEADS, "key": HEADS, "value": HEADS, "output": HEADS, "weights": TOKEN_WEIGHTS}
    return reference.attention_curvature(**{**given, "attends": Attends(1.0), **other})
