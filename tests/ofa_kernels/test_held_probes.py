"""What `hutchinson` launches with the gradient in P alone: copies moved along ν/σ, and the diagonal from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ofa_kernels import launch, reference
from ofa_kernels.ops.perturb import perturb
from ofa_kernels.ops.probed_diagonal import probed_diagonal
from tests.ofa_kernels.calls import DEVICE, EPS, NORMS, PROBE, draw, scale_and_shift
from tests.ofa_kernels.test_kernels import relative_error, roundings, strided

SHAPES = [(2, 5, 32), (1, 1, 1), (3, 4, 129), (2, 9, 300), (0, 3, 8), (2, 0, 8)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["one tile", "several tiles"])
def _tiles(request, monkeypatch):
    configure = launch.configure
    if request.param == "several tiles":
        cut = lambda kernel, width, *rest: replace(configure(kernel, width, *rest), groups=4, tiles=-(-width // 128))  # noqa: E731
        monkeypatch.setattr(launch, "configure", cut)


def of_branch(shape, dtype=torch.float32):
    """A branch's outputs, two copies of them, and weights of which one is 0, as at padding."""
    base, copies, weights = draw(*shape, dtype=dtype), draw(2, *shape, dtype=dtype, seed=1), draw(*shape[:2], seed=2)
    weights[:, -1:] = 0
    return base, copies, weights.float()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_diagonal_is_that_of_the_reference(shape, probe):
    """Against the specification in float64; sequences have their own sums."""
    tensors = of_branch(shape)
    found = probed_diagonal(*tensors, **PROBE, probe=probe)
    expected = reference.probed_diagonal(*(x.double() for x in tensors), **PROBE, probe=probe)
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    assert relative_error(found, expected) <= 3e-6
    assert torch.equal(found, probed_diagonal(*tensors, **PROBE, probe=probe)), "two runs give the same bits"


@pytest.mark.parametrize("parts", [1, 2, 5, 40])
def test_a_sequence_may_be_shared_by_programs(parts, monkeypatch):
    """As many parts as a device has room for, also more than tokens."""
    monkeypatch.setattr(launch, "programs", lambda rows, multiprocessors: 3 * parts)
    tensors = of_branch((3, 7, 40))
    expected = reference.probed_diagonal(*(x.double() for x in tensors), **PROBE)
    assert relative_error(probed_diagonal(*tensors, **PROBE), expected) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_diagonal_of_narrow_rows_is_summed_in_float32(dtype):
    """And does not depend on strides; NaN between rows is not read."""
    base, copies, weights = of_branch((2, 5, 40), dtype)
    expected = reference.probed_diagonal(base.double(), copies.double(), weights.double(), **PROBE)
    dense = probed_diagonal(base, copies, weights, **PROBE)
    assert relative_error(dense, expected) <= 1e-6
    for how in ("rows apart", "rows in reverse blocks", "columns apart"):
        assert torch.equal(probed_diagonal(strided(base, how), strided(copies, how), weights, **PROBE), dense), how


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_along_probes_without_the_scale(norm, dtype):
    """γ is in the norm and not in the displacement."""
    stream, (scale, shift) = draw(3, 300, dtype=dtype), scale_and_shift(300, torch.float32, biased=norm == "layer")
    settings = {"eps": EPS, **NORMS[norm], **PROBE, "samples": 2, "epsilon": 0.5, "scaled": False}
    wide = (x if x is None else x.double() for x in (stream, scale, shift))
    expected = reference.perturb(*wide, **settings)
    assert relative_error(perturb(stream, scale, shift, **settings), expected) <= roundings(300, dtype)
    moved = reference.perturb(stream.double(), torch.ones_like(scale).double() - settings["offset"], **settings)
    own = expected if shift is None else expected - shift
    assert relative_error(own, moved * (scale + settings["offset"])) <= 1e-6, "the reference itself"


@pytest.mark.parametrize("enabled", [True, False])
def test_neither_has_a_gradient(enabled):
    """Refused, not wrong; a branch's measurement runs without gradients."""
    base, copies, weights = of_branch((2, 3, 20))
    scale = torch.ones(20, device=DEVICE)
    with torch.set_grad_enabled(enabled):
        base.requires_grad_()
        moved = perturb(base, scale, eps=EPS, samples=1, epsilon=0.1, **PROBE, scaled=False)
        diagonal = probed_diagonal(base, copies, weights, **PROBE)
    for value, message in ((moved, "no derivative unless scaled"), (diagonal, "probed_diagonal has no derivative")):
        assert value.requires_grad == enabled
        if enabled:
            with pytest.raises(RuntimeError, match=message):
                value.sum().backward()


@pytest.mark.parametrize("which", range(3))
def test_shapes_that_do_not_fit_are_refused_with_the_references_message(which):
    given = [x[:, :-1] if i == which else x for i, x in enumerate(of_branch((2, 3, 20)))]
    messages = []
    for function in (probed_diagonal, reference.probed_diagonal):
        with pytest.raises(ValueError, match="2") as caught:
            function(*given, **PROBE)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
