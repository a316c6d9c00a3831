"""Runs a branch again on other inputs, without a graph.

Hooks record the arguments of the branch's first and last module. `run` calls these modules with other hidden states,
for several copies of the batch at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from ofa.anatomy import trial_run as trial
from ofa.anatomy.module_io import hidden_input, hidden_output, repeat_batch, replace_tensors
from ofa.anatomy.module_names import ACTIVATION_NAMES
from ofa.anatomy.steps import Branch
from ofa.errors import InputError


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None = None


class Replay:
    """The recorded calls of one branch, and the branch as a function of its input."""

    def __init__(self, model: nn.Module, branch: Branch) -> None:
        self._branch = branch
        self._entry, self._exit = model.get_submodule(branch.entry), model.get_submodule(branch.exit)
        self._parent = model.get_submodule(branch.entry.rpartition(".")[0])
        self._between: Callable[[Tensor], Tensor] | None = None
        self._first: _Call | None = None
        self._last: _Call | None = None
        self._open = False
        self.handles: list[RemovableHandle] = [self._entry.register_forward_pre_hook(self._at_entry, with_kwargs=True)]
        if self._exit is not self._entry:
            self.handles.append(self._entry.register_forward_hook(self._after_entry))
            self.handles.append(self._exit.register_forward_pre_hook(self._at_exit, with_kwargs=True))

    def start(self) -> None:
        """Record the calls of the branch from now on."""
        self.stop()
        self._open = True

    def stop(self) -> None:
        """Stop recording and release the recorded calls."""
        self._open, self._first, self._last = False, None, None

    def run(self, inputs: Tensor, copies: int) -> Tensor:
        """The branch's output for the inputs of `copies` other batches, (copies·B, T, d).

        Raises:
            InputError: the computation between the branch's modules is unknown.
        """
        assert self._first is not None
        leaving = self._call(self._entry, self._first, inputs, inputs, copies)
        if self._last is not None:
            leaving = self._connect()(leaving)
            leaving = self._call(self._exit, self._last, leaving, inputs, copies)
        return leaving

    def _call(self, module: nn.Module, call: _Call, hidden: Tensor, inputs: Tensor, copies: int) -> Tensor:
        own = hidden_input(call.args, call.kwargs)
        batch = own.shape[0]
        hidden = hidden.to(own.dtype).view(copies * batch, *own.shape[1:])

        def other(name: str, tensor: Tensor) -> Tensor:
            if tensor is own:
                return hidden
            if (
                module is self._exit
                and self._branch.residual_reader == self._branch.exit
                and tensor.shape == own.shape[:-1] + inputs.shape[-1:]
            ):
                return inputs.to(tensor.dtype)  # this branch reads the stream
            return repeat_batch(name, tensor, batch, copies)

        args, kwargs = replace_tensors(call.args, call.kwargs, other)
        # The copies must not be added to a key-value cache.
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        # `forward`, not the module's call: its hooks are for the model's own run.
        return hidden_output(module.forward(*args, **kwargs))

    def _connect(self) -> Callable[[Tensor], Tensor]:
        """The function between the first module's output and the last one's input: identity or an activation."""
        if self._between is None:
            assert self._first is not None
            assert self._last is not None
            assert self._first.output is not None
            left, read = self._first.output, hidden_input(self._last.args, self._last.kwargs)
            found = (getattr(self._parent, name, None) for name in ACTIVATION_NAMES)
            for between in (lambda tensor: tensor, *(one for one in found if callable(one))):
                if left is read or trial.close(between(left), read):
                    self._between = between
                    break
            else:
                raise InputError(
                    f"the computation between {self._branch.entry} and {self._branch.exit} is neither the identity nor "
                    "a known activation; use gradient='full', which runs the branch as part of the model"
                )
        return self._between

    def _at_entry(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._open:
            self._first = _Call(args, kwargs)

    def _after_entry(self, module: nn.Module, args: object, output: object) -> None:
        if self._open and self._first is not None:
            self._first.output = hidden_output(output).detach()

    def _at_exit(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._open:
            self._last = _Call(args, kwargs)
