"""The two regularizers of OFA in a Lightning module, with automatic optimization.

    python examples/lightning_module.py --epochs 4 --accumulate 2 --precision bf16-mixed --out adapter

Tunes the norm scales of a causal language model on five labelled examples per class and saves a PEFT adapter.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

import ofa
from ofa.evaluation.encoding import Encoder
from ofa.models.introspection import model_window
from ofa.tasks import few_shot


class NormTuning(lightning.LightningModule):
    """A model whose norm scales train, with the penalty in its loss."""

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate
        self.params = ofa.tune_norms(model)  # 1: only the norm scales train
        self.reg = ofa.fused_regularizers(model)  # 2: forward passes are measured

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """Cross-entropy and penalty; Lightning divides both by the number of accumulated batches."""
        loss = self.model(**batch).loss + self.reg.penalty()
        measured = self.reg.measurements
        self.print(f"batch {index}: loss {loss:.4f}, J {measured.step_ratio:.3f}, H {measured.sharpness:.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the scales."""
        return torch.optim.AdamW(self.params, lr=self.learning_rate, weight_decay=0.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the loss and its terms, save."""
    options = parser().parse_args(arguments)
    lightning.seed_everything(options.seed)
    loaded = ofa.load_model(options.model)
    module = NormTuning(loaded.model, options.learning_rate)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate,
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, batches_of(loaded, options))
    module.reg.close()
    print(f"saved {ofa.save_adapter(module.model, options.out)}")


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
    found.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches per optimizer step")
    found.add_argument("--precision", default="32-true", help="32-true or bf16-mixed")
    found.add_argument("--learning-rate", type=float, default=1e-3)
    found.add_argument("--seed", type=int, default=42)
    found.add_argument("--out", default="adapter", help="folder of the adapter")
    return found


if __name__ == "__main__":
    main()
