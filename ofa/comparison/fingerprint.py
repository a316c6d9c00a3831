"""Detect whether a method changed the model: a leftover would affect every later cell."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRIAL_TOKENS = (0, 1, 2, 3)
"""Token ids of the trial run; any vocabulary has them."""
_RELATIVE = 1e-4
"""Tolerance for these logits, relative to the largest: a GPU may choose another algorithm for the same product.
A trained method moves them by far more."""


@dataclass(frozen=True)
class Fingerprint:
    """Checksums of parameters and saved buffers, modules with their modes and hooks, and the logits of a trial run."""

    tensors: dict[str, tuple[object, ...]]
    modules: dict[str, tuple[object, ...]]
    logits: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """Compute the fingerprint: one read of all weights, and one forward of four tokens."""
        # Unsaved buffers may change legitimately, such as rotary frequencies that depend on the length.
        saved = model.state_dict().keys()
        named = [*model.named_parameters(), *(item for item in model.named_buffers() if item[0] in saved)]
        sums = bit_sums([tensor for _, tensor in named])
        return cls(
            tensors={
                name: (
                    id(tensor),
                    tensor.requires_grad,
                    tensor.grad is None,
                    str(tensor.dtype),
                    list(tensor.shape),
                    bits,
                )
                for (name, tensor), bits in zip(named, sums, strict=True)
            },
            modules={
                name: (type(module).__qualname__, module.training, *(len(getattr(module, hooks)) for hooks in _HOOKS))
                for name, module in model.named_modules()
            },
            logits=_trial_logits(model),
        )

    @property
    def weights(self) -> str:
        """Hash (16 hexadecimal digits) of the weights and their dtype; the same on every device."""
        told = {name: [dtype, shape, bits] for name, (_, _, _, dtype, shape, bits) in self.tensors.items()}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, now: Fingerprint) -> str | None:
        """Name what differs from this fingerprint; None if nothing does."""
        for kind, before, after in (("tensor", self.tensors, now.tensors), ("module", self.modules, now.modules)):
            changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
            if changed:
                others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                return f"{kind} {min(changed)!r}{others}"
        tolerance = _RELATIVE * float(self.logits.abs().max())
        same = torch.allclose(now.logits, self.logits, rtol=0.0, atol=tolerance, equal_nan=True)
        return None if same else "the logits of a trial run"


@torch.no_grad()
def bit_sums(tensors: list[Tensor]) -> list[int]:
    """Checksum of each tensor: its bits as integers, summed modulo 2⁶⁴; exact in any order, bound by memory speed."""
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    sums = [0] * len(tensors)
    for index, tensor in enumerate(tensors):
        if not tensor.is_meta:  # offloaded: its values are elsewhere
            by_device.setdefault(tensor.device, []).append((index, _bit_sum(tensor)))
    for found in by_device.values():
        # One transfer for all: each would sync the GPU.
        for (index, _), bits in zip(found, torch.stack([bits for _, bits in found]).tolist(), strict=True):
            sums[index] = bits
    return sums


@torch.no_grad()
def _trial_logits(model: nn.Module) -> Tensor:
    ids = torch.tensor([_TRIAL_TOKENS], device=next(model.parameters()).device)
    return model(input_ids=ids).logits[0, -1].float().cpu()


def _bit_sum(tensor: Tensor) -> Tensor:
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = octets.numel() // 8 * 8
    # A view as int64 needs an aligned offset, which slices of one storage may not have.
    words = octets[:whole] if octets.storage_offset() % 8 == 0 else octets[:whole].clone()
    return words.view(torch.int64).sum() + octets[whole:].sum(dtype=torch.int64)
