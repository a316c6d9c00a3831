"""The two regularizers of OFA on a base that bitsandbytes loads in 4 or 8 bits.

    python examples/quantized.py --bits 4 --steps 20 --out adapter
    python examples/quantized.py --bits 8 --model FOLDER --out adapter

The norm scales are not quantized: they train in float32, and the adapter fits the base in any precision.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq

import ofa
from ofa.evaluation.encoding import Encoder
from ofa.models.introspection import model_window
from ofa.tasks import few_shot

QUANTIZED = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    8: {"load_in_8bit": True},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the loss and its terms, save."""
    options = parser().parse_args(arguments)
    torch.manual_seed(options.seed)
    model, tokenizer, base = load(options)
    params = ofa.tune_norms(model)  # 1: only the norm scales train
    reg = ofa.fused_regularizers(model)  # 2: every forward pass is measured
    optimizer = torch.optim.AdamW(params, lr=options.learning_rate, weight_decay=0.0)
    for step, batch in zip(range(1, options.steps + 1), cycle(batches_of(model, tokenizer, options)), strict=False):
        cross_entropy = model(**batch.to(model.device)).loss
        loss = cross_entropy + reg.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        measured = reg.measurements
        print(
            f"step {step}: loss {loss:.4f} = cross-entropy {cross_entropy:.4f} "
            f"+ penalty {loss - cross_entropy:.4f}, J {measured.step_ratio:.3f}, H {measured.sharpness:.3f}"
        )
    reg.close()
    megabytes = model.get_memory_footprint() / 1e6
    print(f"saved {ofa.save_adapter(model, options.out, base_model=base)}, trained on {megabytes:.0f} MB")


def load(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """The base in 4 or 8 bits, its tokenizer and its name; the embedded model must be saved to disk first."""
    how: dict[str, Any] = {
        "quantization_config": BitsAndBytesConfig(**QUANTIZED[options.bits]),
        "dtype": torch.bfloat16,
    }
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, **how)
        return model, AutoTokenizer.from_pretrained(options.model), options.model
    loaded = ofa.load_model(None)
    with tempfile.TemporaryDirectory() as folder:
        loaded.model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, **how), loaded.tokenizer, loaded.name


def batches_of(model: Any, tokenizer: Any, options: argparse.Namespace) -> DataLoader:
    """Batches of prompt and label; `labels` holds only the label's tokens."""
    data = ofa.load_task(options.task)
    encoder = Encoder(tokenizer, data.task, model_window(model))
    rows = encoder.training_rows(few_shot(data.train, data.task.labels, 5, options.seed).examples)
    return DataLoader(rows, batch_size=options.batch_size, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", help="hub id or folder; the embedded SmolLM2-135M-Instruct without it")
    found.add_argument("--bits", type=int, choices=sorted(QUANTIZED), default=4)
    found.add_argument("--task", default="reviews", help="demo task, or folder with task.json")
    found.add_argument("--steps", type=int, default=20, help="optimizer steps")
    found.add_argument("--batch-size", type=int, default=5)
    found.add_argument("--learning-rate", type=float, default=1e-3)
    found.add_argument("--seed", type=int, default=42)
    found.add_argument("--out", default="adapter", help="folder of the adapter")
    return found


if __name__ == "__main__":
    main()
