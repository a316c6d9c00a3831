"""Launch configurations: tiles cover the row, threads and registers are within bounds."""

from __future__ import annotations

from itertools import product

import pytest

from ofa_kernels.launch import (
    _SWEEPS,
    _TILES,
    MAX_WIDTH,
    REGISTER_HEAVY,
    SHARED,
    configure,
    configure_tiles,
    programs,
    shares,
)
from ofa_kernels.workload import WIDTHS as WIDTHS_AHEAD

ROWS = "norm_step_forward", "norm_step_backward", "contract_forward", "perturb_forward"
KERNELS = (*ROWS, *REGISTER_HEAVY)
WIDTHS = [1, 2, 31, 127, 128, 129, 576, 1024, 4096, 4097, 8192, 11008, 16384, 16385, 32768, MAX_WIDTH]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_cover_the_row_and_threads_are_within_bounds(kernel, architecture):
    for width in WIDTHS:
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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_what_is_compiled_ahead_of_time_serves_every_width(kernel, architecture):
    compiled = {configure(kernel, width, 2, architecture) for width in WIDTHS_AHEAD}
    assert {configure(kernel, width, 2, architecture) for width in range(528, 8193, 16)} <= compiled


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "gfx942"])
def test_a_row_is_loaded_ahead_where_two_fit_beside_each_other(architecture, itemsize):
    """With two stages a loop would only wait for its loads later; the launch would fail with more than there is."""
    limit = SHARED.get(architecture, 99 << 10)
    for width in WIDTHS:
        config = configure("norm_step_backward", width, itemsize, architecture)
        ahead = 2 * 4 * 32 * config.groups * itemsize
        assert config.stages == 1 or (config.stages == 3 and config.tiles == 1 and ahead < limit)
        assert config.stages == 3 or architecture == "gfx942" or 2 * ahead > limit


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_up_to_4096_columns_are_one_tile(kernel):
    """Weight gradients of most models are then summed in registers."""
    assert configure(kernel, 4096, 2, "sm_90").tiles == 1


@pytest.mark.parametrize(
    ("rows", "processors", "expected"),
    [(0, 132, 1), (5, 132, 5), (512, 132, 132), (2048, 132, 256), (8192, 132, 528), (7, 1, 1)],
)
def test_no_more_programs_than_rows_and_few_partial_sums(rows, processors, expected):
    assert programs(rows, processors) == expected


@pytest.mark.parametrize("kernel", [*_SWEEPS, *_TILES])
def test_tiles_of_the_curvature_are_powers_of_two_from_16_on(kernel):
    """For every width of a head that the kernels accept, crowded or not."""
    for architecture, itemsize, crowded in product(("sm_80", "sm_90", "gfx942"), (2, 4), (False, True)):
        for width in (1, 48, 64, 80, 128, 256 if itemsize == 2 else 128):
            config = configure_tiles(kernel, width, itemsize, architecture, crowded)
            for size in (config.block_rows, config.block_columns, config.num_warps):
                assert size & (size - 1) == 0
            assert min(config.block_rows, config.block_columns) >= 16
            assert config.num_warps * (64 if architecture == "gfx942" else 32) <= 256


@pytest.mark.parametrize(
    ("blocks", "tiles", "wanted", "expected"),
    [(0, 5, 8, 1), (4, 0, 8, 1), (1, 10, 4, 4), (1, 10, 100, 10), (8, 10, 4, 1), (3, 7, 12, 4)],
)
def test_runs_of_tiles_are_no_more_than_wanted_and_have_a_tile_each(blocks, tiles, wanted, expected):
    assert shares(blocks, tiles, wanted) == expected
