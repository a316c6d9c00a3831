"""`graphed_step`: replays equal eager steps, and what a graph would get wrong is computed eagerly."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ofa
from ofa.anatomy.fused_layers import is_fused
from ofa.training import buckets
from ofa.training import graphed_step as module
from ofa.training.buckets import bucket, padded
from ofa.training.capture import SWITCH, CannotCaptureError
from ofa.training.config import TrainingConfig
from ofa.training.loop import train
from tests import families
from tests.device import DEVICE
from tests.oracle import Float64
from tests.recorder import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")
LENGTHS = (5, 9, 16, 7, 16, 12, 5, 30, 16, 20)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Stands in the place of CUDA graphs."""
    found = Recorder()
    monkeypatch.setattr(module, "capture_for", lambda device: found)
    return found


def tuned(name: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    model = families.build(name).to(dtype)
    ofa.tune_norms(model)
    return model


def batch_of(tokens: int, seed: int = 0, sequences: int = 2) -> dict[str, Tensor]:
    return families.inputs("llama", sequences=sequences, tokens=tokens, seed=seed)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def scales(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_buckets_are_few_and_hold_every_length() -> None:
    assert [bucket(length) for length in (1, 16, 17, 128, 129, 161, 513, 2048)] == [
        16,
        16,
        32,
        128,
        160,
        192,
        640,
        2048,
    ]
    assert bucket(60, window=64) == 64
    assert bucket(49, window=50) == 50
    assert all(length <= bucket(length) < 1.25 * length for length in range(64, 5000))


def test_a_mask_is_where_it_is_needed_and_only_there() -> None:
    ids = torch.ones(2, 9, dtype=torch.long)
    given = padded({"input_ids": ids, "labels": ids, "weights": torch.ones(9)})
    assert {name: tuple(value.shape) for name, value in given.items()} == {
        "input_ids": (2, 16),
        "labels": (2, 16),
        "attention_mask": (2, 16),
        "weights": (9,),
    }
    assert given["attention_mask"].sum() == 18
    assert (given["labels"][:, 9:] == buckets.IGNORED).all()
    whole = {"input_ids": ids.repeat(1, 2)[:, :16], "attention_mask": torch.ones(2, 16)}
    assert "attention_mask" not in padded(whole), "known to be of ones: attention needs no mask"
    whole["attention_mask"][0, 3] = 0
    assert "attention_mask" in padded(whole)


# Every way in which a branch meets the stream, and every kind of position: rotary, learned, counted from the mask.
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "opt", "phi", "falcon_alibi", "mixtral"])
def test_padding_to_a_bucket_changes_neither_loss_nor_penalty_nor_gradient(name: str) -> None:
    """In float64 to 1e-11: some thousand roundings of sums that have zeros more."""
    model, given = tuned(name), families.inputs(name, sequences=2, tokens=6)
    found = []
    with Float64(), ofa.fused_regularizers(model, step_ratio=0.1, sharpness=0.5) as reg:
        for batch in (given, padded(given)):
            model.zero_grad()
            loss = model(**batch).loss
            penalty = reg.penalty()
            (loss + penalty).backward()
            found.append((loss.detach(), penalty.detach(), gradients(model)))
        assert batch["input_ids"].shape[1] == 16
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11 * float(own.abs().max()))


BOTH = {"step_ratio": 0.1, "sharpness": 0.5}


@pytest.mark.parametrize("terms", [{}, {"step_ratio": 0.1, "sharpness": 0.0}, BOTH, {**BOTH, "fuse": True}])
def test_graphed_steps_train_as_eager_ones(terms: dict[str, float], recorder: Recorder) -> None:
    """Other tokens and other scales at every replay. Tolerance: float32 inside float64 models, ten steps.

    Layers of float64 models are not fused, so fused ones are float32: a hundred roundings of sums in another order.
    """
    fused = "fuse" in terms
    models, found = [tuned(dtype=torch.float32 if fused else torch.float64) for _ in range(2)], []
    for model, graphed in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        reg = ofa.fused_regularizers(model, **terms) if terms else None
        assert is_fused(model) == fused
        step = ofa.graphed_step(model, optimizer)
        step.reason = step.reason if graphed else "eager"
        values = [step(batch_of(tokens, seed=index)) for index, tokens in enumerate(LENGTHS)]
        found.append(values)
        if graphed:
            assert (recorder.recorded, step.replays, step.refused) == (3, 4, {})
        if reg is not None:
            assert reg.passes == len(LENGTHS), "as many probes drawn as steps taken"
            torch.testing.assert_close(reg.measurements.step_ratio, values[-1].step_ratio)
            reg.close()
    for own, other in zip(*found, strict=True):
        for term in ("loss", "penalty", "step_ratio", "sharpness"):
            torch.testing.assert_close(getattr(own, term), getattr(other, term), rtol=1e-5 if fused else 1e-6, atol=0)
    limits = {"rtol": 1e-5, "atol": 1e-7} if fused else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(scales(models[0]), scales(models[1]), **limits)


def test_without_an_optimizer_weighted_gradients_add_up(recorder: Recorder) -> None:
    """As with gradient accumulation; a later replay does not change gradients that were handed out."""
    model = tuned()
    step = ofa.graphed_step(model)
    parts = [(batch_of(16, seed=index), weight) for index, weight in enumerate((1.0, 1.0, 0.25, 0.75))]
    for batch, weight in parts[:2]:
        step(batch, weight)
    model.zero_grad()
    for batch, weight in parts[2:]:
        step(batch, weight)
    assert step.replays == 2
    found = gradients(model)
    model.zero_grad()
    for batch, weight in parts[2:]:
        (weight * model(**batch).loss).backward()
    torch.testing.assert_close(found, gradients(model), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fault", ["a loss that padding changes", "a number of the host"])
def test_a_replay_that_differs_from_an_eager_step_is_not_used(
    fault: str, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """The scales go on as if there were no graphs, and it is said once."""
    now = 0

    def loss_of(model: nn.Module) -> Any:
        def loss(batch: dict[str, Tensor]) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
            return logits[:, -1].square().mean() if "padding" in fault else logits.square().mean() * 2.0**now

        return loss

    models = [tuned(), tuned()]
    for model, graphed in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
        step = ofa.graphed_step(model, optimizer, loss=loss_of(model))
        step.reason = None if graphed else "eager"
        for now in range(5):
            step(batch_of(9 if "padding" in fault else 16, seed=now))
        if graphed:
            (why,) = step.refused.values()
            assert why.startswith("a replayed step differs from an eager one by ")
            assert step.replays == 0
    torch.testing.assert_close(scales(models[0]), scales(models[1]), rtol=0, atol=0)
    assert len([one for one in caplog.records if "are not replayed" in one.message]) == 1


def test_the_graphs_used_last_are_kept(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    step = ofa.graphed_step(tuned())
    for tokens in (16, 32, 48):
        for index in range(3):
            step(batch_of(tokens, seed=index))
    assert (recorder.recorded, step.replays, len(step._graphs)) == (3, 3, 2)
    step(batch_of(16))
    assert recorder.recorded == 3, "one that comes back is not captured at once"
    for index in range(2):
        step(batch_of(16, seed=index))
    assert recorder.recorded == 4


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


CHANGES = {
    "a scale is frozen": lambda model, step: next(p for p in model.parameters() if p.requires_grad).requires_grad_(
        False
    ),
    "a hook is added": lambda model, step: model.lm_head.register_forward_hook(lambda module, args, out: 2 * out),
    "regularizers are attached": lambda model, step: ofa.fused_regularizers(model, sharpness=0.0),
    "a weight is another tensor": lambda model, step: setattr(
        model.lm_head, "weight", nn.Parameter(2 * model.lm_head.weight.detach(), requires_grad=False)
    ),
    "a module is replaced": lambda model, step: setattr(model, "lm_head", copy.deepcopy(model.lm_head)),
    "a module is of another class": lambda model, step: setattr(
        model.lm_head,
        "__class__",
        type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)}),
    ),
    "the model trains": lambda model, step: model.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_again(change: str, recorder: Recorder) -> None:
    """A graph would go on computing what the model was."""
    model = tuned()
    step = ofa.graphed_step(model)
    for index in range(3):
        step(batch_of(16, seed=index))
    CHANGES[change](model, step)
    model.zero_grad()
    values = step(batch_of(16, seed=3))
    assert step.replays == 1, "eager again"
    found = gradients(model)
    model.zero_grad()
    expected = model(**batch_of(16, seed=3)).loss
    reg = ofa.regularizers.attached(model)
    (expected if reg is None else expected + reg.penalty()).backward()
    torch.testing.assert_close(values.loss, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, gradients(model), rtol=1e-6, atol=1e-9)
    for index in range(3):
        step(batch_of(16, seed=index))
    assert (recorder.recorded, step.replays) == (2, 3)


def dropping(model: nn.Module) -> None:
    model.lm_head = nn.Sequential(model.lm_head, nn.Dropout(0.1))  # as LoRA's own
    model.lm_head.train()


def checkpointing(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()


REASONS = {
    "dropout is active in lm_head.1": dropping,
    "activation checkpointing is on": checkpointing,
    "a graph would repeat the probes of estimator='hutchinson'": lambda model: ofa.fused_regularizers(
        model, estimator="hutchinson"
    ),
    "a graph would repeat one of the 3 kinds of step of every=3": lambda model: ofa.fused_regularizers(model, every=3),
    "hooks of accelerate move weights or inputs between devices": lambda model: setattr(
        model.lm_head, "_hf_hook", object()
    ),
    "the model is compiled, for which torch.compile has graphs of its own (mode='reduce-overhead')": lambda model: (
        setattr(model, "lm_head", torch.compile(model.lm_head, backend="eager"))
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_captured_is_eager_with_the_reason(reason: str, recorder: Recorder) -> None:
    model = tuned()
    REASONS[reason](model)
    step = ofa.graphed_step(model)
    for index in range(3):
        step(batch_of(16, seed=index))
    assert (step.reason, recorder.recorded) == (reason, 0)
    assert gradients(model).abs().sum() > 0


def test_a_hook_that_waits_for_the_device_keeps_the_steps_eager(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Found in a rehearsal: a capture that fails would break the process's random numbers."""
    caplog.set_level(logging.INFO, "ofa")
    models, seen = [tuned(), tuned()], []
    models[0].lm_head.register_forward_hook(lambda module, args, output: seen.append(output.sum().item()))
    for model in models:
        step = ofa.graphed_step(model)
        for index in range(4):
            step(batch_of(16, seed=index))
        if model is models[0]:
            assert (step.reason, recorder.recorded) == ("_local_scalar_dense waits for the device", 0)
    torch.testing.assert_close(gradients(models[0]), gradients(models[1]), rtol=1e-6, atol=1e-9)
    assert "training steps are not captured as CUDA graphs: _local_scalar_dense waits" in caplog.text


def test_a_failed_capture_leaves_gradients_and_measurements_alone(recorder: Recorder) -> None:
    model = tuned()

    def fail(run: Any) -> None:
        run()
        raise CannotCaptureError("out of memory")

    recorder.record = fail  # type: ignore[assignment]
    with ofa.fused_regularizers(model, sharpness=0.0) as reg:
        step = ofa.graphed_step(model)
        step(batch_of(16, seed=0))
        model.zero_grad()
        values = step(batch_of(16, seed=1))
        assert step.reason == "out of memory"
        assert reg.passes == 2
        torch.testing.assert_close(reg.measurements.step_ratio, values.step_ratio)
        found = gradients(model)
        model.zero_grad()
        (model(**batch_of(16, seed=1)).loss + reg.penalty()).backward()
    torch.testing.assert_close(found, gradients(model), rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="says why there are no graphs on a CPU")
def test_without_a_gpu_or_by_the_environment_steps_are_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned()
    assert ofa.graphed_step(model).reason == "the model is on cpu, and CUDA graphs need a CUDA GPU"
    monkeypatch.setenv(SWITCH, "off")
    assert ofa.graphed_step(model).reason == "OFA_GRAPHS=off in the environment"


@pytest.mark.parametrize("labels", [("negative", "positive"), ("xab", "xabcd")])
def test_the_training_loop_replays_its_steps(
    labels: tuple[str, str], tiny_model: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With targets of several tokens, a loss over the label words, accumulation and a last batch of another size."""
    model, tokenizer = tiny_model
    task = ofa.Task(name="mood", template="Review: {text}\nSentiment:", labels=labels)
    texts = ("a warm and funny film", "dull, slow and far too long", "never drags", "far too long", "slow")
    examples = [ofa.Example(text, labels[index % 2]) for index, text in enumerate(texts)]
    config = TrainingConfig(
        max_steps=10, batch_size=2, accumulation=2, step_ratio=0.1, sharpness=0.05, label_loss=0.5, learning_rate=1e-2
    )
    from ofa.evaluation.encoding import Encoder

    found = []
    for graphed in (True, False):
        other = copy.deepcopy(model)
        if not graphed:
            monkeypatch.setattr(module, "_why_not", lambda *given: "eager")
        found.append((train(other, Encoder(tokenizer, task, 256), examples, config).records, scales(other)))
    assert recorder.recorded >= 1
    for own, other in zip(found[0][0], found[1][0], strict=True):
        assert (own.loss, own.penalty) == pytest.approx((other.loss, other.penalty), rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: there are no CUDA graphs elsewhere")
@pytest.mark.parametrize("fused", [False, True])
def test_a_gpus_graphs_train_as_eager_steps(fused: bool) -> None:
    """The lines that nothing else runs: rehearsal on a side stream, capture, replay and several graphs in one pool."""
    models = [tuned(dtype=torch.float32 if fused else torch.float64) for _ in range(2)]
    for model, graphed in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with ofa.fused_regularizers(model, step_ratio=0.1, sharpness=0.5, fuse=fused):
            assert is_fused(model) == fused
            step = ofa.graphed_step(model, optimizer)
            assert step.reason is None
            step.reason = None if graphed else "eager"
            for index, tokens in enumerate(LENGTHS):
                step(batch_of(tokens, seed=index))
            assert (step.replays, step.refused) == (4 if graphed else 0, {})
    torch.testing.assert_close(scales(models[0]), scales(models[1]), rtol=1e-4 if fused else 1e-5, atol=1e-7)
