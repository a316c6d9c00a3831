"""Measure a model layer by layer: label predictions from hidden states, step lengths, sharpness.

The analysis of OFA (arXiv 2505.19107). The paper does not define its "probe", so both usual readings are here: the
*logit lens* (each layer's hidden state goes through the model's final norm and head) and, given training examples, a
*linear probe* (logistic regression on each layer's hidden states). Both read the prompt's last token after each decoder
layer. docs/probing.md has the definitions and reasons.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ofa import anatomy as anatomies
from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder, batches_by_length, collate, scores_whole_words
from ofa.evaluation.scorer import Progress
from ofa.models.introspection import accepted_arguments, evaluating, frozen, model_window
from ofa.models.load import refuse_encoder
from ofa.models.types import CausalLM, Tokenizer
from ofa.probing.linear_probe import linear_probe
from ofa.probing.logit_lens import LogitLens
from ofa.probing.results import Probe, Readout, Steps
from ofa.regularizers.attach import fused_regularizers

if TYPE_CHECKING:
    from ofa.tasks import Data, TaskData
    from ofa.tasks.task import Example, Task


def probe(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    examples: TaskData | Data,
    *,
    training: TaskData | Data = (),
    demonstrations: TaskData | Data = (),
    estimator: str = "auto",
    samples: int = 1,
    convention: str = "theory",
    tokens: str = "no-sinks",
    seed: int = 0,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Probe:
    """Measure a model layer by layer on labelled examples; the model's state is restored.

    After the last layer, the lens equals `Scorer`. If two labels share their first token, the lens scores whole words,
    as `Scorer` does: the sum of log p over a word's tokens. Steps are measured on the prompts at both granularities,
    or only at "layer" if the family has no boundary between its sublayers.

    Args:
        examples: anything that `load_task` takes; so are `training` and `demonstrations`.
        training: examples to train the linear probe on, with every label among them; if empty, it is skipped.
        demonstrations: examples to put in front of every prompt.
        estimator, samples, convention, tokens, seed: see `fused_regularizers`. A whole layer has no closed form, so
            "hutchinson" replaces an `estimator` that needs one at granularity "layer".
        progress: called with (done, total) forward passes of single texts.

    Returns:
        Readouts of the hidden states, and the steps at both granularities.

    Raises:
        InputError: no examples, an open-ended task, a label missing from the task or the training examples, a
            model whose steps are not recognized, an option out of range, or results that are not finite.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("bad", "good"))
        >>> found = ofa.probe(model, tokenizer, task, [("a joy", "good"), ("a bore", "bad")])
        >>> found.lens.accuracy.shape, sorted(found.steps)
        (torch.Size([3]), ['layer', 'sublayer'])
    """
    refuse_encoder(model.config)
    from ofa.tasks import examples_from

    examples, training = examples_from(examples, task), examples_from(training, task)
    demonstrations = examples_from(demonstrations, task)
    _check_examples(task, examples, training)
    start = time.perf_counter()
    try:
        anatomy = anatomies.find(model)
    except InputError as error:
        raise InputError(f"{error}; a probe needs the steps, `ofa evaluate` does not") from error
    encoder = Encoder(tokenizer, task, model_window(model))
    truth, classes = (_class_indices(encoder, part) for part in (examples, training))
    texts, training_texts = ([example.text for example in part] for part in (examples, training))
    before = encoder.encode_demonstrations(demonstrations, texts=texts)
    prompts = [[*before, *ids] for ids in encoder.encode_prompts(texts, demonstrations=before)]
    truncated = encoder.truncated
    training_prompts = [[*before, *ids] for ids in encoder.encode_prompts(training_texts, demonstrations=before)]
    words = _scored_words(encoder)
    granularities = [name for name in anatomies.GRANULARITIES if name == "layer" or anatomy.sublayer_steps]
    passes = len(prompts) * (len(granularities) + len(_contexts(words))) + len(training_prompts)
    subject = _Subject(model, LogitLens(model, anatomy.layers), encoder.pad_id, batch_size, _counted(progress, passes))
    how = {"samples": samples, "convention": convention, "tokens": tokens, "seed": seed}
    with evaluating(model), frozen(model):  # the closed form of the trace requires constant weights
        steps = {name: _measured_steps(subject, prompts, name, estimator, **how) for name in granularities}
        log_probabilities, states = _read_words(subject, prompts, words)
        known = _last_states(subject, training_prompts) if training else None
    linear = None
    if known is not None:
        by_layer = [linear_probe(train, classes, test) for train, test in zip(known, states, strict=True)]
        linear = Readout(torch.stack(by_layer), truth)
    result = Probe(
        lens=Readout(log_probabilities, truth),
        linear=linear,
        steps=steps,
        mode="whole word" if scores_whole_words(encoder.labels) else "first token",
        truncated=truncated,
        seconds=time.perf_counter() - start,
    )
    _check_finite(result)
    return result


@dataclass(frozen=True)
class _Subject:
    """The model under measurement and how to run it; `count` is called with the number of texts of each forward."""

    model: CausalLM
    lens: LogitLens
    pad_id: int
    batch_size: int
    count: Callable[[int], None]

    def batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(indices, ids, mask) of batches of similar lengths."""
        for batch in batches_by_length([len(sequence) for sequence in sequences], self.batch_size):
            yield batch, *collate([sequences[index] for index in batch], self.pad_id)
            self.count(len(batch))


def _measured_steps(
    subject: _Subject, prompts: Sequence[Sequence[int]], granularity: str, estimator: str, **options: object
) -> Steps:
    model = subject.model
    if granularity == "layer" and estimator in ("auto", "exact"):
        estimator = "hutchinson"
    device = next(model.parameters()).device
    one_logit = {"logits_to_keep": 1} if "logits_to_keep" in accepted_arguments(model) else {}
    how: dict[str, Any] = {"estimator": estimator, "granularity": granularity, **options}
    attached = fused_regularizers(model, 1.0, 1.0, **how)
    with attached, attached.measuring():
        norms, traces = (torch.empty(len(attached.steps), len(prompts)) for _ in range(2))
        ratios = torch.empty(len(attached.steps) - 1, len(prompts))
        for batch, input_ids, mask in subject.batches(prompts):
            model(input_ids=input_ids.to(device), attention_mask=mask.to(device), **one_logit)
            measured = attached.measurements
            for kept, values in ((norms, measured.step_norms), (ratios, measured.ratios), (traces, measured.traces)):
                assert values is not None
                kept[:, batch] = values.float().cpu()
    return Steps(
        layers=tuple(step.layer for step in attached.steps),
        branches=tuple("+".join(branch.role for branch in step.branches) for step in attached.steps),
        estimator=attached.estimator,
        norms=norms,
        ratios=ratios,
        traces=traces,
    )


def _scored_words(encoder: Encoder) -> list[tuple[int, ...]]:
    """The scored tokens of each label: its first one, or its word and line end if labels share their first token."""
    whole = scores_whole_words(encoder.labels)
    return [word if whole else word[:1] for word in encoder.labels.values()]


def _contexts(words: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The distinct suffixes to append to a prompt so that every token of every word is predicted."""
    return list(dict.fromkeys(word[:-1] for word in words))


def _read_words(
    subject: _Subject, prompts: Sequence[Sequence[int]], words: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the words (L, n, words), and states at the last prompt token (L, n, d); float32, CPU."""
    vocabulary = sorted({token for word in words for token in word})
    scores: Tensor | None = None
    last: Tensor | None = None
    for context in _contexts(words):
        for batch, input_ids, mask in subject.batches([[*prompt, *context] for prompt in prompts]):
            ends = torch.tensor([[len(prompts[index]) - 1] for index in batch])
            states = subject.lens.states(input_ids, mask, ends + torch.arange(len(context) + 1))
            if scores is None or last is None:
                scores = torch.empty(len(states), len(prompts), len(words))
                last = torch.empty(len(states), len(prompts), states.shape[-1])
            last[:, batch] = states[:, :, 0].float().cpu()
            predicted = subject.lens.log_probabilities(states, vocabulary).cpu()
            for column, word in enumerate(words):
                if word[:-1] == context:
                    places = [vocabulary.index(token) for token in word]
                    scores[:, batch, column] = predicted[:, :, range(len(word)), places].sum(-1)
    assert scores is not None
    assert last is not None
    return scores.log_softmax(2), last


def _last_states(subject: _Subject, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states at the last token (L, n, d), float32, on the CPU."""
    parts = []
    order: list[int] = []
    for batch, input_ids, mask in subject.batches(prompts):
        parts.append(subject.lens.states(input_ids, mask, mask.sum(1, keepdim=True) - 1)[:, :, 0].float().cpu())
        order += batch
    return torch.cat(parts, dim=1)[:, torch.tensor(order).argsort()]


def _check_examples(task: Task, examples: Sequence[Example], training: Sequence[Example]) -> None:
    if task.open_ended:
        raise InputError(
            f"task {task.name!r} has no labels for a probe to predict: give a task with labels "
            "(`ofa evaluate` scores open-ended tasks)"
        )
    if not examples:
        raise InputError(f"task {task.name!r} has no example to probe with: give at least one")
    seen = {example.label for example in training}
    absent = next((label for label in task.labels if training and label not in seen), None)
    if absent is not None:
        raise InputError(
            f"the training examples of the linear probe have none of the label {absent!r}: give some of every label"
        )


def _class_indices(encoder: Encoder, examples: Sequence[Example]) -> Tensor:
    for example in examples:
        encoder.encode_target(example.label)
    order = list(encoder.labels)
    return torch.tensor([order.index(example.label) for example in examples], dtype=torch.long)


def _counted(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(texts: int) -> None:
        nonlocal done
        done += texts
        if progress is not None:
            progress(done, total)

    return count


def _check_finite(result: Probe) -> None:
    strange = next((value for value in result.values() if not torch.isfinite(torch.tensor(value.value))), None)
    if strange is not None:
        raise InputError(
            f"the {strange.metric} of layer {strange.layer} is not a number, because the adapter has diverged or the "
            "dtype is too narrow for this model: probe it in float32, or train with a lower learning rate"
        )
