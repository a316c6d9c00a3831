"""The state after the demonstrations overwrites the chosen layer's output at the prompt's last token only."""

from __future__ import annotations

import pytest
import torch

from ofa.errors import InputError
from ofa.evaluation.encoding import label_token_ids
from ofa.evaluation.scorer import Scorer
from ofa.methods import task_vector
from ofa.methods.task_vector import TaskVectorScorer, draw, fit
from ofa.tasks.task import Example
from tests.device import DEVICE
from tests.ofa.given_back import state
from tests.ofa.label_models import COLLIDING, OPEN, ROUNDING, TASK, build, sharpened

SHOTS = (Example("a warm and funny film", "positive"), Example("dull, slow", "negative"))
TEXTS = ["a warm film", "dull", "slow and far too long, but it never drags"]
SUBJECTS = ("film", "novel", "sea", "team", "bank")
POOL = tuple(
    Example(f"a {word} {subject}", label)
    for word, label in (("warm", "positive"), ("funny", "positive"), ("dull", "negative"), ("slow", "negative"))
    for subject in SUBJECTS
)


@pytest.fixture
def llama(tiny_model):
    model, tokenizer = tiny_model
    return sharpened(model), tokenizer


@torch.no_grad()
def by_layers(model, ids, overwritten=None):
    """(outputs of all layers (L, T, d), logits (T, V)) of a Llama or Mistral, layer by layer, without its forward.

    `overwritten` is (layer, position, state): the output that is replaced before the next layer reads it.
    """
    decoder, total = model.model, len(ids)
    hidden = decoder.embed_tokens(torch.tensor([ids], device=DEVICE))
    rotation = decoder.rotary_emb(hidden, torch.arange(total, device=DEVICE)[None])
    seen = torch.ones(total, total, dtype=torch.bool, device=DEVICE).tril()
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        seen &= ~torch.ones_like(seen).tril(-window)
    mask = hidden.new_zeros(1, 1, total, total).masked_fill(~seen, -1e9)
    outputs = []
    for index, layer in enumerate(decoder.layers):
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotation)
        if overwritten is not None and overwritten[0] == index:
            hidden = hidden.clone()
            hidden[0, overwritten[1]] = overwritten[2]
        outputs.append(hidden[0])
    return torch.stack(outputs), model.lm_head(decoder.norm(hidden))[0]


def scores_by_layers(model, tokenizer, task, texts, layer, vector):
    """Label scores of one text, one word at a time: the word after the prompt is not overwritten."""
    words = list(label_token_ids(tokenizer, task).values())
    whole = len({word[0] for word in words}) < len(words)
    rows = []
    for text in texts:
        prompt = tokenizer(task.prompt(text))["input_ids"]
        place = (layer, len(prompt) - 1, vector)
        for word in words:
            read = word if whole else word[:1]
            logits = by_layers(model, [*prompt, *read], place)[1][len(prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(1, torch.tensor(read, device=DEVICE)[:, None]).sum())
    return torch.stack(rows).view(len(texts), -1).log_softmax(1).float().cpu()


# The state


def test_the_states_are_all_layers_outputs_after_demonstrations_and_prompt(llama, monkeypatch):
    """At the last token, in layer order, from one forward over one sequence; oracle: layer by layer."""
    model, tokenizer = llama
    query, _ = draw(TASK, SHOTS, POOL, 5)
    text = "".join(TASK.demonstration(shot) for shot in SHOTS) + TASK.prompt(query.text)
    ids = tokenizer(text)["input_ids"]
    expected = by_layers(model, ids)[0][:, -1]
    states, read = [], []
    monkeypatch.setattr(
        task_vector, "TaskVectorScorer", lambda *args, state, **rest: (states.append(state), Scorer(*args))[1]
    )
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(tuple(args[0].shape)))
    fit(model, tokenizer, TASK, SHOTS, 5, pool=POOL)
    # The first pass is the few tokens by which the layers are found; the batches of the validation hold more rows.
    assert [shape for shape in read[1:] if shape[0] == 1] == [(1, len(ids))]
    torch.testing.assert_close(torch.stack(states), expected)


# The overwrite


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", ["llama", "sliding mistral", "dynamic llama"])
@pytest.mark.parametrize("task", [TASK, COLLIDING], ids=lambda task: task.name)
def test_scores_are_those_of_an_overwrite_by_hand(tiny_model, family, task, layer):
    """In batches of padded prompts, by first tokens and whole words, with caches that can be continued and without."""
    tokenizer = tiny_model[1]
    model = build(family, len(tokenizer))
    vector = 3 * torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    path = f"model.layers.{layer}"
    scorer = TaskVectorScorer(model, tokenizer, task, layer=path, state=vector)
    actual = scorer.log_probabilities(TEXTS)
    expected = scores_by_layers(model, tokenizer, task, TEXTS, layer, vector)
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=0)
    # From the last layer on only the next token depends on it, and words that begin alike are distinguished after that.
    if task is TASK or layer == 0:
        assert (actual - Scorer(model, tokenizer, task).log_probabilities(TEXTS)).abs().max() > 0.01


def test_overwriting_a_state_with_itself_changes_nothing(llama):
    """The hook finds the right row: each prompt, alone in its batch, gets its own state."""
    model, tokenizer = llama
    plain = Scorer(model, tokenizer, TASK, batch_size=1).log_probabilities(TEXTS)
    for row, text in enumerate(TEXTS):
        own = by_layers(model, tokenizer(TASK.prompt(text))["input_ids"])[0][1, -1]
        scorer = TaskVectorScorer(model, tokenizer, TASK, layer="model.layers.1", state=own)
        torch.testing.assert_close(scorer.log_probabilities([text]), plain[row : row + 1], atol=ROUNDING, rtol=0)


# The layer


def test_the_layer_is_the_lowest_of_those_with_the_best_accuracy(llama):
    """Accuracies by hand for every layer, on examples that are neither shots nor the prompt of the state."""
    model, tokenizer = llama
    query, validation = draw(TASK, SHOTS, POOL, 5)
    text = "".join(TASK.demonstration(shot) for shot in SHOTS) + TASK.prompt(query.text)
    states = by_layers(model, tokenizer(text)["input_ids"])[0][:, -1]
    accuracies = []
    for layer, own in enumerate(states):
        scores = scores_by_layers(model, tokenizer, TASK, [example.text for example in validation], layer, own)
        hits = [TASK.labels[best] == e.label for best, e in zip(scores.argmax(1), validation, strict=True)]
        accuracies.append(sum(hits) / len(hits))
    with fit(model, tokenizer, TASK, SHOTS, 5, pool=POOL) as predictor:
        assert predictor.notes == {
            "layer": accuracies.index(max(accuracies)),
            "validation_examples": len(validation),
            "validation_accuracies": accuracies,
        }
        assert predictor.contexts == ("prompt",)
        assert predictor.stored_bytes == 64 * 8
        assert predictor.trainable_parameters == 0
        best = predictor.notes["layer"]
        expected = scores_by_layers(model, tokenizer, TASK, TEXTS, best, states[best])
        torch.testing.assert_close(predictor.scorer.log_probabilities(TEXTS), expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(("accuracies", "layer"), [((0.5, 0.5, 0.5), 0), ((0.25, 0.75, 0.75), 1), ((0, 0, 1), 2)])
def test_ties_go_to_the_lowest_layer(llama, monkeypatch, accuracies, layer):
    of_layers = iter(accuracies)
    monkeypatch.setattr(Scorer, "accuracy", lambda *_: next(of_layers))
    assert fit(*llama, TASK, SHOTS, 5, pool=POOL).notes["layer"] == layer


# Validation examples


@pytest.mark.parametrize(("size", "validation_size"), [(200, 32), (33, 32), (32, 31), (5, 4), (3, 2)])
def test_validation_and_prompt_are_drawn_from_non_shots(size, validation_size):
    """Balanced, without a text twice, the same in every run with a seed."""
    pool = [Example(f"text {index}", TASK.labels[index % 2]) for index in range(size)]
    query, validation = draw(TASK, SHOTS, [*SHOTS, *pool, *pool, Example("unlabelled", "other")], 5)
    texts = [example.text for example in (query, *validation)]
    assert len(validation) == validation_size
    assert len(set(texts)) == len(texts)
    assert set(texts) <= {example.text for example in pool}
    counts = [sum(example.label == label for example in validation) for label in TASK.labels]
    assert max(counts) - min(counts) <= 1
    assert (query, validation) == draw(TASK, SHOTS, [*SHOTS, *pool, *pool], 5)
    others = {draw(TASK, SHOTS, pool, seed)[0] for seed in range(20)}
    assert len(others) > 1


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ((), 'none of class "negative"'),
        (SHOTS, 'none of class "negative"'),
        ((*SHOTS, Example("fine", "negative"), Example("bad", "negative")), 'none of class "positive"'),
        ((Example("fine", "positive"), Example("bad", "negative")), "only 2: give it more"),
    ],
)
def test_a_pool_that_is_too_small_is_refused(llama, pool, message):
    with pytest.raises(InputError, match=message):
        fit(*llama, TASK, SHOTS, 5, pool=pool)


def test_a_task_without_labels_is_refused(llama):
    with pytest.raises(InputError, match="task 'open' has no labels"):
        fit(*llama, OPEN, SHOTS, 5, pool=POOL)


# Restoring the model


@pytest.mark.parametrize("fails_at", [None, "the first pass", "the second layer's accuracy"])
def test_the_model_stays_as_it_was(llama, monkeypatch, fails_at):
    """Also if the fit fails while states are recorded or overwritten."""
    model, tokenizer = llama
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    if fails_at is None:
        with fit(model, tokenizer, TASK, SHOTS, 5, pool=POOL) as predictor:
            predictor.predict(TEXTS)
            assert state(model) == before
        assert state(model) == before
        return
    passes = 1 if fails_at == "the first pass" else 3
    counted = []

    def fail(*_):
        counted.append(1)
        if len(counted) == passes:
            raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        fit(model, tokenizer, TASK, SHOTS, 5, pool=POOL)
    handle.remove()
    assert state(model) == before
