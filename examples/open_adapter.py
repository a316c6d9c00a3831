"""One adapter, loaded in four ways with the same answers: PEFT, transformers, this package, and a merged checkpoint.

    ofa fit --data reviews --model FOLDER --out adapter
    python examples/open_adapter.py adapter --prompt "Review: a warm and funny film\\nSentiment:" --out checkpoint

In float32 nothing is rounded and all logits are bit-identical. In bfloat16 and float16, PEFT and the merged
checkpoint round the tuned scales to the model's dtype, while `ofa.load_adapter` keeps them in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, pipeline

import ofa
from ofa.adapters import read_adapter


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the adapter in every way, and print the distance of its logits from those of `ofa.load_adapter`."""
    options = parser().parse_args(arguments)
    adapter, dtype = options.adapter, getattr(torch, options.dtype)
    base = read_adapter(adapter).base
    loaded = ofa.load_model(base, dtype=options.dtype, device="cpu")
    ofa.load_adapter(loaded.model, adapter)  # only the scales, in the model's own norms
    ids = loaded.tokenizer(options.prompt.replace("\\n", "\n"), return_tensors="pt").input_ids

    merged = ofa.merge(bare(base, dtype), adapter, options.out, tokenizer=loaded.tokenizer, overwrite=True)

    ways: dict[str, Callable[[], Any]] = {
        "PeftModel.from_pretrained": lambda: PeftModel.from_pretrained(bare(base, dtype), adapter),
        "AutoPeftModelForCausalLM": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype),
        "model.load_adapter": lambda: with_adapter(bare(base, dtype), adapter),
        "merged checkpoint": lambda: bare(merged, dtype),
    }
    expected = logits(loaded.model, ids)
    for name, opened in ways.items():
        print(f"{name:26} {(logits(opened(), ids) - expected).abs().max():.1e} from the adapter in use")
    print(f"{'the base without it':26} {(logits(bare(base, dtype), ids) - expected).abs().max():.1e}")

    for folder in (adapter, merged):
        generate = pipeline("text-generation", model=str(folder), dtype=dtype, device="cpu")
        [answer] = generate(options.prompt.replace("\\n", "\n"), max_new_tokens=1, do_sample=False)
        print(f"pipeline on {folder}: {answer['generated_text']!r}")


def bare(name: Any, dtype: torch.dtype) -> Any:
    """The model of a folder or hub id, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


def with_adapter(model: Any, adapter: str) -> Any:
    """The model with the adapter, loaded by transformers."""
    model.load_adapter(adapter)
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A model's logits, in float32."""
    return model.eval()(ids).logits.float()


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("adapter", help="folder that ofa fit wrote; its base must be a folder or on the hub")
    found.add_argument("--prompt", default="Review: a warm and funny film\\nSentiment:")
    found.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    found.add_argument("--out", default="checkpoint", help="folder of the merged checkpoint")
    return found


if __name__ == "__main__":
    main()
