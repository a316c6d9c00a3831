"""The kernels of frozen weights' constants against float64: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ofa.closed_form.constants import AttentionProducts, MlpProducts
from ofa_kernels import dispatch, launch, reference
from ofa_kernels.ops import constants
from tests.ofa_kernels.calls import DEVICE, draw, weights_like
from tests.ofa_kernels.test_kernels import _poisoned_memory  # noqa: F401

OPERATIONS = ("mlp", "attention")
INNER, WIDTH = 37, 70

over_norms = pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
over_operations = pytest.mark.parametrize("operation", OPERATIONS)


@dataclass(frozen=True)
class Weights:
    """What an operation is given: weights in their order, and γ."""

    operation: str
    weights: tuple[Tensor | None, ...]
    scale: Tensor

    def run(self, where, centred: bool, *, wide: bool = False) -> list[Tensor]:
        """The constants, and their gradient in γ for gradients of about one unit, possibly of wider copies."""
        weights, scale = self.weights, self.scale
        if wide:
            weights, scale = tuple(None if x is None else x.double() for x in weights), scale.double()
        found = getattr(where, f"{self.operation}_constants")(*weights, scale, centred)
        grads = [weights_like(one, seed=90 + i) for i, one in enumerate(found)]
        return [*found, getattr(where, f"{self.operation}_constants_gradient")(*weights, scale, grads, centred)]


def mlp(dtype=torch.float32, *, gated=True, fused=False, transposed=False, inner=INNER, width=WIDTH) -> Weights:
    """`fused`: gate and up are halves of one weight; `transposed`: every weight is stored the other way round."""
    both, down = draw(2 * inner, width, dtype=dtype), draw(width, inner, dtype=dtype, seed=1)
    gate, up = both.chunk(2, 0)
    if not fused:
        gate, up = gate.clone(), up.clone()
    if transposed:
        gate, up, down = (x.mT.contiguous().mT for x in (gate, up, down))
    return Weights("mlp", (gate, up if gated else None, down), scale(width))


def attention(
    dtype=torch.float32, *, heads=4, shared=2, head=16, width=WIDTH, fused=False, transposed=False
) -> Weights:
    """`fused`: the rows of every group's queries, key and value stand in one weight; `transposed`: see `mlp`."""
    groups = heads // shared
    one = draw(shared, groups + 2, head, width, dtype=dtype)
    query, key, value = one[:, :groups].reshape(heads, head, width), one[:, groups], one[:, groups + 1]
    if fused and groups == 1:
        query = one[:, 0]
    if not fused:
        key, value = key.clone(), value.clone()
    output = draw(width, heads * head, dtype=dtype, seed=1)
    if transposed:
        query, key, value = (x.mT.contiguous().mT for x in (query, key, value))
        output = output.mT.contiguous().mT
    return Weights("attention", (query, key, value, output.unflatten(1, (heads, head)).transpose(0, 1)), scale(width))


def scale(width: int) -> Tensor:
    """γ in float32, around 1."""
    return (1 + 0.3 * draw(width, seed=2)).float()


def case(operation, dtype=torch.float32, **options) -> Weights:
    return (mlp if operation == "mlp" else attention)(dtype, **options)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN stays NaN."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def allowed(operation: str, dtype: torch.dtype, terms: int) -> float:
    """What the error may be, of sums of `terms` terms of random signs.

    A sum rounds once for each term where a product adds up one by one, ½ ε each and of random signs, and its terms at
    most 8 times before that. A term of a product has one factor cut in two, so that the rest is rounded by half of what
    is left of a rounding, ε²/4; Triton's interpreter cuts bfloat16 off both times, ε². Cancellation of what a LayerNorm
    takes away costs no more than a factor of two here: the channels are few, and γ is far from constant.
    """
    narrow = (math.sqrt(terms) + 8) * 0.5 * torch.finfo(torch.float32).eps
    if operation == "attention" and dtype != torch.float32:
        emulated = dtype == torch.bfloat16 and DEVICE == "cpu"
        narrow += torch.finfo(dtype).eps ** 2 * (1 if emulated else 0.25)
    return 2 * narrow


def assert_close(given: Weights, centred: bool) -> None:
    dtype = given.weights[0].dtype
    actual, oracle = given.run(constants, centred), given.run(reference, centred, wide=True)
    terms = 2 * given.weights[0].numel() // min(given.weights[0].shape)
    for value, expected in zip(actual, oracle, strict=True):
        assert value.dtype == torch.float32
        assert value.shape == expected.shape
        # A written-out comparison: NaN is not ≤ anything.
        assert relative_error(value, expected) <= allowed(given.operation, dtype, terms)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that there are several of everything, and shares of sums: an interpreter takes milliseconds."""
    small = launch.ConstantsLaunch(16, 16, num_warps=1, num_stages=1, max_registers=None, waves=13)
    monkeypatch.setattr(launch, "configure_constants", lambda *args: small)


@over_norms
@over_dtypes
@pytest.mark.parametrize(
    "options",
    [{}, {"gated": False}, {"fused": True}, {"transposed": True}, {"inner": 1, "width": 5}],
    ids=["gated", "plain", "fused", "transposed", "tiny"],
)
@pytest.mark.usefixtures("small_blocks")
def test_constants_of_an_mlp(options, dtype, centred):
    assert_close(mlp(dtype, **options), centred)


@over_norms
@over_dtypes
@pytest.mark.parametrize(
    "options",
    [{}, {"head": 24}, {"heads": 2, "head": 64}, {"heads": 2, "fused": True}, {"transposed": True}, {"shared": 1}],
    ids=["16", "24", "64", "fused", "transposed", "one key"],
)
@pytest.mark.usefixtures("small_blocks")
def test_constants_of_an_attention(options, dtype, centred):
    assert_close(attention(dtype, **options), centred)


@over_norms
@over_operations
@pytest.mark.usefixtures("small_blocks")
def test_constants_in_bfloat16(operation, centred):
    """Strides and blocks are the same in all dtypes, and an interpreter's time is long."""
    assert_close(case(operation, torch.bfloat16), centred)


@over_norms
@over_operations
@over_dtypes
def test_with_the_blocks_of_a_gpu(operation, dtype, centred):
    """Wider than a block of either; heads of 80 are two blocks of M, neither of them full."""
    options = {"inner": 70, "width": 130} if operation == "mlp" else {"heads": 2, "shared": 1, "head": 80}
    assert_close(case(operation, dtype, **options), centred)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 200.0])
@over_norms
@pytest.mark.usefixtures("small_blocks")
def test_scales_and_gradients_of_any_size_in_float16(factor, centred):
    """γ² and M̄ are brought into the range of float16 on their way to a product: 4·10⁴ and 10⁻⁸ are outside of it."""
    drawn = attention(torch.float16)
    given = Weights("attention", drawn.weights, factor * drawn.scale)
    grads = [1e-2 * factor * weights_like(one, seed=i) for i, one in enumerate(given.run(constants, centred)[:3])]
    found = constants.attention_constants_gradient(*given.weights, given.scale, grads, centred)
    wide = [x.double() for x in (*given.weights, given.scale)]
    expected = reference.attention_constants_gradient(*wide, [grad.double() for grad in grads], centred)
    assert_close(given, centred)
    assert relative_error(found, expected) <= allowed("attention", torch.float16, 2 * WIDTH)


def test_gradients_of_zero_are_zero():
    """No unit makes NaN of them."""
    given = attention(torch.float16)
    grads = [torch.zeros_like(one) for one in constants.attention_constants(*given.weights, given.scale, True)]
    found = constants.attention_constants_gradient(*given.weights, given.scale, grads, True)
    assert torch.equal(found, torch.zeros(WIDTH, device=DEVICE))


@over_norms
@over_operations
@pytest.mark.usefixtures("small_blocks")
def test_two_runs_have_the_same_bits(operation, centred):
    given = case(operation, torch.float16)
    first, second = given.run(constants, centred), given.run(constants, centred)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@over_operations
@pytest.mark.usefixtures("small_blocks")
def test_weights_of_several_dtypes_and_strided_vectors(operation):
    """OPT's queries are multiplied by a factor in float32; a gradient may be expanded, γ a column."""
    drawn = case(operation, torch.float16)
    weights = drawn.weights[0].float(), *drawn.weights[1:]
    given = Weights(operation, weights, torch.stack((drawn.scale, drawn.scale), 1)[:, 0])
    assert_close(given, True)
    function = getattr(constants, f"{operation}_constants_gradient")
    found = getattr(constants, f"{operation}_constants")(*weights, given.scale, False)
    grads = [torch.ones((), device=DEVICE).expand_as(one) for one in found]
    whole = [grad.contiguous() for grad in grads]
    assert torch.equal(function(*weights, given.scale, grads, False), function(*weights, given.scale, whole, False))


@over_operations
@pytest.mark.parametrize("centred", [False, True], ids=["rms, dense", "layer, transposed"])
def test_opcheck(operation, centred):
    """Schema, shapes without data, and tracing, by PyTorch's own check."""
    given = case(operation, transposed=centred)
    args = *given.weights, given.scale
    found = getattr(torch.ops.ofa_kernels, f"{operation}_constants")
    torch.library.opcheck(found.default, (*args, centred))
    gradient = getattr(torch.ops.ofa_kernels, f"{operation}_constants_gradient")
    torch.library.opcheck(gradient.default, (*args, *found(*args, centred), centred))


@over_operations
def test_compiles_into_one_graph(operation):
    given = mlp(gated=False) if operation == "mlp" else attention()

    def both(weights, scale):
        found = getattr(constants, f"{operation}_constants")(*weights, scale, True)
        return *found, getattr(constants, f"{operation}_constants_gradient")(*weights, scale, found, True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    pairs = zip(both(given.weights, given.scale), compiled(given.weights, given.scale), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@over_operations
@pytest.mark.parametrize(
    ("scale_dtype", "dtype", "expected"),
    [
        (torch.float32, torch.bfloat16, "triton"),
        (torch.float32, torch.float32, "triton"),
        (torch.float64, torch.bfloat16, "reference"),
        (torch.float32, torch.float64, "reference"),
    ],
    ids=str,
)
def test_scale_and_weights_decide_who_computes(operation, scale_dtype, dtype, expected, monkeypatch):
    """Tensors without data stand for those of a GPU."""
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    drawn = case(operation)
    called = []
    for name in (f"{operation}_constants", f"{operation}_constants_gradient"):
        offered = [
            dispatch.Implementation(one.name, lambda *args, name=one.name: called.append(name), one.accepts)
            for one in dispatch._IMPLEMENTATIONS[name]
        ]
        monkeypatch.setitem(dispatch._IMPLEMENTATIONS, name, offered)
    with FakeTensorMode():
        weights = [None if x is None else torch.empty(x.shape, dtype=dtype, device="cuda") for x in drawn.weights]
        given = torch.empty(WIDTH, dtype=scale_dtype, device="cuda")
        products = (MlpProducts if operation == "mlp" else AttentionProducts)(lambda: tuple(weights))
        products.forward(given, True)
        products.backward(given, True, ())
    assert called == [expected, expected]


def test_heads_wider_than_the_kernels_take_are_left_to_the_reference(monkeypatch):
    monkeypatch.delenv("OFA_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    with FakeTensorMode():
        tensors = [torch.empty(2, 4096, head, device="cuda", dtype=torch.bfloat16) for head in (256, 257)]
    assert [dispatch.choose("attention_constants", one).name for one in tensors] == ["triton", "reference"]


@pytest.mark.parametrize("where", [reference, constants], ids=["reference", "kernels"])
def test_shapes_that_do_not_match_are_refused(where):
    gate, up, down = mlp().weights
    with pytest.raises(ValueError, match=r"up .* must have the same shape"):
        where.mlp_constants(gate, up[1:], down, scale(WIDTH), False)
    with pytest.raises(ValueError, match="do not fit gate"):
        where.mlp_constants(gate, up, down.mT, scale(WIDTH), False)
    with pytest.raises(ValueError, match="must be shaped like the constants"):
        where.mlp_constants_gradient(gate, up, down, scale(WIDTH), [gate[:, 0]], False)
    query, key, value, output = attention().weights
    with pytest.raises(ValueError, match="do not fit query"):
        where.attention_constants(query[:3], key, value, output[:3], scale(WIDTH), False)
    with pytest.raises(ValueError, match=r"output .* do not fit query"):
        where.attention_constants(query, key, value, output.mT, scale(WIDTH), False)
    with pytest.raises(ValueError, match="must be shaped like the constants"):
        where.attention_constants_gradient(query, key, value, output, scale(WIDTH), [query] * 3, False)


@over_norms
@over_operations
def test_the_gradient_of_the_reference_is_that_of_its_constants(operation, centred):
    """By autograd, in float64: the formula that is written by hand is the specification's own derivative."""
    given = case(operation)
    weights = [None if x is None else x.double() for x in given.weights]
    leaf = given.scale.double().requires_grad_()
    found = getattr(reference, f"{operation}_constants")(*weights, leaf, centred)
    grads = [weights_like(one, seed=i) for i, one in enumerate(found)]
    (expected,) = torch.autograd.grad(found, leaf, grads)
    by_hand = getattr(reference, f"{operation}_constants_gradient")(*weights, leaf.detach(), grads, centred)
    torch.testing.assert_close(by_hand, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head", [1, 16, 24, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    "kernel", ["mlp_constants_forward", "attention_constants_forward", "attention_constants_backward"]
)
def test_tiles_are_powers_of_two_that_a_product_takes(kernel, head, itemsize, architecture):
    config = launch.configure_constants(kernel, head, itemsize, architecture)
    for side in (config.block_rows, config.block_width):
        assert side >= 16
        assert side & (side - 1) == 0
    threads = config.num_warps * (64 if architecture.startswith("gfx") else 32)
    assert threads <= 256
    assert config.max_registers is None or config.max_registers * threads <= 65536, "registers of a multiprocessor"


@pytest.mark.parametrize(
    ("blocks", "tiles", "programs", "expected"),
    [(0, 4, 132, 1), (3, 0, 132, 1), (172, 64, 1056, 6), (64, 172, 1056, 16), (128, 128, 264, 2), (300, 9, 132, 1)],
)
def test_sums_are_shared_so_that_a_gpu_is_busy(blocks, tiles, programs, expected):
    assert launch.shares(blocks, tiles, programs) == expected
