"""Captures the arguments of attention functions, through transformers' registry of attention functions.

While regularizers are attached, the model's configuration names our function. It passes the arguments to the module's
observers and calls the model's own attention function. The mask function is registered under the new name as well, so
masks are made as before.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from ofa.sharding import own_class
from ofa_kernels.reference import Attends

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PREFIX = "ofa_"


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of an attention function: heads as (B, H, T, d), and which keys a query attends to."""

    query: Tensor
    key: Tensor
    value: Tensor
    attends: Attends
    unusual: str | None = None
    """The name of an argument that the closed form does not support, or None."""


class AttentionObserver:
    """Gets every call of a module's attention function, if one of its methods is a forward pre-hook of the module.

    The hooks serve as the registry, since copies of the module keep them and `torch.compile` supports them.
    """

    def on_attention(self, call: AttentionCall) -> None:
        """Called before the attention function."""
        raise NotImplementedError


_uses: dict[int, list[Any]] = {}
"""By id of a configuration: the configuration, its number of captures, and its own function's name."""

_counting = threading.RLock()
"""Models in several threads may share a configuration; reentrant, since the garbage collector may release a capture."""


class AttentionCapture:
    """Redirects the attention functions of some modules to ours, until removed."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # Not for modules without the registry: they compare the name with fixed ones.
        watched = [module for module in modules if supports(module)]
        configs: dict[int, Any] = {id(module.config): module.config for module in watched}
        for key, config in configs.items():
            with _counting:
                held = _uses.setdefault(key, [config, 0, own_name(config)])
                held[1] += 1
                config._attn_implementation = _register(held[2])
        # Also if the regularizers are never closed, but garbage-collected with the model.
        self._release = weakref.finalize(self, _release, list(configs))

    def remove(self) -> None:
        """Release the configurations; the last capture restores the name. A second call does nothing."""
        self._release()


def _release(keys: list[int]) -> None:
    for key in keys:
        with _counting:
            held = _uses[key]
            config, _, name = held
            held[1] -= 1
            if not held[1]:
                del _uses[key]
                if config._attn_implementation == _register(name):  # else it was changed since
                    config._attn_implementation = name


def own_name(config: PreTrainedConfig) -> str | None:
    """The name of a configuration's attention function without our prefix, which copied configurations keep."""
    name: str | None = config._attn_implementation
    return None if name is None else name.removeprefix(PREFIX)


def supports(module: nn.Module) -> bool:
    """Whether a module gets its attention function from the registry."""
    return hasattr(_source(module), "ALL_ATTENTION_FUNCTIONS") and getattr(module, "config", None) is not None


def _source(module: nn.Module) -> object:
    """The Python module that defines a module's class."""
    return sys.modules[own_class(module).__module__]


def _register(name: str | None) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = name or "eager"
    ours = PREFIX + name
    if ours not in ALL_ATTENTION_FUNCTIONS:

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **kwargs: object
        ) -> object:
            for observer in _observers(module):
                observer.on_attention(_call(name, module, query, key, value, mask, kwargs))
            eager = getattr(_source(module), "eager_attention_forward", None)
            own = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
            return own(module, query, key, value, mask, **kwargs)

        AttentionInterface.register(ours, attend)
        if name in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(ours, _remembering(ALL_MASK_ATTENTION_FUNCTIONS[name]))
    return ours


def _remembering(make: Callable[..., object]) -> Callable[..., object]:
    """The mask function, caching which of its masks are causal by construction: reading a mask would sync."""

    @wraps(make)
    def made(*args: object, **kwargs: object) -> object:
        mask = make(*args, **kwargs)
        if isinstance(mask, Tensor) and not torch.compiler.is_compiling() and _forbids_later(kwargs["mask_function"]):
            _causal_masks[mask] = _Seen(mask._version, causal=True, captured=capturing(mask))
        return mask

    return made


def _forbids_later(mask_function: Any) -> bool:
    """Whether transformers' description of a mask is causality, alone or combined with others."""
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return True
    if getattr(mask_function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return False
    (parts,) = (cell.cell_contents for cell in mask_function.__closure__)
    return any(_forbids_later(part) for part in parts)


def _observers(module: nn.Module) -> list[AttentionObserver]:
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, AttentionObserver)]


@dataclass(frozen=True)
class _Seen:
    """Whether a mask was causal at a version; `captured` if it was made during CUDA-graph capture."""

    version: int
    causal: bool
    captured: bool = False


_causal_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Cache of which masks are causal: all layers get the same mask, and reading it syncs."""


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask, (..., T, S), forbids all later keys, whose blocks can be skipped."""
    if torch.compiler.is_compiling() or isinstance(mask, FakeTensor) or mask.shape[-2] != mask.shape[-1]:
        return False
    seen = _causal_masks.get(mask)
    if capturing(mask):
        # Values cannot be read during CUDA-graph capture. Masks created in the capture are reproduced on replay; others
        # may differ.
        return seen is not None and seen.captured and seen.causal and seen.version == mask._version
    if seen is None or seen.version != mask._version:
        later = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = _causal_masks[mask] = _Seen(mask._version, causal=not bool(later.triu(1).any()))
    return seen.causal


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that a tensor's values cannot be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _call(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> AttentionCall:
    scale = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    unusual = next((key for key in ("position_bias", "cu_seq_lens_q") if kwargs.get(key) is not None), None)
    window = None
    if mask is not None and not isinstance(mask, Tensor):
        unusual, mask = type(mask).__name__, None
    elif mask is None or mask.dim() == 2:
        # Flash attention gets windows and padding as arguments; the others get a mask, or none if attention is only
        # causal.
        window = kwargs.get("sliding_window") if "flash" in name else None
        mask = None if mask is None else mask[:, None, None, :].bool()
    else:
        causal, mask = causal and _is_causal(mask), mask[..., : key.shape[-2]]
    sinks = kwargs.get("s_aux")
    attends = Attends(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=bool(causal) and query.shape[-2] > 1,
        window=window,
        mask=mask,
        softcap=kwargs.get("softcap"),
        sinks=None if sinks is None else sinks.detach(),
    )
    return AttentionCall(query, key, value, attends, unusual)
