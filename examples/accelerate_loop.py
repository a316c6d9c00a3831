"""The two regularizers of OFA in a loop of `accelerate`, with gradient accumulation.

    python examples/accelerate_loop.py --epochs 4 --accumulate 2 --out adapter

Tunes the norm scales of a causal language model on five labelled examples per class and saves a PEFT adapter.
`accelerator.backward` divides by the number of accumulated passes, so cross-entropy and penalty are their means.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

import ofa
from ofa.evaluation.encoding import Encoder
from ofa.models.introspection import model_window
from ofa.tasks import few_shot


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the loss and its terms, save."""
    options = parser().parse_args(arguments)
    set_seed(options.seed)
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
    loaded = ofa.load_model(options.model)
    params = ofa.tune_norms(loaded.model)  # 1: only the norm scales train
    reg = ofa.fused_regularizers(loaded.model)  # 2: every forward pass is measured
    optimizer = torch.optim.AdamW(params, lr=options.learning_rate, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(loaded.model, optimizer, batches_of(loaded, options))
    for epoch in range(1, options.epochs + 1):
        for batch in loader:
            with accelerator.accumulate(model):
                cross_entropy = model(**batch).loss
                loss = cross_entropy + reg.penalty()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        measured = reg.measurements
        accelerator.print(
            f"epoch {epoch}: loss {loss:.4f} = cross-entropy {cross_entropy:.4f} "
            f"+ penalty {loss - cross_entropy:.4f}, J {measured.step_ratio:.3f}, H {measured.sharpness:.3f}"
        )
    reg.close()
    accelerator.print(f"saved {ofa.save_adapter(accelerator.unwrap_model(model), options.out)}")
    accelerator.end_training()


def batches_of(loaded: ofa.models.load.LoadedModel, options: argparse.Namespace) -> DataLoader:
    """Batches of prompt and label; `labels` holds only the label's tokens."""
    data = ofa.load_task(options.task)
    encoder = Encoder(loaded.tokenizer, data.task, model_window(loaded.model))
    rows = encoder.training_rows(few_shot(data.train, data.task.labels, 5, options.seed).examples)
    return DataLoader(
        rows, batch_size=options.batch_size, shuffle=True, collate_fn=DataCollatorForSeq2Seq(loaded.tokenizer)
    )


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", help="hub id or folder; the embedded SmolLM2-135M-Instruct without it")
    found.add_argument("--task", default="reviews", help="demo task, or folder with task.json")
    found.add_argument("--epochs", type=int, default=4)
    found.add_argument("--batch-size", type=int, default=5)
    found.add_argument("--accumulate", type=int, default=1, metavar="N", help="forward passes per optimizer step")
    found.add_argument("--learning-rate", type=float, default=1e-3)
    found.add_argument("--seed", type=int, default=42)
    found.add_argument("--out", default="adapter", help="folder of the adapter")
    return found


if __name__ == "__main__":
    main()
