"""A vision transformer adapted from five images per class, with both regularizers, against LoRA.

    pip install scikit-learn
    python examples/vit_digits.py --seeds 42,43,44

A small ViT learns half of scikit-learn's 1,797 handwritten digits as they are, within a minute on one core. The task is
then the same digits turned by 90 degrees: five images per class to adapt on, the other half to test on. Every row
trains the head too and starts from the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import ofa

Images = tuple[Tensor, Tensor]
"""Images (n, 1, 8, 8) and their classes (n,)."""

METHODS: dict[str, dict[str, Any]] = {
    "head only": {},
    "norm scales": {"norms": True},
    "norm scales + sharpness": {"norms": True, "sharpness": 0.1},
    "norm scales + step ratio": {"norms": True, "step_ratio": 1e-2},
    "LoRA, rank 4": {"rank": 4},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain, adapt by every method, and print accuracies on the turned digits."""
    options = parser().parse_args(arguments)
    torch.manual_seed(0)
    learned, held_out = digits()
    model = vit()
    fit(model, batches(learned, 64, options.pretraining, seed=0), [{"params": model.parameters(), "lr": 1e-3}])
    print(
        f"upright digits {accuracy(model, held_out):.3f}, turned by 90 degrees {accuracy(model, turned(held_out)):.3f}"
    )
    print(f"{'method':26}trained  accuracy on turned digits, by seed")
    for name, how in METHODS.items():
        found = []
        for seed in map(int, options.seeds.split(",")):
            shots = few(turned(learned), options.shots, seed)
            adapted, count = adapt(deepcopy(model), shots, options.steps, seed, **how)
            found.append(accuracy(adapted, turned(held_out)))
            if how.get("sharpness") and options.out:
                ofa.save_adapter(adapted, Path(options.out) / str(seed))
        print(f"{name:26}{count:7,}  {sum(found) / len(found):.3f}  ({', '.join(f'{one:.3f}' for one in found)})")


def adapt(
    model: Any, shots: Images, steps: int, seed: int, *, norms: bool = False, rank: int = 0, **weights: float
) -> tuple[Any, int]:
    """The model trained on the shots, and the number of trained parameters; `weights` are those of the two terms."""
    head = model.classifier
    model.requires_grad_(False)
    scales = ofa.tune_norms(model) if norms else []
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]))
    lora = [parameter for parameter in model.parameters() if parameter.requires_grad and not norms]
    head.requires_grad_(True)
    groups = [{"params": scales, "lr": 1e-2}, {"params": lora, "lr": 1e-3}, {"params": head.parameters(), "lr": 1e-3}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    regularizers = (
        ofa.fused_regularizers(model, **{"step_ratio": 0.0, "sharpness": 0.0, **weights}) if weights else None
    )
    with regularizers or nullcontext():
        fit(model, batches(shots, 10, steps, seed), groups, regularizers, relative=norms)
    return model, sum(parameter.numel() for group in groups for parameter in group["params"])


def fit(
    model: Any,
    data: Iterator[Images],
    groups: list[dict[str, Any]],
    regularizers: Any = None,
    *,
    relative: bool = False,
) -> None:
    """Train a model in evaluation mode, as the trace requires."""
    model.eval()  # no dropout; gradients still flow
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    if relative:
        ofa.relative_steps(optimizer, model)
    for images, classes in data:
        loss = nn.functional.cross_entropy(model(pixel_values=images).logits, classes)
        if regularizers is not None:
            loss = loss + regularizers.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def vit() -> ViTForImageClassification:
    """A ViT with 0.2 million weights, for images of 8 × 8."""
    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    names = {index: str(index) for index in range(10)}
    return ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=2, num_channels=1, id2label=names))


def digits() -> tuple[Images, Images]:
    """Two halves of the digits."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, second = order.chunk(2)
    classes = torch.tensor(data.target)
    return (images[first], classes[first]), (images[second], classes[second])


def turned(data: Images) -> Images:
    """The images turned by 90 degrees."""
    return torch.rot90(data[0], 1, (2, 3)), data[1]


def few(data: Images, shots: int, seed: int) -> Images:
    """So many images of each class."""
    images, classes = data
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[classes[order] == label][:shots] for label in range(10)])
    return images[chosen], classes[chosen]


def batches(data: Images, size: int, steps: int, seed: int) -> Iterator[Images]:
    """So many batches, each image once in every pass."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(data[0]), generator=generator)])
        rows, order = order[:size], order[size:]
        yield data[0][rows], data[1][rows]


@torch.no_grad()
def accuracy(model: Any, data: Images) -> float:
    """The share of images whose class is predicted."""
    return float((model(pixel_values=data[0]).logits.argmax(1) == data[1]).float().mean())


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--shots", type=int, default=5, help="images per class")
    found.add_argument("--steps", type=int, default=100, help="optimizer steps of each adaptation")
    found.add_argument("--pretraining", type=int, default=1000, help="optimizer steps on upright digits")
    found.add_argument("--seeds", default="42,43,44", help="draws of the images to adapt on")
    found.add_argument("--out", help="folder for the adapters with both regularizers, which PEFT opens")
    return found


if __name__ == "__main__":
    main()
