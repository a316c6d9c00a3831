"""Counter-based random probes: a value depends only on (seed, step, sample, row, channel).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The 128-bit counter is
(channel block, row, sample, step), the 64-bit key is the seed. Probes are not stored: they are recomputed where they
are needed again, in any block size and on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PROBES = ("rademacher", "gaussian")

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF

_SIGNS_PER_COUNTER = 128
_NORMALS_PER_COUNTER = 4


def probes(
    rows: int,
    width: int,
    *,
    samples: int,
    seed: int,
    step: int = 0,
    probe: str = "rademacher",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random probes ν with E[ν νᵀ] = I, float32 of shape (samples, rows, width).

    Rademacher signs use one of the counter's 128 bits per channel (a set bit is −1) and are bit-identical on every
    device. Gaussian values are Box-Muller pairs of two words, equal up to the device's log, sin and cos.

    Raises:
        ValueError: `probe` is not one of `PROBES`.
    """
    check_probe(probe)
    if probe == "rademacher":
        words = _words(rows, width, _SIGNS_PER_COUNTER, samples, seed, step, device)
        bits = (words.unsqueeze(-1) >> torch.arange(32, device=device)) & 1
        values = 1.0 - 2.0 * bits.flatten(2).to(torch.float32)
    else:
        words = _words(rows, width, _NORMALS_PER_COUNTER, samples, seed, step, device)
        values = _box_muller(words.flatten(2).to(torch.float32))
    return values[..., :width]


def check_probe(probe: str) -> None:
    """Raise a ValueError unless `probe` is one of `PROBES`."""
    if probe not in PROBES:
        raise ValueError(f"probe must be one of {', '.join(PROBES)}, not {probe!r}")


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox: counters of 32-bit words, (..., 4) int64 → four random words each, same shape.

    The 64-bit product may overflow int64; two's complement keeps its low and high words exact.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW, (k1 + _KEY_INCREMENTS[1]) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _words(
    rows: int, width: int, per_counter: int, samples: int, seed: int, step: int, device: torch.device | str
) -> Tensor:
    """Random words of shape (samples, rows, channel blocks, 4)."""
    blocks = -(-width // per_counter)
    shape = (samples, rows, blocks)
    block = torch.arange(blocks, device=device).expand(shape)
    row = torch.arange(rows, device=device).unsqueeze(-1).expand(shape)
    sample = torch.arange(samples, device=device).view(-1, 1, 1).expand(shape)
    counter = torch.stack((block, row, sample, torch.full_like(block, step & _LOW)), dim=-1)
    return philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))


def _box_muller(words: Tensor) -> Tensor:
    """Pairs of 32-bit words → pairs of independent standard normal values, same shape."""
    first, second = ((words + 0.5) * 2.0**-32).unflatten(-1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2.0 * torch.log(first)), 2.0 * math.pi * second
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)
