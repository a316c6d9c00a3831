"""The Triton kernels against float64 oracles, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies

from ofa_kernels import launch
from tests.cases import over_pairs
from tests.ofa_kernels.calls import DEVICE, NORMED, NORMS, OPERATIONS, PROBED, Call, as_tuple, call, draw, weights_like

SHAPES = [(2, 3, 17), (7,), (2, 0, 5), (1, 1), (3, 1, 129)]
"""Several dimensions and a ragged tile, one row, no row, one element, and one column more than a counter has."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

OUTPUTS = {
    "norm_step": 4,
    "norm": 2,
    "contract": 2,
}
"""Operations with several outputs, and their number."""

over_operations = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill uninitialized memory with NaN, so that an output element that a kernel does not write is found."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(actual, expected):
    """‖actual − expected‖ / ‖expected‖ in float64; NaN stays NaN.

    Relative to 1 if the expected value is shorter, since all inputs are of size 1: in a row of one column the norm's
    gradient cancels.
    """
    gap = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(gap / torch.linalg.vector_norm(expected.double()).clamp_min(1.0))


def roundings(width, dtype):
    """Error bound of a row operation, for cases where eager PyTorch happens to be exact.

    A pairwise sum of d terms rounds ⌈log₂ d⌉ times in float32; the arithmetic around it adds at most 16 roundings, in
    the gradient of a perturbed norm. One store rounds by half a unit in the last place, or a whole unit in Triton's
    interpreter, which truncates bfloat16.
    """
    store = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.5)
    return (math.ceil(math.log2(max(width, 1))) + 16) * torch.finfo(torch.float32).eps + store


def assert_close(case: Call, width: int, dtype: torch.dtype):
    """The error of outputs and gradients is at most twice the reference's in the same dtype."""
    actual, eager = case.run(case.kernel).tensors(), case.run(case.reference).tensors()
    oracle = case.run(case.reference, dtype=torch.float64).tensors()
    for name, value in actual.items():
        assert value.shape == eager[name].shape, name
        assert value.dtype == eager[name].dtype, name
        if value.numel():
            allowed = max(2 * relative_error(eager[name], oracle[name]), roundings(width, dtype))
            # `<=`, since NaN must fail.
            assert relative_error(value, oracle[name]) <= allowed, name


# A kernel meets every shape and every dtype. It widens what it loads at once (test_kernel_rules.py), so that a shape
# and a dtype at once are nothing new to it; test_any_shape_and_stride draws some of those as well.
@over_pairs(operation=OPERATIONS, shape=SHAPES, dtype=DTYPES)
def test_outputs_and_gradients(operation, shape, dtype):
    assert_close(call(operation, shape, dtype), shape[-1], dtype)


@pytest.mark.parametrize("operation", NORMED)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm(operation, norm):
    """RMSNorm, LayerNorm with its shift, and 1+w, by the compile-time flags of one kernel."""
    assert_close(call(operation, (2, 40), torch.float32, norm), 40, torch.float32)


@pytest.mark.parametrize("operation", PROBED)
def test_gaussian_probes(operation):
    """log, sin and cos differ between devices: errors up to 2π·2⁻²⁴, times a radius of at most 6.8."""
    case = call(operation, (2, 130), torch.float32, probe="gaussian")
    actual, oracle = case.run(case.kernel).tensors(), case.run(case.reference, dtype=torch.float64).tensors()
    for name, value in actual.items():
        assert relative_error(value, oracle[name]) <= 3e-6, name


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 128 columns (one random counter), so that rows have several."""
    configure = launch.configure

    def configure_small(kernel, width, itemsize, architecture):
        return replace(configure(kernel, width, itemsize, architecture), groups=4, tiles=-(-width // 128))

    monkeypatch.setattr(launch, "configure", configure_small)


# A row without a norm has one kind of loop.
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("operation", "norm", "dtype"),
    [
        *((operation, "rms", torch.float16) for operation in NORMED),
        *((operation, "layer", torch.float32) for operation in OPERATIONS),
    ],
)
def test_rows_of_several_tiles(operation, norm, dtype):
    assert_close(call(operation, (2, 300), dtype, norm), 300, dtype)


@pytest.mark.parametrize(
    ("operation", "width"),
    [("norm_step", 65536), ("norm", 65535), ("displace", 65535), ("contract", 65535)],
)
def test_the_widest_row(operation, width):
    """65,536 columns with the real launch settings, which need several tiles."""
    assert_close(call(operation, (1, width), torch.float32, "layer"), width, torch.float32)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    operation=strategies.sampled_from(OPERATIONS),
    norm=strategies.sampled_from(sorted(NORMS)),
    leading=strategies.lists(strategies.integers(0, 3), max_size=3),
    width=strategies.integers(1, 400),
    dtype=strategies.sampled_from([torch.float32, torch.float16]),
    gap=strategies.integers(0, 5),
)
def test_any_shape_and_stride(operation, norm, leading, width, dtype, gap):
    """Any leading shape, any width, any row stride."""
    case = call(operation, (*leading, width), dtype, norm)
    inputs = tuple(x if x is None or x.dim() < 2 else strided(x, gap) for x in case.inputs)
    assert_close(Call(case.kernel, case.reference, inputs, case.outputs, case.settings), width, dtype)


@pytest.mark.parametrize("operation", NORMED)
@pytest.mark.parametrize("tiles", ["one tile", "several tiles"])
def test_a_mean_far_from_zero_cancels_no_digits(operation, tiles, request):
    """A LayerNorm of rows 100 ± 1: E[z²] − E[z]² in float32 would keep three digits of the variance."""
    if tiles == "several tiles":
        request.getfixturevalue("small_tiles")
    case = call(operation, (3, 513), torch.float32, "layer")
    first = case.inputs[0] + 100.0
    case = Call(case.kernel, case.reference, (first, *case.inputs[1:]), case.outputs, case.settings)
    assert_close(case, 513, torch.float32)


@pytest.mark.parametrize(
    ("operation", "output"), [(name, i) for name, outputs in OUTPUTS.items() for i in range(outputs)]
)
def test_gradients_that_arrive_for_one_output_alone(operation, output):
    """Missing gradients count as zero."""
    case = call(operation, (2, 70), torch.float32, "rms" if operation == "norm" else "layer")
    found = []
    for function, dtype in ((case.kernel, torch.float32), (case.reference, torch.float64)):
        inputs = [None if x is None else x.to(dtype).requires_grad_() for x in case.inputs]
        value = as_tuple(function(*inputs, **case.settings))[output]
        given = [x for x in inputs if x is not None]
        weights = weights_like(value, seed=7)
        found.append(torch.autograd.grad(value, given, weights, allow_unused=True, materialize_grads=True))
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) <= roundings(70, torch.float32)


@over_operations
def test_two_runs_give_the_same_bits_and_leave_the_inputs_as_they_were(operation):
    case = call(operation, (3, 130), torch.float16, "layer")
    before = [None if x is None else x.clone() for x in case.inputs]
    first, second = case.run(case.kernel).tensors(), case.run(case.kernel).tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(x is None or torch.equal(x, copy) for x, copy in zip(case.inputs, before, strict=True))


def strided(tensor, how):
    """The same values with other strides; a number is the columns of NaN between rows."""
    if how == "rows apart":
        return strided(tensor, tensor.shape[-1])
    if isinstance(how, int):
        between = torch.full((*tensor.shape[:-1], how), float("nan"), dtype=tensor.dtype, device=tensor.device)
        return torch.cat((tensor, between), -1)[..., : tensor.shape[-1]]
    if how == "rows in reverse blocks":
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


ORDERS = ["rows apart", "rows in reverse blocks", "columns apart"]


@over_operations
def test_strides_of_inputs(operation):
    """Results do not depend on strides; NaN between rows is never read."""
    case = call(operation, (2, 2, 20), torch.float32)
    dense = as_tuple(case.kernel(*case.inputs, **case.settings))
    for how in ORDERS:
        inputs = [x if x is None or x.dim() < 3 else strided(x, how) for x in case.inputs]
        apart = as_tuple(case.kernel(*inputs, **case.settings))
        assert all(torch.equal(a, b) for a, b in zip(dense, apart, strict=True)), how


@over_operations
def test_strides_of_gradients(operation):
    case = call(operation, (2, 2, 20), torch.float32)
    inputs = [None if x is None else x.detach().requires_grad_() for x in case.inputs]
    given = [x for x in inputs if x is not None]
    outputs = as_tuple(case.kernel(*inputs, **case.settings))
    dense = [draw(*output.shape, seed=i).to(output.dtype) for i, output in enumerate(outputs)]
    expected = torch.autograd.grad(outputs, given, dense, retain_graph=True)
    for how in ORDERS:
        grads = [strided(grad, how) if grad.dim() >= 3 else grad.clone() for grad in dense]
        found = torch.autograd.grad(outputs, given, grads, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), how
        assert all(torch.equal(a, b) for a, b in zip(dense, grads, strict=True)), "a gradient was written to"


@over_operations
def test_expanded_gradients(operation):
    """The gradient of a sum has stride 0 in every dimension, that of a broadcast in one."""
    case = call(operation, (2, 2, 20), torch.float32)
    found = []
    for dense in (True, False):
        inputs = [None if x is None else x.detach().requires_grad_() for x in case.inputs]
        outputs = as_tuple(case.kernel(*inputs, **case.settings))
        grads = [torch.full((), 0.5, device=DEVICE).expand(output.shape) for output in outputs]
        grads = [grad.contiguous() for grad in grads] if dense else grads
        found.append(torch.autograd.grad(outputs, [x for x in inputs if x is not None], grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@over_operations
def test_expanded_inputs(operation):
    case = call(operation, (1, 20), torch.float32)
    shapes = [None if x is None else (*(4 if size == 1 else size for size in x.shape[:-1]), -1) for x in case.inputs]
    inputs = [x if x is None else x.expand(shape) for x, shape in zip(case.inputs, shapes, strict=True)]
    dense = [x if x is None else x.contiguous() for x in inputs]
    results = (as_tuple(case.kernel(*given, **case.settings)) for given in (inputs, dense))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_float32_scale_of_a_narrow_stream_is_not_rounded():
    """Tuned scales change by less than half precision resolves: 1 + 2⁻¹³ must not round to 1."""
    stream = torch.full((1, 4), 1000.0, dtype=torch.float16, device=DEVICE)
    weight = torch.full((4,), 1 + 2.0**-13, device=DEVICE).requires_grad_()
    case = call("norm", (1, 4), torch.float16)
    normalized, _ = case.kernel(stream, weight, None, **case.settings)
    (gradient,) = torch.autograd.grad(normalized.float().sum(), weight)
    assert gradient.dtype == torch.float32
    assert normalized.dtype == torch.float16


def test_the_residual_sum_is_rounded_before_it_is_normalized():
    """2048 + 1 is 2048 in float16: the model normalizes the rounded sum."""
    from ofa_kernels.ops.norm_step import norm_step

    residual = torch.tensor([[2048.0, 2.0]], dtype=torch.float16, device=DEVICE)
    update = torch.tensor([[1.0, 0.0]], dtype=torch.float16, device=DEVICE)
    stream, _, sqnorm, rstd = norm_step(residual, update, torch.ones(2, device=DEVICE), eps=1e-5)
    assert stream.tolist() == [[2048.0, 2.0]]
    assert sqnorm.tolist() == [1.0]
    assert rstd.item() == pytest.approx(1 / math.sqrt((2048**2 + 2**2) / 2), rel=1e-6)


@pytest.mark.parametrize("operation", ["norm_step", "norm"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_has_a_second_derivative(operation, norm):
    """From plain float32 operations: some tens of roundings of 6e-8, and those of the first derivative."""
    case = call(operation, (3, 70), torch.float32, norm)
    found = []
    for function, dtype in ((case.kernel, torch.float32), (case.reference, torch.float64)):
        inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in case.inputs]
        given = [x for x in inputs if x is not None]
        outputs = as_tuple(function(*inputs, **case.settings))
        value = sum((output * weights_like(output, seed=i)).sin().sum() for i, output in enumerate(outputs))
        grads = torch.autograd.grad(value, given, create_graph=True)
        inner = sum((grad * weights_like(grad, seed=9 + i)).sum() for i, grad in enumerate(grads))
        found.append(torch.autograd.grad(inner, given, materialize_grads=True))
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) <= roundings(70, torch.float32)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in ("norm_step", "norm")])
def test_a_second_derivative_is_refused_not_wrong(operation):
    case = call(operation, (2, 20), torch.float32)
    inputs = [None if x is None else x.detach().requires_grad_() for x in case.inputs]
    value = sum(output.float().square().sum() for output in as_tuple(case.kernel(*inputs, **case.settings)))
    (grad,) = torch.autograd.grad(value, inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="OFA_KERNELS=reference"):
        torch.autograd.grad(grad.sum(), inputs[0])


@pytest.mark.parametrize(
    ("operation", "which"),
    [
        ("norm_step", 1),
        ("norm", 1),
        ("perturb behind", 3),
        ("contract", 1),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_references_message(operation, which):
    case = call(operation, (2, 20), torch.float32)
    wrong = [x[..., :-1] if i == which else x for i, x in enumerate(case.inputs)]
    messages = []
    for function in (case.kernel, case.reference):
        with pytest.raises(ValueError, match="19") as caught:
            function(*wrong, **case.settings)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
