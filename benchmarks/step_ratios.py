"""Ways to make the step ratio J of its tokens, by their gradients on the embedded model; prints a table.

    python -m benchmarks.step_ratios

Eight texts of two demo tasks each, in two halves. Gradients are in all γ, in the unit of relative steps, |γ₀|: their
length, the cosine between the halves, the cosine with the cross-entropy's, the share of the norm with the longest part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ofa
from benchmarks.screened_terms import AGGREGATES, aggregated, token_means
from ofa.evaluation.encoding import Encoder
from ofa.models.introspection import model_window
from ofa.tasks import load_task
from ofa.training.loss import EncodedExample, cross_entropy, encode_example

TASKS = ("reviews", "questions")
HALF = 4

Gradients = Mapping[str, tuple[float, list[Tensor]]]


def main() -> None:
    """Print the table."""
    loaded = ofa.load_model("embedded", device="cpu")
    scales = ofa.tune_norms(loaded.model)
    print(
        "| texts | J | value | length | halves | with the cross-entropy | largest norm |",
        "|---" * 7 + "|",
        sep="\n",
    )
    for task in TASKS:
        data = load_task(task)
        encoder = Encoder(loaded.tokenizer, data.task, model_window(loaded.model))
        examples = [encode_example(encoder, example) for example in data.train[: 2 * HALF]]
        halves = [measured(loaded.model, scales, part) for part in (examples[:HALF], examples[HALF:])]
        for name in (name for name in halves[0] if name != "loss"):
            told = " | ".join(f"{value:.2f}" for value in compared(halves, name))
            print(f"| {task} | {name} | {told} |", flush=True)


def compared(halves: Sequence[Gradients], name: str) -> Iterator[float]:
    """The columns of a row, means over the halves but for the cosine between them."""
    own = [torch.cat(half[name][1]) for half in halves]
    losses = [torch.cat(half["loss"][1]) for half in halves]
    yield sum(half[name][0] for half in halves) / 2
    yield float(sum(one.norm() for one in own)) / 2
    yield float(torch.cosine_similarity(*own, dim=0))
    yield float(sum(torch.cosine_similarity(a, b, dim=0) for a, b in zip(own, losses, strict=True))) / 2
    yield (
        sum(float(max(part.norm() for part in half[name][1]) / torch.cat(half[name][1]).norm()) for half in halves) / 2
    )


def measured(model: Any, scales: Sequence[nn.Parameter], examples: Sequence[EncodedExample]) -> Gradients:
    """The value and the gradient of the cross-entropy and of every J."""
    found: dict[str, tuple[float, list[Tensor]]] = {}
    for tokens in ("no-sinks", "all"):
        with ofa.fused_regularizers(model, 1.0, 0.0, tokens=tokens) as regularizers:
            loss = cross_entropy(model, examples)
            result = regularizers.measurements
            values: dict[str, Tensor | None] = {f"lengths, {tokens}": result.step_ratio}
            if tokens == "no-sinks":
                values |= {
                    f"{name}, {tokens}": aggregated(result, name, token_means(result, name)) for name in AGGREGATES
                }
                values["loss"] = loss
            for name, value in values.items():
                assert value is not None
                parts = torch.autograd.grad(value, scales, retain_graph=True, allow_unused=True)
                pairs = [(scale.detach().abs(), part) for scale, part in zip(scales, parts, strict=True)]
                found[name] = float(value.detach()), [0 * size if part is None else size * part for size, part in pairs]
    return found


if __name__ == "__main__":
    main()
