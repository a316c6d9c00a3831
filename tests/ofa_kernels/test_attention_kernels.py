"""The kernels of `attention_moments` against a float64 oracle: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ofa_kernels import dispatch, launch, reference
from ofa_kernels.ops import attention_moments as operation
from ofa_kernels.ops import launching
from ofa_kernels.ops.attention_trace import WIDEST_HEAD
from tests.ofa_kernels.calls import DEVICE, draw, weights_like

NAMES = ("query", "key", "value", "output", "angle", "turn", "aim", "tangent")
OUTPUTS = ("lse", "mean", "covariance")
KERNELS = ("forward", "backward_rows", "backward_keys", "backward_values")


@dataclass(frozen=True)
class Attention:
    """Shapes and settings of a call; a mask is made by a function of (sequences, heads, rows, columns)."""

    sequences: int = 2
    heads: int = 2
    shared: int = 1
    rows: int = 21
    columns: int | None = None
    head: int = 32
    value: int = 32
    features: int = 32
    one_angle: bool = False
    tangent: bool = False
    mask: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Drawn once; scores of a few units, so that some keys have most of the weight and none has all."""
        b, h, k, t = self.sequences, self.heads, self.shared, self.rows
        s = t if self.columns is None else self.columns
        shapes = {
            "query": (b, h, t, self.head),
            "key": (b, k, s, self.head),
            "value": (b, k, s, self.value),
            "output": (b, h, t, self.value),
            "angle": (1 if self.one_angle else b, t, self.features),
            "turn": (b, h, s, self.features),
            "aim": (b, h, t, self.head),
            "tangent": (b, h, t, self.head),
        }
        drawn: dict[str, Tensor | None] = {
            name: draw(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())
        }
        return drawn if self.tangent else drawn | {"tangent": None}

    def given_mask(self) -> Tensor | None:
        columns = self.rows if self.columns is None else self.columns
        return None if self.mask is None else self.mask(self.sequences, self.heads, self.rows, columns).to(DEVICE)

    def run(
        self, function: Any, dtype: torch.dtype, *, wide: bool = False, outputs: tuple[str, ...] = OUTPUTS
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name for weights drawn once, possibly of wider copies of the inputs."""
        drawn = self.inputs(dtype)
        return self.call(function, {n: x.double() if wide and x is not None else x for n, x in drawn.items()}, outputs)

    def call(
        self, function: Any, inputs: dict[str, Tensor | None], outputs: tuple[str, ...] = OUTPUTS
    ) -> dict[str, Tensor]:
        """As `run`, for these inputs."""
        inputs = {n: x if x is None else x.detach().requires_grad_(n != "angle") for n, x in inputs.items()}
        mask = self.given_mask()
        found = dict(zip(OUTPUTS, function(*inputs.values(), mask, **self.all_settings()), strict=True))
        differentiated = {name: x for name, x in inputs.items() if x is not None and name != "angle"}
        weights = {name: weights_like(found[name], seed=90 + i) for i, name in enumerate(OUTPUTS)}
        grads = torch.autograd.grad(
            [found[name] for name in outputs],
            list(differentiated.values()),
            [weights[name] for name in outputs],
            materialize_grads=True,
        )
        named = {f"gradient of {name}": grad for name, grad in zip(differentiated, grads, strict=True)}
        return {name: output.detach() for name, output in found.items()} | named

    def all_settings(self) -> dict[str, Any]:
        return {"scale": self.head**-0.5, **self.settings}


def padding(b, h, t, s):
    """(B, 1, 1, S): the last keys of one sequence, and the first of another, are none."""
    keys = torch.arange(s)
    return torch.stack([keys < s - 4 if i % 2 else keys >= 3 for i in range(b)])[:, None, None, :]


def each(b, h, t, s):
    """(B, H, T, S), and every fifth query attends to nothing."""
    mask = draw(b, h, t, s, seed=20).cpu() > -0.5
    mask[:, :, ::5] = False
    return mask


def added(b, h, t, s):
    """(H, T, S) in float32, with the two values that forbid, and one query that is forbidden everything."""
    mask = draw(h, t, s, seed=21).cpu().float()
    mask[:, :, 1::3] = -torch.inf
    mask[:, :, 2::5] = torch.finfo(torch.float32).min
    mask[:, t // 2] = -torch.inf
    return mask


CASES = {
    "all keys": Attention(),
    "causal": Attention(settings={"causal": True}),
    "window": Attention(settings={"window": 4}),
    "causal window": Attention(settings={"causal": True, "window": 7}),
    "a window of every key": Attention(settings={"causal": True, "window": sys.maxsize}),
    "tangent": Attention(tangent=True),
    "causal tangent": Attention(tangent=True, settings={"causal": True}),
    "padding": Attention(mask=padding, settings={"causal": True}),
    "a mask of every pair": Attention(mask=each, tangent=True),
    "a mask of queries and keys": Attention(mask=lambda b, h, t, s: each(1, 1, t, s)[0, 0]),
    "a mask of queries": Attention(mask=lambda b, h, t, s: each(1, h, t, 1)),
    "a mask that is added": Attention(mask=added),
    "an integer mask is added": Attention(mask=lambda b, h, t, s: torch.arange(s) % 3),
    "shared keys": Attention(heads=6, shared=2, rows=9, settings={"causal": True}),
    "a key head for each": Attention(heads=2, shared=2, rows=9),
    "one angle for all": Attention(one_angle=True, rows=9),
    "one feature": Attention(features=1, rows=9),
    "one feature more": Attention(features=33, rows=9, tangent=True),
    "heads of 64": Attention(head=64, value=64, features=64, tangent=True),
    "heads of 80": Attention(head=80, value=80, features=48, tangent=True, settings={"causal": True}),
    "narrower values": Attention(value=20),
    "heads of one": Attention(head=1, value=1, features=1),
    "one query": Attention(rows=1),
    "one query and many keys": Attention(rows=1, columns=37, tangent=True),
    "fewer queries": Attention(rows=5, columns=37, settings={"causal": True}),
    "fewer keys": Attention(rows=37, columns=5, settings={"window": 6}),
    "no keys": Attention(columns=0),
    "no queries": Attention(rows=0, columns=4),
    "no sequences": Attention(sequences=0),
}
HALF = (
    "all keys",
    "causal window",
    "tangent",
    "padding",
    "a mask of every pair",
    "a mask that is added",
    "shared keys",
    "one feature more",
    "heads of 64",
    "heads of 80",
    "narrower values",
    "fewer keys",
)
"""Names of cases."""


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that 21 queries are two of them: an interpreter takes milliseconds for each."""
    small = launch.AttentionLaunch(16, 16, num_warps=1, num_stages=1, max_registers=None)
    monkeypatch.setattr(launch, "configure_attention", lambda *args: small)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that nobody wrote is NaN, so that an output element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64, with lse −inf the same on both sides; NaN stays NaN.

    What is shorter than 1 is measured against 1, the size of everything that is drawn.
    """
    actual, expected = actual.double(), expected.double()
    same = (actual == -torch.inf) & (expected == -torch.inf)
    gap = torch.where(same, 0.0, actual - expected)
    return float(torch.linalg.vector_norm(gap) / torch.linalg.vector_norm(expected[~same]).clamp_min(1.0))


def floor(case: Attention, name: str, dtype: torch.dtype) -> float:
    """What the error may be where eager PyTorch, which computes all of it in float32, happens to make none.

    Sums over channels and keys round ⌈log₂⌉ times each, and no element goes through more than 16 other roundings in
    float32; lse and mean are made of them alone, since all that is multiplied for them is exact in `dtype`. The rest is
    rounded to `dtype` by half a unit in two places: what multiplies the keys or values, and the result. The first
    counts twice, because covariance and gradient of the queries are the difference of two sums. Triton's interpreter
    cuts bfloat16 off, which makes whole units of half ones.
    """
    depth = math.ceil(math.log2(max(case.head, case.features))) + math.ceil(math.log2(max(case.rows, 2)))
    narrow = (depth + 16) * torch.finfo(torch.float32).eps
    if dtype == torch.float32 or name in ("lse", "mean"):
        return narrow
    unit = torch.finfo(dtype).eps * (2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1)
    return narrow + (0.5 + 2 * 0.5) * unit


def assert_close(case: Attention, dtype: torch.dtype) -> None:
    """Outputs and gradients are at most twice as far from float64 as the reference in the same dtype."""
    actual, eager = case.run(operation.attention_moments, dtype), case.run(reference.attention_moments, dtype)
    oracle = case.run(reference.attention_moments, dtype, wide=True)
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
    assert_close(case, torch.float32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", HALF)
def test_outputs_and_gradients_in_float16(name):
    """What is rounded for a product, in each kind of sum; what a query attends to has been seen to in float32."""
    assert_close(CASES[name], torch.float16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["causal", "a mask of every pair", "shared keys"])
def test_bfloat16(name):
    """Few, and coarsely: in the interpreter both the rounding and the products of bfloat16 are emulated."""
    assert_close(CASES[name], torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_it_is_launched(dtype):
    """With the blocks that the run time chooses, several of them either way."""
    assert_close(Attention(heads=2, rows=70, mask=padding, settings={"causal": True}), dtype)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("tangent", [False, True])
def test_gradients_that_arrive_for_one_output_alone(output, tangent):
    """Missing gradients are zero, without being written out."""
    case = Attention(tangent=tangent, settings={"causal": True})
    actual = case.run(operation.attention_moments, torch.float32, outputs=(output,))
    expected = case.run(reference.attention_moments, torch.float32, wide=True, outputs=(output,))
    for name, value in actual.items():
        assert relative_error(value, expected[name]) <= floor(case, name, torch.float32), name


@pytest.mark.usefixtures("small_blocks")
def test_a_query_that_attends_to_nothing_has_nothing_and_moves_nothing():
    """Exactly: no NaN from −inf − (−inf), and no trace of what its rows hold."""
    case = Attention(mask=each, tangent=True)
    found = case.run(operation.attention_moments, torch.float32)
    assert (found["lse"][:, :, ::5] == -torch.inf).all()
    for name in ("mean", "covariance", *(f"gradient of {name}" for name in ("query", "output", "aim", "tangent"))):
        assert (found[name][:, :, ::5] == 0).all(), name
    other = case.inputs(torch.float32)
    for name in ("query", "aim", "tangent", "output"):
        other[name][:, :, ::5] = 3.0
    changed = case.call(operation.attention_moments, other)
    for name in ("key", "value", "turn"):
        assert torch.equal(found[f"gradient of {name}"], changed[f"gradient of {name}"])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("settings", "unseen", "blind"), [({"causal": True}, 32, 0), ({"window": 8}, 0, 32)])
def test_blocks_that_cannot_attend_are_not_read(settings, unseen, blind):
    """NaN in a block of keys reach only the queries that have one of its keys in their own block's range."""
    case = Attention(rows=48, settings=settings)
    clean = case.inputs(torch.float32)
    poisoned = {name: None if x is None else x.clone() for name, x in clean.items()}
    for name in ("key", "value", "turn"):
        poisoned[name][:, :, unseen : unseen + 16] = torch.nan
    found, expected = (case.call(operation.attention_moments, inputs) for inputs in (poisoned, clean))
    for name in (*OUTPUTS, "gradient of query", "gradient of aim"):
        assert torch.equal(found[name][:, :, blind : blind + 16], expected[name][:, :, blind : blind + 16]), name


@pytest.mark.usefixtures("small_blocks")
def test_two_runs_give_the_same_bits():
    case = Attention(sequences=1, mask=padding, tangent=True)
    first, second = (case.run(operation.attention_moments, torch.float16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values behind other strides."""
    if how == "rows apart":
        between = torch.full_like(tensor, torch.nan)
        return torch.cat((tensor, between), -1)[..., : tensor.shape[-1]]
    if how == "heads between rows":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("how", ["rows apart", "heads between rows", "channels apart"])
def test_strides_of_inputs(how):
    """Only the values count; the NaN between rows that are apart are never read."""
    case = Attention(heads=2, shared=2, mask=padding, tangent=True)
    dense = case.inputs(torch.float32)
    inputs = {name: None if x is None else strided(x, how) for name, x in dense.items()}
    found, expected = (case.call(operation.attention_moments, given) for given in (inputs, dense))
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_lie_in_memory_as_their_tensors_do():
    """Heads that are views of (B, T, H, d) have such gradients; the projection behind them reads these as they are."""
    case = Attention(heads=4, shared=2)
    dense = case.inputs(torch.float32)
    inputs = {name: None if x is None else strided(x, "heads between rows") for name, x in dense.items()}
    found = case.call(operation.attention_moments, inputs)
    for name in ("query", "key", "value", "output", "turn", "aim"):
        assert found[f"gradient of {name}"].stride() == inputs[name].stride(), name


def gradients(case: Attention, arrange: Any) -> tuple[Tensor, ...]:
    """Gradients of all inputs for incoming ones that `arrange` lays out from values drawn once."""
    inputs = {n: None if x is None else x.requires_grad_(n != "angle") for n, x in case.inputs(torch.float32).items()}
    outputs = operation.attention_moments(*inputs.values(), case.given_mask(), **case.all_settings())
    grads = [arrange(weights_like(output, seed=i)) for i, output in enumerate(outputs)]
    before = [grad.clone() for grad in grads]
    wanted = [x for x in inputs.values() if x is not None and x.requires_grad]
    found = torch.autograd.grad(outputs, wanted, grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True)), "a gradient was written to"
    return found


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("how", ["rows apart", "heads between rows", "channels apart"])
def test_strides_of_gradients(how):
    case = Attention(tangent=True)
    found, expected = (gradients(case, arrange) for arrange in (lambda grad: strided(grad, how), lambda grad: grad))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_expanded_gradients():
    """A sum hands back one number with stride 0 in every dimension."""
    half = torch.full((), 0.5, device=DEVICE)
    expanded = gradients(Attention(), lambda grad: half.expand(grad.shape))
    dense = gradients(Attention(), lambda grad: half.expand(grad.shape).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_expanded_inputs():
    """One row for all queries, one head for all, one sequence for all."""
    case = Attention(heads=2, shared=2, tangent=True)
    inputs = case.inputs(torch.float32)
    for name, dim in (("tangent", 2), ("turn", 1), ("key", 0), ("aim", 2)):
        whole = inputs[name]
        inputs[name] = whole.narrow(dim, 0, 1).expand(whole.shape)
    dense = {name: x.contiguous() for name, x in inputs.items()}
    found, expected = (case.call(operation.attention_moments, given) for given in (inputs, dense))
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.usefixtures("small_blocks")
def test_inputs_are_left_as_they_were():
    case = Attention(mask=added, tangent=True)
    inputs, mask = case.inputs(torch.float32), case.given_mask()
    before = {name: x.clone() for name, x in inputs.items()}
    case.call(operation.attention_moments, inputs)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())
    assert torch.equal(mask, case.given_mask())


@pytest.mark.usefixtures("small_blocks")
def test_operands_in_float32_are_rounded_to_the_stream_once():
    """turn, aim and tangent come out of float32 arithmetic: the same bits as if they had been rounded before."""
    case = Attention(tangent=True)
    rounded = case.inputs(torch.float16)
    wide = rounded | {name: rounded[name].float() for name in ("angle", "turn", "aim", "tangent")}
    found, expected = (case.call(operation.attention_moments, given) for given in (wide, rounded))
    for name, value in found.items():
        widened = name in ("gradient of turn", "gradient of aim", "gradient of tangent")
        assert value.dtype == (torch.float32 if widened or name in ("lse", "mean") else torch.float16), name
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name


def launches(call: Any) -> dict[str, dict[str, Any]]:
    """What `call` would launch, by kernel: its arguments by name."""
    found = {}

    def record(kernel, grid, args, keywords):
        names = [name for name in kernel.arg_names if name not in keywords]
        found[kernel.fn.__name__] = {"grid": grid, **dict(zip(names, args, strict=True)), **keywords}

    with launching.launching_by(record, "sm_90"):
        call()
    return found


def meta(case: Attention, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """The arguments of `forward`, without data."""
    given = [None if x is None else x.to("meta") for x in case.inputs(dtype).values()]
    mask = case.given_mask()
    settings = case.all_settings()
    shared = settings["scale"], settings.get("causal", False), settings.get("window")
    return [*given, None if mask is None else mask.to("meta"), *shared]


@pytest.mark.parametrize(("mask", "size"), [(padding, 2 * 21), (lambda b, h, t, s: each(1, h, t, 1), 2 * 21)])
def test_a_mask_is_never_written_out(mask, size):
    """(B, 1, 1, S) of padding stays as many bytes."""
    launched = launches(lambda: operation.forward(*meta(Attention(mask=mask))))
    (arguments,) = launched.values()
    assert arguments["mask"].untyped_storage().nbytes() == size


def test_a_gradient_takes_three_sweeps():
    """Over the keys of each query, and twice over the queries of each key; no matrix of all scores in any."""
    *given, scale, causal, window = meta(Attention())
    lse, mean, covariance = operation.empty(*given)
    found = launches(lambda: operation.backward(*given, lse, None, mean, covariance, scale, causal, window))
    assert {name.removeprefix("attention_moments_") for name in found} == set(KERNELS[1:])


ATTENTION = Attention(tangent=True, mask=padding, rows=5, settings={"causal": True})


def arguments(backward: bool) -> list[Any]:
    """Of the operation, as PyTorch's dispatcher knows it."""
    given: list[Any] = [*ATTENTION.inputs(torch.float32).values(), ATTENTION.given_mask()]
    if backward:
        lse, mean, covariance = operation.forward(*given, 0.2, True, None)
        # The gradient of an lse of −inf is any number: 0 comes of it.
        given += [lse, mean, mean, covariance]
    else:
        given = [x.requires_grad_() if x.is_floating_point() and x.dim() == 4 else x for x in given]
    return [*given, 0.2, True, None]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backward", [False, True])
def test_opcheck(backward):
    """Schema, autograd registration, shapes without data, and tracing, by PyTorch's own check."""
    name = "attention_moments_backward" if backward else "attention_moments"
    torch.library.opcheck(getattr(torch.ops.ofa_kernels, name).default, arguments(backward))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    """Forward and backward, with no break, and the same bits."""
    case = replace(ATTENTION, rows=6)
    compiled = torch.compile(operation.attention_moments, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    plain, traced = (case.run(function, torch.float32) for function in (operation.attention_moments, compiled))
    assert all(torch.equal(plain[name], traced[name]) for name in plain)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: on a CPU the kernels run in an interpreter only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [32, 64, 80, 128])
def test_long_sequences_on_a_gpu(head, dtype):
    """As it is launched, over blocks in every position."""
    case = Attention(heads=4, shared=2, rows=517, head=head, value=head, features=head, mask=padding)
    assert_close(replace(case, settings={"causal": True}), dtype)
    assert_close(replace(case, tangent=True, settings={"window": 100}), dtype)


@pytest.mark.usefixtures("small_blocks")
def test_a_second_derivative_is_refused_not_wrong():
    inputs = [None if x is None else x.requires_grad_() for x in Attention(rows=3).inputs(torch.float32).values()]
    value = sum(output.square().sum() for output in operation.attention_moments(*inputs, scale=0.2))
    (grad,) = torch.autograd.grad(value, inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="OFA_KERNELS=reference"):
        torch.autograd.grad(grad.sum(), inputs[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "query"])
def test_what_does_not_fit_is_refused_with_the_sentence_of_the_reference(name):
    case = Attention(tangent=True, rows=5)
    inputs = case.inputs(torch.float32)
    wrong = inputs | {name: inputs[name][..., :-1, :]}
    messages = []
    for function in (operation.attention_moments, reference.attention_moments):
        with pytest.raises(ValueError, match="should be") as caught:
            function(*wrong.values(), scale=1.0)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_window_of_no_key_is_refused():
    with pytest.raises(ValueError, match="window of 0"):
        operation.attention_moments(*Attention(rows=3).inputs(torch.float32).values(), scale=1.0, window=0)


@pytest.mark.parametrize(("dtype", "widest"), [(torch.float32, 128), (torch.float16, 256), (torch.bfloat16, 256)])
@pytest.mark.parametrize("of", ["head", "value", "features"])
def test_heads_that_are_too_wide_are_refused(of, dtype, widest):
    case = replace(Attention(rows=2), **{of: widest + 1})
    with pytest.raises(ValueError, match=f"{widest + 1} channels are wider than the {widest}"):
        case.run(operation.attention_moments, dtype)


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "expected"),
    [
        ("cuda", torch.bfloat16, (2, 4, 8, 256), "triton"),
        ("cuda", torch.float32, (2, 4, 8, 128), "triton"),
        ("cuda", torch.float32, (2, 4, 8, 256), "other"),
        ("cuda", torch.bfloat16, (2, 4, 8, 257), "other"),
        ("cuda", torch.float64, (2, 4, 8, 64), "other"),
        ("cuda", torch.bfloat16, (8, 64), "other"),
        ("cpu", torch.float32, (2, 4, 8, 64), "other"),
    ],
)
def test_kernels_run_for_the_heads_that_they_take(device, dtype, shape, expected, monkeypatch):
    """Tensors without data stand for those of a GPU, so that this shows on a machine that has none."""
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    with FakeTensorMode():
        chosen = dispatch.choose("attention_moments", torch.empty(shape, dtype=dtype, device=device)).name
    assert (chosen == "triton") == (expected == "triton")


@pytest.mark.parametrize("name", ["tangent", "narrower values", "shared keys"])
def test_a_gpu_tensor_without_data_has_the_shapes_of_the_reference(name):
    case = CASES[name]
    drawn = case.inputs(torch.bfloat16)
    expected = reference.attention_moments(*drawn.values(), scale=1.0)
    with FakeTensorMode():
        given = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in drawn.values()]
        found = operation.attention_moments(*given, scale=1.0)
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual.device.type, actual.shape, actual.dtype) == ("cuda", wanted.shape, wanted.dtype)


TOKENS = ("features", "combine", "backward_own", "backward_tokens", "backward_constants")
LAUNCHED = {
    **{f"attention_moments_{name}": {2: 256, 4: 128} for name in KERNELS},
    **{f"attention_trace_{name}": {2: WIDEST_HEAD} for name in TOKENS},
}
"""Kernels, and the widest heads that each takes by the bytes of a number."""


@pytest.mark.parametrize(
    ("kernel", "itemsize", "width"),
    [
        (kernel, size, width)
        for kernel, widest in LAUNCHED.items()
        for size in widest
        for width in (1, 16, 32, 33, 64, 80, 128, 192, 256)
        if width <= widest[size]
    ],
)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx1100"])
@pytest.mark.parametrize("crowded", [False, True])
def test_tiles_and_threads_are_within_bounds(kernel, architecture, itemsize, width, crowded):
    config = launch.configure_attention(kernel, width, itemsize, architecture, crowded)
    tile = launch.tile_width(width)
    for size in (config.block_rows, config.block_columns, tile, config.num_warps):
        assert size & (size - 1) == 0, "Triton's tiles and warps are powers of two"
    assert width <= tile < 2 * max(width, 16)
    assert min(config.block_rows, config.block_columns, tile) >= 16, "what a product takes at least"
    threads = config.num_warps * (64 if architecture.startswith("gfx9") else 32)
    assert 32 <= threads <= 256
    assert config.max_registers is None or config.max_registers * threads <= 65536, "registers of a multiprocessor"
    assert 1 <= config.num_stages <= 3
    smallest = (config.block_rows,) if "trace" in kernel else (config.block_rows, config.block_columns)
    assert min(smallest) * tile * itemsize >= 16 * threads or config.num_warps == 1, "16 bytes of a tile for a thread"


def stages_and_rows(case: Attention) -> dict[str, tuple[int, int]]:
    """Of each kernel that sm_90 would launch for a call: how many tiles are under way, and queries in one."""
    *given, scale, causal, window = meta(case)
    lse, mean, covariance = operation.empty(*given)
    sums = lse, lse, mean, covariance
    found = launches(lambda: operation.forward(*given, scale, causal, window))
    found |= launches(lambda: operation.backward(*given, *sums, scale, causal, window))
    return {name: (one["num_stages"], one["BLOCK_ROWS"]) for name, one in found.items()}


@pytest.mark.parametrize("more", [{"tangent": True}, {"mask": each}], ids=["tangent", "a mask of every pair"])
def test_one_more_tile_of_each_leaves_no_room_for_large_ones(more):
    """237568 bytes would a tangent take beside tiles of 128 channels on sm_90, of 232448: no compiler says so."""
    case = Attention(head=128, value=128, features=128, mask=padding)
    large, small = stages_and_rows(case), stages_and_rows(replace(case, **more))
    assert large.keys() == small.keys()
    for name in ("attention_moments_forward", "attention_moments_backward_rows"):
        assert small[name][0] <= large[name][0]
        assert small[name][1] < large[name][1]


def test_without_triton_a_launch_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ofa_kernels.kernels.attention_moments", None)
    with pytest.raises(ImportError):
        operation.attention_moments(*Attention(rows=2).inputs(torch.float32).values(), scale=1.0)
