"""Guards for a model that other code wraps, copies or modifies while regularizers are attached."""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ofa import sharding
from ofa.errors import InputError
from ofa.regularizers.closed_form.attention_interface import PREFIX, own_name


def unwrap(model: nn.Module) -> nn.Module:
    """The module to attach to: the model inside distributed or compiled wrappers, and inside PEFT's prompt learning.

    Raises:
        InputError: a wrapper runs copies of the model or hides its scales.
    """
    model = sharding.unwrapped(model)
    tuning = getattr(sys.modules.get("peft.tuners.ln_tuning.layer"), "LNTuningLayer", ())
    path = (
        next((path for path, module in model.named_modules() if isinstance(module, tuning)), None) if tuning else None
    )
    if path is not None:
        raise InputError(
            f"{path} is inside PEFT's LN tuning, which keeps its own scales; tune the base model with ofa.tune_norms, "
            "or continue from that adapter with ofa.load_adapter"
        )
    if sharding.is_a(model, "peft", "PeftModel") and model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        # Only the base model's arguments include the virtual tokens.
        inner: nn.Module = model.get_base_model()  # type: ignore[operator]
        return inner
    return model


class DeepcopyGuard:
    """Makes `copy.deepcopy` of a model leave out the regularizers, until removed."""

    def __init__(self, model: nn.Module, handles: Iterable[RemovableHandle]) -> None:
        self._model = weakref.ref(model)
        self._hooks = list(handles)
        # On the instance: `copy.deepcopy` looks there first, also if the model is part of a copied object.
        vars(model)["__deepcopy__"] = self._copy

    def remove(self) -> None:
        """Restore the model's own copying."""
        model = self._model()
        if model is not None:
            vars(model).pop("__deepcopy__", None)

    def _copy(self, memo: dict[int, Any]) -> nn.Module | None:
        model = self._model()
        if model is None:
            return None
        for hooks, ours in self._registers().values():
            memo[id(hooks)] = type(hooks)((k, copy.deepcopy(v, memo)) for k, v in hooks.items() if k not in ours)
        method = vars(model).pop("__deepcopy__")
        try:
            copied = copy.deepcopy(model, memo)
        finally:
            vars(model)["__deepcopy__"] = method
        for module in copied.modules():
            config: Any = getattr(module, "config", None)
            if (getattr(config, "_attn_implementation", None) or "").startswith(PREFIX):
                config._attn_implementation = own_name(config)
        return copied

    def _registers(self) -> dict[int, tuple[Any, set[int]]]:
        """Every dict of hooks, with the ids of our hooks in it."""
        found: dict[int, tuple[object, set[int]]] = {}
        for handle in self._hooks:
            for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref):
                register = reference()
                if register is not None:
                    found.setdefault(id(register), (register, set()))[1].add(handle.id)
        return found


class ModuleIdentityGuard:
    """Detects modules that were replaced after attaching, such as by `peft.get_peft_model`."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._places = []
        for path in dict.fromkeys(paths):
            parent, _, name = path.rpartition(".")
            self._places.append((path, model.get_submodule(parent), name, model.get_submodule(path)))

    def check(self) -> None:
        """Compare the modules with those at attaching.

        Raises:
            InputError: a module was replaced; names the first.
        """
        for path, parent, name, module in self._places:
            if parent._modules.get(name) is not module:
                raise InputError(
                    f"{path} was replaced after the regularizers were attached, as adapters do; close() them, and "
                    "attach them after that"
                )


class ThreadGuard:
    """Refuses a second thread while one is in a measured forward pass."""

    def __init__(self) -> None:
        self._owner: threading.Thread | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether another live thread is in a measured forward pass."""
        owner = self._owner
        return owner is not None and owner is not threading.current_thread() and owner.is_alive()

    def begin(self) -> None:
        """A measured forward pass starts in this thread."""
        self._owner = threading.current_thread()

    def check(self) -> None:
        """Refuse a forward pass, measured or not, during another thread's.

        Raises:
            InputError: another thread is in a measured forward pass.
        """
        if self.elsewhere:
            raise InputError(
                "another thread is in a measured forward pass of this model; give every thread a model of its own, or "
                "let them take turns"
            )

    def end(self) -> None:
        """The measured forward pass ended or was abandoned."""
        self._owner = None
