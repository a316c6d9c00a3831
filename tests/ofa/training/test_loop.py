"""The training loop: examples, loss, steps, files, and how it stops."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import ofa
from ofa.adapters.folder import METRICS
from ofa.anatomy.fused_layers import is_fused
from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.evaluation.scorer import Scorer
from ofa.models.introspection import model_window
from ofa.tasks.task import Example, Task
from ofa.training import loop
from ofa.training.config import TrainingConfig
from ofa.training.loop import Diverged, Interrupted, learning_rate, train
from ofa.training.records import StepRecord, read_metrics
from ofa.tuning.norms import restore_norms
from tests.device import DEVICE

TASK = Task(name="mood", template="Review: {text}\nSentiment:", labels=("negative", "positive"))
# In the tiny tokenizer all of these begin with the same token, and one begins with all tokens of another.
COLLIDING = Task(name="colliding", template="Review: {text}\nSentiment:", labels=("xab", "xabcd", "y", "xq"))
OPEN = Task(name="open", template="{text}\nAnswer:")

EXAMPLES = (
    Example("a warm and funny film", "positive"),
    Example("dull, slow and far too long, and then it goes on", "negative"),
    Example("never drags", "positive"),
    Example("far too long", "negative"),
    Example("funny, and warm to the last", "positive"),
    Example("slow", "negative"),
    Example("a film", "positive"),
    Example("it drags", "negative"),
)
COLLIDING_EXAMPLES = tuple(Example(e.text, label) for e, label in zip(EXAMPLES, COLLIDING.labels * 2, strict=True))
OPEN_EXAMPLES = (
    Example("12 + 7", "19"),
    Example("the capital of France", "Paris, I think"),
    Example("who wrote the first novel about the sea", "a bank"),
)
PLAIN = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "step_ratio": 0.0, "sharpness": 0.0}
BOTH = {**PLAIN, "step_ratio": 0.1, "sharpness": 0.05}


def scales_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(loaded, examples=EXAMPLES[:5], task=TASK, *, settings=PLAIN, **options):
    """Train, return the result and the tuned scales, and restore the model."""
    model, tokenizer = loaded
    try:
        encoder = Encoder(tokenizer, task, model_window(model))
        result = train(model, encoder, examples, TrainingConfig(**settings), **options)
        return result, scales_of(model)
    finally:
        restore_norms(model)


class Watch:
    """Records inputs of every forward pass, and scales and gradients after every step."""

    def __init__(self, model):
        self.model = model
        self.start = {f"{norm}.weight": model.get_parameter(f"{norm}.weight").detach().clone() for norm in norms(model)}
        self.inputs, self.scales, self.gradients = [], [self.start], []

    def before_forward(self, module, args, kwargs):
        if torch.is_grad_enabled():
            self.inputs.append({name: kwargs[name].clone() for name in ("input_ids", "attention_mask")})

    def progress(self, record, total):
        self.scales.append(scales_of(self.model))
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad})


def norms(model):
    return [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]


@contextmanager
def watched(model):
    watch = Watch(model)
    handle = model.register_forward_pre_hook(watch.before_forward, with_kwargs=True)
    try:
        yield watch
    finally:
        handle.remove()


@contextmanager
def before_pass(model, number, act):
    """Call `act` before the forward pass of this number, counted from 1."""
    count = 0

    def hook(module, args):
        nonlocal count
        count += 1
        if count == number:
            act()

    handle = model.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def rows(inputs):
    """The unpadded token ids of every sequence of a forward pass."""
    return [tuple(i[m == 1].tolist()) for i, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def examples_seen(watch, tokenizer, examples=EXAMPLES):
    by_ids = {tuple(tokenizer(TASK.prompt(e.text))["input_ids"]): index for index, e in enumerate(examples)}
    return [[by_ids[row] for row in rows(inputs)] for inputs in watch.inputs]


# The schedule and the optimizer


@pytest.mark.parametrize(
    ("step", "total", "warmup", "share"),
    [
        # 5 % of 40 steps are 2 of warm-up; then a cosine over the other 38, half way down after 19.
        (0, 40, 0.05, 0.5),
        (1, 40, 0.05, 1.0),
        (2, 40, 0.05, 1.0),
        (21, 40, 0.05, 0.5),
        (39, 40, 0.05, 0.5 * (1 - math.cos(math.pi / 38))),
        (40, 40, 0.05, 0.0),
        # Warm-up steps are rounded up: 5 % of 21 are 1.05.
        (0, 21, 0.05, 0.5),
        (1, 21, 0.05, 1.0),
        (0, 10, 0.0, 1.0),
        (5, 10, 0.0, 0.5),
        (3, 4, 1.0, 1.0),
        (0, 4, 1.0, 0.25),
        (0, 1, 0.05, 1.0),
    ],
)
def test_the_learning_rate_warms_up_over_a_share_of_the_steps_and_falls_to_0_by_a_cosine(step, total, warmup, share):
    config = TrainingConfig(learning_rate=0.02, warmup=warmup)
    # A cosine and two products in float64.
    assert learning_rate(step, total, config) == pytest.approx(0.02 * share, rel=1e-12, abs=1e-17)


def test_the_defaults_are_those_of_the_study():
    """docs/studies.md; weight decay, warm-up and batch are the paper's, and so is the rate of absolute steps."""
    config = TrainingConfig()
    assert (config.peak_rate, config.weight_decay, config.warmup) == (1e-2, 1e-3, 0.05)
    assert TrainingConfig(relative=False).peak_rate == 1e-3
    assert (config.batch_size, config.accumulation, config.step_ratio, config.sharpness) == (4, 1, 0.0, 0.0)
    assert config.gradient == "preconditioner"


@pytest.mark.parametrize(("weight_decay", "relative"), [(1e-3, True), (0.5, False)])
def test_every_step_is_adamw_with_the_scheduled_rate(tiny_model, weight_decay, relative):
    """A plain AdamW (β 0.9, 0.999, ε 1e-8, decoupled decay) gives the run's scales from its gradients.

    Relative steps are as long as the scales that the model came with, a quarter here.
    """
    settings = {**PLAIN, "weight_decay": weight_decay, "relative": relative}
    with torch.no_grad():
        for name, parameter in tiny_model[0].named_parameters():
            if "norm" in name:
                parameter.mul_(0.25)
    with watched(tiny_model[0]) as watch:
        result, tuned = run(tiny_model, progress=watch.progress, settings=settings)
    total = len(result.records)
    assert total == 6
    for name, start in watch.start.items():
        scale, first, second = start.double(), 0.0, 0.0
        for step, gradients in enumerate(watch.gradients):
            rate = 1e-2 * (1.0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (total - 1))))
            assert result.records[step].learning_rate == pytest.approx(rate, rel=1e-12)
            gradient = gradients[name].double()
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            change = -scale * rate * weight_decay - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
            scale = scale + (start.double().abs() if relative else 1.0) * change
        # Scales of about 1 are rounded to float32 (2^-24) twice a step, the moments a few times; without the decay of
        # 1e-3 it would be 3e-5.
        torch.testing.assert_close(tuned[name].double(), scale, rtol=0, atol=total * 6 * 2**-24)


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "shots_per_class", "steps"),
    [
        ({}, 8, 16, 60),
        ({}, 1, 1, 24),  # more steps on one shot of each class cost likelihood
        ({}, 2, 1.3, 32),
        ({}, 10, 4, 70),  # every example is seen at least seven times
        ({"epochs": 2}, 8, 1, 16),
        ({"max_steps": 5, "epochs": 2}, 8, 1, 5),
    ],
)
def test_the_length_of_a_run_is_as_set_or_follows_the_shots(settings, steps_per_epoch, shots_per_class, steps):
    assert TrainingConfig(**settings).total_steps(steps_per_epoch, shots_per_class) == steps


def test_max_steps_overrides_epochs(tiny_model):
    """Fewer than one epoch and more than all; the schedule ends with the last step, which is validated."""
    for steps in (2, 7):
        scores = iter(range(100))
        result, _ = run(tiny_model, settings={**PLAIN, "max_steps": steps}, validate=lambda: next(scores))  # noqa: B023
        assert len(result.records) == steps
        config = TrainingConfig(**PLAIN)
        assert result.records[-1].learning_rate == learning_rate(steps - 1, steps, config)
        assert result.best_epoch == result.records[-1].epoch


# The order of the examples


def test_every_epoch_sees_every_example_once_in_its_own_order(tiny_model):
    """Also with a smaller last batch; the order follows from seed and epoch, and another seed has another one."""
    orders = {}
    for seed in (1, 2):
        for again in (False, True):
            settings = {**PLAIN, "epochs": 3, "batch_size": 3, "seed": seed}
            with watched(tiny_model[0]) as watch:
                run(tiny_model, EXAMPLES, settings=settings)
            batches = examples_seen(watch, tiny_model[1])
            assert [len(batch) for batch in batches] == [3, 3, 2] * 3
            epochs = [[*batches[start], *batches[start + 1], *batches[start + 2]] for start in (0, 3, 6)]
            assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) == 3
            orders[seed, again] = epochs
    assert orders[1, False] == orders[1, True]
    assert all(one != other for one, other in zip(orders[1, False], orders[2, False], strict=True))


# The loss


class WithoutLogitsToKeep:
    """A model without the argument `logits_to_keep`."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        assert use_cache is False
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def loss_by_hand(loaded, task, examples, scales):
    """Mean over the examples of −log p per target token, in float64, one unpadded sequence at a time."""
    model, tokenizer = copy.deepcopy(loaded[0]).double(), loaded[1]
    with torch.no_grad():
        for name, value in scales.items():
            model.get_parameter(name).copy_(value)
    losses = []
    for example in examples:
        before = tokenizer(task.prompt(example.text))["input_ids"]
        end = {"mood": "", "colliding": "\n", "open": tokenizer.eos_token}[task.name]
        whole = tokenizer(task.prompt(example.text) + task.target(example.label) + end)["input_ids"]
        if task is TASK:
            whole = whole[: len(before) + 1]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([whole], device=DEVICE)).logits[0].log_softmax(-1)
        places = range(len(before), len(whole))
        losses.append(-sum(log_p[place - 1, whole[place]] for place in places) / len(places))
    return float(sum(losses) / len(losses))


@pytest.mark.parametrize("keeps_logits", [True, False])
@pytest.mark.parametrize(
    ("task", "examples"),
    [(TASK, EXAMPLES[:3]), (COLLIDING, COLLIDING_EXAMPLES[:4]), (OPEN, OPEN_EXAMPLES)],
    ids=["first token", "whole word", "completion"],
)
def test_the_loss_is_the_full_vocabulary_cross_entropy_at_the_labels_tokens(tiny_model, task, examples, keeps_logits):
    """First token; whole words and line end if two labels share it; completions and the end of the text."""
    model, _ = tiny_model
    original = type(model)
    if not keeps_logits:
        model.__class__ = type("Plain", (WithoutLogitsToKeep, original), {})
    with watched(model) as watch:
        result, _ = run(
            tiny_model, examples, task, progress=watch.progress, settings={**PLAIN, "batch_size": len(examples)}
        )
    model.__class__ = original
    for record, scales in zip(result.records, watch.scales[:-1], strict=True):
        # Losses of about 6 from float32 logits: a rounding is 2^-24 · 8 = 5e-7, and a logit of a three-layer model has
        # a few of its own size. One wrong token or position moves the loss by more than 1e-3.
        assert record.loss == pytest.approx(loss_by_hand(tiny_model, task, examples, scales), abs=1e-5)


def label_loss_by_hand(loaded, task, examples):
    """Mean of −ln p of each target among the next tokens of label words with the same beginning, from plain logits."""
    model, tokenizer = loaded
    end = {"mood": "", "colliding": "\n"}[task.name]
    losses = []
    for example in examples:
        before = tokenizer(task.prompt(example.text))["input_ids"]
        words = {
            label: tokenizer(task.prompt(example.text) + task.target(label) + end)["input_ids"][len(before) :]
            for label in task.labels
        }
        own = words[example.label][: 1 if task is TASK else None]
        with torch.no_grad():
            p = model(input_ids=torch.tensor([[*before, *own]], device=DEVICE)).logits[0].softmax(-1)
        total = 0.0
        for place, target in enumerate(own):
            allowed = {word[place] for word in words.values() if word[:place] == own[:place]}
            here = p[len(before) + place - 1]
            total -= math.log(here[target] / sum(here[token] for token in allowed))
        losses.append(total / len(own))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("task", "examples"), [(TASK, EXAMPLES[:3]), (COLLIDING, COLLIDING_EXAMPLES[:4])], ids=["first token", "whole word"]
)
def test_the_loss_over_the_label_words_is_added_with_its_weight(tiny_model, task, examples):
    settings = {**PLAIN, "batch_size": len(examples)}
    plain, _ = run(tiny_model, examples, task, settings=settings)
    both, _ = run(tiny_model, examples, task, settings={**settings, "label_loss": 2.0})
    expected = label_loss_by_hand(tiny_model, task, examples)
    assert expected > 0.1
    assert both.records[0].loss - plain.records[0].loss == pytest.approx(2 * expected, abs=1e-5)


def test_a_task_without_label_words_has_no_loss_over_them(tiny_model):
    with pytest.raises(InputError, match="no label words"):
        run(tiny_model, OPEN_EXAMPLES, OPEN, settings={**PLAIN, "label_loss": 1.0})


def test_a_run_ends_after_an_epoch_below_stop_loss(tiny_model):
    """By the mean over the epoch's three steps, each of which may be above; the learning rates are unchanged."""
    settings = {**PLAIN, "epochs": 4}
    whole, _ = run(tiny_model, settings=settings)
    means = [sum(record.loss for record in whole.records[start : start + 3]) / 3 for start in range(0, 12, 3)]
    bound = (means[1] + means[2]) / 2
    assert means[0] > means[1] > bound > means[2]
    result, _ = run(tiny_model, settings={**settings, "stop_loss": bound})
    assert [record.loss for record in result.records] == [record.loss for record in whole.records[:9]]


# Accumulation

SPLITS = [(2, 2), (1, 4)]


@pytest.mark.parametrize("step_ratio", [0.0, 0.5])
@pytest.mark.parametrize("count", [8, 7], ids=["full batches", "a smaller last batch"])
def test_accumulation_changes_neither_the_terms_nor_the_scales(tiny_model, count, step_ratio):
    """Without sharpness, whose probes are drawn per pass: it is equal only in expectation."""
    settings = {**PLAIN, "step_ratio": step_ratio}
    with watched(tiny_model[0]) as watch:
        whole, expected = run(
            tiny_model, EXAMPLES[:count], progress=watch.progress, settings={**settings, "batch_size": 4}
        )
    for batch_size, accumulation in SPLITS:
        split = {**settings, "batch_size": batch_size, "accumulation": accumulation}
        result, scales = run(tiny_model, EXAMPLES[:count], settings=split)
        # Sums of at most 4 · 60 tokens' gradients in another order, and 64 · 384 products each: a relative error of
        # about √(64 · 384 · 240) · 2^-24 = 1.4e-4 without pairwise sums; a hundredth of it was measured. A
        # micro-batch with a wrong share would have an error of 1/4 or more.
        for one, other in zip(result.records, whole.records, strict=True):
            assert (one.epoch, one.learning_rate) == (other.epoch, other.learning_rate)
            for term in ("loss", "penalty", "gradient_norm"):
                assert getattr(one, term) == pytest.approx(getattr(other, term), rel=2e-5)
            assert (one.step_ratio is None) == (step_ratio == 0)
        for name in expected:
            gradients = torch.stack([gradient[name] for gradient in watch.gradients])
            noise = 2e-5 * gradients.square().mean().sqrt()
            # Adam divides the gradient by its size: an entry changes by at most 2·lr a step, and its relative error,
            # twice (numerator and root), is noise / |g|.
            per_step = (2 * noise / gradients.abs().amin(0)).clamp_max(2.0)
            bound = len(gradients) * 1e-2 * per_step + 4 * 2**-24
            assert ((scales[name] - expected[name]).abs() <= bound).all()
            # The bound detects a wrong gradient: for most entries it is a thousandth of a step.
            assert bound.median() < 1e-3 * 1e-2 * len(gradients)


# The penalty


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("weights", [{"step_ratio": 0.1, "sharpness": 0.05}, {"step_ratio": 0.1}, {"sharpness": 0.05}])
def test_the_recorded_terms_are_what_the_regularizers_measure_with_the_passs_probes(tiny_model, weights, accumulation):
    """J and H of every step equal `fused_regularizers` at the same scales, inputs, seed and pass, bit for bit."""
    model, _ = tiny_model
    settings = {**PLAIN, **weights, "accumulation": accumulation, "epochs": 1, "seed": 7}
    with watched(model) as watch:
        result, _ = run(tiny_model, progress=watch.progress, settings=settings)
    given = {name: settings[name] for name in ("step_ratio", "sharpness")}
    passes = iter(enumerate(watch.inputs))
    sizes = {1: [[2], [2], [1]], 2: [[2, 2], [1]]}[accumulation]
    ofa.tune_norms(model)  # as the trainer does: the choice of "auto" depends on the trained parameters
    with ofa.fused_regularizers(model, **given, seed=7) as reg:
        for record, scales, parts in zip(result.records, watch.scales[:-1], sizes, strict=True):
            for name, value in scales.items():
                model.get_parameter(name).data.copy_(value)
            expected = Counter()
            for size in parts:
                reg.passes, inputs = next(passes)
                assert len(inputs["input_ids"]) == size
                model(**inputs, use_cache=False)
                measured = reg.measurements
                for name, value in (("step_ratio", measured.step_ratio), ("sharpness", measured.sharpness)):
                    if value is not None:
                        expected[name] += value.item() * size / sum(parts)
                expected["penalty"] += reg.penalty().item() * size / sum(parts)
            # The same operations on the same numbers, but shares are multiplied in another order.
            for name in ("step_ratio", "sharpness", "penalty"):
                assert getattr(record, name) == (pytest.approx(expected[name], rel=1e-12) if name in expected else None)
    assert next(passes, None) is None


@pytest.mark.parametrize("weights", [{"step_ratio": 0.1}, {"sharpness": 0.05}])
def test_a_penalty_changes_the_gradient_step(tiny_model, weights):
    """The first gradient differs from norm tuning's, while the loss is the same."""
    plain, plain_scales = run(tiny_model)
    regularized, scales = run(tiny_model, settings={**PLAIN, **weights})
    assert regularized.records[0].loss == pytest.approx(plain.records[0].loss, rel=1e-6)
    assert regularized.records[0].gradient_norm != pytest.approx(plain.records[0].gradient_norm, rel=1e-3)
    assert any(not torch.equal(scales[name], plain_scales[name]) for name in scales)


@pytest.mark.parametrize(("settings", "attached"), [(PLAIN, False), (BOTH, True)])
def test_regularizers_are_attached_only_if_a_weight_is_positive(tiny_model, settings, attached):
    """Attaching another set raises if there is one."""
    found = []

    def progress(record, total):
        try:
            ofa.fused_regularizers(tiny_model[0]).close()
            found.append(False)
        except InputError:
            found.append(True)

    result, _ = run(tiny_model, settings=settings, progress=progress)
    assert found == [attached] * 6
    assert {(r.step_ratio is None, r.sharpness is None, r.penalty == 0) for r in result.records} == {
        (not attached,) * 3
    }
    ofa.fused_regularizers(tiny_model[0]).close()


# What is written


def test_the_metrics_file_has_one_json_object_per_step_with_the_records_fields(tiny_model, tmp_path):
    """In a folder created if missing; the records of the result, of the file and of `progress` are the same."""
    seen = []
    folder = tmp_path / "new" / "run"
    result, _ = run(tiny_model, settings=BOTH, folder=folder, progress=lambda *given: seen.append(given))
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [set(line) for line in lines] == [{field.name for field in fields(StepRecord)}] * 6
    assert lines == [asdict(record) for record in result.records]
    assert read_metrics(folder) == list(result.records)
    assert seen == [(record, 6) for record in result.records]
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert all(before["seconds"] <= after["seconds"] for before, after in pairwise(lines))
    assert result.seconds == pytest.approx(lines[-1]["seconds"], abs=1e-4)


def test_a_metrics_line_cut_short_is_left_out(tiny_model, tmp_path):
    """A kill may cut a line short."""
    result, _ = run(tiny_model, folder=tmp_path)
    text = (tmp_path / METRICS).read_text()
    (tmp_path / METRICS).write_text(text[:-20])
    assert read_metrics(tmp_path) == list(result.records[:-1])
    assert read_metrics(tmp_path / "nowhere") == []


def test_nothing_is_written_without_a_folder(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tiny_model)
    assert list(tmp_path.iterdir()) == []


def test_drift_and_gradient_norm_are_lengths_over_all_scales(tiny_model):
    """‖γ − γ₀‖/‖γ₀‖ and ‖∇‖ from the scales and gradients themselves, in float64."""
    with watched(tiny_model[0]) as watch:
        result, _ = run(tiny_model, progress=watch.progress)
    start = torch.cat([value.double() for value in watch.start.values()])
    for record, scales, gradients in zip(result.records, watch.scales[1:], watch.gradients, strict=True):
        moved = torch.cat([scales[name].double() for name in watch.start]) - start
        gradient = torch.cat([value.double() for value in gradients.values()])
        # γ − γ₀ is exact for close numbers; the sums of 448 float32 squares are not: √448 · 2^-24.
        assert record.drift == pytest.approx(float(moved.norm() / start.norm()), rel=2e-6)
        assert record.gradient_norm == pytest.approx(float(gradient.norm()), rel=2e-6)


# What trains, and in which mode


def test_only_norm_scales_get_gradients_in_eval_mode(tiny_model):
    """Every module is in eval mode during training, and in its previous mode afterwards."""
    model, _ = tiny_model
    model.train()
    model.lm_head.eval()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    wanted = {f"{norm}.weight" for norm in norms(model)}
    modes = []

    def progress(record, total):
        assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
        assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted
        modes.append(any(module.training for module in model.modules()))

    run(tiny_model, settings=BOTH, progress=progress)
    assert len(wanted) == 7
    assert modes == [False] * 6
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_norm_without_gradient_stops_the_run_at_once_and_is_named(tiny_model):
    model, _ = tiny_model
    handle = model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda m, a, output: output.detach())
    seen = []
    with pytest.raises(InputError, match=r"1 of 7 .*model\.layers\.1\.post_attention_layernorm\.weight"):
        run(tiny_model, progress=lambda *given: seen.append(given))
    handle.remove()
    assert seen == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"epochs": 0}, "epochs"), ({"learning_rat": 1e-3}, "learning_rat"), ({"samples": "many"}, "samples")],
)
def test_a_wrong_setting_is_named_in_one_sentence(settings, named):
    with pytest.raises(InputError, match=named) as error:
        TrainingConfig(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "examples", "message"),
    [({}, (), "not one example"), ({"resume": True}, EXAMPLES, "folder")],
    ids=["no examples", "no folder to resume from"],
)
def test_a_run_that_cannot_start_says_why(tiny_model, options, examples, message):
    with pytest.raises(InputError, match=message):
        run(tiny_model, examples, **options)


# Validation


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.2, 0.9, 0.5), 2), ((0.2, 0.5, 0.9), 3), ((0.7, 0.7, 0.1), 1)],
    ids=["middle", "last", "tie"],
)
def test_the_scales_of_the_best_epoch_are_kept(tiny_model, scores, best):
    """The first of equal ones; validation comes once after every epoch of 3 steps."""
    asked = iter(scores)
    with watched(tiny_model[0]) as watch:
        result, scales = run(
            tiny_model, settings={**PLAIN, "epochs": 3}, validate=lambda: next(asked), progress=watch.progress
        )
    assert result.best_epoch == best
    assert next(asked, None) is None
    assert all(torch.equal(scales[name], value) for name, value in watch.scales[3 * best].items())


def test_without_validation_the_last_step_is_kept(tiny_model):
    with watched(tiny_model[0]) as watch:
        result, scales = run(tiny_model, progress=watch.progress)
    assert result.best_epoch is None
    assert all(torch.equal(scales[name], value) for name, value in watch.scales[-1].items())


# Stopping


@pytest.fixture
def handlers():
    """The signal handlers, which must be the same after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("within", ["progress", "a forward pass"])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(tiny_model, tmp_path, number, within):
    """Interrupted is a KeyboardInterrupt that names the step and the checkpoint."""
    model, _ = tiny_model
    seen = []

    def progress(record, total):
        seen.append(record.step)
        if within == "progress" and len(seen) == 2:
            signal.raise_signal(number)

    # Every batch is one pass, so the second pass is in the second step.
    raising = 2 if within == "a forward pass" else 0
    with (
        before_pass(model, raising, lambda: signal.raise_signal(number)),
        pytest.raises(Interrupted, match="after step 2") as stopped,
    ):
        run(tiny_model, folder=tmp_path, progress=progress)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert str(tmp_path) in str(stopped.value)
    assert seen == [1, 2]
    assert [record.step for record in read_metrics(tmp_path)] == [1, 2]
    result, _ = run(tiny_model, folder=tmp_path, resume=True, progress=progress)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(result.records) == 6


@pytest.mark.usefixtures("handlers")
def test_a_signal_without_a_folder_names_only_the_step(tiny_model):
    with pytest.raises(Interrupted, match=r"^stopped after step 1$"):
        run(tiny_model, progress=lambda record, total: signal.raise_signal(signal.SIGINT))


@pytest.mark.usefixtures("handlers")
def test_a_second_interrupt_does_not_wait_for_the_step(tiny_model):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with before_pass(tiny_model[0], 2, twice), pytest.raises(KeyboardInterrupt) as stopped:
        run(tiny_model)
    assert not isinstance(stopped.value, Interrupted)


def test_a_run_in_a_thread_leaves_the_signals_to_the_caller(tiny_model, handlers):
    """Only the main thread may set handlers; a run in another thread sets none and gives the same scales."""
    found, scales = [], []

    def work():
        scales.append(run(tiny_model, progress=lambda *given: found.append(signal.getsignal(signal.SIGINT)))[1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [handlers[signal.SIGINT]] * 6
    expected = run(tiny_model)[1]
    assert all(torch.equal(scales[0][name], value) for name, value in expected.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_epoch(tiny_model, tmp_path, value):
    """A frozen weight breaks after step 4, in the second epoch; the checkpoint of the first still continues."""
    model, _ = tiny_model
    _, expected = run(tiny_model)
    whole = model.lm_head.weight.detach().clone()

    def progress(record, total):
        if record.step == 4:
            model.lm_head.weight.data[5:9] = value

    with pytest.raises(Diverged, match=r"loss is (nan|inf) at step 5 of 6.*checkpoint") as error:
        run(tiny_model, folder=tmp_path, progress=progress)
    assert str(tmp_path) in str(error.value)
    model.lm_head.weight.data.copy_(whole)
    steps = []
    _, scales = run(tiny_model, folder=tmp_path, resume=True, progress=lambda record, _: steps.append(record.step))
    assert steps == [4, 5, 6]
    assert all(torch.equal(scales[name], value) for name, value in expected.items())


def test_a_nan_gradient_never_reaches_the_scales(tiny_model, tmp_path):
    """The loss may still be finite; a checkpoint written on a signal in that step would hold the broken scales."""
    model, _ = tiny_model
    watch = Watch(model)

    def progress(record, total):
        watch.progress(record, total)
        if record.step == 1:
            model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))

    encoder = Encoder(tiny_model[1], TASK, model_window(model))
    with pytest.raises(Diverged, match="gradient is nan at step 2 of 6"):
        train(model, encoder, EXAMPLES[:5], TrainingConfig(**PLAIN), folder=tmp_path, progress=progress)
    assert all(torch.equal(value, watch.scales[1][name]) for name, value in scales_of(model).items())


# It learns


@pytest.mark.parametrize("settings", [PLAIN, {**PLAIN, "step_ratio": 1e-3, "sharpness": 1e-4}], ids=["plain", "ofa"])
def test_a_separable_toy_task_is_learned(tiny_model, settings):
    """Two classes told apart by one word: the loss falls below a tenth of its start and every example is right."""
    model, tokenizer = tiny_model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # Larger than the usual initialization, so that the scales of a random model have an effect.
                parameter.mul_(4)
    examples = [Example("warm", "positive"), Example("dull", "negative")]
    encoder = Encoder(tokenizer, TASK, model_window(model))
    config = TrainingConfig(**{**settings, "epochs": 40, "learning_rate": 0.1, "seed": 3})
    result = train(model, encoder, examples, config)
    assert result.records[-1].loss < 0.1 * result.records[0].loss
    scorer = Scorer(model, tokenizer, TASK)
    assert scorer.predict([example.text for example in examples]) == ["positive", "negative"]


@pytest.mark.parametrize("chosen", ["triton", "reference"])
def test_layers_are_fused_while_they_train_where_the_kernels_run(tiny_model, monkeypatch, chosen):
    """Sums and norms would be launched one by one otherwise."""
    monkeypatch.setattr(loop, "dispatch", SimpleNamespace(choose=lambda *given: SimpleNamespace(name=chosen)))
    fused = []
    run(tiny_model, progress=lambda record, total: fused.append(is_fused(tiny_model[0])))
    assert set(fused) == {chosen == "triton"}
    assert not is_fused(tiny_model[0])
