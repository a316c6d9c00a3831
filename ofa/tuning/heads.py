"""Gives a classifier a head for the labels of a task, beside its tuned norm scales, and undoes it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ofa.errors import InputError
from ofa.models.introspection import head_modules
from ofa.tuning.norms import compute_in, undone_with_norms


class ReplacedHead:
    """A copy of a model's head with one logit for each label, in place of its own until `remove`.

    The last layer is new and 0, unless the model's own labels are these. The copy is float32 or wider, so that small
    steps are not lost, and the model's configuration names the labels.

    Raises:
        InputError: the model has no classification head.
    """

    def __init__(self, model: Any, labels: Sequence[str]) -> None:
        self._model = model
        self.paths = head_modules(model)
        last = _last_layer(model, self.paths)
        known = tuple(model.config.id2label[index] for index in range(model.config.num_labels))
        self._own = {path: model.get_submodule(path) for path in self.paths}
        self._config = {name: getattr(model.config, name) for name in ("id2label", "label2id", "problem_type")}
        self._num_labels = model.num_labels
        for path, module in self._own.items():
            _set(model, path, copy.deepcopy(module).to(torch.promote_types(_dtype(module), torch.float32)))
        if known != tuple(labels):
            _set(model, last, _blank(model.get_submodule(last), len(labels)))
        for path, module in self._own.items():
            if (wide := _dtype(model.get_submodule(path))) != _dtype(module):
                compute_in(wide, model.get_submodule(path))
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: index for index, label in enumerate(labels)}
        # Else a base for several labels at once would keep its sigmoid in a pipeline.
        model.config.problem_type = "single_label_classification"
        model.num_labels = len(labels)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The head's parameters by their path in the model."""
        return {
            f"{path}.{name}": parameter
            for path in self.paths
            for name, parameter in self._model.get_submodule(path).named_parameters()
        }

    def remove(self) -> None:
        """Put back the model's own head and labels."""
        for path, module in self._own.items():
            _set(self._model, path, module)
        for name, value in self._config.items():
            setattr(self._model.config, name, value)
        self._model.num_labels = self._num_labels


def trained_head(model: nn.Module) -> tuple[str, ...]:
    """Paths of the head's modules that train, in a model whose other weights are frozen."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        return ()
    heads = (path for path in head_modules(model))
    return tuple(path for path in heads if all(p.requires_grad for p in model.get_submodule(path).parameters()))


def tune_head(model: Any, labels: Sequence[str]) -> ReplacedHead:
    """Train a head for these labels beside the tuned norm scales; `restore_norms` restores the model's own.

    Raises:
        InputError: the model has no classification head.
    """
    head = hold_head(model, labels)
    for parameter in head.parameters().values():
        parameter.requires_grad_(True)
    return head


def hold_head(model: Any, labels: Sequence[str]) -> ReplacedHead:
    """A frozen head for these labels, until `restore_norms`; the norms are tuned or loaded already."""
    head = ReplacedHead(model, labels)
    undone_with_norms(model, head)
    for parameter in head.parameters().values():
        parameter.requires_grad_(False)
    return head


def _last_layer(model: nn.Module, paths: Sequence[str]) -> str:
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name == path or name.startswith(f"{path}.") for path in paths)
    ]
    if not linear:
        raise InputError(
            f"a {type(model).__name__} has no classification head; load it with transformers' "
            "AutoModelForSequenceClassification"
        )
    return linear[-1]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _blank(layer: Any, labels: int) -> nn.Linear:
    like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    blank = nn.Linear(layer.in_features, labels, bias=layer.bias is not None, **like)
    for parameter in blank.parameters():
        nn.init.zeros_(parameter)
    return blank


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
