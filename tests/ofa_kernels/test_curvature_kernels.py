"""The curvature kernels against a float64 oracle, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import pytest
import torch

from benchmarks.eager_traffic import Ledger
from ofa_kernels import dispatch, launch, reference
from ofa_kernels.ops import attention_curvature as attention
from ofa_kernels.ops import branch_diagonal, launching
from ofa_kernels.ops import mlp_curvature as mlp
from ofa_kernels.reference import Attends, HeadNorm, Move, Rotary
from tests.cases import over_pairs
from tests.device import DEVICE
from tests.ofa_kernels.calls import draw

DTYPES = [torch.float32, torch.float16]
"""Without bfloat16, which the interpreter truncates where a GPU rounds; one test covers it."""

OUTPUTS = ("query", "key", "value", "moved")


@pytest.fixture(autouse=True)
def _held_and_poisoned():
    """No gradients, as in a run of the kernels; uninitialized memory is NaN."""
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Attention:
    """Shapes and settings of a call; `mask` makes one of (sequences, heads, tokens)."""

    sequences: int = 2
    heads: int = 2
    shared: int = 1
    tokens: int = 17
    head: int = 32
    value: int = 32
    pairs: int = 0
    interleaved: bool = False
    one_angle: bool = False
    normed: bool = False
    read: int = 0
    move: str = "given"
    """The move of queries and keys if something is read: "given", or "own", along themselves."""
    mask: Any = None
    sinks: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Any, dtype: torch.dtype, *, wide: bool = False) -> dict[str, torch.Tensor]:
        """The outputs of a function for inputs drawn once in `dtype`, upcast to float64 if `wide`."""
        b, h, k, t = self.sequences, self.heads, self.shared, self.tokens

        def given(*shape: int, seed: int) -> torch.Tensor:
            drawn = draw(*shape, dtype=dtype, seed=seed)
            return drawn.double() if wide else drawn

        q, key = given(b, h, t, self.head, seed=0), given(b, k, t, self.head, seed=1)
        v, o = given(b, k, t, self.value, seed=2), given(b, h, t, self.value, seed=3)
        weights = given(b, t, seed=4).abs()
        # As at padding.
        weights[:, t // 2 + 1 :] = 0
        angles = [given(1 if self.one_angle else b, t, max(self.pairs, 1), seed=5 + i) for i in range(2)]
        rotary = Rotary(*angles, interleaved=self.interleaved) if self.pairs else None
        norms = [None, None]
        if self.normed:
            entering = given(b, h, t, self.head, seed=7), given(b, k, t, self.head, seed=8)
            norms = [HeadNorm(x, given(self.head, seed=9 + i), 1e-5) for i, x in enumerate(entering)]
        move = None
        if self.read:
            moves = q * 0.5, key.flip(2)
            columns = [given(b, h, t, self.read, seed=11 + i) for i in range(3)]
            move = Move(*(moves if self.move == "given" else (None, None)), *columns)
        mask = None if self.mask is None else self.mask(b, h, t).to(DEVICE)
        sinks = given(h, seed=14) if self.sinks else None
        attends = Attends(**{"scale": self.head**-0.5, "mask": mask, "sinks": sinks, **self.settings})
        found = function(
            q, key, v, o, weights, attends, rotary=rotary, query_norm=norms[0], key_norm=norms[1], move=move
        )
        return {name: getattr(found, name) for name in OUTPUTS if getattr(found, name) is not None}


def padding(b, h, t):
    """(B, 1, 1, T): the last keys of one sequence and the first of another are masked."""
    keys = torch.arange(t)
    return torch.stack([keys < t - 4 if i % 2 else keys >= 3 for i in range(b)])[:, None, None, :]


def each(b, h, t):
    """(B, H, T, T), with every fifth query fully masked."""
    mask = draw(b, h, t, t, seed=20).cpu() > -0.5
    mask[:, :, ::5] = False
    return mask


def added(b, h, t):
    """(H, T, T) in float32, with both masking values, and one query fully masked."""
    mask = draw(h, t, t, seed=21).cpu().float()
    mask[:, :, 1::3] = -torch.inf
    mask[:, :, 2::5] = torch.finfo(torch.float32).min
    mask[:, t // 2] = -torch.inf
    return mask


CASES = {
    "all keys": Attention(),
    "causal": Attention(settings={"causal": True}),
    "window": Attention(pairs=16, settings={"window": 4}),
    "causal window": Attention(pairs=16, settings={"causal": True, "window": 7}),
    "a window of every key": Attention(settings={"causal": True, "window": sys.maxsize}),
    "padding": Attention(pairs=16, mask=padding, settings={"causal": True}),
    "a mask of every pair": Attention(pairs=16, mask=each),
    "a mask of queries": Attention(mask=lambda b, h, t: each(1, h, t)[..., :1]),
    "a mask that is added": Attention(pairs=16, mask=added, read=3),
    "soft-caps": Attention(pairs=16, read=3, settings={"causal": True, "softcap": 0.7}),
    "soft-caps far from the scores": Attention(settings={"causal": True, "softcap": 50.0}),
    "sinks": Attention(pairs=16, sinks=True, read=3, settings={"causal": True, "window": 5}),
    "sinks and nothing else": Attention(sinks=True, mask=each),
    "pairs beside each other": Attention(pairs=16, interleaved=True, settings={"causal": True}),
    "some channels turn": Attention(pairs=5, settings={"causal": True}),
    "some turn, beside each other": Attention(pairs=5, interleaved=True, one_angle=True),
    "norms on heads": Attention(pairs=16, normed=True, settings={"causal": True}),
    "norms on heads with all": Attention(normed=True, pairs=4, read=3, mask=padding, settings={"softcap": 2.0}),
    "a move": Attention(pairs=16, read=8, settings={"causal": True}),
    "a move along itself": Attention(read=8, move="own", settings={"causal": True}),
    "a move through every channel": Attention(read=32),
    "shared keys": Attention(heads=6, shared=2, pairs=16, tokens=9, read=2, settings={"causal": True}),
    "heads of 80, narrower values": Attention(head=80, value=20, pairs=20, settings={"causal": True}),
    "heads of one": Attention(head=1, value=1),
    "one token": Attention(tokens=1, pairs=16, read=2),
    "several blocks": Attention(sequences=1, heads=1, tokens=70, pairs=16, read=3, settings={"causal": True}),
}


def gap(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / max(‖expected‖, 1); NaN stays NaN."""
    norm = torch.linalg.vector_norm
    return float(norm(actual.double() - expected.double()) / norm(expected.double()).clamp_min(1.0))


def assert_close(found: dict, plain: dict, oracle: dict, dtype: torch.dtype) -> None:
    """The error against float64 is at most twice that of eager PyTorch in the same dtype, or eight roundings."""
    assert found.keys() == plain.keys() == oracle.keys()
    for name, value in found.items():
        assert value.shape == oracle[name].shape, name
        assert value.dtype == torch.float32, name
        assert gap(value, oracle[name]) <= max(2 * gap(plain[name], oracle[name]), 8 * torch.finfo(dtype).eps), name


@contextmanager
def eager() -> Iterator[None]:
    """The reference without upcasts, as eager PyTorch would compute it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("attention_heads", "attention_curvature"):
            # The package has a function of the second name.
            patch.setattr(import_module(f"ofa_kernels.reference.{name}"), "upcast", lambda x: x)
        yield


BOTH = ("a mask that is added", "soft-caps", "soft-caps far from the scores", "sinks", "norms on heads with all")
BOTH += ("shared keys", "several blocks")
"""Cases that together have every argument: in float32 a sum has no smaller error than the kernel's own."""


# All in float16: a kernel branches by the case, and each branch has casts of its own, which do nothing in float32.
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float16) for name in CASES), *((name, torch.float32) for name in BOTH)], ids=str
)
def test_attention(name, dtype):
    """One case for each kind of mask, score, rotary embedding and norm on heads."""
    case = CASES[name]
    oracle = case.run(reference.attention_curvature, dtype, wide=True)
    found = case.run(attention.attention_curvature, dtype)
    with eager():
        plain = case.run(reference.attention_curvature, dtype)
    assert_close(found, plain, oracle, dtype)


def test_attention_in_bfloat16():
    """Within a hundred units of 2⁻⁸: the interpreter truncates bfloat16, a GPU rounds."""
    case = CASES["norms on heads with all"]
    oracle = case.run(reference.attention_curvature, torch.bfloat16, wide=True)
    found = case.run(attention.attention_curvature, torch.bfloat16)
    assert max(gap(found[name], oracle[name]) for name in oracle) <= 0.1


def test_weights_far_below_what_float16_holds():
    """1/(Nσ²) of a stream of length 1000 is 1e-9; float16's smallest number is 6e-8."""
    case = CASES["causal"]

    def scaled(function, factor):
        return lambda q, k, v, o, w, *rest, **given: function(q, k, v, o, w.float() * factor, *rest, **given)

    small = case.run(scaled(attention.attention_curvature, 1e-9), torch.float16)
    large = case.run(scaled(attention.attention_curvature, 1.0), torch.float16)
    for name in OUTPUTS[:3]:
        assert gap(small[name] * 1e9, large[name]) <= 1e-5


def test_runs_of_tokens_are_added_up(monkeypatch):
    """As on a GPU with more multiprocessors than heads."""
    case = CASES["several blocks"]
    whole = case.run(attention.attention_curvature, torch.float32)
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 100)
    for name, value in case.run(attention.attention_curvature, torch.float32).items():
        assert gap(value, whole[name]) <= 1e-6


@dataclass(frozen=True)
class Mlp:
    """Shapes and settings of a call."""

    gated: bool = True
    activation: str = "silu"
    shape: tuple[int, int, int] = (2, 21, 70)
    read: int = 3
    one_read: bool = False
    shifted: bool = False

    def run(self, function: Any, dtype: torch.dtype, *, wide: bool = False) -> dict[str, torch.Tensor]:
        sequences, tokens, inner = self.shape

        def given(*shape: int, seed: int) -> torch.Tensor:
            drawn = draw(*shape, dtype=dtype, seed=seed)
            return drawn.double() if wide else drawn

        gate, up = given(*self.shape, seed=0), given(*self.shape, seed=1) if self.gated else None
        read = given(1 if self.one_read else sequences, self.read, inner, seed=2) if self.read else None
        shifts = {"gate_shift": given(inner, seed=3)} if self.shifted else {}
        shifts |= {"up_shift": given(inner, seed=4)} if self.shifted and self.gated else {}
        weights = given(sequences, tokens, seed=5).abs()
        found = function(gate, up, weights, activation=self.activation, read=read, **shifts)
        return {name: x for name, x in zip(("gate", "up", "moved"), found, strict=True) if x is not None}


MLPS = {
    **{f"gated {name}": Mlp(activation=name) for name in reference.ACTIVATIONS},
    "plain": Mlp(gated=False, activation="gelu"),
    "plain with a shift": Mlp(gated=False, activation="gelu_tanh", shifted=True),
    "shifts": Mlp(shifted=True),
    "nothing read": Mlp(read=0),
    "the same rows for all": Mlp(one_read=True, read=16),
    "one token, one channel": Mlp(shape=(1, 1, 1)),
    "several tiles": Mlp(shape=(1, 150, 300)),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float16) for name in MLPS), ("several tiles", torch.float32)],
    ids=str,
)
def test_mlp(name, dtype, monkeypatch):
    """One case for each activation and each optional argument; arithmetic is float32 in either dtype."""
    case = MLPS[name]
    monkeypatch.setattr(mlp, "multiprocessors", lambda device: 3)
    oracle = case.run(reference.mlp_curvature, dtype, wide=True)
    plain = case.run(reference.mlp_curvature, dtype)
    assert_close(case.run(mlp.mlp_curvature, dtype), plain, oracle, torch.float32)


def mlp_weights(gated, sequences, inner, width, dtype):
    """(weights, down, sums) and γ."""
    weights = [draw(inner, width, dtype=dtype, seed=i) for i in range(1 + gated)]
    sums = [draw(sequences, inner, dtype=torch.float32, seed=3 + i) for i in range(1 + gated)]
    return (weights, draw(width, inner, dtype=dtype, seed=2), sums), draw(width, dtype=torch.float32, seed=6)


def attention_weights(sequences, dtype, heads=4, shared=2, head=20, value=24, width=50):
    """The four weights, as the views that `ofa` passes, and their sums."""
    query, key = (
        draw(n * head, width, dtype=dtype, seed=i).view(n, head, width) for i, n in enumerate((heads, shared))
    )
    other = draw(shared, value, width, dtype=dtype, seed=2)
    output = draw(width, heads * value, dtype=dtype, seed=3).unflatten(1, (heads, value)).transpose(0, 1)
    shapes = (sequences, heads, value, head), (sequences, heads, value, head), (sequences, heads)
    sums = tuple(draw(*shape, dtype=torch.float32, seed=4 + i) for i, shape in enumerate(shapes))
    return (query, key, other, output), sums


def wider(given):
    """Float64 copies of tensors, also in lists and tuples."""
    return given.double() if isinstance(given, torch.Tensor) else [wider(one) for one in given]


@over_pairs(sequences=[1, 3, 18], gated=[True, False], centred=[False, True], dtype=DTYPES)
def test_mlp_diagonal(gated, sequences, centred, dtype, monkeypatch):
    """Both branches of the kernel (one sequence, 16 at once), and the image that a LayerNorm needs."""
    monkeypatch.setattr(branch_diagonal, "multiprocessors", lambda device: 1)
    given, scale = mlp_weights(gated, sequences, 70, 50, dtype)
    scale = scale if centred else None
    found, plain = (f(*given, scale) for f in (branch_diagonal.mlp_diagonal, reference.mlp_diagonal))
    oracle = reference.mlp_diagonal(*wider(given), None if scale is None else scale.double())
    assert_close(*(_pair(*one) for one in (found, plain, oracle)), torch.float32)


@over_pairs(sequences=[1, 3], centred=[False, True], dtype=DTYPES)
def test_attention_trace_and_diagonal(sequences, centred, dtype):
    """tr(C M), not Σ C ⊙ M: heads are narrower than values, and neither divides a tile."""
    weights, sums = attention_weights(sequences, dtype)
    factor, scale = draw(50, dtype=torch.float32, seed=8), draw(50, dtype=torch.float32, seed=9)
    scale = scale if centred else None
    wide = None if scale is None else scale.double()
    first = tuple(x[0] for x in sums)
    traces = (
        branch_diagonal.attention_trace(*weights, sums, factor, scale),
        reference.attention_trace(*weights, sums, factor, scale),
        reference.attention_trace(*wider(weights), wider(sums), factor.double(), wide),
    )
    assert_close(*({"trace": x} for x in traces), torch.float32)
    diagonals = (
        branch_diagonal.attention_diagonal(*weights, first, scale),
        reference.attention_diagonal(*weights, first, scale),
        reference.attention_diagonal(*wider(weights), wider(first), wide),
    )
    assert_close(*(_pair(*one) for one in diagonals), torch.float32)


def test_weights_in_bfloat16_lose_nothing_of_the_sums():
    """Products split the sums into two bfloat16 numbers, truncated in the interpreter: the error is 2⁻¹⁴, not 2⁻⁸."""
    weights, sums = attention_weights(2, torch.bfloat16)
    factor = draw(50, dtype=torch.float32, seed=8)
    found = branch_diagonal.attention_trace(*weights, sums, factor)
    assert gap(found, reference.attention_trace(*wider(weights), wider(sums), factor.double())) <= 2**-13
    first = tuple(x[0] for x in sums)
    found = branch_diagonal.attention_diagonal(*weights, first)[0]
    assert gap(found, reference.attention_diagonal(*wider(weights), wider(first))[0]) <= 2**-13


def _pair(diagonal, image):
    return {"diagonal": diagonal} | ({} if image is None else {"image": image})


def layer(dtype=torch.float32, tokens=17):
    """The five operations of a Llama layer's attention and MLP, as `ofa` calls them."""
    (projections, down, _), factor = mlp_weights(True, 2, 70, 50, dtype)
    weights, _ = attention_weights(2, dtype, head=32, value=32)
    query, key = (draw(2, count, tokens, 32, dtype=dtype, seed=i) for i, count in enumerate((4, 2)))
    share, seen = draw(2, tokens, dtype=torch.float32).abs(), draw(2, 4, tokens, 8, dtype=torch.float32)
    angle, gate = draw(1, tokens, 16, dtype=dtype), draw(2, tokens, 70, dtype=dtype)
    first = tuple(x[0] for x in attention_weights(2, dtype, head=32, value=32)[1])
    read = draw(2, 8, 70, dtype=dtype)

    def run(query=query, key=key, gate=gate, share=share):
        found = dispatch.attention_curvature(
            query,
            key,
            key,
            query,
            share,
            Attends(0.2, causal=True),
            rotary=Rotary(angle, angle),
            move=Move(None, None, seen, seen, seen),
        )
        trace = dispatch.attention_trace(*weights, (found.query, found.key, found.value), factor)
        diagonal, _ = dispatch.attention_diagonal(*weights, first)
        to_gate, to_up, moved = dispatch.mlp_curvature(gate, gate, share, activation="silu", read=read)
        other, _ = dispatch.mlp_diagonal(projections, down, (to_gate, to_up))
        return [found.query, found.key, found.value, found.moved, trace, diagonal, to_gate, to_up, moved, other]

    return run


@pytest.fixture
def on_kernels(monkeypatch):
    """Use the kernels on any device."""
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    for operation, offered in dispatch._IMPLEMENTATIONS.items():
        taking = [replace(one, accepts=lambda x: True) if one.name == "triton" else one for one in offered]
        monkeypatch.setitem(dispatch._IMPLEMENTATIONS, operation, taking)


@pytest.mark.usefixtures("on_kernels")
def test_a_llama_layer_is_eight_launches_and_four_of_pytorch():
    """Two sweeps and their products, an MLP's slopes and their sum, three reads of weights; four sums of PyTorch."""
    counted = Counter()

    def count(kernel, *args):
        counted[kernel.fn.__name__] += 1

    with launching.launching_by(count, "sm_90"), pytest.MonkeyPatch.context() as patch:
        # A mode would see the registered operations, not their launches.
        patch.setattr(launching, "is_direct", lambda args: True)
        for module in (attention, mlp, branch_diagonal):
            # As many multiprocessors as an H200, so that sums over tokens and over heads are split.
            patch.setattr(module, "multiprocessors", lambda device: 132)
        run = layer(tokens=150)
        with Ledger() as ledger:
            run()
    assert sum(counted.values()) == len(counted) == 8, counted
    assert ledger.kernels == 4


@pytest.mark.usefixtures("on_kernels")
def test_two_runs_give_the_same_bits():
    run = layer(torch.float16)
    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.usefixtures("on_kernels")
def test_a_layer_compiles_into_one_graph():
    """Compiled and eager results are bit-identical."""
    run = layer(tokens=9)
    query, key = (draw(2, count, 9, 32, dtype=torch.float32, seed=i) for i, count in enumerate((4, 2)))
    given = query, key, draw(2, 9, 70, dtype=torch.float32), draw(2, 9, dtype=torch.float32).abs()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(*given), compiled(*given), strict=True))


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Attention(head=129, tokens=3, sequences=1), "wider than 128"),
        (Attention(value=129, tokens=3, sequences=1), "wider than 128"),
    ],
)
def test_heads_wider_than_the_kernels_go_to_the_reference(case, why):
    query, value = (draw(1, 2, 3, width, dtype=torch.float32) for width in (case.head, case.value))
    assert why in attention.refusal(query, value, None, None, None)
    found, expected = (
        case.run(f, torch.float32) for f in (attention.attention_curvature, reference.attention_curvature)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_norm_over_all_heads_goes_to_the_reference():
    """OLMo-2: all heads share one σ, and the pulls of its tokens are returned."""
    heads = draw(1, 2, 3, 4, dtype=torch.float32)
    norm = HeadNorm(heads, draw(2, 1, 4, dtype=torch.float32, seed=1), 1e-5)
    given = heads, heads, heads, heads, draw(1, 3, dtype=torch.float32), Attends(0.5)
    assert "all heads" in attention.refusal(heads, heads, norm, None, None)
    assert attention.attention_curvature(*given, query_norm=norm).query_pull is not None


def test_a_read_of_every_row_goes_to_the_reference():
    case = Mlp(read=launch.WIDEST_READ + 1)
    found, expected = (case.run(f, torch.float32) for f in (mlp.mlp_curvature, reference.mlp_curvature))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


HEADS, WIDE = draw(1, 2, 5, 16), draw(1, 2, 5, 16, seed=1)
OPERATIONS = {
    "attention_curvature": (
        *(HEADS, WIDE, WIDE, HEADS, draw(1, 5), None, None, draw(1, 5, 8), draw(1, 5, 8), HEADS, draw(16), WIDE),
        *(
            draw(16),
            HEADS,
            WIDE,
            HEADS[..., :3],
            HEADS[..., :3],
            HEADS[..., :3],
            0.3,
            True,
            None,
            None,
            False,
            1e-5,
            1e-5,
        ),
    ),
    "attention_curvature bare": (
        HEADS,
        WIDE,
        WIDE,
        HEADS,
        draw(1, 5),
        *(None,) * 13,
        0.3,
        True,
        3,
        2.0,
        False,
        0.0,
        0.0,
    ),
    "mlp_curvature": (draw(2, 5, 9), draw(2, 5, 9), draw(2, 5), draw(1, 3, 9), draw(9), draw(9), "silu"),
    "mlp_curvature plain": (draw(2, 5, 9), None, draw(2, 5), None, None, None, "gelu"),
    "mlp_diagonal": (draw(9, 7), draw(9, 7), draw(7, 9), draw(2, 9), draw(2, 9), draw(7)),
    "mlp_diagonal plain": (draw(9, 7), None, draw(7, 9), draw(2, 9), None, None),
    "attention_trace": (*(draw(2, 4, 7),) * 3, draw(2, 7, 4), *(draw(3, 2, 4, 4),) * 2, draw(3, 2), draw(7), draw(7)),
    "attention_diagonal": (*(draw(2, 4, 7),) * 3, draw(2, 7, 4), *(draw(2, 4, 4),) * 2, draw(2), draw(7)),
    "attention_diagonal rms": (*(draw(2, 4, 7),) * 3, draw(2, 7, 4), *(draw(2, 4, 4),) * 2, draw(2), None),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name):
    """Schema, shapes without data, and tracing, by PyTorch's own check."""
    given = [x.float() if isinstance(x, torch.Tensor) else x for x in OPERATIONS[name]]
    torch.library.opcheck(getattr(torch.ops.ofa_kernels, name.split()[0]).default, given)
