"""Baselines that do not train the model: the states and scores they read, and what they compute."""

from __future__ import annotations

import pytest
import torch

from ofa.errors import InputError
from ofa.evaluation.scorer import Scorer
from ofa.methods import centroids, method
from ofa.methods.calibrated_in_context import CONTENT_FREE
from ofa.methods.hidden_states import last_hidden_states
from ofa.probing.linear_probe import linear_probe
from tests.ofa.given_back import SHOTS, TASK, TEXTS, state
from tests.ofa.label_models import OPEN, ROUNDING, build


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_hidden_states_are_those_the_head_reads_at_the_last_token_of_each_prompt(family, tiny_model):
    """Through the model's own head they give the scores of the label words, in the order of the texts."""
    tokenizer = tiny_model[1]
    model = build(family, len(tokenizer))
    scorer = Scorer(model, tokenizer, TASK, batch_size=2)
    states = last_hidden_states(scorer, TEXTS)
    firsts = [word[0] for word in scorer.encoder.labels.values()]
    head = model.get_output_embeddings()
    with torch.no_grad():
        scores = head(states.to(head.weight))[:, firsts].log_softmax(1).float().cpu()
    torch.testing.assert_close(scores, scorer.log_probabilities(TEXTS), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("name", "classify"),
    [
        ("linear-probe", lambda known, classes, tested: linear_probe(known, classes, tested)),
        ("centroids", lambda known, classes, tested: centroids.train(known, classes)[0](tested)),
    ],
)
def test_classifiers_learn_the_shots_and_leave_the_model_alone(tiny_model, name, classify):
    """Label words are not used; the probabilities are the classifier's on the states."""
    model, tokenizer = tiny_model
    before = state(model)
    scorer = Scorer(model, tokenizer, TASK)
    known, tested = (last_hidden_states(scorer, texts) for texts in ([shot.text for shot in SHOTS], TEXTS))
    classes = torch.tensor([TASK.labels.index(shot.label) for shot in SHOTS])
    with method(name)(model, tokenizer, TASK, SHOTS, 5) as predictor:
        expected = classify(known, classes, tested).exp()
        torch.testing.assert_close(predictor.predict_proba(TEXTS), expected, rtol=0, atol=ROUNDING)
        assert predictor.evaluate(SHOTS).metrics.accuracy == 1.0
        assert predictor.contexts == ("prompt",)
        assert predictor.training is None
        assert predictor.stored_bytes == 4 * predictor.trainable_parameters > 0
    assert state(model) == before
    with pytest.raises(InputError, match="no shot has the label 'positive'"):
        method(name)(model, tokenizer, TASK, [shot for shot in SHOTS if shot.label != "positive"], 5)
    with pytest.raises(InputError, match="no labels to classify"):
        method(name)(model, tokenizer, OPEN, SHOTS, 5)


def test_centroids_by_hand():
    """Two classes on a line: ±1 ± 0.5, standardized by √1.25; the within-class variance is 2·0.25·2/(4 − 2)/1.25."""
    states = torch.tensor([[-1.5, 7.0], [-0.5, 7.0], [0.5, 7.0], [1.5, 7.0]])
    classify, weights = centroids.train(states, torch.tensor([0, 0, 1, 1]))
    tested = classify(torch.tensor([[0.25, 7.0], [0.0, -3.0]]))
    # −‖z − μ‖²/2s²: (0.25 ± 1)²/1.25 over 2·0.4; the channel that never varies plays no part.
    difference = (1.25**2 - 0.75**2) / 1.25 / (2 * 0.4)
    torch.testing.assert_close(tested[0], torch.tensor([-difference, 0.0]).log_softmax(0))
    torch.testing.assert_close(tested[1].exp(), torch.tensor([0.5, 0.5]))
    assert weights == 4
    one_each, _ = centroids.train(states[[0, 3]], torch.tensor([0, 1]))
    assert torch.isfinite(one_each(states)).all()


def test_calibrated_scores_are_relative_to_texts_without_content(tiny_model):
    """Oracle: probabilities of in-context learning, p(label | text) / mean p(label | content-free), normalised."""
    model, tokenizer = tiny_model
    with method("icl")(model, tokenizer, TASK, SHOTS, 5) as plain:
        prior = plain.predict_proba(CONTENT_FREE).mean(0)
        ratio = plain.predict_proba(TEXTS) / prior
    with method("icl-calibrated")(model, tokenizer, TASK, SHOTS, 5) as predictor:
        assert predictor.contexts == ("demonstrations",)
        torch.testing.assert_close(
            predictor.predict_proba(TEXTS), ratio / ratio.sum(1, keepdim=True), rtol=0, atol=ROUNDING
        )
