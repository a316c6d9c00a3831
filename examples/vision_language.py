"""The two regularizers of OFA in a vision-language model, on pictures and their names.

    python examples/vision_language.py --model HuggingFaceTB/SmolVLM-256M-Instruct --steps 20 --out adapter

The whole model is called with pictures; tuned norms and measured steps are those of its language part, and the vision
tower is unchanged. Without --model, a Llava is assembled from the embedded language model and a small random vision
tower, which learns little.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import ofa

COLOURS = ("red", "green", "blue", "yellow")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the loss and its terms, save."""
    options = parser().parse_args(arguments)
    torch.manual_seed(options.seed)
    model, processor = load(options)
    params = ofa.tune_norms(model)  # 1: only the norm scales of the language part train
    reg = ofa.fused_regularizers(model)  # 2: every forward pass is measured
    optimizer = torch.optim.AdamW(params, lr=options.learning_rate, weight_decay=0.0)
    for step, batch in zip(range(1, options.steps + 1), batches_of(processor, options), strict=False):
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
    print(f"saved {ofa.save_adapter(model, options.out, base_model=options.model)}")


def batches_of(processor: Any, options: argparse.Namespace) -> Iterator[Any]:
    """Squares of one colour, a question, and the colour's name; `labels` holds only the name's tokens."""
    generator = torch.Generator().manual_seed(options.seed)
    image_token = processor.image_token
    while True:
        names = [COLOURS[i] for i in torch.randint(len(COLOURS), (options.batch_size,), generator=generator).tolist()]
        pictures = [[Image.new("RGB", (64, 64), name)] for name in names]
        prompts = [f"{image_token}\nQuestion: what colour is this?\nAnswer:" for _ in names]
        texts = [f"{prompt} {name}" for prompt, name in zip(prompts, names, strict=True)]
        batch = processor(images=pictures, text=texts, padding=True, padding_side="right", return_tensors="pt")
        prompted = processor(images=pictures, text=prompts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : prompted["input_ids"].shape[1]] = -100  # all prompts have the same length
        batch["labels"] = labels
        yield batch


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """A vision-language model and its processor, in evaluation mode."""
    if options.model:
        return AutoModelForImageTextToText.from_pretrained(options.model), AutoProcessor.from_pretrained(options.model)
    language = ofa.load_model(options.language)
    language.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = language.tokenizer.convert_tokens_to_ids("<image>")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**size, image_size=32, patch_size=16)
    config = LlavaConfig(text_config=language.model.config, vision_config=vision, image_token_index=image)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.model.state_dict())
    model.lm_head.load_state_dict(language.model.lm_head.state_dict())
    model.resize_token_embeddings(len(language.tokenizer), mean_resizing=False)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pictures,
        language.tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model.eval(), processor


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", help="vision-language model by hub id or folder")
    found.add_argument("--language", help="without --model: language model to put a vision tower in front of")
    found.add_argument("--steps", type=int, default=20, help="optimizer steps")
    found.add_argument("--batch-size", type=int, default=4)
    found.add_argument("--learning-rate", type=float, default=1e-3)
    found.add_argument("--seed", type=int, default=42)
    found.add_argument("--out", default="adapter", help="folder of the adapter")
    return found


if __name__ == "__main__":
    main()
