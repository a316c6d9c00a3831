"""Train PEFT adapters in the common training loop: inject, train, and remove them completely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofa.adapters.attach_peft import attach_adapter
from ofa.errors import InputError
from ofa.evaluation.scorer import Scorer
from ofa.files import Json
from ofa.methods import Predictor
from ofa.methods.options import without_regularizers
from ofa.models.introspection import trainable
from ofa.models.load import is_encoder
from ofa.models.types import CausalLM, Tokenizer
from ofa.tasks.task import Example, Task
from ofa.training.config import TrainingConfig
from ofa.training.loop import train
from ofa.training.records import StepRecord
from ofa.tuning.heads import ReplacedHead
from ofa.tuning.norms import restore_norms, tune_norms

if TYPE_CHECKING:
    from peft import PeftConfig

SETTINGS = {"relative": False}
"""What differs from `TrainingConfig`: A and B of an adapter begin at 0 or by chance, and have no size of their own."""


def fit_adapter(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    shots: Sequence[Example],
    seed: int,
    adapter: Callable[[CausalLM], PeftConfig],
    *,
    method: str,
    folder: str | Path | None = None,
    resume: bool = False,
    validation: Sequence[Example] = (),
    progress: Callable[[StepRecord, int], None] | None = None,
    scored_by: type[Scorer] = Scorer,
    with_norms: bool = False,
    notes: Json,
    **settings: Any,
) -> Predictor:
    """Train only a PEFT adapter on the shots by cross-entropy.

    The adapter's parameters are float32 in any model (float64 in a float64 model), with initial values drawn by `seed`.
    With `validation` examples, those of the epoch with the best accuracy on them are kept. A failed or interrupted run
    restores the model.

    Args:
        method: its name in messages.
        folder, resume: as for `training.loop.train`.
        adapter: makes PEFT's configuration for a model; targets are full paths.
        scored_by: the scorer's class.
        with_norms: tune every norm scale beside the adapter, with the regularizers of OFA.
        notes: the predictor's notes, to which the names of the adapted modules are added.
        settings: fields of `TrainingConfig`; those of the regularizers only `with_norms`.

    Raises:
        InputError: a setting is wrong, the model is not a causal language model or has an adapter, or PEFT cannot
            adapt it; see also `training.loop.train`.
    """
    if not with_norms:
        settings = without_regularizers(method, settings)
        if settings.get("relative"):
            raise InputError(f"relative steps are those of norm scales, and {method} trains none; leave relative out")
    config = TrainingConfig(seed=seed, **{**SETTINGS, **settings})
    _check_model(model)
    peft_config = adapter(model)
    targets = sorted(getattr(peft_config, "target_modules", ()))
    with ExitStack() as undo:
        if with_norms:
            undo.callback(restore_norms, model)
            tune_norms(model)
        scales = trainable(model) if with_norms else {}
        if is_encoder(model.config):
            if peft_config.is_prompt_learning:
                raise InputError(f"an encoder reads no prompt for {method} to begin; use norm-tuning, lora or ia3")
            head = ReplacedHead(model, task.labels)
            undo.callback(head.remove)
            peft_config.modules_to_save = list(head.paths)
            targets += head.paths
        adapted = attach_adapter(model, peft_config, config.seed, undo)
        for scale in scales.values():
            scale.requires_grad_(True)
        scorer = scored_by(adapted, tokenizer, task)
        result = train(
            adapted,
            scorer.encoder,
            shots,
            config,
            folder=folder,
            resume=resume,
            validate=(lambda: scorer.accuracy(validation)) if validation else None,
            progress=progress,
            tune=trainable,
        )
        names = sorted({path.rpartition(".")[2] for path in targets})
        return Predictor(
            scorer=scorer,
            trainable_parameters=sum(parameter.numel() for parameter in trainable(adapted).values()),
            training=result,
            stored_bytes=stored_bytes(adapted) + sum(scale.nbytes for scale in scales.values()),
            notes={**notes, "adapted": names} if names else notes,
            # Last, so that a failure in the lines above is undone too.
            release=undo.pop_all().close,
        )


def stored_bytes(model: CausalLM) -> int:
    """Size in bytes of the tensors that PEFT would save of the adapter."""
    from peft import get_peft_model_state_dict

    # Embeddings are never trained here; PEFT's check for it would ask the hub.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return sum(tensor.nbytes for tensor in tensors.values())


def _check_model(model: CausalLM) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not (is_encoder(model.config) or model.can_generate()):
        raise InputError(
            f"a {type(model).__name__} is not a causal language model and cannot continue a prompt; load one with "
            "transformers' AutoModelForCausalLM"
        )
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("the model already has a PEFT adapter; merge or unload it first")
