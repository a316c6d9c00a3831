"""The soft prompt is one vector in front of the embeddings, and labels are read at the prompt's last token."""

from __future__ import annotations

import pytest
import torch

from ofa.errors import InputError
from ofa.methods import soft_prompt
from ofa.tasks.task import Task
from tests import families
from tests.device import DEVICE
from tests.ofa.given_back import SHOTS, TASK, TEXTS
from tests.ofa.methods.grown import with_vocabulary_of

TRAINING = {"epochs": 2, "batch_size": 4}


@torch.no_grad()
def logits_behind(model, vector, ids):
    """Logits (tokens + 1, vocabulary) of the base model for the vector and the ids' own embeddings."""
    own = model.get_input_embeddings()(torch.tensor([ids], device=DEVICE))
    embedded = torch.cat([vector.to(own.dtype).view(1, 1, -1), own], dim=1)
    return model.eval()(inputs_embeds=embedded).logits[0].float()


def fitted(model, tokenizer, seed=5, **options):
    return soft_prompt.fit(model, tokenizer, TASK, SHOTS, seed, **{**TRAINING, **options})


def vector_of(predictor):
    return predictor.scorer.model.get_prompt(1)[0, 0].detach().clone()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "gemma3", "granite", "falcon_alibi"])
def test_labels_are_read_at_the_prompt_s_last_token(tiny_model, family):
    """Oracle: hand-made embeddings give equal scores at the prompt's last position, and other scores one earlier.

    Learned positions, embeddings scaled in their module (Gemma 3) and after it (Gemma, Granite), and no positions.
    """
    tokenizer = tiny_model[1]
    model = with_vocabulary_of(tokenizer, families.build(family))
    with fitted(model, tokenizer) as predictor:
        vector, encoder = vector_of(predictor), predictor.scorer.encoder
        scores = predictor.scorer.log_probabilities(TEXTS)
    firsts = [word[0] for word in encoder.labels.values()]
    rows = [logits_behind(model, vector, encoder.encode_prompt(text)) for text in TEXTS]
    last, early = (torch.stack([row[place, firsts] for row in rows]).log_softmax(1).cpu() for place in (-1, -2))
    # Keys and values of the vector are computed apart from the rest, in float32.
    torch.testing.assert_close(scores, last, rtol=1e-4, atol=1e-5)
    assert (early - last).abs().max() > 1e-3


def test_a_cache_that_cannot_be_continued_changes_no_score(tiny_model):
    """Then PEFT's own forward runs, with the vector in front of every whole sequence."""
    model, tokenizer = tiny_model
    with fitted(model, tokenizer) as predictor:
        shared = predictor.evaluate(SHOTS, demonstrations=SHOTS[:2]).probabilities
        # What the check reads; the layers rotate as they were built.
        model.config.rope_parameters["rope_type"] = "dynamic"
        assert not predictor.scorer.shared_prefix([5, 9]).reuses_cache
        whole = predictor.evaluate(SHOTS, demonstrations=SHOTS[:2]).probabilities
    torch.testing.assert_close(whole, shared, rtol=1e-4, atol=1e-6)


def test_training_reads_the_same_position(tiny_model):
    """The first loss is the hand-made cross-entropy at the last position, with the drawn token as vector."""
    model, tokenizer = tiny_model
    with fitted(model, tokenizer, learning_rate=1e-30) as predictor:
        vector, encoder = vector_of(predictor), predictor.scorer.encoder
        losses = [record.loss for record in predictor.training.records]
    expected = [
        -logits_behind(model, vector, encoder.encode_prompt(shot.text))[-1].log_softmax(-1)[
            encoder.labels[shot.label][0]
        ]
        for shot in SHOTS
    ]
    # Float32, and a batch that is padded.
    assert losses == [pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)] * 2


def test_the_first_vector_is_the_embedding_of_a_token_drawn_by_the_seed(tiny_model):
    """A step of 1e-30 does not move it; other seeds draw other tokens."""
    model, tokenizer = tiny_model
    table = model.get_input_embeddings().weight
    drawn = []
    for seed in range(6):
        with fitted(model, tokenizer, seed=seed, epochs=1, learning_rate=1e-30) as predictor:
            (token,) = (table == vector_of(predictor)).all(1).nonzero()
            drawn.append(int(token))
    assert len(set(drawn)) > 3


def test_it_has_d_parameters(tiny_model):
    """Stored with four bytes each; the window for texts is one position shorter."""
    with fitted(*tiny_model) as predictor:
        assert (predictor.trainable_parameters, predictor.stored_bytes) == (64, 256)
        assert predictor.scorer.encoder.window == 255
        assert predictor.notes == {"extra_tokens": 1}


def test_a_long_text_leaves_room_for_the_vector(tiny_model):
    """The window is full to the last position: 256 with learned positions would fail beyond it."""
    tokenizer = tiny_model[1]
    model = with_vocabulary_of(tokenizer, families.build("gpt2"))
    with fitted(model, tokenizer) as predictor:
        assert predictor.predict(["a film that never ends " * 40])[0] in TASK.labels
        assert predictor.scorer.truncated == 1


def test_an_open_ended_task_is_refused(tiny_model):
    """PEFT ignores the positions that padding on the left needs, so that completions would depend on their batch."""
    task = Task(name="echo", template="Say: {text}\nEcho:", labels=())
    with pytest.raises(InputError, match="task 'echo' has no labels, and soft-prompt only scores labels"):
        soft_prompt.fit(*tiny_model, task, SHOTS, 5)


def test_generating_and_checkpointed_activations_leave_no_trace(tiny_model):
    """PEFT writes to the base model when it generates, and hooks its embeddings where activations are checkpointed."""
    model, tokenizer = tiny_model
    model.gradient_checkpointing_enable()
    embedding = model.get_input_embeddings()
    model.enable_input_require_grads()
    before = [sorted(vars(module)) for module in model.modules()], list(embedding._forward_hooks)
    attributes = {name: vars(model)[name] for name in ("_require_grads_hooks", "_require_grads_hook")}
    with fitted(model, tokenizer, epochs=1) as predictor:
        predictor.scorer.model.generate(input_ids=torch.tensor([[5, 9, 40]], device=DEVICE), max_new_tokens=2)
        assert predictor.predict(TEXTS)
    assert ([sorted(vars(module)) for module in model.modules()], list(embedding._forward_hooks)) == before
    assert {name: vars(model)[name] for name in attributes} == attributes
