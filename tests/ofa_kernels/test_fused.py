"""The operations with derivatives written by hand, on the CPU, against autograd of their references in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ofa_kernels import reference
from ofa_kernels.blocked import attention_trace as blocked
from ofa_kernels.fused import attention_moments as fused_moments
from ofa_kernels.fused import attention_trace as fused
from ofa_kernels.fused import mlp_trace as fused_mlp
from ofa_kernels.fused import norm_trace as fused_norm
from ofa_kernels.fused import squared_norm
from ofa_kernels.reference import ACTIVATIONS, HeadNorm, Rotary
from tests.ofa_kernels.test_mlp_trace import EPS, draw

BATCH, HEADS, SHARED, T, D, E = 3, 6, 3, 7, 6, 4
SCALE = 0.6
CONSTANT = ("gate_shift", "up_shift", "hidden", "shift", "query_shift", "key_shift", "value_shift", "mask", "angle")
"""What no derivative is taken of."""
WIDE = ("query_trace", "key_trace", "value_trace", "trace", "angle", "turn", "aim", "tangent", "mask")
"""What is float32 in a model of 16 bits."""


@dataclass(frozen=True)
class Case:
    """Arguments of an operation; q/k head norms are given as `query_entering`, `query_weight` and so on."""

    operation: Callable[..., Any]
    given: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def oracle(self) -> Callable[..., Any]:
        return getattr(reference, self.operation.__name__)

    @property
    def names(self) -> list[str]:
        """What derivatives are taken of."""
        return [name for name in self.given if name not in CONSTANT]

    def inputs(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Leaves, of which some ask for a gradient."""
        names = self.names if names is None else names
        return {name: x.detach().requires_grad_(name in names) for name, x in self.given.items()}

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> Case:
        """Every tensor changed; the angles of a rotary embedding as if they were called "angle"."""
        options = dict(self.options)
        if "rotary" in options:
            turn = options["rotary"]
            options["rotary"] = Rotary(change("angle", turn.cos), change("angle", turn.sin), turn.interleaved)
        return Case(self.operation, {name: change(name, x) for name, x in self.given.items()}, options)

    def to(self, dtype: torch.dtype, wide: torch.dtype | None = None) -> Case:
        kept = dtype if wide is None else wide
        return self.changed(lambda name, x: x if x.dtype == torch.bool else x.to(kept if name in WIDE else dtype))


def results(operation, given: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Every output by itself: of mlp_trace (hidden, tangent, trace)."""
    given = ({"up": None} if operation.__name__ == "mlp_trace" else {}) | given
    for name in ("query", "key"):
        if f"{name}_entering" in given:
            given[f"{name}_norm"] = HeadNorm(given.pop(f"{name}_entering"), given.pop(f"{name}_weight"), EPS)
    found = operation(**given, **options)
    if operation.__name__ == "mlp_trace":
        return (*found[0].unbind(), found[1])
    return found if isinstance(found, tuple) else (found,)


def derive(case: Case, operation=None, *, outputs=None, names=None, summed=False) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients in `names` of some `outputs`, weighted at random or `summed`; 0 for none."""
    names = case.names if names is None else names
    given = case.inputs(names)
    found = results(operation or case.operation, given, case.options)
    chosen = [i for i in (range(len(found)) if outputs is None else outputs) if found[i].requires_grad]
    # lse of a query that attends to nothing is −inf, and has no derivative.
    incoming = [draw(*found[i].shape, seed=900 + i).to(found[i]) for i in chosen]
    incoming = [x.masked_fill(found[i].detach() == -math.inf, 0.0) for x, i in zip(incoming, chosen, strict=True)]
    incoming = [x.new_ones(()).expand_as(x) for x in incoming] if summed else incoming
    before, inputs = [x.clone() for x in incoming], [given[name] for name in names]
    grads = torch.autograd.grad([found[i] for i in chosen], inputs, incoming, materialize_grads=True)
    assert all(torch.equal(x, copy) for x, copy in zip(incoming, before, strict=True)), "incoming gradients changed"
    return [x.detach() for x in found], list(grads)


def equal(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True))


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Relative to the largest entry: float64 has 1e-16, sums of some hundred terms of both signs lose a few digits.

    Anything wrong in a formula shows in the first digits, so that 1e-10 decides with room on both sides.
    """
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite]), i
        a, b = a[finite], b[finite]
        assert a.numel() == 0 or (a - b).abs().max() <= 1e-10 * b.abs().max(), i


def assert_reference(case: Case, **which: Any) -> None:
    (found, grads), (true, true_grads) = derive(case, **which), derive(case, case.oracle, **which)
    assert_near(found, true)
    assert_near(grads, true_grads)
    assert [x.dtype for x in (*found, *grads)] == [x.dtype for x in (*true, *true_grads)]


def mlp(activation="silu", gated=True, shifted=True, rows=(2, 5), inner=7) -> Case:
    given = {"gate": draw(*rows, inner, seed=1), "up": draw(*rows, inner, seed=2), "gate_trace": draw(inner, seed=3)}
    given |= {name: draw(inner, seed=4 + i) for i, name in enumerate(("up_trace", "gate_shift", "up_shift"))}
    gone = [name for name in given if ("shift" in name and not shifted) or ("up" in name and not gated)]
    given = {name: x for name, x in given.items() if name not in gone}
    return Case(fused_mlp.mlp_trace, given, {"activation": activation})


def norm(kind="rms", offset=0.0, shifted=True, rows=(2, 5), width=7) -> Case:
    given = {"stream": 1.5 * draw(*rows, width, seed=1) + 0.5, "weight": 1 + 0.3 * draw(width, seed=2)}
    given |= {"image": draw(*rows, width, seed=3), "trace": draw(*rows, seed=4)}
    given |= {"shift": draw(width, seed=5)} if shifted else {}
    return Case(fused_norm.norm_trace, given, {"eps": EPS, "kind": kind, "offset": offset})


SPINS = {"none": None, "half": (3, False), "interleaved": (3, True), "partial": (2, False), "partly inter.": (2, True)}


def attention(
    operation=blocked.attention_trace, spin="half", shifted=True, mask=None, normed=(), batch=BATCH, **options: Any
) -> Case:
    """Any output, and angles of which every sequence has its own: not those of a model."""
    heads, shared, rows = (options.pop(name, n) for name, n in (("heads", HEADS), ("shared", SHARED), ("rows", T)))
    shapes = {"query": (batch, heads, rows, D), "key": (batch, shared, rows, D), "value": (batch, shared, rows, E)}
    shapes |= {"output": (batch, heads, rows, E), "query_trace": (heads, D, E), "key_trace": (heads, D, E)}
    shapes |= {"value_trace": (heads,)}
    if shifted:
        shapes |= {"query_shift": (heads, D), "key_shift": (shared, D), "value_shift": (shared, E)}
    for name in normed:
        shapes |= {f"{name}_entering": shapes[name], f"{name}_weight": (D,)}
    if SPINS[spin] is not None:
        pairs, interleaved = SPINS[spin]
        angles = draw(batch if spin == "half" else 1, rows, pairs, seed=40)
        options["rotary"] = Rotary(angles.cos(), 1.2 * angles.sin(), interleaved)
    return attending(operation, shapes, mask, options)


def attending(operation, shapes: dict[str, tuple[int, ...]], mask: Tensor | None, options: dict[str, Any]) -> Case:
    given = {name: draw(*shape, seed=10 + i) for i, (name, shape) in enumerate(shapes.items())}
    return Case(operation, given | ({} if mask is None else {"mask": mask}), {"scale": SCALE, **options})


def moments(own_tangent=True, columns=T, mask=None, **options: Any) -> Case:
    per_query, per_key = (BATCH, HEADS, T), (BATCH, SHARED, columns)
    shapes = {"query": (*per_query, D), "key": (*per_key, D), "value": (*per_key, E), "output": (*per_query, E)}
    shapes |= {"angle": (1, T, 5), "turn": (BATCH, HEADS, columns, 5), "aim": (*per_query, D)}
    shapes |= {"tangent": (*per_query, D)} if own_tangent else {}
    return attending(fused_moments.attention_moments, shapes, mask, options)


PADDING = torch.ones(BATCH, 1, 1, T, dtype=torch.bool)
PADDING[1, ..., :3], PADDING[2] = False, False
DENSE = draw(BATCH, HEADS, T, T, seed=50) > -0.5
DENSE[0, :, 4], DENSE[1, :, 2, 2] = False, False
ADDED = draw(HEADS, T, T, seed=51).masked_fill(draw(HEADS, T, T, seed=52) > 1, -math.inf)
ADDED[:, 3] = -math.inf
MASKS = {"none": None, "padding": PADDING, "dense": DENSE, "added": ADDED, "keys": PADDING[1, 0, 0]}
"""All but `none` leave some query without any key (`keys` under a causal mask), or without its own."""

over_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
over_shifts = pytest.mark.parametrize("shifted", [False, True], ids=["", "shifts"])
over_ways = pytest.mark.parametrize("way", [blocked.attention_trace, fused.attention_trace], ids=["blocked", "fused"])

CUTS = {"whole": None, "uneven": (3, 2), "one by one": (1, 1), "sequences": (5, 6)}
"""Queries of a block, and heads (of keys, of one sequence each) of a part: two of three, or two sequences of three."""


def cut(monkeypatch, name: str, case: Case) -> None:
    """Blocks that divide nothing, whatever the machine's number of threads is."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    if CUTS[name] is None:
        return
    queries, parts = CUTS[name]
    monkeypatch.setattr(fused_moments, "BLOCK", queries)
    monkeypatch.setattr(blocked, "QUERIES", queries)
    if "query" in case.given:
        _, heads, rows, width = case.given["query"].shape
        elements = parts * heads // case.given["key"].shape[1] * rows * width
        monkeypatch.setattr(blocked, "ELEMENTS", elements)
    for module in (fused_mlp, fused_norm):
        monkeypatch.setattr(module, "BLOCK", 7 * queries)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@over_shifts
@pytest.mark.parametrize("name", ["whole", "uneven"])
def test_mlp_trace_and_its_gradients(monkeypatch, activation, gated, shifted, name):
    """Without the model's hidden row, and with it: returned to the bit, with the gradient of the formula.

    The tangent of a gated MLP is made of that row. A model rounds it; here it is off by 1e-12, and so is the tangent.
    """
    case = mlp(activation, gated, shifted)
    cut(monkeypatch, name, case)
    assert_reference(case)
    own = results(case.operation, case.given, case.options)[0] * (1 + 1e-12)
    case = Case(case.operation, case.given | {"hidden": own}, case.options)
    assert_reference(case)
    assert torch.equal(results(case.operation, case.given, case.options)[0], own)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@over_shifts
@pytest.mark.parametrize("name", ["whole", "uneven"])
def test_norm_trace_and_its_gradients(monkeypatch, kind, offset, shifted, name):
    case = norm(kind, offset, shifted)
    cut(monkeypatch, name, case)
    assert_reference(case)


@over_ways
@pytest.mark.parametrize("spin", SPINS)
@over_shifts
@over_masks
def test_attention_trace_and_its_gradients(monkeypatch, way, spin, shifted, mask):
    """Every way to say which keys a query attends to, in blocks that divide neither queries nor heads."""
    for causal, window in product((True, False), (None, 2)):
        case = attention(way, spin, shifted, mask, causal=causal, window=window)
        cut(monkeypatch, "uneven", case)
        assert_reference(case)


@over_ways
@pytest.mark.parametrize("normed", [("query",), ("key",), ("query", "key")], ids="+".join)
@pytest.mark.parametrize("spin", ["none", "half", "partly inter."])
@over_shifts
@pytest.mark.parametrize("mask", [None, PADDING], ids=["", "padding"])
def test_attention_trace_of_normed_heads(way, normed, spin, shifted, mask):
    """Also in what enters the norms and in their scales."""
    assert_reference(attention(way, spin, shifted, mask, normed, causal=True))


@pytest.mark.parametrize("own_tangent", [False, True], ids=["q", "tangent"])
@over_masks
@pytest.mark.parametrize("name", CUTS)
def test_attention_moments_and_their_gradients(monkeypatch, own_tangent, mask, name):
    for causal, window in product((True, False), (None, 2)):
        case = moments(own_tangent, mask=mask, causal=causal, window=window)
        cut(monkeypatch, name, case)
        assert_reference(case)
    assert_reference(moments(own_tangent, columns=5))


@over_ways
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize(("heads", "shared"), [(6, 3), (3, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("spin", ["none", "half"])
def test_attention_trace_in_parts(monkeypatch, way, name, heads, shared, spin):
    """Sums over parts, and slices of tensors that have or lack a dimension of sequences or heads."""
    added = DENSE[:, :heads].double()
    case = attention(way, spin, mask=added, heads=heads, shared=shared, causal=True, window=4)
    cut(monkeypatch, name, case)
    assert_reference(case)


CASES = {
    "mlp, gated": mlp(),
    "mlp, plain": mlp("gelu", gated=False),
    "norm, rms": norm(),
    "norm, layer": norm("layer", 1.0, shifted=False),
    "moments": moments(mask=PADDING, causal=True),
    "blocked": attention(mask=PADDING, causal=True),
    "blocked, no shifts": attention(spin="none", shifted=False, mask=ADDED),
    "fused": attention(fused.attention_trace, mask=DENSE, causal=True),
    "head norms": attention(normed=("query", "key"), mask=PADDING, causal=True),
}
LARGE = {
    "mlp, gated": mlp(rows=(64,), inner=96),
    "mlp, plain": mlp("gelu_tanh", False, rows=(64,), inner=96),
    "norm, rms": norm(rows=(64,), width=96),
    "norm, layer": norm("layer", 1.0, rows=(64,), width=96),
    "blocked": attention(rows=80, causal=True),
    "fused": attention(fused.attention_trace, rows=80, causal=True),
    "head norms": attention(normed=("query", "key"), rows=80, causal=True),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
over_large = pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)


@over_cases
@pytest.mark.parametrize("name", CUTS)
def test_each_incoming_gradient_alone(monkeypatch, case, name):
    """A loss may use the tangent without the trace, or the other way round: what is missing is 0, not garbage."""
    cut(monkeypatch, name, case)
    for output in range(len(results(case.oracle, case.given, case.options))):
        assert_reference(case, outputs=[output])


@over_cases
def test_what_is_asked_changes_nothing(case):
    """No gradient, every one or a single one, twice: the same bits, and inputs as they were."""
    before = {name: x.clone() for name, x in case.given.items()}
    found, grads = derive(case)
    plain = results(case.operation, case.given, case.options)
    assert not any(x.requires_grad for x in plain)
    assert equal((plain, []), (found, []))
    assert equal(derive(case), (found, grads))
    for name, grad in zip(case.names, grads, strict=True):
        assert equal(derive(case, names=[name]), (found, [grad]))
    assert all(torch.equal(case.given[name], copy) for name, copy in before.items())


def transposed(name: str, x: Tensor) -> Tensor:
    first = 1 if x.dim() == 4 else 0
    return x.transpose(first, first + 1).contiguous().transpose(first, first + 1) if x.dim() > 1 else x


CHANGES = {
    "views of tokens first, or last": transposed,
    "halves of a projection": lambda name, x: torch.cat((x, 7 * x), -1)[..., : x.shape[-1]],
    "one sequence for all": lambda name, x: x[:1].expand_as(x) if x.dim() > 1 and name != "mask" else x,
}


@over_cases
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["whole", "uneven"])
def test_strides(monkeypatch, case, change, name):
    """Of inputs and of incoming gradients: that of a sum is one number, seen from every entry."""
    cut(monkeypatch, name, case)
    assert_reference(case.changed(change))
    # The last two: lse of a query that attends to nothing has no sum.
    assert_reference(case.changed(change), summed=True, outputs=[-2, -1] if "mask" in case.given else None)


@pytest.mark.parametrize(("batch", "rows"), [(0, 3), (2, 0), (1, 1), (2, 1), (1, 33)], ids=str)
def test_odd_shapes(batch, rows):
    """No sequence, no token, one token, one more than a block of queries; and vectors alone."""
    for case in (mlp(rows=(batch, rows)), norm(rows=(batch, rows)), mlp(gated=False, rows=()), norm("layer", rows=())):
        assert_reference(case)
    for way, spin in product((blocked.attention_trace, fused.attention_trace) if rows else (), ("none", "half")):
        assert_reference(attention(way, spin, batch=batch, rows=rows, causal=True))


def error(actual: list[Tensor], true: list[Tensor]) -> list[float]:
    """Root mean square of the errors over that of the entries: one entry's rounding may be lucky, a tensor's not."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(actual, true, strict=True)]


@over_large
def test_float32_is_as_good_as_the_reference(case):
    """Against float64, at most twice the reference's own error, in values and gradients.

    The floor is four roundings of float32, 2.4e-7: where the reference is better than that there is nothing to hold.
    """
    case, floor = case.to(torch.float32), 2 * torch.finfo(torch.float32).eps
    true, found, own = derive(case.to(torch.float64), case.oracle), derive(case), derive(case, case.oracle)
    for part in range(2):  # values, gradients
        for mine, theirs in zip(error(found[part], true[part]), error(own[part], true[part]), strict=True):
            assert mine <= 2 * theirs + floor


@over_large
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_those_of_the_outputs_alone(case, dtype):
    """Arithmetic is float32, traces too: what is returned in 16 bits was rounded once, or twice on its way.

    A rounding is off by eps/2 at most, and the tangent's two (of a covariance or a hidden row, and of itself) by eps;
    a trace is not rounded but for that of head norms, which a rounded covariance enters.
    """
    narrow = case.to(dtype, wide=torch.float32)
    found, grads = derive(narrow)
    true, true_grads = derive(narrow.to(torch.float64), case.oracle)
    *rounded, trace = found
    assert trace.dtype == torch.float32
    assert all(x.dtype == dtype for x in rounded)
    assert [x.dtype for x in grads] == [narrow.given[name].dtype for name in case.names]
    eps = torch.finfo(dtype).eps
    assert all(x.isfinite().all() for x in (*found, *grads))
    assert max(error([*rounded, *grads], [*true[:-1], *true_grads]), default=0.0) <= eps
    assert max(error([trace], [true[-1]])) <= (eps if "query_entering" in case.given else 1e-5)


@over_large
def test_autocast_does_not_reach_inside(case):
    """float32 numbers, to the bit, under autocast to bfloat16: a backward pass as well where it is all by hand."""
    case = case.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward = results(case.operation, case.given, case.options)
        both = None if "query_entering" in case.given else derive(case)
    expected = derive(case)
    assert equal((forward, []), (expected[0], []))
    assert both is None or equal(both, expected)


def kept(case: Case) -> list[Tensor]:
    """The tensors that a graph holds besides the operation's inputs."""
    given = case.inputs()
    rotary = case.options.get("rotary")
    inputs = [*given.values(), *(() if rotary is None else (rotary.cos, rotary.sin))]
    known, found = {x.untyped_storage().data_ptr() for x in inputs}, {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive = results(case.operation, given, case.options)
        assert all(x.requires_grad for x in alive)
        return list(found.values())


IMAGES = 3 * [(BATCH, HEADS, T, D)]
KEPT = {name: [] for name in CASES if "mlp" in name or "norm, " in name} | {"moments": [(BATCH, HEADS, T)]}
KEPT |= {"blocked": IMAGES, "blocked, no shifts": IMAGES, "fused": [*IMAGES, (BATCH, HEADS, T)]}


@pytest.mark.parametrize(("name", "expected"), KEPT.items(), ids=KEPT)
def test_what_is_kept(name, expected):
    """The design's table of memory: the inputs, which a model keeps anyway, three images of heads, a number per row."""
    found = kept(CASES[name])
    assert sorted(tuple(x.shape) for x in found) == sorted(expected)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in found), "a view keeps more than it shows"


@pytest.mark.parametrize("rows", [23, 46])
@over_ways
@pytest.mark.parametrize("normed", [(), ("query", "key")], ids=["", "head norms"])
def test_nothing_kept_has_two_dimensions_of_tokens(rows, way, normed):
    """Memory is linear in the length of a sequence: T × T scores would be the first thing to outgrow it."""
    found = kept(attention(way, rows=rows, causal=True, normed=normed))
    assert found
    assert all(list(x.shape).count(rows) < 2 for x in found)
    assert max(x.untyped_storage().nbytes() for x in found) == 8 * BATCH * HEADS * rows * D


def refusal(operation, case: Case, **changed: Any) -> str | None:
    """The sentence; None where nothing is refused."""
    given = {name: changed.get(name, x) for name, x in case.given.items()}
    options = case.options | {name: x for name, x in changed.items() if name not in given}
    try:
        results(operation, given, options)
    except (ValueError, RuntimeError) as refused:
        return f"{type(refused).__name__}: {refused}"
    return None


@over_cases
def test_constants_that_ask_for_a_gradient_are_refused(case):
    """A missing gradient would be a wrong one without a word. (Masks of moments are never differentiated.)"""
    moments_given = case.operation is fused_moments.attention_moments
    for name in [name for name in case.given if "shift" in name or (name == "mask" and not moments_given)]:
        asked = {name: case.given[name].double().clone().requires_grad_()}
        start = f"RuntimeError: {name} requires a gradient, which only the reference computes"
        assert refusal(case.operation, case, **asked).startswith(start)
        with torch.no_grad():
            assert refusal(case.operation, case, **asked) is None


@over_cases
def test_what_does_not_fit_is_refused_with_the_sentence_of_the_reference(case):
    refused = 0
    for name in [name for name in case.given if name != "mask" and "entering" not in name and "weight" not in name]:
        x = case.given[name]
        for wrong in (x[..., :-1], x.unsqueeze(0).repeat(2, *(1,) * x.dim())):
            sentence = refusal(case.oracle, case, **{name: wrong})
            assert sentence == refusal(case.operation, case, **{name: wrong})
            refused += sentence is not None and sentence.startswith("ValueError")
    assert refused >= 3
    for option in {"activation", "kind"} & set(case.options):
        assert refusal(case.operation, case, **{option: "other"}) == refusal(case.oracle, case, **{option: "other"})


@pytest.mark.parametrize("name", ["moments", "fused", "head norms", "blocked"])
def test_a_window_of_no_key_is_refused_with_the_sentence_of_the_reference(name):
    case = CASES[name]
    assert refusal(case.operation, case, window=0) == refusal(case.oracle, case, window=0)
    assert refusal(case.oracle, case, window=0).startswith("ValueError: a window of 0")


@over_cases
def test_a_second_derivative_is_refused(case):
    """Rather than computed without what the first one has of the inputs."""
    given = case.inputs()
    found = [x.where(x > -math.inf, 0.0).square().sum() for x in results(case.operation, given, case.options)]
    grads = torch.autograd.grad(sum(found), [given[name] for name in case.names], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(x.square().sum() for x in grads).backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squared_norm_and_its_gradient(dtype):
    """The reference's numbers and dtypes, rows of zeros included, where a norm has no gradient and its square has 0.

    Sums of 33 squares of one sign: a relative error of 33 roundings of the sum's dtype at the most.
    """
    update = draw(4, 5, 33, seed=60).to(dtype)
    update[1, 2] = 0
    grads, found = [], []
    for operation in (squared_norm.squared_norm, reference.squared_norm):
        leaf = update.clone().requires_grad_()
        value = operation(leaf)
        value.backward(draw(4, 5, seed=61).to(value.dtype))
        found.append(value.detach())
        grads.append(leaf.grad)
    assert [x.dtype for x in found] == [torch.promote_types(dtype, torch.float32)] * 2
    assert grads[0].dtype == dtype
    assert torch.allclose(*found, rtol=33 * torch.finfo(found[1].dtype).eps, atol=0)
    assert torch.equal(grads[0], grads[1])


def test_squared_norm_has_every_derivative():
    """Second order (a penalty on a gradient), and forward mode."""
    update = draw(3, 7, seed=62).requires_grad_()
    assert torch.autograd.gradcheck(squared_norm.squared_norm, (update,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(squared_norm.squared_norm, (update,))
