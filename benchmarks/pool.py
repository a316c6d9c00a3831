"""A batch whose rows have an adapter each, in one pass of a pool, beside a batch of one adapter and beside switching.

python -m benchmarks.pool --out benchmarks/results/pool_cpu.csv

`one_adapter` computes the batch with the same adapter for every row, `pool` with another for each, and `switching`
row by row, the scales copied into the model before each. First of all, rows of the pool must equal those of the same
batch with their adapter alone, to the bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import ofa
from benchmarks.serving import Seconds, interleaved, ratio
from benchmarks.table import commit, cpu, significant, writing
from ofa.adapters import Adapter, read_adapter
from ofa.models.load import load_model

ONE, POOL, SWITCHING = "one_adapter", "pool", "switching"


@dataclass(frozen=True)
class Row:
    """One number of the table; a throughput is the median over the rounds of rows per second over `one_adapter`'s."""

    benchmark: str
    rows: int
    tokens: int
    adapters: int
    variant: str
    metric: str
    value: float
    unit: str
    rounds: int
    dtype: str
    device: str
    torch: str
    commit: str


def calls(
    model: Any, adapters: dict[str, Adapter], tokens: int, pool: ofa.AdapterPool
) -> dict[str, Callable[[], Tensor]]:
    """The logits after the last token of every row, by variant."""
    names = list(adapters)
    ids = torch.randint(3, 300, (len(names), tokens), generator=torch.Generator().manual_seed(0))

    def answer(rows: Tensor) -> Tensor:
        return model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False, logits_to_keep=1).logits

    def one() -> Tensor:
        put(model, adapters[names[0]])
        return answer(ids)

    def pooled() -> Tensor:
        with pool.rows(names):
            return answer(ids)

    def switching() -> Tensor:
        found = []
        for row, name in enumerate(names):
            put(model, adapters[name])
            found.append(answer(ids[row : row + 1]))
        return torch.cat(found)

    return {ONE: one, POOL: pooled, SWITCHING: switching}


def put(model: Any, adapter: Adapter) -> None:
    """Switch adapters by nothing else than copying scales, which no check and no file slows down."""
    for path, value in adapter.parameters.items():
        model.get_parameter(path).copy_(value)


def many(adapter: Adapter, count: int) -> dict[str, Adapter]:
    """Adapters whose scales are all others."""
    return {
        f"adapter {index}": replace(
            adapter, parameters={path: value * (1 + index / 1000) for path, value in adapter.parameters.items()}
        )
        for index in range(count)
    }


@torch.no_grad()
def check_answers(by_variant: dict[str, Callable[[], Tensor]], model: Any, adapters: dict[str, Adapter]) -> None:
    """See that the first row is that of its adapter alone, and the last is not that of the first's adapter."""
    alone, pooled = by_variant[ONE](), by_variant[POOL]()
    torch.testing.assert_close(pooled[0], alone[0], rtol=0, atol=0)
    assert not torch.equal(pooled[-1], alone[-1])
    torch.testing.assert_close(pooled, by_variant[SWITCHING](), rtol=1e-3, atol=1e-2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the three ways and write the table."""
    options = _parser().parse_args(arguments)
    loaded = load_model(options.model, dtype=options.dtype, device="cpu")
    model: Any = loaded.model
    with TemporaryDirectory() as folder:
        ofa.tune_norms(model)
        adapter = read_adapter(ofa.save_adapter(model, Path(folder) / "adapter", base_model=loaded.name))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapters = many(adapter, options.rows)
    origin = options.rounds, options.dtype, cpu(), torch.__version__, commit()
    with writing(options.out, Row) as write, ofa.AdapterPool(model) as pool:
        for name, one in adapters.items():
            pool.add(name, one)
        by_variant = calls(model, adapters, options.tokens, pool)
        check_answers(by_variant, model, adapters)
        times = interleaved(by_variant, options.rounds, "cpu")
        size = Path(loaded.name).name, options.rows, options.tokens, len(adapters)
        write(Row(*size, *number, *origin) for number in _numbers(times, options.rows))


def _numbers(times: dict[str, list[Seconds]], rows: int) -> Iterator[tuple[str, str, float, str]]:
    for variant, taken in times.items():
        for clock in Seconds._fields:
            own, base = ([getattr(one, clock) for one in all_of] for all_of in (taken, times[ONE]))
            speed, relative = rows / median(own), ratio(base, own)[0]
            print(f"{variant:12} {clock:9} {speed:8.2f} rows/s   {relative:.3f} of one adapter's batch")
            yield variant, f"{clock}_rows_per_second", significant(speed), "1/s"
            yield variant, f"{clock}_throughput", significant(relative), "1"


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="CSV file to write")
    found.add_argument("--model", help="hub id or folder; the embedded SmolLM2-135M-Instruct without it")
    found.add_argument("--rows", type=int, default=64, help="rows of the batch, each with an adapter of its own")
    found.add_argument("--tokens", type=int, default=48, help="tokens of a row")
    found.add_argument("--rounds", type=int, default=5, help="timed rounds")
    found.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return found


if __name__ == "__main__":
    main()
