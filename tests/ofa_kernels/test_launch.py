"""Launch configurations: a tile holds the row, threads are what a program may have, and nothing else matters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ofa_kernels.launch import HEAVY, MAX_WIDTH, WALKING, configure, programs
from ofa_kernels.workload import WIDTHS as WIDTHS_AHEAD

ROWS = "norm_step_forward", "norm_step_backward", "contract_forward", "perturb_forward", "norm_trace_forward"
KERNELS = (*ROWS, *HEAVY)
WIDTHS = [1, 2, 31, 127, 128, 129, 576, 1024, 4096, 4097, 8192, 11008, 16384, 16385, 32768, MAX_WIDTH]


@pytest.mark.parametrize("kernel", [*KERNELS, *WALKING])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_cover_the_row_and_threads_are_within_bounds(kernel, width, architecture):
    config = configure(kernel, width, 2, architecture)
    columns = 32 * config.groups
    assert (config.tiles - 1) * columns < width <= config.tiles * columns
    assert columns >= 128, "a tile has at least the channels of one random counter"
    assert config.groups & (config.groups - 1) == 0, "Triton's tiles are powers of two"
    threads = config.num_warps * (64 if architecture.startswith("gfx") else 32)
    assert 64 <= threads <= 512
    assert config.max_registers is None or config.max_registers * threads <= 65536, "registers of a multiprocessor"
    assert config.num_warps >= 1
    assert config.num_warps & (config.num_warps - 1) == 0


@pytest.mark.parametrize("kernel", [*KERNELS, *WALKING])
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_what_is_compiled_ahead_of_time_serves_every_width(kernel, architecture):
    compiled = {configure(kernel, width, 2, architecture) for width in WIDTHS_AHEAD}
    assert {configure(kernel, width, 2, architecture) for width in range(528, 8193, 16)} <= compiled


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_up_to_4096_columns_are_one_tile(kernel):
    """Most models; their weight gradients are summed in registers."""
    assert configure(kernel, 4096, 2, "sm_90").tiles == 1


@pytest.mark.parametrize(
    ("rows", "processors", "expected"),
    [(0, 132, 1), (5, 132, 5), (512, 132, 132), (2048, 132, 256), (8192, 132, 528), (7, 1, 1)],
)
def test_no_more_programs_than_rows_and_few_partial_sums(rows, processors, expected):
    assert programs(rows, processors) == expected


@pytest.mark.parametrize("kernel", WALKING)
@pytest.mark.parametrize("width", [1536, 4096, 11008, 14336, MAX_WIDTH])
def test_rows_that_are_walked_through_differ_in_nothing_but_the_number_of_tiles(kernel, width):
    """Widths of MLPs are many, and their kernels do not depend on that number."""
    config = configure(kernel, width, 2, "sm_90")
    assert replace(config, tiles=1) == configure(kernel, 2048, 2, "sm_90")
