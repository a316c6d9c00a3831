"""The kernels of `attention_trace` against a float64 oracle: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ofa_kernels import launch, reference
from ofa_kernels.fused import attention_trace as fused
from ofa_kernels.ops import attention_moments, launching
from ofa_kernels.ops import attention_trace as operation
from ofa_kernels.reference import HeadNorm, Rotary
from tests.ofa_kernels.calls import DEVICE, draw, weights_like
from tests.ofa_kernels.test_attention_kernels import (  # noqa: F401
    _poisoned_memory,
    added,
    each,
    padding,
    relative_error,
    small_blocks,
    strided,
)

NAMES = ("query", "key", "value", "output", "query_trace", "key_trace", "value_trace")
HEADS, CONSTANTS = NAMES[:4], NAMES[4:]
SHIFTS = ("query_shift", "key_shift", "value_shift")
OUTPUTS = ("tangent", "trace")
FORWARD = ("attention_trace_features", "attention_moments_forward", "attention_trace_combine")
BACKWARD = (
    "attention_trace_backward_own",
    "attention_moments_backward_rows",
    "attention_moments_backward_keys",
    "attention_moments_backward_values",
    "attention_trace_backward_tokens",
    "attention_trace_backward_constants",
)


@dataclass(frozen=True)
class Trace:
    """Shapes and settings of a call; a mask is made by a function of (sequences, heads, rows, columns)."""

    sequences: int = 2
    heads: int = 2
    shared: int = 1
    rows: int = 21
    head: int = 32
    value: int = 32
    pairs: int = 16
    interleaved: bool = False
    one_angle: bool = True
    shifted: tuple[str, ...] = ()
    mask: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Drawn once: heads of about one unit, and constants whose products with them are, in float32."""
        heads = (self.sequences, self.heads, self.rows), (self.sequences, self.shared, self.rows)
        constant = self.heads, self.head, self.value
        shapes = {
            "query": (*heads[0], self.head),
            "key": (*heads[1], self.head),
            "value": (*heads[1], self.value),
            "output": (*heads[0], self.value),
            "query_trace": constant,
            "key_trace": constant,
            "value_trace": (self.heads,),
        }
        drawn = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
        for name in CONSTANTS[:2]:
            drawn[name] = drawn[name] / self.value**0.5
        return {name: x.to(dtype if name in HEADS else torch.float32) for name, x in drawn.items()}

    def shifts(self) -> dict[str, Tensor | None]:
        """Those of `SHIFTS` that there are, as large as what they are taken off, in float32 as models' are."""
        shapes = (self.heads, self.head), (self.shared, self.head), (self.shared, self.value)
        return {
            name: draw(*shape, seed=31 + i).float() if name in self.shifted else None
            for i, (name, shape) in enumerate(zip(SHIFTS, shapes, strict=True))
        }

    def rotary(self, dtype: torch.dtype) -> Rotary | None:
        """A turn by any angle for each pair and token, in `dtype` as models have it."""
        angle = 3 * draw(1 if self.one_angle else self.sequences, self.rows, self.pairs, seed=10)
        return Rotary(angle.cos().to(dtype), angle.sin().to(dtype), self.interleaved) if self.pairs else None

    def run(
        self, function: Any, dtype: torch.dtype, *, wide: bool = False, outputs: tuple[str, ...] = OUTPUTS
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name for weights drawn once, possibly of wider copies of the inputs."""
        inputs, rotary = self.inputs(dtype), self.rotary(dtype)
        if wide:
            inputs = {name: x.double() for name, x in inputs.items()}
            rotary = rotary and Rotary(rotary.cos.double(), rotary.sin.double(), rotary.interleaved)
        return self.call(function, inputs, rotary, outputs)

    def call(
        self,
        function: Any,
        inputs: dict[str, Tensor],
        rotary: Rotary | None,
        outputs: tuple[str, ...] = OUTPUTS,
        **options: Any,
    ) -> dict[str, Tensor]:
        """As `run`, for these inputs."""
        inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        mask = None if self.mask is None else self.given_mask()
        given = {"scale": self.head**-0.5, "mask": mask, "rotary": rotary, **self.shifts(), **self.settings, **options}
        found = dict(zip(OUTPUTS, function(*inputs.values(), **given), strict=True))
        weights = {name: weights_like(found[name], seed=90 + i) for i, name in enumerate(OUTPUTS)}
        grads = torch.autograd.grad(
            [found[name] for name in outputs],
            list(inputs.values()),
            [weights[name] for name in outputs],
            materialize_grads=True,
        )
        named = {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}
        return {name: output.detach() for name, output in found.items()} | named

    def given_mask(self) -> Tensor:
        mask: Tensor = self.mask(self.sequences, self.heads, self.rows, self.rows).to(DEVICE)
        return mask


CAUSAL = {"causal": True}
CASES = {
    "all keys": Trace(),
    "causal": Trace(settings=CAUSAL),
    "window": Trace(settings={"window": 4}),
    "causal window": Trace(settings={"causal": True, "window": 7}),
    "partial rotation": Trace(head=40, pairs=12, settings=CAUSAL),
    "interleaved": Trace(interleaved=True, rows=9, settings=CAUSAL),
    "interleaved, partial": Trace(interleaved=True, pairs=9, rows=9),
    "one channel rests": Trace(head=33, value=32, rows=9),
    "no rotation": Trace(pairs=0, settings=CAUSAL),
    "an angle for each sequence": Trace(one_angle=False, rows=9),
    "shared keys": Trace(heads=6, shared=2, rows=9, settings=CAUSAL),
    "a key head for each": Trace(shared=2, rows=9),
    "padding": Trace(mask=padding, settings=CAUSAL),
    "a mask of every pair": Trace(mask=each),
    "a mask that is added": Trace(mask=added),
    "an integer mask is added": Trace(mask=lambda b, h, t, s: torch.arange(s) % 3, rows=9),
    "narrower values": Trace(value=24, rows=9),
    "wider values": Trace(head=24, value=40, pairs=12, rows=9, settings=CAUSAL),
    "heads of 16": Trace(head=16, value=16, pairs=8, rows=9),
    "heads of 64": Trace(head=64, value=64, pairs=32, settings=CAUSAL),
    "heads of 80, partial": Trace(head=80, value=80, pairs=20, rows=9),
    "heads of 128": Trace(sequences=1, head=128, value=128, pairs=64, rows=17, settings=CAUSAL),
    "heads of two": Trace(head=2, value=1, pairs=1, rows=9),
    "shifts": Trace(heads=4, shared=2, mask=padding, settings=CAUSAL, shifted=SHIFTS),
    "shifts, interleaved and partial": Trace(head=40, pairs=12, interleaved=True, one_angle=False, shifted=SHIFTS),
    "shifts without rotation": Trace(head=24, pairs=0, rows=17, mask=added, shifted=SHIFTS),
    "a shift of the queries": Trace(rows=9, settings={"window": 4}, shifted=("query_shift",)),
    "a shift of the keys": Trace(head=33, rows=9, mask=each, shifted=("key_shift",)),
    "a shift of the values": Trace(value=24, rows=9, settings=CAUSAL, shifted=("value_shift",)),
    "one token": Trace(rows=1),
    "no tokens": Trace(rows=0),
    "no sequences": Trace(sequences=0),
}


def floor(case: Trace, name: str, dtype: torch.dtype) -> float:
    """What the error may be beside eager PyTorch, which rounds nothing to `dtype` but results and their gradients.

    The kernels round to `dtype`, on the way to

    - the trace: M, and turn and aim or v − o. It is a difference of two sums in each head, so that all count twice;
    - the tangent: what multiplies the values, twice likewise, the covariance between two kernels, and the result;
    - gradients of M: ∂turn and ∂aim, each of a difference of two sums, and what they make of keys and queries;
    - gradients of heads: M, turn or aim, and their gradients, twice; what multiplies the other side in a sweep, twice;
      what a kernel adds to, and the result;
    - with a shift of the queries, what is left of them: in the tangent and in the gradients of heads, twice likewise.

    Each is half a unit at most, 1/√3 of that in the mean square, and errors that do not know of each other add up like
    the root of their number. The gradient of c_v is made of what is exact. In float32 the sums over channels and tokens
    round ⌈log₂⌉ times each, and no element goes through more than 24 other roundings. Triton's interpreter cuts
    bfloat16 off, which makes whole units of half ones.
    """
    depth = sum(math.ceil(math.log2(max(count, 2))) for count in (case.head, case.value, case.rows, case.sequences))
    narrow = (depth + 24) * torch.finfo(torch.float32).eps
    roundings = {"trace": 8, "tangent": 4, "gradient of value_trace": 0}
    roundings |= {f"gradient of {name}": 6 for name in CONSTANTS[:2]}
    shifted = 2 if "query_shift" in case.shifted and (name == "tangent" or name.split()[-1] in HEADS) else 0
    unit = torch.finfo(dtype).eps * (2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1)
    return narrow + math.sqrt((roundings.get(name, 12) + shifted) / 3) * 0.5 * unit


def assert_close(case: Trace, dtype: torch.dtype) -> None:
    """Outputs and gradients are at most twice as far from float64 as the reference in the same dtype, or the floor."""
    actual, eager = case.run(operation.attention_trace, dtype), case.run(reference.attention_trace, dtype)
    oracle = case.run(reference.attention_trace, dtype, wide=True)
    assert actual.keys() == eager.keys()
    for name, value in actual.items():
        assert value.shape == eager[name].shape, name
        assert value.dtype == eager[name].dtype, name
        if value.numel():
            allowed = max(2 * relative_error(eager[name], oracle[name]), floor(case, name, dtype))
            # A written-out comparison: NaN is not ≤ anything.
            assert relative_error(value, oracle[name]) <= allowed, name


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients(case):
    assert_close(case, torch.float16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["causal", "a mask of every pair", "partial rotation", "shifts"])
def test_bfloat16(name):
    """Few, and coarsely: in the interpreter both the rounding and the products of bfloat16 are emulated."""
    assert_close(replace(CASES[name], rows=9), torch.bfloat16)


def test_as_it_is_launched():
    """With the blocks that the run time chooses, several of them."""
    assert_close(Trace(rows=70, mask=padding, settings=CAUSAL), torch.float16)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: on a CPU the kernels run in an interpreter only")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [64, 80, 128])
def test_long_sequences_on_a_gpu(head, dtype):
    """As it is launched, over blocks in every position; heads of 80 turn half of their channels."""
    pairs = head // 4 if head == 80 else head // 2
    case = Trace(heads=4, shared=2, rows=517, head=head, value=head, pairs=pairs, mask=padding)
    assert_close(replace(case, settings=CAUSAL), dtype)
    assert_close(replace(case, settings=CAUSAL, shifted=SHIFTS), dtype)
    assert_close(replace(case, mask=each, interleaved=True, one_angle=False), dtype)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("output", OUTPUTS)
def test_gradients_that_arrive_for_one_output_alone(output):
    """The missing one is zero; of the constants, the tangent depends on none."""
    case = Trace(rows=9, settings=CAUSAL)
    actual = case.run(operation.attention_trace, torch.float16, outputs=(output,))
    eager = case.run(reference.attention_trace, torch.float16, outputs=(output,))
    expected = case.run(reference.attention_trace, torch.float16, wide=True, outputs=(output,))
    for name, value in actual.items():
        allowed = max(2 * relative_error(eager[name], expected[name]), floor(case, name, torch.float16))
        assert relative_error(value, expected[name]) <= allowed, name
    if output == "tangent":
        assert all((actual[f"gradient of {name}"] == 0).all() for name in CONSTANTS)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shifted", [(), SHIFTS], ids=["plain", "shifted"])
def test_a_query_that_attends_to_nothing_has_nothing_and_moves_nothing(shifted):
    """Exactly: no NaN from −inf − (−inf), and no trace of what its rows hold."""
    case = Trace(heads=1, mask=each, shifted=shifted)
    found = case.run(operation.attention_trace, torch.float16)
    for name in ("tangent", "gradient of query", "gradient of output"):
        assert (found[name][:, :, ::5] == 0).all(), name
    assert (found["trace"][:, ::5] == 0).all()
    other = case.inputs(torch.float16)
    for name in ("query", "output"):
        other[name][:, :, ::5] = 3.0
    changed = case.call(operation.attention_trace, other, case.rotary(torch.float16))
    for name in ("key", "value", *CONSTANTS):
        assert torch.equal(found[f"gradient of {name}"], changed[f"gradient of {name}"]), name


@pytest.mark.usefixtures("small_blocks")
def test_two_runs_give_the_same_bits():
    case = Trace(sequences=1, mask=padding, shared=2)
    first, second = (case.run(operation.attention_trace, torch.float16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("multiprocessors", [3, 1000])
def test_constants_are_summed_over_runs(multiprocessors, monkeypatch):
    """A CPU has one run for each head. Two of three blocks, the last one shorter; and one for each block."""
    case = Trace(sequences=1, rows=41, settings=CAUSAL)
    whole = case.run(operation.attention_trace, torch.float16)
    monkeypatch.setattr(operation, "multiprocessors", lambda device: multiprocessors)
    found = case.run(operation.attention_trace, torch.float16)
    for name, value in found.items():
        if name.removeprefix("gradient of ") in CONSTANTS:
            # Three blocks' sums in another order.
            assert relative_error(value, whole[name]) <= 4 * torch.finfo(torch.float32).eps, name
        else:
            assert torch.equal(value, whole[name]), name


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("moved", [False, True], ids=["queries", "what a shift leaves of them"])
def test_the_gradient_of_the_queries_is_added_to_what_a_token_does_to_itself(moved):
    """In place: the sweep reads and writes the tensor that it is given. A tangent's gradient joins them."""
    case = Trace(rows=9)
    query, key, value, output, *_ = case.inputs(torch.float16).values()
    b, h, t, features = *query.shape[:3], 5
    reverse, turn, aim = draw(1, t, features).half(), draw(b, h, t, features, seed=1).half(), draw(*query.shape).half()
    tangent = draw(*query.shape, seed=5).half() if moved else None
    sweep = attention_moments.Attention(query, key, value, output, reverse, turn, aim, tangent, None, 0.2, False, None)
    lse, mean, covariance = draw(b, h, t).float(), draw(b, h, t).float(), torch.empty_like(output)
    sweep.forward(lse, mean, covariance)
    grads = lse, draw(b, h, t, seed=2).float(), draw(*output.shape, seed=3).half()
    alone = sweep.backward(lse, *grads)
    own, apart = draw(*query.shape, seed=4).half(), alone["query"]
    swept = sweep.backward(lse, *grads, own_query=(into := own.clone()), tangent_follows=True)
    assert swept["query"].data_ptr() == into.data_ptr()
    assert "tangent" not in swept
    # One rounding of each sum of the sweep alone, and one of the whole; a tangent's sum has operands of its own.
    unit = torch.finfo(torch.float16).eps * (2 if moved else 1)
    if moved:
        apart = apart + alone["tangent"]
    torch.testing.assert_close(swept["query"], apart + own, rtol=unit, atol=unit * float(apart.abs().max()))


def test_each_gradient_has_the_dtype_of_its_tensor():
    """Constants are float32 beside a stream of 16 bits, or whatever they are."""
    for constants in (torch.float32, torch.float16):
        case = Trace(rows=3)
        inputs = {name: x.to(constants) if name in CONSTANTS else x for name, x in case.inputs(torch.float16).items()}
        found = case.call(operation.attention_trace, inputs, case.rotary(torch.float16))
        assert (found["tangent"].dtype, found["trace"].dtype) == (torch.float16, torch.float32)
        for name, x in inputs.items():
            assert found[f"gradient of {name}"].dtype == x.dtype, name


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("how", ["rows apart", "heads between rows", "channels apart"])
def test_strides_of_inputs(how):
    """Only the values count; the NaN between rows that are apart are never read."""
    case = Trace(shared=2, rows=9, one_angle=False, shifted=SHIFTS)
    dense, rotary = case.inputs(torch.float16), case.rotary(torch.float16)
    inputs = {name: strided(x, how) if name in HEADS else x for name, x in dense.items()}
    found, expected = (case.call(operation.attention_trace, given, rotary) for given in (inputs, dense))
    assert all(torch.equal(found[name], expected[name]) for name in found)
    if how == "heads between rows":
        for name in HEADS:
            assert found[f"gradient of {name}"].stride() == inputs[name].stride(), name
        assert found["tangent"].transpose(1, 2).is_contiguous(), "as W_o reads it"


@pytest.mark.usefixtures("small_blocks")
def test_strides_of_constants_and_angles():
    """M stored the other way round; angles that models have twice, of one sequence for all, or with channels apart."""
    case = Trace(heads=1, rows=5)
    inputs, rotary = case.inputs(torch.float16), case.rotary(torch.float16)
    expected = case.call(operation.attention_trace, inputs, rotary)
    turned = {name: x.mT.contiguous().mT if name in CONSTANTS[:2] else x for name, x in inputs.items()}
    arrangements = (
        lambda x: torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., : x.shape[-1]],
        lambda x: x.expand(case.sequences, -1, -1),
        lambda x: x.repeat(case.sequences, 1, 1),
        lambda x: x.mT.contiguous().mT,
    )
    for arrange in arrangements:
        found = case.call(operation.attention_trace, turned, Rotary(arrange(rotary.cos), arrange(rotary.sin)))
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.usefixtures("small_blocks")
def test_expanded_inputs_and_gradients():
    """One row for all queries, one head for all, one sequence for all; a sum hands back one number for everything."""
    case = Trace(shared=2, rows=9)
    inputs, rotary = case.inputs(torch.float16), case.rotary(torch.float16)
    for name, dim in (("query", 2), ("key", 0), ("value", 1), ("output", 2)):
        whole = inputs[name]
        inputs[name] = whole.narrow(dim, 0, 1).expand(whole.shape)
    results = []
    for given in (inputs, {name: x.contiguous() for name, x in inputs.items()}):
        given = [x.detach().requires_grad_() for x in given.values()]
        outputs = operation.attention_trace(*given, scale=0.2, rotary=rotary)
        grads = [x.new_full((), 0.5).expand(x.shape) for x in outputs]
        grads = grads if results == [] else [grad.contiguous() for grad in grads]
        results.append([*outputs, *torch.autograd.grad(outputs, given, grads)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_inputs_are_left_as_they_were():
    case = Trace(rows=9, mask=added)
    inputs, rotary, mask = case.inputs(torch.float16), case.rotary(torch.float16), case.given_mask()
    before = {name: x.clone() for name, x in inputs.items()}
    case.call(operation.attention_trace, inputs, rotary, mask=mask)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())
    assert torch.equal(mask, case.given_mask())


def launches(call: Any, architecture: str = "sm_90") -> list[tuple[str, dict[str, Any]]]:
    """What `call` would launch, in its order: kernels and their arguments by name."""
    found = []

    def record(kernel, grid, args, keywords):
        names = [name for name in kernel.arg_names if name not in keywords]
        found.append((kernel.fn.__name__, {"grid": grid, **dict(zip(names, args, strict=True)), **keywords}))

    with launching.launching_by(record, architecture):
        call()
    return found


def dispatched(case: Trace, device: torch.device | str = DEVICE) -> list[Any]:
    """The arguments of the operation as PyTorch's dispatcher knows it."""
    rotary = case.rotary(torch.float16)
    turns = (None, None) if rotary is None else (rotary.cos, rotary.sin)
    mask = None if case.mask is None else case.given_mask()
    tensors = [*case.inputs(torch.float16).values(), *case.shifts().values(), mask, *turns]
    tensors = [x if x is None else x.to(device) for x in tensors]
    return [*tensors, case.interleaved, 0.2, case.settings.get("causal", False), case.settings.get("window")]


def backwards(given: list[Any], saved: Any, grads: Any) -> list[Any]:
    """The arguments of the backward operation from those of the forward one, what it saved, and gradients."""
    return [*given[:13], *saved, *grads, *given[13:]]


@pytest.mark.parametrize("shifted", [(), SHIFTS, SHIFTS[:1], SHIFTS[2:]], ids="-".join)
@pytest.mark.parametrize("pairs", [0, 9, 16])
def test_what_is_launched(pairs, shifted):
    """A sweep over the keys forward and three backward, what goes token by token around them, and nothing twice."""
    given = dispatched(Trace(pairs=pairs, mask=padding, shifted=shifted), "meta")
    found = launches(lambda: operation.forward(*given))
    assert tuple(name for name, _ in found) == FORWARD
    tangent, trace, *saved = operation.empty(*given)
    found = launches(lambda: operation.backward(*backwards(given, saved, (tangent, trace))))
    assert tuple(name for name, _ in found) == BACKWARD


@pytest.mark.parametrize(("architecture", "fewer"), [("sm_90", 1), ("sm_100", 2), ("gfx942", 1)])
def test_shifts_take_fewer_rows_at_once_where_registers_do_not_suffice(architecture, fewer):
    """Heads of 64 on sm_100, whose kernels spill otherwise; what was measured on sm_90 stays, and gfx942 has room."""
    rows = []
    for shifted in ((), SHIFTS):
        given = dispatched(Trace(head=64, value=64, pairs=32, shifted=shifted), "meta")
        found = dict(launches(lambda given=given: operation.forward(*given), architecture))
        rows.append(found["attention_trace_combine"]["BLOCK_ROWS"])
    assert rows[0] == fewer * rows[1]


@pytest.mark.parametrize("case", [Trace(rows=0), Trace(sequences=0)], ids=["no tokens", "no sequences"])
def test_without_a_token_nothing_is_launched(case):
    given = dispatched(case, "meta")
    tangent, trace, *saved = operation.empty(*given)
    assert launches(lambda: operation.forward(*given)) == []
    assert launches(lambda: operation.backward(*backwards(given, saved, (tangent, trace)))) == []


OTHERS = {
    "float32": (Trace(rows=9), torch.float32, ()),
    "wide heads": (Trace(rows=3, head=144, value=144, pairs=72), torch.float16, ()),
    "wide values": (Trace(rows=3, value=144), torch.float16, ()),
    "float32 with shifts": (Trace(rows=9, shifted=SHIFTS), torch.float32, ()),
    "a norm of the queries": (Trace(rows=9, shifted=SHIFTS[:1]), torch.float16, ("query_norm",)),
    "a norm of the keys": (Trace(rows=9), torch.float16, ("key_norm",)),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("case", "dtype", "special"), OTHERS.values(), ids=OTHERS)
def test_elsewhere_the_sweeps_alone_are_kernels(case, dtype, special, monkeypatch):
    """The bits of `fused.attention_trace` around them, close to the reference."""
    monkeypatch.setattr(operation, "call", lambda *args: pytest.fail("these kernels do not take it"))
    inputs, rotary = case.inputs(dtype), case.rotary(dtype)
    weight = 1 + 0.3 * draw(case.head, seed=30).float()
    options = {
        "query_norm": HeadNorm(draw(*inputs["query"].shape, dtype=dtype, seed=34), weight, 1e-5),
        "key_norm": HeadNorm(draw(*inputs["key"].shape, dtype=dtype, seed=35), weight, 1e-5),
    }
    given = {name: options[name] for name in special}
    found, eager = (
        case.call(function, inputs, rotary, **given)
        for function in (operation.attention_trace, reference.attention_trace)
    )
    fully = case.call(fused.attention_trace, inputs, rotary, moments=operation._KERNELS, **given)
    for name, value in found.items():
        assert torch.equal(value, fully[name]), name
        # Two results in 16 bits, each within a floor of what is right.
        assert relative_error(value, eager[name]) <= 2 * floor(case, name, dtype), name


OPCHECKED = Trace(rows=5, mask=padding, settings=CAUSAL, shifted=("query_shift", "value_shift"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backward", [False, True])
def test_opcheck(backward):
    """Schema, autograd registration, shapes without data, and tracing, by PyTorch's own check."""
    given = dispatched(OPCHECKED)
    if backward:
        tangent, trace, *saved = operation.forward(*given)
        arguments = backwards(given, saved, (tangent, trace))
    else:
        arguments = [x.requires_grad_() if i < len(NAMES) else x for i, x in enumerate(given)]
    name = "attention_trace_backward" if backward else "attention_trace"
    torch.library.opcheck(getattr(torch.ops.ofa_kernels, name).default, arguments)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    """Forward and backward, with no break, and the same bits."""
    case = replace(OPCHECKED, rows=6)
    compiled = torch.compile(operation.attention_trace, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    plain, traced = (case.run(function, torch.float16) for function in (operation.attention_trace, compiled))
    assert all(torch.equal(plain[name], traced[name]) for name in plain)


@pytest.mark.usefixtures("small_blocks")
def test_a_second_derivative_is_refused_not_wrong():
    case = Trace(rows=3)
    inputs = [x.requires_grad_() for x in case.inputs(torch.float16).values()]
    outputs = operation.attention_trace(*inputs, scale=0.2, rotary=case.rotary(torch.float16))
    (grad,) = torch.autograd.grad(sum(output.square().sum() for output in outputs), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="OFA_KERNELS=reference"):
        torch.autograd.grad(grad.sum(), inputs[0])


def test_a_mask_that_requires_a_gradient_is_refused():
    case = Trace(rows=3, mask=lambda b, h, t, s: torch.zeros(t, s, requires_grad=True))
    with pytest.raises(RuntimeError, match="mask"):
        case.run(operation.attention_trace, torch.float16)


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_that_requires_a_gradient_is_refused(name):
    """Shifts are made of frozen weights; a gradient that is left out would be a wrong one."""
    case = Trace(rows=3, shifted=SHIFTS)
    inputs, shift = case.inputs(torch.float16), case.shifts()[name].requires_grad_()
    with pytest.raises(RuntimeError, match=name):
        case.call(operation.attention_trace, inputs, case.rotary(torch.float16), **{name: shift})


@pytest.mark.parametrize("name", [name for name in (*NAMES, *SHIFTS) if name != "query"])
def test_what_does_not_fit_is_refused_with_the_sentence_of_the_reference(name):
    case = Trace(rows=5, shifted=SHIFTS)
    inputs = case.inputs(torch.float16) | case.shifts()
    shorter = inputs[name][:-1] if name == "value_trace" else inputs[name][..., :-1, :]
    messages = []
    for function in (operation.attention_trace, reference.attention_trace):
        with pytest.raises(ValueError, match="should be") as caught:
            function(**(inputs | {name: shorter}), scale=1.0)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["causal", "wider values", "shared keys"])
def test_a_gpu_tensor_without_data_has_the_shapes_of_the_reference(name):
    drawn = CASES[name].inputs(torch.float16)
    expected = reference.attention_trace(*drawn.values(), scale=1.0)
    with FakeTensorMode():
        given = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in drawn.values()]
        found = operation.attention_trace(*given, scale=1.0)
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual.device.type, actual.shape, actual.dtype) == ("cuda", wanted.shape, wanted.dtype)


def test_no_run_is_without_a_block_and_none_more_than_a_gpu_has_room_for():
    """Two programs for each run and head: two on every multiprocessor where there are blocks enough."""
    for blocks, heads, multiprocessors in [(0, 4, 132), (1, 32, 132), (64, 32, 132), (7, 2, 1000), (500, 1, 132)]:
        runs = launch.attention_runs(blocks, heads, multiprocessors)
        assert 1 <= runs <= max(1, blocks)
        assert runs == max(1, blocks) or 2 * heads * runs >= 2 * multiprocessors
        assert heads * (runs - 1) < multiprocessors
