"""Prompts attend to template and labels of the demonstrations, but not to their texts."""

from __future__ import annotations

import pytest
import torch

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder, label_token_ids
from ofa.evaluation.prefix_cache import PrefixCache
from ofa.evaluation.scorer import Scorer
from ofa.methods.label_anchor import AnchorEncoder, fit
from ofa.models.introspection import evaluating
from ofa.tasks.task import Example, Task
from tests import families
from tests.device import DEVICE
from tests.ofa.given_back import state
from tests.ofa.label_models import COLLIDING, OPEN, ROUNDING, TASK, build, sharpened

SHOTS = (
    Example("a warm and funny film", "positive"),
    Example("dull, slow", "negative"),
    Example("it never drags.", "positive"),
)
TEXTS = ["a warm film", "dull", "slow and far too long, but it never drags after the first hour"]


@pytest.fixture
def llama(tiny_model):
    model, tokenizer = tiny_model
    return sharpened(model), tokenizer


def hidden_from_the_prompt(length: int, kept: list[int], total: int) -> torch.Tensor:
    """Additive mask (1, 1, total, total), float64: causal; tokens from `length` on see only `kept` of those before."""
    seen = torch.ones(total, total, dtype=torch.bool, device=DEVICE).tril()
    dropped = [position for position in range(length) if position not in kept]
    seen[length:, dropped] = False
    return torch.zeros(1, 1, total, total, dtype=torch.float64, device=DEVICE).masked_fill(~seen, -1e9)


@torch.no_grad()
def logits_by_mask(model, prefix, kept, ids, start):
    """Oracle: all logits after the prefix, from one forward with a mask that hides dropped tokens."""
    total = len(prefix) + len(ids)
    positions = [*range(len(prefix)), *range(start, start + len(ids))]
    return model(
        input_ids=torch.tensor([[*prefix, *ids]], device=DEVICE),
        attention_mask=hidden_from_the_prompt(len(prefix), kept, total),
        position_ids=torch.tensor([positions], device=DEVICE),
    ).logits[0, len(prefix) :]


# Which tokens


def kept_text(tokenizer, task, shots, window=None):
    encoder = AnchorEncoder(tokenizer, task, window)
    ids = encoder.encode_demonstrations(shots)
    assert ids == Encoder(tokenizer, task, window).encode_demonstrations(shots)
    assert encoder.anchors == sorted(set(encoder.anchors))
    return tokenizer.decode([ids[position] for position in encoder.anchors])


TEMPLATES = {
    "as in the paper": ("Review: {text}\nSentiment:", "Review:\nSentiment: {label}\n"),
    "nothing before the text": ("{text}\nSentiment:", "\nSentiment: {label}\n"),
    "one line": ("{text} is", " is {label}\n"),
    "several lines": ("News\nText: {text}\n---\nType:", "News\nText:\n---\nType: {label}\n"),
    # The quotation mark is a token of its own for the tiny tokenizer.
    "no blank before the text": ('Text: "{text}" so:', 'Text: "" so: {label}\n'),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_everything_but_the_texts_is_kept_also_the_last_label(tiny_model, name):
    template, expected = TEMPLATES[name]
    task = Task("mood", template, ("negative", "positive"))
    assert kept_text(tiny_model[1], task, SHOTS) == "".join(expected.format(label=shot.label) for shot in SHOTS)


def test_special_tokens_in_front_are_kept(tiny_model):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_model[1]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer("a")["input_ids"][0] == 0
    expected = "Review:\nSentiment: positive\nReview:\nSentiment: negative\n"
    assert kept_text(tokenizer, TASK, SHOTS[:2]) == f"<s>{expected}"


def test_a_token_of_text_and_template_is_kept_for_the_template(tiny_model):
    """A full stop and the line end are one token in many vocabularies; dropped, the label line would not begin."""
    tokenizer = tiny_model[1]
    tokenizer.add_tokens([".\n", ":it"])
    assert kept_text(tokenizer, TASK, SHOTS[1:]) == "Review:\nSentiment: negative\nReview:.\nSentiment: positive\n"
    close = Task("mood", "Review:{text}\nSentiment:", TASK.labels)
    assert kept_text(tokenizer, close, SHOTS[2:]) == "Review:it.\nSentiment: positive\n"


def test_anchors_are_those_of_the_demonstrations_that_fit_the_window(tiny_model):
    """The first positive one is dropped, the first of the class with the most examples."""
    tokenizer = tiny_model[1]
    whole = Encoder(tokenizer, TASK, None).encode_demonstrations(SHOTS)
    kept = kept_text(tokenizer, TASK, SHOTS, window=len(whole) + 2)
    assert kept == "Review:\nSentiment: negative\nReview:\nSentiment: positive\n"


# Scores

# GPT-2 and OPT learn their positions; GPT-J's table of positions is one of angles; Phi and GPT-NeoX rotate in part.
FAMILIES = ["llama", "qwen3", "gemma2", "phi", "gptj", "gpt_neox", "falcon", "gpt2", "opt"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_of_a_prefix_is_a_mask_over_the_rest(name):
    """Oracle: one forward with a mask by hand. Right padding (second row) and a word after it change nothing."""
    model = families.build(name).double()
    ids = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    prefix, kept, prompts, word = ids[:12], [0, 1, 5, 6, 11], [ids[12:18], ids[18:21]], ids[21:]
    start = len(kept) if name in ("gpt2", "opt") else len(prefix)
    with evaluating(model):
        shared = PrefixCache(model, prefix, 0, kept=kept)
        last = shared.last_logits(prompts)
        words = shared.word_log_likelihoods(prompts, [word])[:, 0]
        everything = PrefixCache(model, prefix, 0).last_logits(prompts)
    assert shared.cached_bytes == cache_bytes(model, len(kept))
    assert (everything - last).abs().max() > 0.01, "what is dropped must matter for this to be a test"
    for row, prompt in enumerate(prompts):
        logits = logits_by_mask(model, prefix, kept, [*prompt, *word], start)
        torch.testing.assert_close(last[row], logits[len(prompt) - 1].float(), atol=ROUNDING, rtol=0)
        steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = steps.gather(1, torch.tensor(word, device=DEVICE)[:, None]).sum()
        torch.testing.assert_close(words[row], expected.float(), atol=ROUNDING, rtol=0)


def cache_bytes(model, tokens):
    with evaluating(model):
        cache = model(input_ids=torch.arange(3, 3 + tokens, device=DEVICE)[None], use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("task", [TASK, COLLIDING], ids=lambda task: task.name)
def test_labels_are_scored_after_the_anchors(tiny_model, family, task):
    """Oracle: the mask by hand, one text and one word at a time; by first tokens and whole words."""
    tokenizer = tiny_model[1]
    model = build(family, len(tokenizer))
    shots = [Example(shot.text, task.labels[index % 2]) for index, shot in enumerate(SHOTS)]
    encoder = AnchorEncoder(tokenizer, task, None)
    prefix = encoder.encode_demonstrations(shots)
    words = list(label_token_ids(tokenizer, task).values())
    whole = len({word[0] for word in words}) < len(words)
    start = len(prefix) if family == "llama" else len(encoder.anchors)
    expected = []
    for text in TEXTS:
        prompt = tokenizer(task.prompt(text))["input_ids"]
        for word in words:
            read = word if whole else word[:1]
            logits = logits_by_mask(model, prefix, encoder.anchors, [*prompt, *read], start)[len(prompt) - 1 : -1]
            expected.append(logits.log_softmax(-1).gather(1, torch.tensor(read, device=DEVICE)[:, None]).sum())
    expected = torch.stack(expected).view(len(TEXTS), -1).log_softmax(1).float().cpu()
    with fit(model, tokenizer, task, shots, 5) as predictor:
        assert predictor.contexts == ("prompt",)
        assert predictor.notes == {"extra_tokens": len(encoder.anchors)}
        assert predictor.stored_bytes == cache_bytes(model, len(encoder.anchors))
        actual = predictor.scorer.log_probabilities(TEXTS)
        examples = [Example(text, task.labels[0]) for text in TEXTS]
        assert torch.equal(predictor.scorer.evaluate(examples).probabilities, actual.exp())
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=0)
    in_context = Scorer(model, tokenizer, task, demonstrations=shots).log_probabilities(TEXTS)
    assert (actual - in_context).abs().max() > 0.01


# Refusals, and restoring the model


@pytest.mark.parametrize(
    ("family", "task", "message"),
    [
        ("bloom", TASK, "a bloom model cannot continue from a part of its cache"),
        ("dynamic llama", TASK, "a llama model cannot continue"),
        ("llama", OPEN, "task 'open' has no labels"),
    ],
)
def test_tasks_and_models_without_anchors_are_refused_at_once(tiny_model, family, task, message):
    tokenizer = tiny_model[1]
    with pytest.raises(InputError, match=message):
        fit(build(family, len(tokenizer)), tokenizer, task, SHOTS, 5)


def test_the_model_stays_as_it_was(llama):
    model, tokenizer = llama
    model.train()
    model.model.layers[0].eval()
    before = state(model)
    with fit(model, tokenizer, TASK, SHOTS, 5) as predictor:
        predictor.predict(TEXTS)
        assert state(model) == before
    handle = model.model.layers[1].register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        fit(model, tokenizer, TASK, SHOTS, 5)
    handle.remove()
    assert state(model) == before
