"""Scores do not depend on batch, padding or cache, and an evaluation restores the model's state."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from ofa.errors import InputError
from ofa.evaluation import scorer as evaluation
from ofa.evaluation.encoding import label_token_ids
from ofa.evaluation.prefix_cache import PrefixCache
from ofa.evaluation.scorer import Scorer, evaluate
from ofa.models.introspection import evaluating
from ofa.tasks.task import Example
from tests import families
from tests.device import DEVICE
from tests.ofa.label_models import COLLIDING, OPEN, ROUNDING, TASK, build, sharpened

TEXTS = ["a warm film", "dull", "slow and far too long, but it never drags after the first hour", "funny and warm"]
SHOTS = [Example("a warm and funny film", "positive"), Example("dull, slow", "negative")]
OPEN_EXAMPLES = [Example("12 + 7", "19"), Example("the capital of France", "Paris, I think"), Example("who", "a bank")]


@pytest.fixture
def tokenizer(tiny_model):
    return tiny_model[1]


@pytest.fixture
def llama(tiny_model):
    return sharpened(tiny_model[0])


@torch.no_grad()
def next_log_probabilities(model, ids):
    return model(input_ids=torch.tensor([ids], device=DEVICE)).logits[0, -1].double().log_softmax(0)


def by_hand(model, tokenizer, task, texts, before=""):
    """Oracle: one text, one label, one token at a time; no batch, no padding, no cache."""
    label_ids = label_token_ids(tokenizer, task)
    whole = len({ids[0] for ids in label_ids.values()}) < len(label_ids)
    rows = []
    for text in texts:
        row = []
        for word in label_ids.values():
            ids = tokenizer(before + task.prompt(text))["input_ids"]
            score = 0.0
            for token in word if whole else word[:1]:
                score += next_log_probabilities(model, ids)[token].item()
                ids = [*ids, token]
            row.append(score)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).log_softmax(1)


def assert_same_scores(actual, expected):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.double(), atol=ROUNDING, rtol=0)


def first_tokens(tokenizer, task):
    return {ids[0] for ids in label_token_ids(tokenizer, task).values()}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_neither_batch_nor_padding_nor_order_changes_a_score(llama, tokenizer, batch_size):
    assert len(first_tokens(tokenizer, TASK)) == 2
    expected = by_hand(llama, tokenizer, TASK, TEXTS)
    assert (expected[:, 0].max() - expected[:, 0].min()) > 0.01, (
        "the texts must score differently for this to be a test"
    )
    scorer = Scorer(llama, tokenizer, TASK, batch_size=batch_size)
    assert_same_scores(scorer.log_probabilities(TEXTS), expected)
    assert_same_scores(scorer.log_probabilities(TEXTS[::-1]), expected.flip(0))


def test_predictions_are_the_best_labels_in_input_order(llama, tokenizer):
    scorer = Scorer(llama, tokenizer, TASK, batch_size=2)
    probabilities = scorer.predict_proba(TEXTS)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(TEXTS)))
    assert scorer.predict(TEXTS) == [TASK.labels[index] for index in probabilities.argmax(1).tolist()]


def test_no_texts_give_no_predictions(llama, tokenizer):
    assert Scorer(llama, tokenizer, TASK, demonstrations=SHOTS).log_probabilities([]).shape == (0, 2)


FAMILIES = [("llama", True), ("gpt2", True), ("opt", True), ("sliding mistral", True)]
FAMILIES += [("dynamic llama", False), ("bloom", False)]


@pytest.mark.parametrize(("family", "reuses"), FAMILIES)
@pytest.mark.parametrize("task", [TASK, COLLIDING], ids=lambda task: task.name)
def test_demonstrations_from_a_shared_cache_score_like_the_whole_text(tokenizer, family, reuses, task):
    # Protects positions and masks after a cached prefix, for every way a family counts positions, and the fall-back.
    model = build(family, len(tokenizer))
    shots = [Example(shot.text, task.labels[index]) for index, shot in enumerate(SHOTS)]
    before = "".join(task.demonstration(shot) for shot in shots)
    expected = by_hand(model, tokenizer, task, TEXTS, before)
    without = by_hand(model, tokenizer, task, TEXTS)
    assert (expected - without).abs().max() > 0.01, "the demonstrations must matter for this to be a test"
    scorer = Scorer(model, tokenizer, task, demonstrations=shots, batch_size=3)
    assert_same_scores(scorer.log_probabilities(TEXTS), expected)
    assert_same_scores(Scorer(model, tokenizer, task, batch_size=3).log_probabilities(TEXTS), without)
    with evaluating(model):
        assert PrefixCache(model, [3, 4], 0).reuses_cache is reuses


def test_demonstrations_are_computed_once_and_left_as_they_were(llama, tokenizer):
    # Protects the cost of in-context learning, and the shared keys against appends by earlier batches.
    seen = []
    handle = llama.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    scorer = Scorer(llama, tokenizer, TASK, demonstrations=SHOTS, batch_size=1)
    demonstrations = scorer.encoder.encode_demonstrations(SHOTS)
    scorer.log_probabilities(TEXTS)
    handle.remove()
    prompts = scorer.encoder.encode_prompts(TEXTS, demonstrations=demonstrations)
    assert seen == [(1, len(demonstrations)), *sorted(((1, len(prompt)) for prompt in prompts), reverse=True)]


def test_weights_changed_between_two_calls_are_seen(llama, tokenizer):
    # Protects evaluation during training: keys cached with old weights must not be reused.
    scorer = Scorer(llama, tokenizer, TASK, demonstrations=SHOTS)
    scorer.log_probabilities(TEXTS)
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight.mul_(1.5)
    before = "".join(TASK.demonstration(shot) for shot in SHOTS)
    assert_same_scores(scorer.log_probabilities(TEXTS), by_hand(llama, tokenizer, TASK, TEXTS, before))


def test_labels_that_share_a_first_token_are_scored_by_the_whole_word_and_it_is_said_once(llama, tokenizer, caplog):
    assert len(first_tokens(tokenizer, COLLIDING)) < len(COLLIDING.labels)
    assert len({len(ids) for ids in label_token_ids(tokenizer, COLLIDING).values()}) > 1
    evaluation._warn_of_whole_words.cache_clear()
    with caplog.at_level(logging.WARNING):
        scorer = Scorer(llama, tokenizer, COLLIDING, batch_size=3)
        Scorer(llama, tokenizer, COLLIDING)
    assert caplog.text.count("scored by whole words") == 1
    assert scorer.mode == "whole word"
    assert_same_scores(scorer.log_probabilities(TEXTS), by_hand(llama, tokenizer, COLLIDING, TEXTS))


@pytest.mark.parametrize("task", [TASK, COLLIDING], ids=lambda task: task.name)
def test_the_vocabulary_is_projected_only_where_it_is_read(llama, tokenizer, monkeypatch, task):
    # Protects memory (tokens × vocabulary is the largest tensor of a forward), and models without logits_to_keep.
    projected = []
    handle = llama.lm_head.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0].shape[1]))
    chosen = Scorer(llama, tokenizer, task, batch_size=4).log_probabilities(TEXTS)
    handle.remove()
    assert max(projected) <= max(len(TEXTS), *map(len, label_token_ids(tokenizer, task).values()))
    forward = llama.forward
    monkeypatch.setattr(
        llama,
        "forward",
        lambda input_ids, attention_mask, position_ids=None, past_key_values=None, use_cache=None: forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        ),
    )
    torch.testing.assert_close(Scorer(llama, tokenizer, task).log_probabilities(TEXTS), chosen, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_gradient_flags_are_as_before(llama, tokenizer, fails):
    # Protects the training loop that evaluates between epochs, also if the evaluation fails.
    llama.train()
    llama.model.layers[1].eval()
    llama.lm_head.weight.requires_grad_(False)
    modes = {name: module.training for name, module in llama.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in llama.named_parameters()}
    states = []
    handle = llama.register_forward_pre_hook(lambda *_: states.append((llama.training, torch.is_grad_enabled())))
    if fails:
        with pytest.raises(ZeroDivisionError):
            Scorer(llama, tokenizer, TASK).log_probabilities(TEXTS, progress=lambda *_: 1 // 0)
    else:
        Scorer(llama, tokenizer, TASK).log_probabilities(TEXTS)
    handle.remove()
    assert states == [(False, False)]
    assert torch.is_grad_enabled()
    assert modes == {name: module.training for name, module in llama.named_modules()}
    assert flags == {name: parameter.requires_grad for name, parameter in llama.named_parameters()}
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_a_prompt_tuned_model_is_read_after_its_virtual_tokens(llama, tokenizer):
    # Protects the soft-prompt baseline: its logits are shifted by the virtual tokens.
    from peft import PromptTuningConfig, get_peft_model

    tuned = get_peft_model(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).double().eval()
    before = "".join(TASK.demonstration(shot) for shot in SHOTS)
    scorer = Scorer(tuned, tokenizer, TASK, demonstrations=SHOTS, batch_size=3)
    assert_same_scores(scorer.log_probabilities(TEXTS), by_hand(tuned, tokenizer, TASK, TEXTS, before))


def test_an_adapter_on_the_weights_keeps_the_shared_cache(llama, tokenizer):
    from peft import LoraConfig, get_peft_model

    expected = Scorer(llama, tokenizer, TASK, demonstrations=SHOTS).log_probabilities(TEXTS)
    tuned = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).double().eval()
    with evaluating(tuned):
        assert PrefixCache(tuned, [3, 4], 0).reuses_cache
    # LoRA starts as the identity.
    assert_same_scores(Scorer(tuned, tokenizer, TASK, demonstrations=SHOTS).log_probabilities(TEXTS), expected)


@pytest.mark.parametrize("shots", [(), (Example("7 + 7", "14"), Example("the sea", "blue"))])
def test_completion_totals_are_sums_over_the_completion(llama, tokenizer, shots):
    before = "".join(OPEN.demonstration(shot) for shot in shots)
    expected = []
    for example in OPEN_EXAMPLES:
        ids = tokenizer(before + OPEN.prompt(example.text))["input_ids"]
        completion = tokenizer(before + OPEN.prompt(example.text) + OPEN.target(example.label))["input_ids"][len(ids) :]
        scores = []
        for token in completion:
            scores.append(next_log_probabilities(llama, ids)[token].item())
            ids = [*ids, token]
        expected.append(sum(scores) / len(scores))
    scorer = Scorer(llama, tokenizer, OPEN, demonstrations=shots, batch_size=2)
    totals, counts = scorer.completion_totals(OPEN_EXAMPLES)
    assert_same_scores(totals / counts, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("shots", [(), (Example("7 + 7", "14"), Example("the sea", "blue"))])
def test_generation_is_greedy_and_padding_does_not_change_it(llama, tokenizer, shots):
    # Protects against the model's own sampling settings, and against padding between a prompt and its completion.
    llama.generation_config.do_sample = True
    llama.generation_config.repetition_penalty = 1.7
    before = "".join(OPEN.demonstration(shot) for shot in shots)
    expected = []
    for text in TEXTS:
        ids = tokenizer(before + OPEN.prompt(text))["input_ids"]
        new = []
        while len(new) < 6 and tokenizer.eos_token_id not in new:
            new.append(int(next_log_probabilities(llama, ids + new).argmax()))
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    scorer = Scorer(llama, tokenizer, OPEN, demonstrations=shots, batch_size=3)
    assert scorer.generate(TEXTS, max_new_tokens=6) == expected
    assert len(set(expected)) > 1


def test_open_ended_evaluation_compares_as_many_lines_as_the_truth_has(llama, tokenizer, monkeypatch):
    """Only a newline ends a line; blanks around an answer do not count."""
    answers = [" 19\nQuestion: 3 + 4", "London", "a\u2028bank\nand", "one\ntwo\nthree"]
    monkeypatch.setattr(Scorer, "generate", lambda *_, **__: answers)
    examples = [*OPEN_EXAMPLES[:2], Example("who", "\na\u2028bank\n"), Example("count", "one\ntwo")]
    result = evaluate(llama, tokenizer, OPEN, examples, batch_size=2)
    assert result.predictions == ("19", "London", "a\u2028bank", "one\ntwo")
    assert result.metrics.exact_match == result.metrics.accuracy == pytest.approx(3 / 4)
    assert Scorer(llama, tokenizer, OPEN).accuracy(examples) == result.metrics.accuracy, "what chooses the best epoch"
    totals, counts = Scorer(llama, tokenizer, OPEN).completion_totals(examples)
    assert result.metrics.negative_log_likelihood == pytest.approx(-float(totals.sum()) / int(counts.sum()))
    assert result.probabilities.shape == (4, 0)
    assert result.mode == "completion"


def test_open_ended_evaluation_end_to_end(llama, tokenizer):
    calls = []
    result = evaluate(llama, tokenizer, OPEN, OPEN_EXAMPLES, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [(2, 3), (3, 3)]
    assert len(result.predictions) == 3
    assert json.loads(json.dumps(result.metrics.to_dict())) == result.metrics.to_dict()


def test_evaluation_puts_scores_and_metrics_together(llama, tokenizer):
    examples = [Example(text, TASK.labels[index % 2]) for index, text in enumerate([*TEXTS, "warm " * 400])]
    calls = []
    result = evaluate(llama, tokenizer, TASK, examples, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert result.truncated == 1
    assert result.mode == "first token"
    assert result.seconds > 0
    scorer = Scorer(llama, tokenizer, TASK, batch_size=2)
    torch.testing.assert_close(result.probabilities, scorer.predict_proba([example.text for example in examples]))
    assert list(result.predictions) == scorer.predict([example.text for example in examples])
    hits = sum(prediction == example.label for prediction, example in zip(result.predictions, examples, strict=True))
    assert result.metrics.accuracy == hits / 5


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "task 'mood' has no example to evaluate on"),
        ([Example("fine", "positive"), Example(" ", "positive")], "text 2 of 2 is blank"),
        ([Example("fine", "great")], "'great' is not a label"),
    ],
)
def test_bad_examples_are_refused(llama, tokenizer, examples, message):
    with pytest.raises(InputError, match=message):
        evaluate(llama, tokenizer, TASK, examples)


@pytest.mark.parametrize("task", [TASK, COLLIDING, OPEN], ids=lambda task: task.name)
def test_scores_that_are_not_numbers_are_refused(llama, tokenizer, task):
    """argmax of NaN scores would predict the first label without an error."""
    with torch.no_grad():
        llama.model.norm.weight[0] = float("nan")
    examples = [Example(text, (task.labels or TEXTS)[0]) for text in TEXTS]
    with pytest.raises(InputError, match="scores are not numbers"):
        evaluate(llama, tokenizer, task, examples)
    if not task.open_ended:
        with pytest.raises(InputError, match="scores are not numbers"):
            Scorer(llama, tokenizer, task).predict(TEXTS)


def test_an_encoder_whose_head_has_other_labels_is_refused(tokenizer):
    """Its logits would be taken for other labels."""
    with pytest.raises(InputError, match="answers LABEL_0, LABEL_1, LABEL_2 and not 'negative'"):
        Scorer(families.build("bert"), tokenizer, TASK)


def test_an_open_ended_task_has_no_label_probabilities(llama, tokenizer):
    with pytest.raises(InputError, match="call generate instead"):
        Scorer(llama, tokenizer, OPEN).log_probabilities(TEXTS)
