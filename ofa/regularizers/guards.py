"""A model that regularizers are attached to may be wrapped, copied and changed by others: what is right, what is loud.

- `unwrap` is the module whose forward pass is measured, whatever it is wrapped in.
- `DeepcopyGuard` lets `copy.deepcopy` of the model make one without the regularizers.
- `ModuleIdentityGuard` notices modules that were exchanged since, such as by `peft.get_peft_model`.
- `ThreadGuard` refuses a second thread while the first one is in a measured forward pass.
"""

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
    """The module to attach to: what wrappers of processes and compilers hold, or what PEFT hands its prompts to.

    Raises:
        InputError: a wrapper that runs copies of the model or hides its scales.
    """
    model = sharding.unwrapped(model)
    tuning = getattr(sys.modules.get("peft.tuners.ln_tuning.layer"), "LNTuningLayer", ())
    path = (
        next((path for path, module in model.named_modules() if isinstance(module, tuning)), None) if tuning else None
    )
    if path is not None:
        raise InputError(
            f"{path} is inside of PEFT's LN tuning, which keeps scales of its own; tune the base model with "
            "ofa.tune_norms, or continue from that adapter with ofa.load_adapter"
        )
    if sharding.is_a(model, "peft", "PeftModel") and model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        # Its own arguments know nothing of the virtual tokens that the base model is given.
        inner: nn.Module = model.get_base_model()  # type: ignore[operator]
        return inner
    return model


class DeepcopyGuard:
    """Lets a model be copied as it would be with nothing attached, until it is removed."""

    def __init__(self, model: nn.Module, handles: Iterable[RemovableHandle]) -> None:
        self._model = weakref.ref(model)
        self._hooks = list(handles)
        # `copy.deepcopy` asks the object itself, not its class; so also where the model is part of something copied.
        vars(model)["__deepcopy__"] = self._copy

    def remove(self) -> None:
        """Leave copying to the model again."""
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
        """Every register of hooks with the numbers of ours in it."""
        found: dict[int, tuple[Any, set[int]]] = {}
        for handle in self._hooks:
            for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref):
                register = reference()
                if register is not None:
                    found.setdefault(id(register), (register, set()))[1].add(handle.id)
        return found


class ModuleIdentityGuard:
    """Where the modules are that something relies on."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._places = []
        for path in dict.fromkeys(paths):
            parent, _, name = path.rpartition(".")
            self._places.append((path, model.get_submodule(parent), name, model.get_submodule(path)))

    def check(self) -> None:
        """Raise where another module is called now.

        Raises:
            InputError: the first one.
        """
        for path, parent, name, module in self._places:
            if parent._modules.get(name) is not module:
                raise InputError(
                    f"{path} was exchanged after the regularizers were attached, as adapters do; close() them and "
                    "attach them behind that"
                )


class ThreadGuard:
    """Which thread is in the middle of a forward pass."""

    def __init__(self) -> None:
        self._owner: threading.Thread | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether it is in another thread, which lives."""
        owner = self._owner
        return owner is not None and owner is not threading.current_thread() and owner.is_alive()

    def begin(self) -> None:
        """A measured forward pass begins in this thread."""
        self._owner = threading.current_thread()

    def check(self) -> None:
        """Refuse to begin another one, measured or not.

        Raises:
            InputError: another thread has not come to the end of its own.
        """
        if self.elsewhere:
            raise InputError(
                "another thread is in a measured forward pass of this model; give every thread a model of its own, or "
                "let them take turns"
            )

    def end(self) -> None:
        """It has ended, or was given up."""
        self._owner = None
