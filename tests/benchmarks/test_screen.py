"""Screened terms: their gradient has the length that the words say, and the script's records are those of the grid."""

from __future__ import annotations

import sys

import pytest
import torch

import ofa
from benchmarks import screen
from benchmarks.screened_terms import AGGREGATES, Term, WithTerm, balanced, fit
from ofa import InputError
from ofa.comparison.store import read_records
from ofa.evaluation.encoding import Encoder
from ofa.methods import METHODS, method
from ofa.training.config import TrainingConfig
from ofa.training.loss import cross_entropy, encode_example
from ofa.tuning.norms import restore_norms
from tests.ofa.given_back import SHOTS, TASK

QUICK = {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2}


def test_a_fixed_weight_is_the_program_s_own(tiny_model):
    """Otherwise screened rows would not compare with those of `ofa compare`."""
    with method("ofa")(*tiny_model, TASK, SHOTS, 5, **QUICK, sharpness=0.5) as own:
        expected = [record.loss for record in own.training.records]
    with fit(*tiny_model, TASK, SHOTS, 5, **QUICK, sharpness=0.5) as screened:
        found = [record.loss for record in screened.training.records]
        assert screened.notes["at_the_end"]["sharpness"] > 0
    assert found == pytest.approx(expected, rel=1e-6)


def test_balanced_batches_hold_both_classes():
    """In every epoch, each shot once."""
    order = balanced(SHOTS, TrainingConfig(batch_size=2, seed=0))
    for epoch in range(20):
        batches = [order(epoch, index) for index in (0, 1)]
        assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3]
        assert all({SHOTS[i].label for i in batch} == set(TASK.labels) for batch in batches)


@pytest.mark.parametrize(
    ("way", "name", "aggregate", "control"),
    [
        ("of the gradient", "sharpness", None, None),
        ("of the gradient", "sharpness", None, "permuted"),
        ("of the gradient, one-sided", "sharpness", None, None),
        ("of the first gradient", "unified", None, None),
        *(("of the first gradient", "step_ratio", aggregate, None) for aggregate in AGGREGATES),
    ],
)
def test_a_share_of_the_gradient_has_its_length(tiny_model, way, name, aggregate, control):
    """In units of the pretrained scales; a permuted one too, in another direction."""
    model, tokenizer = tiny_model
    config = TrainingConfig(batch_size=len(SHOTS), max_steps=1)
    encoder = Encoder(tokenizer, TASK, 64)
    data = [encode_example(encoder, shot) for shot in SHOTS]
    term = Term.parse(f"0.3 {way}", name=name, aggregate=aggregate, permuted=control is not None)
    parameters = ofa.tune_norms(model)
    sizes = torch.cat([parameter.detach().abs() for parameter in parameters])
    guidance = WithTerm(model, term, data, config, None, {}, len(TASK.labels))
    try:
        own = torch.cat(torch.autograd.grad(cross_entropy(model, data), parameters)) * sizes
        guidance.begin(parameters, ())
        guidance.backward(lambda: cross_entropy(model, data))
        added = torch.cat([parameter.grad for parameter in parameters]) * sizes - own
    finally:
        guidance.close()
        restore_norms(model)
    assert float(added.norm() / own.norm()) == pytest.approx(0.3, rel=1e-3)
    if "one-sided" in way:
        assert float(added @ own) > -1e-5 * float(own @ own)


@pytest.mark.parametrize("weight", ["0.3 of the weather", "some"])
def test_other_words_are_refused(weight):
    with pytest.raises(InputError, match=f'the weight "{weight}" cannot be read'):
        Term.parse(weight)


def test_cells_are_recorded_once_as_the_grid_names_them(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text(
        f"model: {tiny_folder}\ntasks: [reviews]\nseeds: 1\nshots: 2\ntest_size: 4\ncontexts: prompt\n"
        "methods: {ofa: [{max_steps: 2, sharpness: 3 × loss}, {max_steps: 2, sharpness: 0.3 decoupled}]}\n"
    )
    monkeypatch.setattr(sys, "argv", ["screen", str(tmp_path / "grid.yaml"), str(tmp_path / "out")])
    monkeypatch.setitem(METHODS, screen.SCREENED, "")  # to be taken out again
    screen.main()
    first, second = read_records(tmp_path / "out")
    assert first.cell.row == "ofa (max_steps=2, sharpness=3 × loss)"
    assert (first.error, second.error) == (None, None)
    assert set(first.notes["at_the_end"]) == {"sharpness", "step_ratio", "shots"}
    finished = second.finished
    screen.main()
    assert [record.finished for record in read_records(tmp_path / "out")] == [first.finished, finished]
