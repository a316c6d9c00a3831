"""Train PEFT adapters in the common training loop: inject, train, and remove them completely."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ofa.errors import InputError, first_sentence
from ofa.evaluation.encoding import Encoder
from ofa.evaluation.scorer import Scorer
from ofa.methods import Predictor
from ofa.models.introspection import model_window
from ofa.models.types import CausalLM, Tokenizer
from ofa.regularizers.options import RegularizerOptions
from ofa.tasks.task import Example, Task
from ofa.training.config import TrainingConfig
from ofa.training.loop import train
from ofa.training.records import StepRecord

if TYPE_CHECKING:
    from peft import PeftConfig

_SET_BY_PEFT = ("prepare_inputs_for_generation", "generation_config", "_require_grads_hooks", "_require_grads_hook")


def fit_adapter(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    adapter: Callable[[Any], PeftConfig],
    *,
    validation: Sequence[Example] = (),
    progress: Callable[[StepRecord, int], None] | None = None,
    scored_by: type[Scorer] = Scorer,
    notes: Mapping[str, Any],
    **settings: Any,
) -> Predictor:
    """Train only a PEFT adapter on the shots by cross-entropy.

    The adapter's parameters are float32 in any model (float64 in a float64 model), with initial values drawn by `seed`.
    With `validation` examples, those of the epoch with the best accuracy on them are kept. A failed or interrupted run
    restores the model.

    Args:
        adapter: makes PEFT's configuration for a model; targets are full paths.
        scored_by: the scorer's class.
        notes: the predictor's notes, to which the names of the adapted modules are added.
        settings: fields of `TrainingConfig` except those of the regularizers.

    Raises:
        InputError: a setting is wrong, the model is not a causal language model or has an adapter, or PEFT cannot
            adapt it; see also `training.loop.train`.
    """
    config = _training_config(seed, settings)
    _check_model(model)
    peft_config = adapter(model)
    targets = sorted(getattr(peft_config, "target_modules", ()))
    with ExitStack() as undo:
        adapted = _attach(model, peft_config, targets, config.seed, undo)
        scorer = scored_by(adapted, tokenizer, task)
        result = train(
            adapted,
            Encoder(tokenizer, task, model_window(adapted)),
            shots,
            config,
            validate=(lambda: scorer.accuracy(validation)) if validation else None,
            progress=progress,
            tune=trainable,
        )
        names = sorted({path.rpartition(".")[2] for path in targets})
        return Predictor(
            scorer=scorer,
            trainable_parameters=sum(parameter.numel() for parameter in trainable(adapted).values()),
            training=result,
            stored_bytes=stored_bytes(adapted),
            notes={**notes, "adapted": names} if names else notes,
            # Last, so that a failure in the lines above is undone too.
            release=undo.pop_all().close,
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def stored_bytes(model: CausalLM) -> int:
    """Size in bytes of the tensors that PEFT would save of the adapter."""
    from peft import get_peft_model_state_dict

    # Embeddings are never trained here; PEFT's check for it would ask the hub.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return sum(tensor.nbytes for tensor in tensors.values())


def _training_config(seed: int, settings: Mapping[str, Any]) -> TrainingConfig:
    foreign = settings.keys() & (RegularizerOptions.model_fields.keys() - {"seed"})
    if foreign:
        raise InputError(f"{min(foreign)} is a setting of OFA, and this method has no regularizers; leave it out")
    return TrainingConfig(seed=seed, step_ratio=0.0, sharpness=0.0, **settings)


def _check_model(model: CausalLM) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(
            f"a {type(model).__name__} is not a causal language model and cannot continue a prompt; load one with "
            "transformers' AutoModelForCausalLM"
        )
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("the model already has a PEFT adapter; merge or unload it first")


def _attach(model: CausalLM, config: PeftConfig, targets: Iterable[str], seed: int, undo: ExitStack) -> Any:
    """Inject the adapter and freeze everything else; `undo` restores all that PEFT replaces, sets and freezes.

    PEFT's own `unload` needs a complete adapter, which a failure may not leave, and restores only modules.
    """
    for parameter in model.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
    # PEFT draws initial values on the CPU; forking its generator keeps the global random state.
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        return _wrap(model, config, undo) if config.is_prompt_learning else _inject(model, config, targets, undo)


def _inject(model: CausalLM, config: PeftConfig, targets: Iterable[str], undo: ExitStack) -> Any:
    from peft import inject_adapter_in_model
    from peft.functional import cast_adapter_dtype

    for path in targets:
        parent, _, name = path.rpartition(".")
        undo.callback(setattr, model.get_submodule(parent), name, model.get_submodule(path))
    _keep_attributes(model, ("peft_config",), undo)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(
            f"PEFT cannot adapt this model by {config.peft_type.value}: {first_sentence(error)}"
        ) from error
    cast_adapter_dtype(model, "default")
    return model


def _wrap(model: CausalLM, config: PeftConfig, undo: ExitStack) -> Any:
    from peft import get_peft_model

    for module in (model, *model.children()):
        _keep_attributes(module, _SET_BY_PEFT, undo)
    if hasattr(model.config, "pretraining_tp"):
        undo.callback(setattr, model.config, "pretraining_tp", model.config.pretraining_tp)
    hooks = getattr(model, "_require_grads_hooks", None)
    with warnings.catch_warnings():
        # PEFT still uses a property that transformers has deprecated.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        wrapped = get_peft_model(model, config)
    if getattr(model, "_require_grads_hooks", None) is not hooks:
        undo.callback(model.disable_input_require_grads)
    return wrapped


def _keep_attributes(module: nn.Module, names: Iterable[str], undo: ExitStack) -> None:
    own = vars(module)
    for name in names:
        if name in own:
            undo.callback(own.__setitem__, name, own[name])
        else:
            undo.callback(own.pop, name, None)
