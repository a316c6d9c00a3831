"""The reference operations against formulas in float64 NumPy, and against PyTorch and Hugging Face."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from ofa_kernels import reference
from ofa_kernels.philox import PROBES, probes
from tests.cases import over_pairs

EPS = 1e-5
SHAPES = [(2, 3, 17), (7,), (2, 0, 5), (1, 1), (3, 1, 129)]
OUTPUTS = ("residual", "normalized", "update_sqnorm", "rstd")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
"""Pairs of these and of the options: each option is one line of the formula, so that a third value changes nothing."""

over_kinds = pytest.mark.parametrize("kind", reference.KINDS)
over_probes = pytest.mark.parametrize("probe", PROBES)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm_parameters(width, dtype, biased):
    return (1 + 0.3 * draw(width, seed=1)).to(dtype), draw(width, dtype=dtype, seed=2) if biased else None


def oracle_norm(stream, weight, bias, kind, offset):
    """(normalized, 1/σ) of float64 rows by the textbook formula."""
    z = np.asarray(stream, np.float64)
    centred = z - z.mean(-1, keepdims=True) if kind == "layer" else z
    rstd = 1 / np.sqrt((centred**2).mean(-1) + EPS)
    normalized = centred * rstd[..., None] * (np.asarray(weight, np.float64) + offset)
    return normalized if bias is None else normalized + np.asarray(bias, np.float64), rstd


def wide(tensor):
    return None if tensor is None else tensor.detach().double().numpy()


def float32_error(width):
    """Relative rounding of a row operation in float32: a pairwise sum of d terms rounds ⌈log₂ d⌉ times on the way to
    each result, and squaring, mean, eps, root, centring, two products and a sum add eight roundings at most."""
    return (math.ceil(math.log2(max(width, 1))) + 8) * torch.finfo(torch.float32).eps


def assert_close(actual, expected, dtype):
    """Within the float32 roundings of the arithmetic and half a unit in the last place for the one cast at the end."""
    assert actual.dtype == dtype
    assert tuple(actual.shape) == expected.shape
    if actual.numel():
        store = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        scale = np.abs(expected).max()
        assert np.abs(wide(actual) - expected).max() <= (store + float32_error(actual.shape[-1])) * scale


def assert_rows_close(actual, expected, width):
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(wide(actual), expected, rtol=float32_error(width))


@over_pairs(
    shape=SHAPES, dtype=DTYPES, kind=reference.KINDS, offset=[0.0, 1.0], biased=[False, True], updated=[False, True]
)
def test_norm_step_is_the_formula(shape, dtype, kind, offset, biased, updated):
    residual, update = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=3) if updated else None
    weight, bias = norm_parameters(shape[-1], dtype, biased)
    stream, normalized, sqnorm, rstd = reference.norm_step(
        residual, update, weight, bias, eps=EPS, kind=kind, offset=offset
    )
    # The norm reads the sum rounded to the model's dtype.
    assert torch.equal(stream, residual + update if updated else residual)
    expected, expected_rstd = oracle_norm(wide(stream), wide(weight), wide(bias), kind, offset)
    assert_close(normalized, expected, dtype)
    assert_rows_close(rstd, expected_rstd, shape[-1])
    assert_rows_close(sqnorm, (wide(update) ** 2).sum(-1) if updated else np.zeros(shape[:-1]), shape[-1])


@over_pairs(dtype=DTYPES, kind=reference.KINDS, biased=[False, True])
def test_the_error_of_norm_step_is_at_most_twice_that_of_eager_pytorch(dtype, kind, biased):
    residual, update = draw(64, 96, dtype=dtype), draw(64, 96, dtype=dtype, seed=3)
    weight, bias = norm_parameters(96, dtype, biased)
    stream, normalized, _, _ = reference.norm_step(residual, update, weight, bias, eps=EPS, kind=kind)
    norm = eager_rms_norm if kind == "rms" else eager_layer_norm
    expected, _ = oracle_norm(wide(stream), wide(weight), wide(bias), kind, 0.0)
    error = np.abs(wide(normalized) - expected).max()
    assert error <= 2 * np.abs(wide(norm(stream, weight, bias)) - expected).max()


def eager_rms_norm(stream, weight, bias):
    """As Hugging Face writes it: normalized in float32, cast, then scaled in the stream's dtype."""
    hidden = stream.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    scaled = weight * hidden.to(stream.dtype)
    return scaled if bias is None else scaled + bias


def eager_layer_norm(stream, weight, bias):
    return F.layer_norm(stream, weight.shape, weight, bias, EPS)


@pytest.mark.parametrize("library", ["LayerNorm", "RMSNorm", "LlamaRMSNorm", "GemmaRMSNorm"])
def test_norms_of_the_libraries_agree(library):
    """The specification is the formula that the models run."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    types = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    types |= {"LlamaRMSNorm": LlamaRMSNorm, "GemmaRMSNorm": GemmaRMSNorm}
    norm = types[library](48, eps=EPS)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.add_(0.3 * draw(48, dtype=torch.float32, seed=seed))
    stream = draw(6, 48, dtype=torch.float32, seed=9)
    actual = reference.norm_step(
        stream,
        None,
        norm.weight,
        getattr(norm, "bias", None),
        eps=EPS,
        kind="layer" if library == "LayerNorm" else "rms",
        offset=float(library == "GemmaRMSNorm"),
    )[1]
    expected = norm(stream)
    # Both results are float32, each within its roundings of the exact one.
    assert (actual - expected).abs().max() <= 2 * float32_error(48) * expected.abs().max()


def test_a_float32_scale_of_a_narrow_stream_is_not_rounded():
    """Tuned scales change by less than bfloat16 resolves; the output still has the stream's dtype."""
    stream = draw(4, 33, dtype=torch.bfloat16)
    weight = norm_parameters(33, torch.float32, False)[0]
    normalized = reference.norm_step(stream, None, weight, eps=EPS)[1]
    assert_close(normalized, oracle_norm(wide(stream), wide(weight), None, "rms", 0.0)[0], torch.bfloat16)


def test_the_residual_sum_is_rounded_before_it_is_normalized():
    """256 + 1 is 256 in bfloat16: the model normalizes the rounded sum."""
    residual = torch.tensor([[256.0, 2.0]], dtype=torch.bfloat16)
    update = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    stream, _, sqnorm, rstd = reference.norm_step(residual, update, torch.ones(2), eps=EPS)
    assert stream.tolist() == [[256.0, 2.0]]
    assert sqnorm.tolist() == [1.0]
    assert rstd.item() == pytest.approx(1 / math.sqrt((256**2 + 2**2) / 2), rel=float32_error(2))


def test_a_squared_norm_does_not_overflow_in_float16():
    """300² exceeds float16's 65504, so the sum is float32."""
    assert reference.squared_norm(torch.full((2, 4), 300.0, dtype=torch.float16)).tolist() == [360000.0] * 2


@over_pairs(shape=SHAPES, dtype=DTYPES)
def test_squared_norm_is_the_sum_of_squares_of_a_row(shape, dtype):
    update = draw(*shape, dtype=dtype)
    assert_rows_close(reference.squared_norm(update), (wide(update) ** 2).sum(-1), shape[-1])


@over_pairs(shape=SHAPES, dtype=DTYPES, kind=reference.KINDS)
def test_rstd_is_one_over_sigma(shape, dtype, kind):
    stream = draw(*shape, dtype=dtype)
    expected = oracle_norm(wide(stream), np.ones(shape[-1]), None, kind, 0.0)[1]
    assert_rows_close(reference.rstd(stream, eps=EPS, kind=kind), expected, shape[-1])


def nu_of(shape, samples, **key):
    """The probes of a stack of this shape."""
    rows = math.prod(shape[:-1])
    return wide(probes(rows, shape[-1], samples=samples, **key)).reshape(samples, *shape)


@over_pairs(shape=SHAPES, dtype=DTYPES, kind=reference.KINDS, probe=PROBES)
def test_perturb_is_the_norm_of_the_moved_stream(shape, dtype, kind, probe):
    """N(z + ε P ν) with P = diag(γ)/σ and ν from the counter."""
    stream = draw(*shape, dtype=dtype)
    weight, bias = norm_parameters(shape[-1], dtype, biased=True)
    key = {"seed": 7, "step": 3, "probe": probe}
    copies = reference.perturb(stream, weight, bias, eps=EPS, kind=kind, offset=1.0, samples=2, epsilon=0.1, **key)
    rstd = oracle_norm(wide(stream), wide(weight), None, kind, 1.0)[1]
    moved = wide(stream) + 0.1 * (wide(weight) + 1.0) * rstd[..., None] * nu_of(shape, 2, **key)
    assert_close(copies, oracle_norm(moved, wide(weight), wide(bias), kind, 1.0)[0], dtype)


@over_pairs(dtype=DTYPES, probe=PROBES, diagonal=[(17,), (2, 3, 1), (2, 3, 17)])
def test_displace_moves_along_preconditioned_probes(dtype, probe, diagonal):
    stream, preconditioner = draw(2, 3, 17, dtype=dtype), draw(*diagonal, dtype=dtype, seed=1)
    key = {"seed": 7, "step": 3, "probe": probe}
    copies = reference.displace(stream, preconditioner, samples=2, epsilon=0.1, **key)
    expected = wide(stream) + 0.1 * wide(preconditioner) * nu_of((2, 3, 17), 2, **key)
    assert_close(copies, expected, dtype)


@over_pairs(shape=SHAPES, dtype=DTYPES, probe=PROBES)
def test_contract_is_the_product_with_the_same_probes(shape, dtype, probe):
    base, copies = draw(*shape, dtype=dtype), draw(2, *shape, dtype=dtype, seed=1)
    key = {"seed": 7, "step": 3, "probe": probe}
    actual, sqnorm = reference.contract(base, copies, **key)
    assert_rows_close(sqnorm, (wide(base) ** 2).sum(-1), shape[-1])
    terms = nu_of(shape, 2, **key) * (wide(copies) - wide(base))
    assert actual.dtype == torch.float32
    # Terms of both signs cancel, so the roundings are relative to the sum of their sizes.
    assert (np.abs(wide(actual) - terms.sum(-1)) <= float32_error(shape[-1]) * np.abs(terms).sum(-1)).all()


@pytest.mark.parametrize("width", [1, 31, 128, 129])
def test_contract_undoes_displace_exactly_for_signs(width):
    """νᵀν = d: integers are exact in float32, so a different probe, row or sample is found."""
    base = draw(2, 3, width).round().float()
    copies = reference.displace(base, torch.ones(width), samples=3, epsilon=1.0, seed=5, step=2)
    assert torch.equal(reference.contract(base, copies, seed=5, step=2)[0], torch.full((3, 2, 3), float(width)))


@over_probes
@pytest.mark.parametrize("other", [{"seed": 6}, {"step": 3}], ids=str)
def test_contract_with_another_seed_or_step_does_not(probe, other):
    base, key = draw(2, 3, 64), {"seed": 5, "step": 2, "probe": probe}
    copies = reference.displace(base, torch.ones(64), epsilon=1.0, **key)
    own = reference.contract(base, copies, **key)[0]
    assert own.numpy() == pytest.approx((nu_of((2, 3, 64), 1, **key) ** 2).sum(-1), rel=1e-12)
    assert (reference.contract(base, copies, **{**key, **other})[0] < own / 2).all()


def grad_inputs(biased=True):
    """(residual, update, weight, bias) in float64, ready for gradcheck."""
    shapes = [(2, 3, 5), (2, 3, 5), (5,), *([(5,)] if biased else [])]
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


@over_pairs(
    outputs=[(0,), (1,), (2,), (3,), (0, 1, 2, 3)], kind=reference.KINDS, offset=[0.0, 1.0], biased=[False, True]
)
def test_gradients_of_norm_step(kind, offset, biased, outputs):
    """In every differentiable input, also if only one output is used."""

    def step(*tensors):
        results = reference.norm_step(*tensors, eps=EPS, kind=kind, offset=offset)
        return tuple(results[i] for i in outputs)

    assert gradcheck(step, grad_inputs(biased))


@over_kinds
@pytest.mark.parametrize("output", [0, 1, 3], ids=[OUTPUTS[i] for i in (0, 1, 3)])
def test_gradients_of_norm_step_without_an_update(kind, output):
    residual, _, weight, bias = grad_inputs()
    assert gradcheck(
        lambda z, w, b: reference.norm_step(z, None, w, b, eps=EPS, kind=kind)[output], (residual, weight, bias)
    )


@over_kinds
@over_probes
def test_gradients_of_perturb(kind, probe):
    options = {"eps": EPS, "kind": kind, "offset": 1.0, "samples": 2, "epsilon": 0.1, "seed": 3, "probe": probe}
    stream, _, weight, bias = grad_inputs()
    assert gradcheck(lambda z, w, b: reference.perturb(z, w, b, **options), (stream, weight, bias))


@over_probes
def test_gradients_of_displace_and_contract(probe):
    stream, copies, preconditioner = grad_inputs(biased=False)
    key = {"seed": 3, "step": 1, "probe": probe}
    assert gradcheck(lambda z, p: reference.displace(z, p, samples=2, epsilon=0.1, **key), (stream, preconditioner))
    stack = torch.stack((copies, 2 * copies)).detach().requires_grad_()
    assert gradcheck(lambda z, c: reference.contract(z, c, **key), (stream, stack))


@over_kinds
def test_gradients_of_rstd_and_squared_norm(kind):
    stream = grad_inputs()[0]
    assert gradcheck(lambda z: reference.rstd(z, eps=EPS, kind=kind), (stream,))
    assert gradcheck(reference.squared_norm, (stream,))


@over_kinds
@pytest.mark.parametrize("output", range(4), ids=OUTPUTS)
def test_expanded_gradients_are_the_gradients_of_their_copies(kind, output):
    """The gradient of a sum has stride 0 and must be read as a full tensor."""
    grads = []
    for materialize in (False, True):
        tensors = grad_inputs()
        result = reference.norm_step(*tensors, eps=EPS, kind=kind)[output]
        incoming = torch.ones((), dtype=torch.float64).expand(result.shape)
        incoming = incoming.contiguous() if materialize else incoming
        grads.append(torch.autograd.grad(result, tensors, incoming, allow_unused=True))
    for expanded, dense in zip(*grads, strict=True):
        assert (expanded is None) == (dense is None)
        assert expanded is None or torch.equal(expanded, dense)


def test_expanded_inputs_are_read_as_full_ones():
    row = draw(1, 5, dtype=torch.float32)
    stream = row.expand(4, 5)
    weight = norm_parameters(5, torch.float32, False)[0]
    for actual, expected in zip(
        reference.norm_step(stream, stream, weight, eps=EPS),
        reference.norm_step(stream.clone(), stream.clone(), weight, eps=EPS),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_inputs_are_left_as_they_were():
    tensors = [tensor.detach() for tensor in grad_inputs()]
    before = [tensor.clone() for tensor in tensors]
    reference.norm_step(*tensors, eps=EPS)
    reference.perturb(tensors[0], tensors[2], tensors[3], eps=EPS, epsilon=0.1, seed=0)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


Z, G = torch.ones(2, 4), torch.ones(4)
REFUSED = {
    "kind of norm_step": (lambda: reference.norm_step(Z, None, G, eps=EPS, kind="batch"), "rms, layer, not 'batch'"),
    "kind of perturb": (lambda: reference.perturb(Z, G, eps=EPS, kind="x", epsilon=1, seed=0), "rms, layer, not 'x'"),
    "kind of rstd": (lambda: reference.rstd(Z, eps=EPS, kind="x"), "rms, layer, not 'x'"),
    "width of the scale": (lambda: reference.norm_step(Z, None, torch.ones(3), eps=EPS), r"weight \(3,\) .* width 4"),
    "scale with rows": (lambda: reference.norm_step(Z, None, Z, eps=EPS), r"weight \(2, 4\) .* width 4"),
    "shift that broadcasts": (lambda: reference.norm_step(Z, None, G, G[:1], eps=EPS), r"bias \(1,\) .* width 4"),
    "update that broadcasts": (lambda: reference.norm_step(Z, Z[:1], G, eps=EPS), r"update \(1, 4\) .* \(2, 4\)"),
    "width in perturb": (lambda: reference.perturb(Z, G[:2], eps=EPS, epsilon=1, seed=0), r"weight \(2,\) .* width 4"),
    "copies without a stack": (lambda: reference.contract(Z, Z, seed=0), r"copies \(2, 4\) .* \(2, 4\)"),
    "probe": (lambda: reference.contract(Z, Z[None], seed=0, probe="x"), "rademacher, gaussian, not 'x'"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_shapes_that_do_not_fit_are_refused_and_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
