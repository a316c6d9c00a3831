"""An interrupted run resumes bit-identically, and a checkpoint of another run is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ofa.adapters.folder import CHECKPOINT, METRICS
from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.models.introspection import model_window
from ofa.tasks.task import Example, Task
from ofa.training import checkpoint
from ofa.training.checkpoint import Checkpoint
from ofa.training.config import TrainingConfig
from ofa.training.loop import Interrupted, train
from ofa.training.records import read_metrics
from ofa.tuning.norms import restore_norms
from tests.device import DEVICE

TASK = Task(name="mood", template="Review: {text}\nSentiment:", labels=("negative", "positive"))
EXAMPLES = (
    Example("a warm and funny film", "positive"),
    Example("dull, slow and far too long, and then it goes on", "negative"),
    Example("never drags", "positive"),
    Example("far too long", "negative"),
    Example("funny, and warm to the last", "positive"),
)
# Five examples in batches of two: an epoch is three steps, the last one smaller; two epochs are six steps.
PLAIN = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "step_ratio": 0.0, "sharpness": 0.0}
BOTH = {**PLAIN, "step_ratio": 0.1, "sharpness": 0.05, "samples": 2}
BOTH |= {"estimator": "hutchinson", "gradient": "full"}
# Two passes of one or two examples per step, two steps per epoch; the sharpness is measured in one step of four.
ACCUMULATED = {**PLAIN, "accumulation": 2, "epochs": 3, "step_ratio": 0.1, "sharpness": 5.0, "every": 4}
SETTINGS = {"norm tuning": PLAIN, "both terms": BOTH, "both terms, accumulated": ACCUMULATED}
# The forward pass that is not reached, counted from 1: before the first step, within an epoch, within a step (between
# its two passes), right after an epoch's end. With accumulation an epoch has 2 steps and 3 passes.
CUTS = [("both terms", cut) for cut in range(1, 7)]
CUTS += [(name, cut) for name in ("norm tuning", "both terms, accumulated") for cut in (2, 3, 5)]


class PowerCut(Exception):
    """Ends a run without cleaning up."""


def run(loaded, folder, settings, *, examples=EXAMPLES, **options):
    """Train, return the result and the tuned scales, and restore the model."""
    model, tokenizer = loaded
    try:
        encoder = Encoder(tokenizer, TASK, model_window(model))
        result = train(model, encoder, examples, TrainingConfig(**settings), folder=folder, **options)
        return result, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    finally:
        restore_norms(model)


def cut_before(loaded, number, folder, settings, **options):
    """A run that ends before its forward pass of this number."""
    passes = 0

    def count(module, args):
        nonlocal passes
        passes += torch.is_grad_enabled()
        if passes == number:
            raise PowerCut

    handle = loaded[0].register_forward_pre_hook(count)
    with pytest.raises(PowerCut):
        run(loaded, folder, settings, **options)
    handle.remove()


def metrics(folder):
    """The lines of the metrics file without times."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_bits(scales, expected):
    assert list(scales) == list(expected)
    assert [name for name in expected if not torch.equal(scales[name], expected[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder, tmp_path_factory):
    """Name of the settings → scales and metrics of an uninterrupted run; computed once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = {}

    def get(name):
        if name not in known:
            model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval().to(DEVICE)
            folder = tmp_path_factory.mktemp("uninterrupted")
            result, scales = run((model, AutoTokenizer.from_pretrained(tiny_folder)), folder, SETTINGS[name])
            known[name] = scales, metrics(folder), result
        return known[name]

    return get


# Resuming


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_a_run_that_ends_before_any_pass_resumes_bit_identically(tiny_model, tmp_path, uninterrupted, name, cut):
    """From the last epoch's checkpoint: the same scales and metrics file, and each step once in the result."""
    scales, lines, whole = uninterrupted(name)
    cut_before(tiny_model, cut, tmp_path, SETTINGS[name])
    steps = []
    result, resumed = run(
        tiny_model, tmp_path, SETTINGS[name], resume=True, progress=lambda record, total: steps.append(record.step)
    )
    assert_same_bits(resumed, scales)
    assert metrics(tmp_path) == lines
    assert [record.step for record in result.records] == [record.step for record in whole.records]
    # It continued from the last epoch's end and did not start over.
    assert steps[0] == (1 if cut <= 3 else {"both terms, accumulated": 3}.get(name, 4))
    assert all(before.seconds <= after.seconds for before, after in pairwise(result.records))


@pytest.mark.parametrize(
    ("name", "stop"),
    [*(("both terms", stop) for stop in range(1, 7)), ("norm tuning", 2), ("both terms, accumulated", 3)],
)
def test_a_run_stopped_by_ctrl_c_after_any_step_resumes_bit_identically(
    tiny_model, tmp_path, uninterrupted, name, stop
):
    """From a checkpoint of the step itself, also inside an epoch; after the last step there is nothing left to do."""
    scales, lines, _ = uninterrupted(name)

    def progress(record, total):
        if record.step == stop:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tiny_model, tmp_path, SETTINGS[name], progress=progress)
    steps = []
    _, resumed = run(
        tiny_model, tmp_path, SETTINGS[name], resume=True, progress=lambda record, total: steps.append(record.step)
    )
    assert steps == list(range(stop + 1, 7))
    assert_same_bits(resumed, scales)
    assert metrics(tmp_path) == lines


def test_a_run_that_ends_twice_resumes_bit_identically(tiny_model, tmp_path, uninterrupted):
    """A resumed run can be resumed."""
    scales, lines, _ = uninterrupted("both terms")
    cut_before(tiny_model, 6, tmp_path, BOTH)
    cut_before(tiny_model, 2, tmp_path, BOTH, resume=True)
    _, resumed = run(tiny_model, tmp_path, BOTH, resume=True)
    assert_same_bits(resumed, scales)
    assert metrics(tmp_path) == lines


SCRIPT = """
import os, signal, sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from ofa.methods.norm_tuning import fit_ofa
from ofa.tasks.task import Example, Task
import json

torch.set_num_threads(1)
base, folder, given = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().to(given["device"])

def progress(record, total):
    if record.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

shots = [Example(**example) for example in given["examples"]]
task = Task.from_dict(given["task"])
tokenizer = AutoTokenizer.from_pretrained(base)
fit_ofa(model, tokenizer, task, shots, 42, folder=folder, progress=progress, **given["settings"])
"""


def test_a_killed_process_resumes_bit_identically(tiny_model, tiny_folder, tmp_path, uninterrupted):
    """SIGKILL in the second epoch of a real process; metrics of later steps are not written twice."""
    given = {"examples": [asdict(e) for e in EXAMPLES], "task": TASK.to_dict(), "settings": BOTH, "device": DEVICE}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SCRIPT, str(tiny_folder), str(tmp_path), json.dumps(given)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [record.step for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    scales, lines, _ = uninterrupted("both terms")
    _, resumed = run(tiny_model, tmp_path, BOTH, resume=True)
    assert_same_bits(resumed, scales)
    assert metrics(tmp_path) == lines


def test_the_best_epoch_survives_a_resume(tiny_model, tmp_path):
    """The best scales are those of epoch 1; the run ends in epoch 2 and is resumed, and they are kept."""
    settings = {**PLAIN, "epochs": 3}
    scores = [0.9, 0.1, 0.2]
    asked = iter(scores)
    whole, expected = run(tiny_model, tmp_path / "whole", settings, validate=lambda: next(asked))
    assert whole.best_epoch == 1
    asked = iter(scores)
    cut_before(tiny_model, 6, tmp_path / "cut", settings, validate=lambda: next(asked))
    result, scales = run(tiny_model, tmp_path / "cut", settings, validate=lambda: next(asked), resume=True)
    assert next(asked, None) is None
    assert result.best_epoch == 1
    assert_same_bits(scales, expected)


def test_a_run_that_ended_early_does_not_continue(tiny_model, tmp_path):
    """Every loss is below the bound, so the first epoch is the last, also for a resumed run."""
    settings = {**PLAIN, "stop_loss": 1e9}
    _, scales = run(tiny_model, tmp_path, settings)
    result, resumed = run(tiny_model, tmp_path, settings, resume=True)
    assert [record.step for record in result.records] == [1, 2, 3]
    assert_same_bits(resumed, scales)


# The file


def state(step=3, best=True):
    generator = torch.Generator().manual_seed(step)

    def tensors():
        return {name: torch.randn(size, generator=generator) for name, size in (("a.weight", 5), ("b.c.weight", 2))}

    return Checkpoint(
        step=step,
        passes=11,
        seconds=0.1 + 0.2,
        run={"config": {"seed": 1, "epsilon": None, "learning_rate": 0.1}, "data": "d", "model": "m", "schedule": "s"},
        scales=tensors(),
        moments={"exp_avg": tensors(), "exp_avg_sq": tensors()} if step else {},
        best=(2, 0.1, tensors()) if best else None,
    )


def flat(value):
    """Nested dicts with tensors as lists, so that == compares every number."""
    if isinstance(value, dict):
        return {name: flat(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [flat(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def as_lists(given):
    return {name: flat(getattr(given, name)) for name in Checkpoint.__dataclass_fields__}


@pytest.mark.parametrize(("step", "best"), [(3, True), (3, False), (0, False)])
def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path, step, best):
    """Bit-identical, from a single safetensors file."""
    path = tmp_path / CHECKPOINT
    given = state(step, best)
    checkpoint.save(path, given)
    assert as_lists(checkpoint.load(path, given.run, given.scales)) == as_lists(given)
    assert list(tmp_path.iterdir()) == [path]
    with safe_open(path, "pt") as file:
        assert {name.partition("/")[0] for name in file.keys()} >= {"scale"}  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize("failing", ["safetensors.torch.save_file", "os.replace"])
def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing):
    """If the disk is full while the new file is written or moved, the old one is intact, without a temporary file."""
    path = tmp_path / CHECKPOINT
    old = state(3)
    checkpoint.save(path, old)
    before = path.read_bytes()

    def full(*given, **options):
        if failing != "os.replace":
            Path(given[1]).write_bytes(before[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, full)
    with pytest.raises(InputError, match="No space left"):
        checkpoint.save(path, state(4))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert checkpoint.load(path, old.run, old.scales).step == 3


def test_a_run_writes_nothing_but_its_metrics_and_a_safetensors_checkpoint(tiny_model, tmp_path):
    """No pickle, no temporary file; the files are a few times the size of the scales."""
    run(tiny_model, tmp_path, BOTH)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CHECKPOINT, METRICS])
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        names = list(file.keys())
        text = json.dumps(file.metadata())
    # 7 norms: scale and two moments each.
    assert len(names) == 21
    assert not any(example.text in text for example in EXAMPLES)


# Refusals


@pytest.fixture
def stopped(tiny_model, tmp_path):
    """The folder of a run that ended in its second epoch."""
    cut_before(tiny_model, 5, tmp_path, PLAIN)
    return tmp_path


def test_resuming_without_a_checkpoint_is_refused(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint .*checkpoint\.safetensors to resume from"):
        run(tiny_model, tmp_path, PLAIN, resume=True)


def rewritten(path, change):
    """The checkpoint with other metadata."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata()
    save_file(tensors, path, metadata=change(metadata))


def without(name):
    def change(metadata):
        facts = json.loads(metadata["state"])
        del facts[name]
        return {"state": json.dumps(facts)}

    return change


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "no safetensors": lambda path: path.write_bytes(b"PK\x03\x04" + b"not a checkpoint" * 20),
    "another safetensors": lambda path: rewritten(path, lambda metadata: {"format": "pt"}),
    "no metadata": lambda path: rewritten(path, lambda metadata: None),
    "broken metadata": lambda path: rewritten(path, lambda metadata: {"state": metadata["state"][:-5]}),
    "no run": lambda path: rewritten(path, without("run")),
    "no step": lambda path: rewritten(path, without("step")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_left_alone(tiny_model, stopped, damage):
    """The message names the file; it, the metrics and the model are unchanged."""
    path = stopped / CHECKPOINT
    DAMAGE[damage](path)
    before = path.read_bytes(), (stopped / METRICS).read_bytes()
    with pytest.raises(InputError, match=r"checkpoint\.safetensors is damaged"):
        run(tiny_model, stopped, PLAIN, resume=True)
    assert (path.read_bytes(), (stopped / METRICS).read_bytes()) == before


OTHER = {
    "demonstrated_steps": 0.5,
    "head_learning_rate": 1e-4,
    "epochs": 3,
    "max_steps": 5,
    "label_loss": 1.0,
    "class_weights": "balanced",
    "stop_loss": 0.1,
    "learning_rate": 2e-2,
    "weight_decay": 0.0,
    "warmup": 0.5,
    "batch_size": 3,
    "accumulation": 2,
    "seed": 43,
    "relative": False,
    "step_ratio": 0.5,
    "sharpness": 0.5,
    "estimator": "hutchinson",
    "granularity": "layer",
    "samples": 2,
    "epsilon": 1e-2,
    "probe": "gaussian",
    "convention": "algorithm1",
    "gradient": "full",
    "every": 2,
    "radial": "exact",
    "tokens": "last",
}


@pytest.mark.parametrize("name", TrainingConfig.model_fields)
def test_another_configuration_is_refused_by_the_name_of_its_field(tiny_model, stopped, name):
    """For every field of the configuration; the message has both values."""
    before = (stopped / CHECKPOINT).read_bytes(), (stopped / METRICS).read_bytes()
    saved = TrainingConfig(**PLAIN).model_dump()[name]
    with pytest.raises(InputError) as error:
        run(tiny_model, stopped, {**PLAIN, name: OTHER[name]}, resume=True)
    assert f"{name}={saved!r}, not {OTHER[name]!r}" in str(error.value)
    assert ((stopped / CHECKPOINT).read_bytes(), (stopped / METRICS).read_bytes()) == before


@pytest.mark.parametrize(
    "examples",
    [
        EXAMPLES[:4],
        EXAMPLES[::-1],
        (*EXAMPLES[:4], Example(EXAMPLES[4].text, "negative")),
        (*EXAMPLES[:4], Example("something else", EXAMPLES[4].label)),
    ],
    ids=["fewer", "another order", "another label", "another text"],
)
def test_other_training_examples_are_refused(tiny_model, stopped, examples):
    with pytest.raises(InputError, match="other training examples"):
        run(tiny_model, stopped, PLAIN, examples=examples, resume=True)


@pytest.mark.parametrize(
    ("default", "value"), [("STEPS_PER_SHOT", 1), ("RELATIVE_RATE", 0.5)], ids=["steps", "learning rate"]
)
def test_a_run_made_with_other_defaults_is_refused(tiny_model, tmp_path, monkeypatch, default, value):
    """The configuration leaves them out; the rest of the run would follow another schedule than its begin."""
    settings = {"batch_size": 5}
    cut_before(tiny_model, 2, tmp_path, settings)
    monkeypatch.setattr(f"ofa.training.config.{default}", value)
    with pytest.raises(InputError, match=r"made with 60 steps at a learning rate of 0\.01, not .*have changed"):
        run(tiny_model, tmp_path, settings, resume=True)


@pytest.mark.parametrize("change", ["values", "width", "dtype"])
def test_another_model_is_refused(tiny_model, stopped, change):
    """Also one of the same shapes, such as an instruction-tuned version of the base."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model, tokenizer = tiny_model
    if change == "values":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    elif change == "dtype":
        model.to(torch.bfloat16)
    else:
        config = AutoConfig.from_pretrained(model.config.name_or_path)
        config.hidden_size = 32
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="of another model"):
        run((model, tokenizer), stopped, PLAIN, resume=True)
