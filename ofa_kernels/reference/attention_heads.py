"""The parts of an attention besides its projections: rotary embedding, norms on heads, which keys it attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ofa_kernels.reference.stream import upcast


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding R_i of queries and keys: channel pairs (x, y) → (x cos − y sin, y cos + x sin).

    Attributes:
        cos, sin: (B or 1, T, p) for the first p channel pairs of a head; the other channels pass unchanged.
        interleaved: pairs are channels (2k, 2k + 1); otherwise (k, k + p).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def turn(self, heads: Tensor, sign: float = 1.0) -> Tensor:
        """R_i of every row of (B, H, T, d); its transpose R_iᵀ for `sign=-1`."""
        return self.mix(upcast(heads), upcast(self.cos).unsqueeze(1), upcast(self.sin).unsqueeze(1), 1.0, sign)

    def mix(self, heads: Tensor, cos: Tensor, sin: Tensor, rest: Tensor | float, sign: float) -> Tensor:
        """Channel pairs (x, y) → (x cos − sign · y sin, y cos + sign · x sin), the other channels times `rest`."""
        x, y, other = self.pairs(heads)
        turned = torch.addcmul(x * cos, y, sin, value=-sign), torch.addcmul(y * cos, x, sin, value=sign)
        return self.join(*turned, other * rest)

    def pairs(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, y) of all pairs, (..., p) each, and the channels that are not rotated."""
        count = self.cos.shape[-1]
        turned, rest = heads[..., : 2 * count], heads[..., 2 * count :]
        if self.interleaved:
            return turned[..., 0::2], turned[..., 1::2], rest
        return turned[..., :count], turned[..., count:], rest

    def join(self, x: Tensor, y: Tensor, rest: Tensor) -> Tensor:
        """The inverse of `pairs`."""
        if self.interleaved:
            return torch.cat((torch.stack((x, y), -1).flatten(-2), rest), -1)
        return torch.cat((x, y, rest), -1)


@dataclass(frozen=True)
class HeadNorm:
    """An RMSNorm of queries or keys, before they are rotated: γ ⊙ q̂, q̂ = q̄/σ.

    Attributes:
        entering: q̄, the norm's input, (B, H, T, d).
        weight: γ, (d,), the same for all heads; (H, 1, d) for one norm over all heads together.
        eps: added to the mean square.
    """

    entering: Tensor
    weight: Tensor
    eps: float

    @property
    def joint(self) -> bool:
        """Whether all heads share one σ (OLMo-2); else each head has its own (Qwen3)."""
        return self.weight.dim() == 3

    @property
    def width(self) -> int:
        """Number of channels that share one σ."""
        heads, channels = self.entering.shape[1], self.entering.shape[-1]
        return heads * channels if self.joint else channels

    def hat(self) -> tuple[Tensor, Tensor]:
        """(q̂, 1/σ), (B, H, T, d) and (B, H or 1, T, 1)."""
        wide = upcast(self.entering)
        rstd = torch.rsqrt(wide.square().mean((1, 3) if self.joint else -1, keepdim=True) + self.eps)
        return wide * rstd, rstd

    def normalized(self) -> Tensor:
        """γ ⊙ q̂."""
        return upcast(self.weight) * self.hat()[0]

    def push(self, direction: Tensor) -> Tensor:
        """J x for J = Γ(I − q̂q̂ᵀ/width)/σ, the norm's Jacobian at each row."""
        hat, rstd = self.hat()
        return upcast(self.weight) * self._project(hat, direction) * rstd

    def pull(self, gradient: Tensor) -> Tensor:
        """Jᵀ x, the norm's backward pass."""
        hat, rstd = self.hat()
        return self._project(hat, upcast(self.weight) * gradient) * rstd

    def _project(self, hat: Tensor, rows: Tensor) -> Tensor:
        return rows - hat * (hat * rows).mean((1, 3) if self.joint else -1, keepdim=True)


@dataclass(frozen=True)
class Attends:
    """Which keys a query attends to, and how its scores are computed.

    Attributes:
        scale: of the scores q·k.
        causal: query i attends to keys up to i.
        window: a query attends to the last `window` keys, its own included; also to as many later keys unless `causal`.
        mask: bool (True: attends) or added to the scores, broadcast against (B, H, T, T).
        softcap: t, scores become t·tanh(s/t) before the mask (Gemma 2).
        sinks: a score per head, (H,), that is in the softmax's sum and has no value (gpt-oss).
    """

    scale: float
    causal: bool = False
    window: int | None = None
    mask: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def keys(self, first: int, last: int, tokens: int) -> tuple[int, int]:
        """The range of keys that queries first…last may attend to."""
        start = 0 if self.window is None else max(0, first - self.window + 1)
        return start, last if self.causal else tokens

    def bias(self, rows: slice, columns: slice, like: Tensor) -> Tensor | None:
        """The addend of the scores of some queries and keys: 0, a float mask's value or −∞; None if it is all 0."""
        query = torch.arange(rows.start, rows.stop, device=like.device).unsqueeze(1)
        key = torch.arange(columns.start, columns.stop, device=like.device).unsqueeze(0)
        allowed: Tensor | None = key <= query if self.causal else None
        if self.window is not None:
            near = key > query - self.window
            near = near if self.causal else near & (key < query + self.window)
            allowed = near if allowed is None else allowed & near
        added: Tensor | None = None
        if self.mask is not None:
            part = self.mask if self.mask.shape[-2] == 1 else self.mask[..., rows, :]
            part = part if part.shape[-1] == 1 else part[..., columns]
            if part.dtype == torch.bool:
                allowed = part if allowed is None else allowed & part
            else:
                added = part.to(like.dtype)
        if allowed is None:
            return added
        added = torch.zeros((), dtype=like.dtype, device=like.device) if added is None else added
        return torch.where(allowed, added, -torch.inf)


def check_window(window: int | None) -> None:
    """Raise a ValueError for a window without the query's own key."""
    if window is not None and window < 1:
        raise ValueError(f"a window counts the query's own key and must be at least 1, not {window}")


def check_heads(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
    """Raise a ValueError unless the shapes are those of one self-attention."""
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} are not (B, H, T, d) and (B, K, T, d)")
    (sequences, heads, tokens, _), shared = query.shape, key.shape[1]
    if shared == 0 or heads % shared:
        raise ValueError(f"{heads} query heads cannot share {shared} key heads evenly")
    depth = value.shape[-1]
    expected = {
        "value": (value, (sequences, shared, tokens, depth)),
        "output": (output, (sequences, heads, tokens, depth)),
    }
    check_shapes(expected)


def check_shapes(expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raise a ValueError for the first tensor whose shape differs from the expected one."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} should be {shape}")


def per_query_head(shared: Tensor, heads: int) -> Tensor:
    """Keys or values, (B, K, T, d), repeated for the query heads that share them: (B, H, T, d)."""
    groups = heads // shared.shape[1]
    return shared if groups == 1 else shared.repeat_interleave(groups, 1)
