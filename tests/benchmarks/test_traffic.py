"""The bytes model against every load and store of the kernels, counted in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from benchmarks import traffic
from benchmarks.traffic import Size
from ofa_kernels import launch
from ofa_kernels.ops import contract, displace, launching, norm_step, perturb, probed_diagonal

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts what the interpreter does")

SIZES = [
    Size(3, 200, itemsize=4, samples=1),
    Size(5, 576, itemsize=2, samples=2, biased=True, centred=True),
]
PROBE = 7, 3, False
CACHED = ("weight", "bias")
"""Operands that every row reads again; counted once in the model."""
PARTIAL = ("partial_weight", "partial_bias", "sums")
"""Operands that are not in the model; their results are."""


class Ledger:
    """How often a kernel read and wrote each element of each of its operands."""

    def __init__(self):
        self.operands, self.reads, self.writes = {}, {}, {}

    def launch(self, kernel, grid, args, keywords):
        assert not self.operands, "one launch is counted, not two"
        self.operands = {name: arg for name, arg in zip(kernel.arg_names, args, strict=False) if torch.is_tensor(arg)}
        for counts in (self.reads, self.writes):
            counts |= {name: np.zeros(tensor.numel(), int) for name, tensor in self.operands.items()}
        kernel[(grid,)](*args, **keywords)

    def note(self, counts, pointers, mask):
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.int64)
        for name, tensor in self.operands.items():
            element, offset = np.divmod(addresses - tensor.data_ptr(), tensor.element_size())
            inside = (element >= 0) & (element < tensor.numel())
            assert not offset[inside].any(), f"{name} is accessed between its elements"
            np.add.at(counts[name], element[inside], 1)
            addresses = addresses[~inside]
        assert not len(addresses), "memory that is no operand's is accessed"

    def inputs(self):
        return [name for name, counts in self.writes.items() if not counts.any()]

    def outputs(self):
        return [name for name, counts in self.writes.items() if counts.any() and name not in PARTIAL]

    def bytes_of(self, names):
        return sum(self.operands[name].nbytes for name in names)


def norm_step_forward(size):
    return norm_step.forward(rows(size), rows(size), *scale_and_shift(size), 1e-5, size.centred, 0.0, measured=True)


def norm_step_backward(size, measured=True):
    saved = rows(size), rows(size), scale_and_shift(size)[0], scalars(size), scalars(size)
    grads = rows(size), rows(size), scalars(size) if measured else None, None
    return norm_step.backward(*saved, *grads, size.centred, 0.0, size.biased)


def perturb_forward(size, unperturbed=False, scaled=True):
    tensors = rows(size), rows(size) if unperturbed else None, *scale_and_shift(size)
    return (perturb.forward(*tensors, 1e-5, size.centred, 0.0, scaled, size.samples, 0.1, *PROBE),)


def perturb_backward(size):
    tensors = rows(size), scale_and_shift(size)[0], rows(size, size.samples)
    return perturb.backward(*tensors, 1e-5, size.centred, 0.0, 0.1, *PROBE, size.biased)


def contract_forward(size):
    return contract.forward(rows(size), rows(size, size.samples), *PROBE)


def contract_backward(size):
    return contract.backward(rows(size), scalars(size, size.samples), scalars(size), size.samples, *PROBE)


def diagonal(size):
    tensors = rows(size)[None], rows(size, size.samples).unsqueeze(1), scalars(size)[None]
    return (probed_diagonal.forward(*tensors, *PROBE),)


def displace_forward(size, per_row=False):
    diagonal = scalars(size)[:, None].expand(-1, size.width) if per_row else torch.rand(size.rows, size.width)
    return (displace.forward(rows(size), diagonal, size.samples, 0.1, *PROBE),)


def displace_backward(size):
    return displace.backward(rows(size, size.samples), 0.1, *PROBE, True)


def rows(size, *stacked):
    return torch.randn(*stacked, size.rows, size.width).to(torch.float32 if size.itemsize == 4 else torch.float16)


def scalars(size, *stacked):
    return torch.rand(*stacked, size.rows)


def scale_and_shift(size):
    return torch.rand(size.width), torch.rand(size.width) if size.biased else None


def label(parameter):
    return f"{parameter.rows}x{parameter.width}" if isinstance(parameter, Size) else f"tiles of {parameter or 'a row'}"


# Every operation with the model of its bytes, and the reads of each element of its rows and numbers per row if a row is
# one tile. Repeated reads are in the cache, since one program reads them.
OPERATIONS = {
    "norm_step_forward": (norm_step_forward, traffic.norm_step_forward, lambda n: {"residual": 1, "update": 1}),
    "norm_step_backward": (
        norm_step_backward,
        traffic.norm_step_backward,
        lambda n: {"stream": 1, "update": 1, "rstd": 1, "grad_stream": 1, "grad_normalized": 1, "grad_sqnorm": 1},
    ),
    "add_norm_backward": (
        partial(norm_step_backward, measured=False),
        traffic.add_norm_backward,
        lambda n: {"stream": 1, "rstd": 1, "grad_stream": 1, "grad_normalized": 1},
    ),
    "perturb_forward": (perturb_forward, traffic.perturb_forward, lambda n: {"stream": 1 + 2 * n}),
    "perturb_forward behind": (
        partial(perturb_forward, unperturbed=True),
        partial(traffic.perturb_forward, unperturbed=True),
        lambda n: {"stream": 1 + 2 * n, "unperturbed": 1},
    ),
    "perturb_forward without γ": (
        partial(perturb_forward, scaled=False),
        traffic.perturb_forward,
        lambda n: {"stream": 1 + 2 * n},
    ),
    "perturb_backward": (
        perturb_backward,
        traffic.perturb_backward,
        lambda n: {"stream": 3 + n, "grad_copies": 2},
    ),
    "contract_forward": (contract_forward, traffic.contract_forward, lambda n: {"base": 1, "copies": 1}),
    "contract_backward": (
        contract_backward,
        traffic.contract_backward,
        lambda n: {"base": 1, "grad_products": 1, "grad_sqnorm": 1},
    ),
    "probed_diagonal": (
        diagonal,
        partial(traffic.probed_diagonal, sequences=1),
        lambda n: {"base": 1, "copies": 1, "weights": 1},
    ),
    "displace_forward": (displace_forward, traffic.displace_forward, lambda n: {"stream": 1, "preconditioner": 1}),
    "displace_forward per row": (
        partial(displace_forward, per_row=True),
        partial(traffic.displace_forward, per_row=True),
        lambda n: {"stream": 1, "preconditioner": 1},
    ),
    "displace_backward": (displace_backward, traffic.displace_backward, lambda n: {"grad_copies": 1}),
}
over_operations = pytest.mark.parametrize("operation", OPERATIONS)
over_sizes = pytest.mark.parametrize("size", SIZES, ids=label)


@cache
def counted(operation, size, tile):
    """The ledger of one call and its results; rows have tiles of `tile` columns, or the default."""
    from triton.runtime.interpreter import interpreter_builder

    ledger, builder = Ledger(), type(interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *args, **kwargs):
        ledger.note(ledger.reads, pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def counted_store(self, pointers, value, mask, *args, **kwargs):
        ledger.note(ledger.writes, pointers, mask)
        return store(self, pointers, value, mask, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, launching.launching_by(ledger.launch, "sm_90"):
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        if tile:
            usual, cut = launch.configure, {"groups": tile // 32, "tiles": -(-size.width // tile)}
            patch.setattr(launch, "configure", lambda *args: replace(usual(*args), **cut))
        return ledger, OPERATIONS[operation][0](size)


@over_operations
@pytest.mark.parametrize(("size", "tile"), [(SIZES[0], None), (SIZES[1], None), (SIZES[0], 128)], ids=label)
def test_distinct_bytes_are_those_of_the_model(operation, size, tile):
    ledger, results = counted(operation, size, tile)
    for name in ledger.inputs():
        assert ledger.reads[name].all(), f"{name} is not read completely"
    for name in ledger.outputs():
        assert (ledger.writes[name] == 1).all(), f"{name} is not written once"
    touched = {tensor.data_ptr() for tensor in ledger.operands.values()}
    summed = sum(result.nbytes for result in results if result.data_ptr() not in touched)
    model = OPERATIONS[operation][1](size)
    assert ledger.bytes_of(ledger.inputs()) == model.reads
    assert ledger.bytes_of(ledger.outputs()) + summed == model.writes


@over_operations
@over_sizes
def test_how_often_an_element_of_a_row_is_read(operation, size):
    ledger, _ = counted(operation, size, None)
    expected = OPERATIONS[operation][2](size.samples) | ({"mean": 1} if "mean" in ledger.inputs() else {})
    found = {name: sorted(set(counts)) for name, counts in ledger.reads.items() if counts.any() and name not in CACHED}
    assert found == {name: [times] for name, times in expected.items()}


@over_operations
@over_sizes
def test_a_program_writes_its_partial_sums_once_and_does_not_read_them(operation, size):
    ledger, _ = counted(operation, size, None)
    for name in set(PARTIAL) & set(ledger.operands):
        assert (ledger.writes[name] == 1).all()
        assert not ledger.reads[name].any()
