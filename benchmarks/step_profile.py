"""Where the CPU time of the exact sharpness goes, by operation: `python -m benchmarks.step_profile`.

The thread's own time, which other processes disturb less than wall clock; each operation without those inside it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.workloads import SMOLLM2_135M, VARIANTS, batch, build, step
from ofa.regularizers.closed_form import branch_trace
from ofa.regularizers.estimators import exact
from ofa_kernels import dispatch

OPERATIONS = ("attention_curvature", "attention_trace", "attention_diagonal", "mlp_curvature", "mlp_diagonal")


class Stopwatch:
    """Seconds by label; a timed function does not count those that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[float] = []

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - started
                self.seconds[label] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        return run


@contextmanager
def watched() -> Iterator[Stopwatch]:
    """A stopwatch on the operations, and on all else that the estimator does at the end of a branch."""
    watch = Stopwatch()
    places = [(dispatch, name, name) for name in OPERATIONS]
    places += [(branch_trace.AttentionBody, "_move", "projections of the radial term")]
    places += [(exact.Exact, "leave", "the rest: norms, channels, assembly")]
    patches = [patch.object(owner, name, watch.timed(label, getattr(owner, name))) for owner, name, label in places]
    for one in patches:
        one.start()
    try:
        yield watch
    finally:
        for one in patches:
            one.stop()


def main() -> None:
    """Print milliseconds per layer of every operation, and of a plain step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="layers of the model")
    parser.add_argument("--steps", type=int, default=10, help="steps to average over")
    options = parser.parse_args()
    workload = SMOLLM2_135M.shortened(options.layers)
    model, ids, per_layer = build(workload), batch(workload), 1e3 / options.steps / options.layers
    step(model, ids, None)
    started = time.thread_time()
    for _ in range(options.steps):
        step(model, ids, None)
    print(f"{per_layer * (time.thread_time() - started):8.2f} ms per layer: a plain step")
    attached = VARIANTS["sharpness"](model, 0)
    step(model, ids, attached)
    with watched() as watch:
        for _ in range(options.steps):
            step(model, ids, attached)
    for label, seconds in watch.seconds.most_common():
        print(f"{per_layer * seconds:8.2f} {label}")
    print(f"{per_layer * watch.seconds.total():8.2f} in all")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
