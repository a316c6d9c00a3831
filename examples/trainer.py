"""The two regularizers of OFA in `transformers.Trainer`: the penalty is in the model's own loss.

    python examples/trainer.py --epochs 4 --accumulate 2 --out adapter

Tunes the norm scales of a causal language model on five labelled examples per class and saves a PEFT adapter.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import ofa
from ofa.evaluation.encoding import Encoder
from ofa.models.introspection import model_window
from ofa.tasks import few_shot


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Train, print what Trainer logs and the last J and H, save."""
    options = parser().parse_args(arguments)
    loaded = ofa.load_model(options.model)
    model = loaded.model
    ofa.tune_norms(model)  # 1: only the norm scales train
    with (
        ofa.fused_regularizers(model, into_loss=True) as reg,  # 2: in the loss
        tempfile.TemporaryDirectory() as scratch,
    ):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=options.batch_size,
                gradient_accumulation_steps=options.accumulate,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=options.seed,
            ),
            train_dataset=rows_of(loaded, options),
            data_collator=DataCollatorForSeq2Seq(loaded.tokenizer),
        )
        trainer.train()
        print(f"J {reg.measurements.step_ratio:.3f}, H {reg.measurements.sharpness:.3f} of the last forward pass")
    print(f"saved {ofa.save_adapter(model, options.out)}")
    return trainer


def rows_of(loaded: ofa.models.load.LoadedModel, options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Prompt and label of every shot; `labels` holds only the label's tokens."""
    data = ofa.load_task(options.task)
    encoder = Encoder(loaded.tokenizer, data.task, model_window(loaded.model))
    return encoder.training_rows(few_shot(data.train, data.task.labels, 5, options.seed).examples)


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
