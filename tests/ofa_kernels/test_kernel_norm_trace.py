"""What only the kernels of norm_trace have: a stream and an image of two dtypes, and inputs that are constants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ofa_kernels import reference
from ofa_kernels.ops.norm_trace import norm_trace
from tests.ofa_kernels.calls import DEVICE, EPS, call, weights_like
from tests.ofa_kernels.test_kernels import assert_close

over_norms = pytest.mark.parametrize("norm", ["rms", "layer"])


@over_norms
@pytest.mark.parametrize(
    ("stream", "image"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("apart", [0, 1], ids=["stream", "image"])
def test_stream_and_image_of_two_dtypes_with_rows_as_far_apart_as_each_has_them(norm, stream, image, apart):
    """Each gradient has its own tensor's dtype; the coarser one decides how near the others can be."""
    case = call("norm_trace", (3, 40), torch.float32, norm)
    rows = [case.inputs[0].to(stream), case.inputs[2].to(image)]
    rows[apart] = torch.cat((rows[apart], torch.full_like(rows[apart], float("nan"))), -1)[:, :40]
    case = replace(case, inputs=(rows[0], case.inputs[1], rows[1], case.inputs[3]))
    assert_close(case, 40, torch.bfloat16)
    found = case.run(case.kernel)
    assert found.outputs["trace"].dtype == torch.float32
    assert [grad.dtype for grad in found.gradients] == [stream, torch.float32, image, torch.float32]


@over_norms
@pytest.mark.parametrize("which", range(4), ids=["stream", "weight", "image", "trace"])
def test_a_gradient_of_one_input_alone(norm, which):
    """The others are constants: a frozen weight, the first stream, a trace that depends on nothing."""
    case = call("norm_trace", (3, 40), torch.float32, norm)
    together = case.run(case.kernel).gradients[which]
    inputs = [x.detach().requires_grad_(i == which) for i, x in enumerate(case.inputs)]
    result = case.kernel(*inputs, **case.settings)
    (alone,) = torch.autograd.grad(result, inputs[which], weights_like(result, seed=90))
    assert torch.equal(alone, together)


@over_norms
def test_a_shift_in_any_norm_and_a_layer_norm_without(norm):
    """The product that made the image has a shift or has none, whatever the norm in front of the branch is."""
    case = call("norm_trace", (3, 40), torch.float32, norm)
    shift = None if "shift" in case.settings else call("norm_trace", (3, 40), torch.float32, "layer").settings["shift"]
    assert_close(replace(case, settings={**case.settings, "shift": shift}), 40, torch.float32)


def test_weight_and_shift_of_any_stride_and_dtype():
    case = call("norm_trace", (3, 40), torch.float32, "layer")
    stream, weight, image, trace = case.inputs
    vectors = weight.half(), case.settings["shift"].half()
    apart = [torch.stack((x, x), -1)[:, 0] for x in vectors]
    found = []
    for scale, shift in (vectors, apart):
        scale = scale.detach().requires_grad_()
        result = norm_trace(stream, scale, image, trace, eps=EPS, kind="layer", shift=shift)
        found.append((result, *torch.autograd.grad(result.sum(), scale)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][1].dtype == torch.float16


@over_norms
def test_no_rows_have_a_weight_of_zero_gradient(norm):
    case = call("norm_trace", (0, 8), torch.float32, norm)
    assert torch.equal(case.run(case.kernel).gradients[1], torch.zeros(8, device=DEVICE))


def test_a_shift_that_requires_a_gradient_is_refused():
    """Leaving its gradient out would be wrong without a word."""
    case = call("norm_trace", (2, 20), torch.float32, "layer")
    case.settings["shift"].requires_grad_()
    with pytest.raises(RuntimeError, match="shift requires a gradient"):
        norm_trace(*case.inputs, **case.settings)
    with torch.no_grad():
        norm_trace(*case.inputs, **case.settings)


def test_a_trace_that_is_not_one_number_per_row_is_refused_with_the_sentence_of_the_reference():
    stream, weight, image, trace = call("norm_trace", (2, 20), torch.float32).inputs
    messages = []
    for function in (norm_trace, reference.norm_trace):
        with pytest.raises(ValueError, match="one number per row") as caught:
            function(stream, weight, image, trace[:1], eps=EPS)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
