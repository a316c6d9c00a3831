"""`into_loss=True` in `transformers.Trainer`: the penalty's weight, equality with a plain loop, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ofa
from ofa import InputError
from ofa.regularizers.attach import Regularizers
from tests import families
from tests.device import DEVICE
from tests.ofa.trainers import WeightOfPenalty, gradients_of_steps, without_dropout

LENGTHS = (6, 4, 7, 5, 3, 6, 4, 7, 5, 4)
"""Ten sequences, two per batch: one step of four micro-batches and one of a single micro-batch."""


def sequences(name: str) -> list[dict[str, Any]]:
    """Token ids of several lengths, each with a different number of labels."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        first = index % 3
        rows.append({"ids": ids, "labels": index % 3 if name == "bert" else [-100] * first + ids[first:]})
    return rows


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["ids"]) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    classes = isinstance(rows[0]["labels"], int)
    return {
        "input_ids": padded("ids", 0),
        "attention_mask": torch.tensor([[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]) if classes else padded("labels", -100),
    }


def batches(name: str) -> list[dict[str, Tensor]]:
    rows = sequences(name)
    return [families.on_device(collate(rows[start : start + 2])) for start in range(0, len(rows), 2)]


def trainer_of(model: nn.Module, folder: Path, *, name: str = "llama", kind: type | None = None, **options: Any) -> Any:
    """A Trainer over the sequences in their order, two in a batch, with plain SGD."""
    from transformers import Trainer, TrainingArguments

    keywords = {key: options.pop(key) for key in ("compute_loss_func", "eval_dataset", "callbacks") if key in options}
    arguments = TrainingArguments(
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
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    return (kind or Trainer)(
        model=model, args=arguments, train_dataset=sequences(name), data_collator=collate, **keywords
    )


def tuned(name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = without_dropout(families.build(name)).to(dtype)
    ofa.tune_norms(model)
    return model


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_penalty_weighs_one_in_every_step(name: str, accumulation: int, tmp_path: Path) -> None:
    """Also with different numbers of labels, in an epoch's short last step, and for a classification loss."""
    model = tuned(name)
    with ofa.fused_regularizers(model, into_loss=True) as reg:
        weights = WeightOfPenalty(reg)
        trainer_of(model, tmp_path, name=name, gradient_accumulation_steps=accumulation, callbacks=[weights]).train()
    assert len(weights.of_steps) == (5 if accumulation == 1 else 2)
    assert weights.of_steps == pytest.approx([1.0] * len(weights.of_steps), abs=1e-6)


def plain_loop(model: nn.Module, reg: Regularizers, parts: list[dict[str, Tensor]], accumulation: int) -> list[float]:
    """Losses of the steps of a plain loop: cross-entropy and penalty, weighted by a micro-batch's labels."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for start in range(0, len(parts), accumulation):
        step = parts[start : start + accumulation]
        counts = [int((part["labels"][:, 1:] != -100).sum()) for part in step]
        losses.append(0.0)
        for part, count in zip(step, counts, strict=True):
            loss = (model(**part).loss + reg.penalty()) * count / sum(counts)
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer_does_what_the_plain_loop_does(accumulation: int, tmp_path: Path) -> None:
    """Losses of every step and parameters after the last, with both terms large."""
    by_hand, by_trainer = tuned(dtype=torch.float64), tuned(dtype=torch.float64)
    with ofa.fused_regularizers(by_hand, 1.0, 1.0) as reg:
        losses = plain_loop(by_hand, reg, batches("llama"), accumulation)
    with ofa.fused_regularizers(by_trainer, 1.0, 1.0, into_loss=True):
        trainer = trainer_of(by_trainer, tmp_path, gradient_accumulation_steps=accumulation)
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Trainer sums its logs in float32, and rounds some entries to four decimals.
    assert logged == pytest.approx(losses, abs=1e-3)
    for one, other in zip(by_trainer.parameters(), by_hand.parameters(), strict=True):
        # The model computes norms and softmax in float32, here in the same order in both.
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    moved = [
        float((one - other).detach().abs().max())
        for one, other in zip(tuned().parameters(), by_hand.parameters(), strict=True)
    ]
    assert max(moved) > 1e-3


def mean_of_log_likelihoods(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def trainer_with_a_loss_of_its_own() -> type:
    from transformers import Trainer

    class OwnLoss(Trainer):
        """As in many scripts: labels stay in the inputs, and the model's own loss is not used."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **extra: Any) -> Any:
            outputs = model(**inputs)
            loss = mean_of_log_likelihoods(outputs, inputs["labels"], (inputs["labels"][:, 1:] != -100).sum())
            return (loss, outputs) if return_outputs else loss

    return OwnLoss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"label_smoothing_factor": 0.1}, "returned none .label smoothing.*compute_loss"),
        (lambda: {"compute_loss_func": mean_of_log_likelihoods}, "returned none .label smoothing, compute_loss_func"),
        (lambda: {"kind": trainer_with_a_loss_of_its_own()}, "another loss of the model's other outputs"),
    ],
    ids=["label smoothing", "compute_loss_func", "compute_loss"],
)
def test_a_loss_without_the_penalty_is_refused(
    options: Callable[[], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    """Training would silently lack the penalty; the message says where to add it."""
    model = tuned()
    with ofa.fused_regularizers(model, into_loss=True), pytest.raises(InputError, match=message) as error:
        trainer_of(model, tmp_path, **options()).train()
    assert "reg.penalty()" in str(error.value)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "options",
    [{"label_smoothing_factor": 0.1}, {"compute_loss_func": mean_of_log_likelihoods}],
    ids=["label smoothing", "compute_loss_func"],
)
def test_a_subclass_that_adds_the_penalty(options: dict[str, Any], accumulation: int, tmp_path: Path) -> None:
    """The penalty has weight 1 in every step, and evaluation is unchanged."""
    from transformers import Trainer

    model = tuned()
    with ofa.fused_regularizers(model) as reg:
        weights = WeightOfPenalty(reg)

        class Penalized(Trainer):
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **extra: Any) -> Any:
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **extra)
                if model.training:
                    loss = loss + reg.penalty() / self.current_gradient_accumulation_steps
                return (loss, outputs) if return_outputs else loss

        trainer = trainer_of(
            model,
            tmp_path,
            kind=Penalized,
            gradient_accumulation_steps=accumulation,
            callbacks=[weights],
            eval_dataset=sequences("llama"),
            **options,
        )
        trainer.train()
        with_penalty = trainer.evaluate()["eval_loss"]
        reg.close()
        assert with_penalty == trainer.evaluate()["eval_loss"]
    assert weights.of_steps == pytest.approx([1.0] * len(weights.of_steps), abs=1e-6)


def test_evaluation_is_not_measured_and_does_not_change_training(tmp_path: Path) -> None:
    """Its loss has no penalty, `passes` counts only training, and training is bit-identical."""
    ends = []
    for strategy in ("steps", "no"):
        model = tuned()
        with ofa.fused_regularizers(model, 1.0, 1.0, "hutchinson", into_loss=True) as reg:
            trainer = trainer_of(model, tmp_path, eval_dataset=sequences("llama"), eval_strategy=strategy, eval_steps=1)
            trainer.train()
            assert reg.passes == 5
            evaluated, predicted = trainer.evaluate(), trainer.predict(sequences("llama"))
            assert reg.passes == 5
        assert evaluated["eval_loss"] == trainer.evaluate()["eval_loss"] == predicted.metrics["test_loss"]
        ends.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_gradient_checkpointing_by_its_switch(estimator: str, tmp_path: Path) -> None:
    """`gradient_checkpointing=True` is not reentrant by default and changes nothing; reentrant is refused."""
    found = []
    for switch in (False, True):
        make = partial(trainer_of, folder=tmp_path, gradient_accumulation_steps=4, gradient_checkpointing=switch)
        found.append(gradients_of_steps(make, tuned(dtype=torch.float64), estimator=estimator))
    plain, checkpointed = found
    for one, other in zip(checkpointed, plain, strict=True):
        # The recomputation does the same operations in the same order; only sums of gradients may change their order.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    model = tuned()
    model.enable_input_require_grads()
    with (
        ofa.fused_regularizers(model, into_loss=True),
        pytest.raises(InputError, match="reentrant activation checkpointing hides"),
    ):
        trainer_of(
            model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
        ).train()
