"""Encoding: what is cut, what is never cut, and the tokens of a label after a prompt."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder, batches_by_length, collate, label_token_ids, scores_whole_words
from ofa.models.introspection import model_window
from ofa.tasks.task import Example, Task
from ofa.training.loss import encode_example

TASK = Task(name="mood", template="Review: {text}\nSentiment:", labels=("negative", "positive"))
OPEN = Task(name="facts", template="{text}")
WORDS = "a warm and funny film that never drags, dull and slow at first but in the end far too short"
EXAMPLES = [
    Example("a warm film", "positive"),
    Example("dull and slow", "negative"),
    Example("funny", "positive"),
    Example("far too long", "negative"),
    Example("it never drags", "positive"),
    Example("slow", "negative"),
]


def byte_level_tokenizer():
    """Like GPT-2's: a space belongs to the next word, and no special token is put in front of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, TASK.prompt("x") + " positive", TASK.prompt("x") + " negative"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentencepiece_tokenizer():
    """Like Llama-2's: a space is added before the first word of a text, and BOS is put in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<s>", "<unk>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz:,\n▁RS"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, TASK.prompt("x") + " positive", TASK.prompt("x") + " negative"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<unk>")


@pytest.fixture(params=[byte_level_tokenizer, sentencepiece_tokenizer])
def tokenizer(request):
    return request.param()


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize("label", TASK.labels)
def test_a_label_is_what_it_adds_to_a_prompt(tokenizer, label):
    # Protects the score: the bare word, without its leading space, has other tokens.
    prompt = TASK.prompt("some quite different film")
    added = label_token_ids(tokenizer, TASK)[label]
    assert tokenizer(prompt)["input_ids"] + list(added) == tokenizer(prompt + " " + label)["input_ids"]
    assert Encoder(tokenizer, TASK, None).encode_target(label) == list(added)


@pytest.mark.parametrize(
    ("ids", "whole"),
    [({"a": (1,), "b": (2,)}, False), ({"a": (1, 3), "b": (1, 4), "c": (2,)}, True), ({}, False)],
)
def test_whole_words_are_scored_only_where_first_tokens_collide(ids, whole):
    assert scores_whole_words(ids) is whole


def test_a_label_that_merges_with_the_template_is_refused():
    # Protects the prompt: its last token must be the one that the model reads before the label.
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {char: index for index, char in enumerate("tex: ab")} | {": ": 7}
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [(":", " ")])))
    with pytest.raises(InputError, match="merges with the end of the template"):
        label_token_ids(merging, Task(name="t", template="{text}:", labels=("a", "b")))


@pytest.mark.parametrize("labels", [("is", "is a"), ("film", "far", "film and far")], ids=" / ".join)
def test_words_that_are_scored_whole_end_as_in_a_demonstration(tokenizer, labels):
    """Otherwise a label that is a prefix of another is always more probable."""
    task = Task("t", TASK.template, labels)
    ids = label_token_ids(tokenizer, task)
    assert scores_whole_words(ids)
    encoder = Encoder(tokenizer, task, None)
    for label, word in ids.items():
        example = Example("a warm film", label)
        assert encoder.encode_demonstrations([example]) == [*encoder.encode_prompt("a warm film"), *word]
        assert encode_example(encoder, example).targets == word
        assert encoder.training_rows([example])[0]["labels"][-len(word) :] == list(word)
        assert not any(word == other[: len(word)] for name, other in ids.items() if name != label)


def test_a_label_that_begins_another_is_refused_where_the_tokenizer_has_no_line_end():
    from tokenizers import normalizers

    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    with pytest.raises(InputError, match="'is a' of task 't' begins with label 'is'"):
        label_token_ids(tokenizer, Task("t", "{text}:", ("is", "dull", "is a")))


def test_labels_that_are_the_same_tokens_are_refused():
    # Protects against a task that no model can answer: the two labels always score the same.
    from tokenizers import normalizers

    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="have the same tokens"):
        label_token_ids(tokenizer, Task(name="t", template="{text}:", labels=("Yes", "yes")))


@pytest.mark.parametrize("window", [24, 30, 41, 60])
def test_truncation_keeps_the_template_and_the_end_of_the_text(tokenizer, window):
    # Protects the template: cutting ids instead of the text would remove one end of it.
    encoder = Encoder(tokenizer, TASK, window)
    room = max(len(ids) for ids in encoder.labels.values())
    text = " ".join([WORDS] * 5)
    ids = encoder.encode_prompt(text)
    shown = text_of(tokenizer, ids)
    assert shown.startswith("Review: ")
    assert shown.endswith("\nSentiment:")
    kept = shown.removeprefix("Review: ").removesuffix("\nSentiment:")
    assert kept
    assert text.endswith(kept.strip())
    # One more character can cost two tokens, because it changes how a word is split.
    assert window - room - 1 <= len(ids) <= window - room
    assert encoder.truncated == 1


def test_a_text_that_fits_is_left_alone_and_not_counted(tokenizer):
    encoder = Encoder(tokenizer, TASK, 200)
    assert encoder.encode_prompt("a warm film") == tokenizer(TASK.prompt("a warm film"))["input_ids"]
    assert encoder.truncated == 0


def test_room_and_demonstrations_are_taken_from_the_window(tokenizer):
    # Protects against positions beyond the window: prompt, label and demonstrations must fit together.
    encoder = Encoder(tokenizer, TASK, 120)
    demonstrations = encoder.encode_demonstrations(EXAMPLES[:2])
    ids = encoder.encode_prompt(" ".join([WORDS] * 9), demonstrations=demonstrations, room=7)
    assert 120 - 1 <= len(demonstrations) + len(ids) + 7 <= 120


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_text_is_refused_and_named(text):
    encoder = Encoder(byte_level_tokenizer(), TASK, 100)
    with pytest.raises(InputError, match="the text to encode is blank"):
        encoder.encode_prompt(text)
    with pytest.raises(InputError, match="text 2 of 2 is blank"):
        encoder.encode_prompts(["fine", text])


def test_a_template_beyond_the_window_is_refused(tokenizer):
    with pytest.raises(InputError, match="leaves no room for a text in a window of 4 tokens"):
        Encoder(tokenizer, TASK, 4).encode_prompt(WORDS)


def test_an_unknown_label_is_refused():
    with pytest.raises(InputError, match="'awful' is not a label of task 'mood'"):
        Encoder(byte_level_tokenizer(), TASK, 100).encode_target("awful")


def test_demonstrations_and_prompt_are_the_tokens_of_the_whole_text(tokenizer):
    # Protects in-context learning: a single BOS, and no extra spaces at the seams.
    encoder = Encoder(tokenizer, TASK, None)
    demonstrations = encoder.encode_demonstrations(EXAMPLES)
    prompt = encoder.encode_prompt("a slow film", demonstrations=demonstrations)
    whole = "".join(TASK.demonstration(example) for example in EXAMPLES) + TASK.prompt("a slow film")
    assert demonstrations + prompt == tokenizer(whole)["input_ids"]
    assert encoder.encode_demonstrations([]) == []


@pytest.mark.parametrize("window", [30, 45, 60, 70])
def test_demonstrations_are_dropped_from_the_front_with_classes_balanced(window, caplog):
    # Protects the priors of in-context learning: a class shown less often is predicted less often.
    tokenizer = byte_level_tokenizer()
    encoder = Encoder(tokenizer, TASK, window)
    with caplog.at_level(logging.WARNING):
        ids = encoder.encode_demonstrations(EXAMPLES, texts=["funny and warm"])
    shown = text_of(tokenizer, ids)
    kept = [example for example in EXAMPLES if TASK.demonstration(example).strip() in shown]
    counts = Counter(example.label for example in kept)
    assert 0 < len(kept) < len(EXAMPLES)
    assert shown == "".join(TASK.demonstration(example) for example in kept).strip()
    assert abs(counts["positive"] - counts["negative"]) <= 1
    assert kept[-1] == EXAMPLES[-1]
    assert f"{len(EXAMPLES) - len(kept)} of {len(EXAMPLES)} demonstrations" in caplog.text
    assert len(ids) + len(encoder.encode_prompt("funny and warm", demonstrations=ids)) <= window


def test_one_long_text_does_not_drive_out_all_demonstrations():
    # Protects the other texts of a call: the long one is cut instead.
    encoder = Encoder(byte_level_tokenizer(), TASK, 140)
    long = " ".join([WORDS] * 9)
    demonstrations = encoder.encode_demonstrations(EXAMPLES, texts=["short", long])
    assert len(demonstrations) > 40
    encoder.encode_prompts(["short", long], demonstrations=demonstrations)
    assert encoder.truncated == 1


def test_the_completion_of_an_open_ended_task_has_the_tokens_of_the_whole_text(tokenizer):
    encoder = Encoder(tokenizer, OPEN, None)
    assert encoder.labels == {}
    whole = tokenizer("a film: warm and funny")["input_ids"]
    assert encoder.encode_prompt("a film:") + encoder.encode_target(" warm and funny", "a film:") == whole


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("2+2=", "4"), ("def f():\n", "    return 1\n"), ("It is ", "funny"), ("It is fun", "ny\n\n")],
)
def test_a_pair_is_trained_as_it_is_written(prompt, completion):
    """Prompt and completion are not separated, and the prompt has the same tokens as in generation."""
    tokenizer = byte_level_tokenizer()
    encoder = Encoder(tokenizer, OPEN, None)
    encoded = encode_example(encoder, Example(prompt, completion))
    assert list(encoded.prompt) == tokenizer(prompt)["input_ids"]
    assert encoded.targets[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([*encoded.prompt, *encoded.targets[:-1]]) == prompt + completion


def test_a_prompt_that_is_cut_keeps_the_blanks_at_its_end():
    encoder = Encoder(byte_level_tokenizer(), OPEN, 12)
    ids = encoder.encode_prompt("   " + WORDS + "  \n", room=3)
    assert encoder.truncated == 1
    assert (WORDS + "  \n").endswith(encoder.tokenizer.decode(ids))


@pytest.mark.parametrize("window", [None, 24])
def test_training_rows_end_in_their_labels(tokenizer, window):
    """Only the label's tokens have a loss, and a long text is cut so that they fit."""
    encoder = Encoder(tokenizer, TASK, window)
    for example, row in zip(EXAMPLES, encoder.training_rows(EXAMPLES), strict=True):
        label = encoder.encode_target(example.label)
        assert row["input_ids"] == encoder.encode_prompt(example.text, room=len(label)) + label
        assert row["labels"] == [-100] * (len(row["input_ids"]) - len(label)) + label
        assert window is None or len(row["input_ids"]) <= window


def test_collate_pads_on_the_right_and_masks_the_padding():
    input_ids, mask = collate([[5, 6, 7], [8]], pad_id=9)
    assert input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 7))
def test_batches_hold_every_index_once_longest_first(lengths, batch_size):
    batches = batches_by_length(lengths, batch_size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(InputError, match="batch size is 0"):
        batches_by_length([1], 0)


@pytest.mark.parametrize(
    ("config", "adapter", "window"),
    [
        (SimpleNamespace(max_position_embeddings=64), None, 64),
        (SimpleNamespace(max_position_embeddings=64), SimpleNamespace(num_virtual_tokens=3), 61),
        (SimpleNamespace(max_position_embeddings=64), SimpleNamespace(r=8), 64),
        (SimpleNamespace(), None, None),
    ],
)
def test_the_window_is_what_the_positions_leave_for_the_input(config, adapter, window):
    # Protects soft prompts: their virtual tokens take positions of their own.
    config.get_text_config = lambda: config
    assert model_window(SimpleNamespace(config=config, active_peft_config=adapter)) == window
