"""The two regularizers of OFA in an encoder with a new classification head: BERT and its relatives.

    python examples/encoder.py --model google-bert/bert-base-uncased --epochs 5 --out encoder

`tune_norms` freezes everything but the norm scales. A new head must train as well, so it is unfrozen and has its own
learning rate. An adapter holds only the scales: the head is saved next to it, and a merged checkpoint holds both.
Without --model the example uses a small BERT with random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import ofa
from ofa.tasks import TaskData, few_shot


def main(arguments: Sequence[str] | None = None) -> None:
    """Train scales and head, print the loss and its terms, save both, and load them again."""
    options = parser().parse_args(arguments)
    torch.manual_seed(options.seed)
    data = ofa.load_task(options.task)
    model, tokenizer, base = load(options, data.task.labels)
    model.eval()  # no dropout, as the trace requires; gradients still flow
    params = ofa.tune_norms(model)  # 1: the norm scales train
    head = model.classifier.requires_grad_(True)  # and so does the new head
    reg = ofa.fused_regularizers(model)  # 2: every forward pass is measured
    groups = [{"params": params, "lr": 1e-3}, {"params": head.parameters(), "lr": options.head_learning_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for epoch in range(1, options.epochs + 1):
        for batch in batches_of(data, tokenizer, options):
            cross_entropy = model(**batch).loss
            loss = cross_entropy + reg.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        measured = reg.measurements
        print(
            f"epoch {epoch}: loss {loss:.4f} = cross-entropy {cross_entropy:.4f} "
            f"+ 0.01 * J {measured.step_ratio:.3f} + 0.001 * H {measured.sharpness:.3f}"
        )
    reg.close()
    out = Path(options.out)
    ofa.save_adapter(model, out / "adapter", base_model=str(base))
    save_file(head.state_dict(), out / "adapter" / "head.safetensors")
    ofa.merge(model, out / "adapter", out / "merged", tokenizer=tokenizer)
    print(f"saved {out / 'adapter'} with its head, and both in one checkpoint: {out / 'merged'}")
    again, _, _ = load(argparse.Namespace(**{**vars(options), "model": base}), data.task.labels)
    ofa.load_adapter(again, out / "adapter")
    again.classifier.load_state_dict(load_file(out / "adapter" / "head.safetensors"))
    with torch.no_grad():
        print(
            f"loaded again: logits differ by {(again.eval()(**batch).logits - model(**batch).logits).abs().max():.1e}"
        )


def load(options: argparse.Namespace, labels: Sequence[str]) -> tuple[Any, Any, str | Path]:
    """Encoder with a head for the labels, tokenizer, and their folder or id."""
    names = dict(enumerate(labels))
    if options.model:
        how = {"id2label": names, "ignore_mismatched_sizes": True}  # replaces a head with other labels
        base = AutoModelForSequenceClassification.from_pretrained(options.model, **how)
        return base, AutoTokenizer.from_pretrained(options.model), options.model
    folder = Path(options.out) / "random-bert"
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    tokenizer = ofa.load_model(None).tokenizer
    model = BertForSequenceClassification(BertConfig(**size, vocab_size=len(tokenizer), id2label=names))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


def batches_of(data: TaskData, tokenizer: Any, options: argparse.Namespace) -> DataLoader:
    """Batches of texts and label indices."""

    def collate(examples: Sequence[Any]) -> Any:
        batch = tokenizer([example.text for example in examples], padding=True, return_tensors="pt")
        labels = [data.task.labels.index(example.label) for example in examples]
        return {**batch, "labels": torch.tensor(labels)}

    shots = few_shot(data.train, data.task.labels, options.shots, options.seed).examples
    return DataLoader(shots, batch_size=options.batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", help="encoder by hub id or folder; a small random one without it")
    found.add_argument("--task", default="reviews", help="demo task, or folder with task.json")
    found.add_argument("--shots", type=int, default=5, help="examples per class")
    found.add_argument("--epochs", type=int, default=5)
    found.add_argument("--batch-size", type=int, default=5)
    found.add_argument("--head-learning-rate", type=float, default=1e-2)
    found.add_argument("--seed", type=int, default=42)
    found.add_argument("--out", default="encoder", help="folder of the adapter and the merged checkpoint")
    return found


if __name__ == "__main__":
    main()
