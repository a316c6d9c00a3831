"""The two regularizers of OFA in a plain PyTorch loop, with accumulation, checkpointing, bfloat16 or compilation.

    python examples/plain_loop.py --steps 20 --out adapter
    python examples/plain_loop.py --accumulate 2 --checkpointing --offload --out adapter
    python examples/plain_loop.py --dtype bfloat16 --compile --out adapter

Tunes the norm scales of a causal language model on five labelled examples per class and saves a PEFT adapter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

import ofa
from ofa.evaluation.encoding import Encoder
from ofa.models.introspection import model_window
from ofa.tasks import few_shot


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the loss and its terms, save."""
    options = parser().parse_args(arguments)
    torch.manual_seed(options.seed)
    loaded = ofa.load_model(options.model, dtype=options.dtype)
    model = loaded.model
    params = ofa.tune_norms(model)  # 1: only the norm scales train
    reg = ofa.fused_regularizers(model)  # 2: every forward pass is measured
    optimizer = torch.optim.AdamW(params, lr=options.learning_rate, weight_decay=0.0)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only
    call = torch.compile(model, backend=options.compile) if options.compile else model
    batches, on_gpu = endless(batches_of(loaded, options)), model.device.type == "cuda"
    for step in range(1, options.steps + 1):
        for _ in range(options.accumulate):
            batch = next(batches).to(model.device)
            with torch.autograd.graph.save_on_cpu(pin_memory=on_gpu) if options.offload else nullcontext():
                cross_entropy = call(**batch).loss
                loss = cross_entropy + reg.penalty()
            (loss / options.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        measured = reg.measurements
        print(
            f"step {step}: loss {loss:.4f} = cross-entropy {cross_entropy:.4f} "
            f"+ penalty {loss - cross_entropy:.4f}, J {measured.step_ratio:.3f}, H {measured.sharpness:.3f}"
        )
    reg.close()
    print(f"saved {ofa.save_adapter(model, options.out)}")


def batches_of(loaded: ofa.models.load.LoadedModel, options: argparse.Namespace) -> DataLoader:
    """Batches of prompt and label; `labels` holds only the label's tokens."""
    data = ofa.load_task(options.task)
    encoder = Encoder(loaded.tokenizer, data.task, model_window(loaded.model))
    rows = encoder.training_rows(few_shot(data.train, data.task.labels, 5, options.seed).examples)
    return DataLoader(
        rows, batch_size=options.batch_size, shuffle=True, collate_fn=DataCollatorForSeq2Seq(loaded.tokenizer)
    )


def endless(loader: DataLoader) -> Iterator:
    """The loader's batches, epoch after epoch."""
    while True:
        yield from loader


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", help="hub id or folder; the embedded SmolLM2-135M-Instruct without it")
    found.add_argument("--task", default="reviews", help="demo task, or folder with task.json")
    found.add_argument("--steps", type=int, default=20, help="optimizer steps")
    found.add_argument("--batch-size", type=int, default=5)
    found.add_argument("--accumulate", type=int, default=1, metavar="N", help="forward passes per optimizer step")
    found.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    found.add_argument("--offload", action="store_true", help="keep saved tensors in the main memory")
    found.add_argument("--dtype", default="float32", help="of the frozen weights: float32, bfloat16 or float16")
    found.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="run the model compiled")
    found.add_argument("--learning-rate", type=float, default=1e-3)
    found.add_argument("--seed", type=int, default=42)
    found.add_argument("--out", default="adapter", help="folder of the adapter")
    return found


if __name__ == "__main__":
    main()
