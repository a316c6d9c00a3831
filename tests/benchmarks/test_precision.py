"""The table of errors by dtype: the error of each estimator, and the best step."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import precision


def test_errors_of_a_small_model_are_of_the_size_of_their_dtype() -> None:
    """bfloat16 has roundings of 2⁻⁹: the closed form loses a few of them, differences the most."""
    model, batch = precision._small()
    rows = list(precision._measure("small", model, batch, precision.Precision(torch.bfloat16)))
    found = {(estimator, step, metric): value for estimator, step, _, metric, value in rows}
    assert 0 < found["exact", "default", "error"] < 16 * 2**-9
    assert 0 < found["exact", "default", "gradient_error"] < 16 * 2**-9
    assert found["exact", "default", "noise"] == 0
    assert found["hutchinson", "default", "noise"] > 0.1
    assert found["hutchinson", "ε = 1", "error"] > 0.5
    # Rounding falls with δ and curvature rises: there is a best δ in between.
    curve = [found["hutchinson", f"δ = {delta:g}", "gradient_error"] for delta in precision.RELATIVE]
    assert min(curve) < min(curve[0], curve[-1])


def test_the_kept_table_has_the_columns_of_the_benchmark() -> None:
    table = Path(precision.__file__).parent / "results" / "precision_cpu.csv"
    assert table.read_text().splitlines()[0].split(",") == list(precision.Row.__dataclass_fields__)
