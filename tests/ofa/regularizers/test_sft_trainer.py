"""`into_loss=True` in TRL's SFTTrainer, which computes its loss from log-probabilities and never calls the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ofa
from ofa import InputError
from tests.device import DEVICE
from tests.ofa.trainers import WeightOfPenalty, gradients_of_steps

pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecated|Padding-free|Packing).*")

Loaded = tuple[Any, Any]


def pairs() -> list[dict[str, str]]:
    """Prompts and completions of several lengths; two in a batch make four micro-batches and one left over."""
    data = ofa.load_task("reviews")
    return [
        {"prompt": data.task.prompt(one.text)[: 20 + 3 * index], "completion": " " + one.label + " yes" * (index % 3)}
        for index, one in enumerate(data.train[:10])
    ]


def trainer_of(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Any:
    """An SFTTrainer over the pairs in their order, two in a batch, with plain SGD."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    keywords = {key: options.pop(key) for key in ("compute_loss_func", "eval_dataset", "callbacks") if key in options}
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=DEVICE == "cpu",
        bf16=False,
        disable_tqdm=True,
        **options,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs()),
        processing_class=tokenizer,
        **keywords,
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_penalty_weighs_one_in_every_step(accumulation: int, tiny_model: Loaded, tmp_path: Path) -> None:
    """With the default loss, over the labels of completions, whose number differs."""
    model, tokenizer = tiny_model
    ofa.tune_norms(model)
    with ofa.fused_regularizers(model, into_loss=True) as reg:
        weights = WeightOfPenalty(reg)
        trainer_of(model, tokenizer, tmp_path, gradient_accumulation_steps=accumulation, callbacks=[weights]).train()
    assert len(weights.of_steps) == (5 if accumulation == 1 else 2)
    assert weights.of_steps == pytest.approx([1.0] * len(weights.of_steps), abs=1e-6)


@pytest.mark.parametrize("attach_first", [True, False], ids=["attached before", "attached behind"])
def test_the_default_loss_has_the_plain_loops_gradient(attach_first: bool, tiny_model: Loaded, tmp_path: Path) -> None:
    """With the trainer's defaults, activation checkpointing included; the trainer replaces the model's forward."""
    model, tokenizer = tiny_model
    tuned = ofa.tune_norms(model)
    start = [parameter.detach().clone() for parameter in tuned]
    batches: list[dict[str, Tensor]] = []

    def make(model: Any, **options: Any) -> Any:
        trainer = trainer_of(model, tokenizer, tmp_path, **options)
        batches.extend(trainer.get_train_dataloader())
        return trainer

    if attach_first:
        found = gradients_of_steps(make, model)
    else:
        trainer = make(model)
        with ofa.fused_regularizers(model, 1.0, 1.0, into_loss=True):
            trainer.train()
        found = []
    expected, losses = [], []
    ended = [parameter.detach().clone() for parameter in tuned]
    for parameter, value in zip(tuned, start, strict=True):
        parameter.data.copy_(value)
    with ofa.fused_regularizers(model, 1.0, 1.0) as reg:
        for batch in batches:
            loss = model(**batch).loss + reg.penalty()
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, tuned)
            expected += gradients
            for parameter, gradient in zip(tuned, gradients, strict=True):
                parameter.data -= 0.01 * gradient
    assert len(losses) == 5
    for one, other in zip(found, expected, strict=attach_first):
        # Two ways to sum a softmax in float32, over five steps.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    for one, other in zip(ended, tuned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def sum_of_logits(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"label_smoothing_factor": 0.1}, "returned none .label smoothing"),
        ({"compute_loss_func": sum_of_logits}, "returned none .label smoothing, compute_loss_func"),
        ({"packing": True, "max_length": 64}, "several packed sequences"),
        ({"padding_free": True, "max_length": None}, "several packed sequences"),
    ],
    ids=["dft", "label smoothing", "compute_loss_func", "packing", "padding_free"],
)
def test_settings_that_would_train_without_the_penalty_are_refused(
    options: dict[str, Any], message: str, tiny_model: Loaded, tmp_path: Path
) -> None:
    """The message names the setting to change."""
    model, tokenizer = tiny_model
    ofa.tune_norms(model)
    with ofa.fused_regularizers(model, into_loss=True), pytest.raises(InputError, match=message):
        trainer_of(model, tokenizer, tmp_path, **options).train()


def test_wrapped_rows_are_measured_as_single_sequences(tiny_model: Loaded, tmp_path: Path) -> None:
    """`packing_strategy="wrapped"`: the model treats every row as one sequence."""
    model, tokenizer = tiny_model
    ofa.tune_norms(model)
    with ofa.fused_regularizers(model, into_loss=True) as reg:
        weights = WeightOfPenalty(reg)
        trainer_of(
            model, tokenizer, tmp_path, packing=True, packing_strategy="wrapped", max_length=64, callbacks=[weights]
        ).train()
    assert weights.of_steps == pytest.approx([1.0] * len(weights.of_steps), abs=1e-6)


def test_evaluation_has_no_penalty(tiny_model: Loaded, tmp_path: Path) -> None:
    """Its loss has no penalty, and its passes are not measured."""
    from datasets import Dataset

    model, tokenizer = tiny_model
    ofa.tune_norms(model)
    with ofa.fused_regularizers(model, 1.0, 1.0, into_loss=True) as reg:
        trainer = trainer_of(model, tokenizer, tmp_path, eval_dataset=Dataset.from_list(pairs()))
        trainer.train()
        attached = trainer.evaluate()["eval_loss"]
        assert reg.passes == 5
    assert attached == trainer.evaluate()["eval_loss"]
