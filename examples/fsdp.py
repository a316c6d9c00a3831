"""The two regularizers of OFA with FSDP2 (`fully_shard`): every process has a shard of the weights and of each batch.

    torchrun --nproc-per-node 2 examples/fsdp.py --epochs 4 --out adapter

Uses NCCL with a GPU for every process, else gloo on the CPU. With equal shares, FSDP's mean of the gradients is the
gradient of the whole batch, and the adapter is the same as from `plain_loop.py` with that batch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import DataCollatorForSeq2Seq

import ofa
from ofa.evaluation.encoding import Encoder
from ofa.models.introspection import model_window
from ofa.tasks import few_shot


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the loss and its terms, save."""
    options = parser().parse_args(arguments)
    device = meet()
    loaded = ofa.load_model(options.model, device="cpu")  # every rank moves its own shard to its device
    model = loaded.model
    ofa.tune_norms(model)  # 1: only the norm scales train, in float32; before fully_shard
    # 2: every forward pass is measured, with other probes on every rank
    reg = ofa.fused_regularizers(model, seed=dist.get_rank())
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in reg.anatomy.layers:
        fully_shard(model.get_submodule(layer), mesh=mesh)
    fully_shard(model, mesh=mesh)
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=options.learning_rate, weight_decay=0.0)
    loader = batches_of(loaded, options)
    for epoch in range(1, options.epochs + 1):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            cross_entropy = model(**batch.to(device)).loss
            loss = cross_entropy + reg.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        measured = reg.measurements
        terms = torch.stack([loss, cross_entropy, measured.step_ratio, measured.sharpness]).detach()
        dist.all_reduce(terms)
        if dist.get_rank() == 0:
            total, entropy, ratio, sharpness = (terms / dist.get_world_size()).tolist()
            print(
                f"epoch {epoch}: loss {total:.4f} = cross-entropy {entropy:.4f} "
                f"+ penalty {total - entropy:.4f}, J {ratio:.3f}, H {sharpness:.3f}"
            )
    reg.close()
    saved = ofa.save_adapter(model, options.out)  # on every rank, which has a shard; rank 0 writes
    if dist.get_rank() == 0:
        print(f"saved {saved}")
    dist.destroy_process_group()


def meet() -> torch.device:
    """Join the other processes; returns this one's device."""
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def batches_of(loaded: ofa.models.load.LoadedModel, options: argparse.Namespace) -> DataLoader:
    """A rank's share of the batches of prompt and label; `labels` holds only the label's tokens."""
    data = ofa.load_task(options.task)
    encoder = Encoder(loaded.tokenizer, data.task, model_window(loaded.model))
    rows = encoder.training_rows(few_shot(data.train, data.task.labels, 5, options.seed).examples)
    return DataLoader(
        rows,
        batch_size=options.batch_size,
        sampler=DistributedSampler(rows, seed=options.seed),
        collate_fn=DataCollatorForSeq2Seq(loaded.tokenizer),
    )


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", help="hub id or folder; the embedded SmolLM2-135M-Instruct without it")
    found.add_argument("--task", default="reviews", help="demo task, or folder with task.json")
    found.add_argument("--epochs", type=int, default=4)
    found.add_argument("--batch-size", type=int, default=5, help="sequences of each process")
    found.add_argument("--learning-rate", type=float, default=1e-3)
    found.add_argument("--seed", type=int, default=42)
    found.add_argument("--out", default="adapter", help="folder of the adapter")
    return found


if __name__ == "__main__":
    main()
