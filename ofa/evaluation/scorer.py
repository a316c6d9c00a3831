"""Score labels with a language model, and evaluate its predictions on examples."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder, batches_by_length, collate, scores_whole_words
from ofa.evaluation.head import HeadEncoder, HeadLogits
from ofa.evaluation.prefix_cache import PrefixCache
from ofa.evaluation.scores import CompletionMetrics, Metrics, metrics
from ofa.models.introspection import evaluating, model_window
from ofa.models.load import is_encoder, refuse_encoder
from ofa.models.types import CausalLM, Tokenizer

if TYPE_CHECKING:
    from ofa.evaluation.calibration import Calibration
    from ofa.tasks import Data, TaskData
    from ofa.tasks.task import Example, Task


__all__ = ["CompletionMetrics", "Evaluation", "Metrics", "Scorer", "evaluate", "metrics"]

logger = logging.getLogger(__name__)

Mode = Literal["first token", "whole word", "completion", "head"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a model on a set of examples, in their order, and their metrics.

    `probabilities` is (n, number of labels), float32, on the CPU; (n, 0) for an open-ended task. `truncated` counts the
    texts cut to fit the window, `mode` is what was scored, and `seconds` is wall-clock time.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("bad", "good"))
        >>> result = ofa.evaluate(model, tokenizer, task, [("a joy", "good"), ("a bore", "bad")])
        >>> result.probabilities.shape, result.truncated
        (torch.Size([2, 2]), 0)
    """

    metrics: Metrics | CompletionMetrics
    predictions: tuple[str, ...]
    probabilities: Tensor
    seconds: float
    truncated: int
    mode: Mode


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    task: Task,
    examples: TaskData | Data,
    *,
    demonstrations: TaskData | Data = (),
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict every example, optionally with demonstrations in context, and measure the predictions.

    `examples` may be anything that `load_task` takes: a list of (text, label), a DataFrame, a data set, a file.
    `progress(done, total)` is called after every batch. An open-ended task is measured by the exact match of greedy
    completions and by the likelihood of the true completions.

    Returns:
        The predictions and their metrics.

    Raises:
        InputError: no examples, an empty text, or a label that the task does not have.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("bad", "good"))
        >>> result = ofa.evaluate(model, tokenizer, task, [("a joy", "good"), ("a bore", "bad")])
        >>> result.metrics.count, len(result.predictions)
        (2, 2)
    """
    from ofa.tasks import examples_from

    shown = examples_from(demonstrations, task)
    scorer = Scorer(model, tokenizer, task, demonstrations=shown, batch_size=batch_size)
    return scorer.evaluate(examples_from(examples, task), progress=progress)


class Scorer:
    """Scores the label words of a task, or completes its prompts, with one model; results are in input order.

    Texts are batched by length; batching and padding do not change a score. Every call uses the model's current
    weights and restores its training mode. `demonstrations` go in front of every prompt; each call computes them once,
    so one call with many texts is faster than many calls.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("bad", "good"))
        >>> scorer = ofa.Scorer(model, tokenizer, task)
        >>> texts = ["a warm film", "it drags"]
        >>> scorer.predict_proba(texts).sum(1)
        tensor([1., 1.])
        >>> scorer.log_probabilities(texts).shape, len(scorer.predict(texts)), scorer.truncated
        (torch.Size([2, 2]), 2, 0)
        >>> examples = [ofa.Example("a joy", "good"), ofa.Example("a bore", "bad")]
        >>> scorer.evaluate(examples).metrics.accuracy == scorer.accuracy(examples)
        True
        >>> totals, tokens = scorer.completion_totals(examples)
        >>> (totals / tokens).shape
        torch.Size([2])
        >>> len(scorer.generate(["a warm film"], max_new_tokens=2))
        1
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        task: Task,
        *,
        demonstrations: Sequence[Example] = (),
        batch_size: int = 16,
        calibration: Calibration | None = None,
    ) -> None:
        if type(self) is not Scorer:  # subclasses read prompts
            refuse_encoder(model.config)
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.demonstrations = tuple(demonstrations)
        self.batch_size = batch_size
        self.calibration = calibration
        self.encoder = encoder_for(model, tokenizer, task)
        self.mode: Mode = "completion" if task.open_ended else "first token"
        if isinstance(self.encoder, HeadEncoder):
            self.mode = "head"
        elif scores_whole_words(self.encoder.labels):
            self.mode = "whole word"
            _warn_of_whole_words(task.name)

    @property
    def truncated(self) -> int:
        """Number of texts cut so far to fit the model's window."""
        return self.encoder.truncated

    def log_probabilities(self, texts: Sequence[str], *, progress: Progress | None = None) -> Tensor:
        """Log-probabilities (n, number of labels) of the labels, float32, on the CPU, normalised over the labels.

        A label is scored at the last token of the prompt by its first token, or by the whole word and the line end that
        ends it where two labels share their first token: log p summed over the tokens, not divided by their number. An
        encoder scores it by its head.

        Raises:
            InputError: a text is empty, or the task has no labels.
        """
        if self.task.open_ended:
            raise InputError(f"task {self.task.name!r} has no labels to choose from: call generate instead")
        words = list(self.encoder.labels.values())
        firsts = torch.tensor([word[0] for word in words])
        demonstrations, prompts = self._encode(texts)
        scores = torch.empty(len(texts), len(words))
        with evaluating(self.model):
            shared = self.shared_prefix(demonstrations)
            for batch in self.batches(prompts, progress):
                chosen = [prompts[index] for index in batch]
                if self.mode == "whole word":
                    scores[batch] = shared.word_log_likelihoods(chosen, words).cpu()
                else:
                    scores[batch] = shared.last_logits(chosen).cpu()[:, firsts]
        _refuse_nan(scores)
        scores = scores.log_softmax(dim=1)
        # Calibrations are made without demonstrations, which change the probabilities themselves.
        return scores if self.calibration is None or self.demonstrations else self.calibration.apply(scores)

    def predict_proba(self, texts: Sequence[str], *, progress: Progress | None = None) -> Tensor:
        """Probabilities (n, number of labels) of the labels, float32, on the CPU; every row sums to 1."""
        return self.log_probabilities(texts, progress=progress).exp()

    def predict(self, texts: Sequence[str], *, progress: Progress | None = None) -> list[str]:
        """The most probable label of every text; for an open-ended task, its completion by `generate`."""
        if self.task.open_ended:
            return self.generate(texts, progress=progress)
        best = self.log_probabilities(texts, progress=progress).argmax(dim=1)
        return [self.task.labels[index] for index in best.tolist()]

    def generate(
        self, texts: Sequence[str], max_new_tokens: int = 32, *, progress: Progress | None = None
    ) -> list[str]:
        """Greedy completions of the prompts, leading blanks included, up to the end-of-text token."""
        demonstrations, prompts = self._encode(texts, room=max_new_tokens)
        prompts = [[*demonstrations, *prompt] for prompt in prompts]
        completions = [""] * len(texts)
        with evaluating(self.model):
            for batch in self.batches(prompts, progress):
                new = self._greedy([prompts[index] for index in batch], max_new_tokens)
                texts_of_batch = self.tokenizer.batch_decode(new, skip_special_tokens=True)
                for index, text in zip(batch, texts_of_batch, strict=True):
                    completions[index] = text
        return completions

    def evaluate(self, examples: Sequence[Example], *, progress: Progress | None = None) -> Evaluation:
        """Predict the examples and measure the predictions; see the function `evaluate`."""
        if not examples:
            raise InputError(f"task {self.task.name!r} has no example to evaluate on: give at least one")
        start, cut_before = time.perf_counter(), self.truncated
        if self.task.open_ended:
            return _evaluate_completions(self, examples, progress, start)
        truth = [example.label for example in examples]
        for label in truth:
            self.encoder.encode_target(label)
        probabilities = self.predict_proba([example.text for example in examples], progress=progress)
        return Evaluation(
            metrics=metrics(probabilities, truth, self.task.labels),
            predictions=tuple(self.task.labels[index] for index in probabilities.argmax(1).tolist()),
            probabilities=probabilities,
            seconds=time.perf_counter() - start,
            truncated=self.truncated - cut_before,
            mode=self.mode,
        )

    def accuracy(self, examples: Sequence[Example]) -> float:
        """Share of the examples whose label, or whole completion, is predicted correctly; see `evaluate`."""
        return self.evaluate(examples).metrics.accuracy

    def shared_prefix(self, demonstrations: Sequence[int]) -> PrefixCache:
        """The cache of the demonstrations' ids, used to score prompts; methods that score otherwise override this."""
        if self.mode == "head":
            return HeadLogits(self.model, self.encoder.pad_id)  # type: ignore[return-value]
        return PrefixCache(self.model, demonstrations, self.encoder.pad_id)

    def completion_totals(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Log-likelihood (n,), float32, of each example's own label or completion, and its number of tokens (n,)."""
        targets = [self.encoder.encode_target(example.label, example.text) for example in examples]
        room = max((len(target) for target in targets), default=0)
        demonstrations, prompts = self._encode([example.text for example in examples], room=room)
        totals = torch.empty(len(examples))
        with evaluating(self.model):
            shared = self.shared_prefix(demonstrations)
            whole = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
            for batch in self.batches(whole, None):
                chosen = [targets[index] for index in batch]
                totals[batch] = shared.completion_log_likelihoods([prompts[i] for i in batch], chosen).cpu()
        _refuse_nan(totals)
        return totals, torch.tensor([len(target) for target in targets])

    def _encode(self, texts: Sequence[str], room: int | None = None) -> tuple[list[int], list[list[int]]]:
        demonstrations = self.encoder.encode_demonstrations(self.demonstrations, texts=texts, room=room)
        return demonstrations, self.encoder.encode_prompts(texts, demonstrations=demonstrations, room=room)

    def batches(self, sequences: Sequence[Sequence[int]], progress: Progress | None) -> Iterator[list[int]]:
        """Yield batches of indices of sequences of similar lengths; `progress` is called after each batch."""
        done = 0
        for batch in batches_by_length([len(sequence) for sequence in sequences], self.batch_size):
            yield batch
            done += len(batch)
            if progress is not None:
                progress(done, len(sequences))

    def _greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        # New tokens are appended after the last column: only here, the padding is on the left.
        flipped = collate([prompt[::-1] for prompt in prompts], self.encoder.pad_id)
        device = next(self.model.parameters()).device
        input_ids, attention_mask = (part.flip(1).to(device) for part in flipped)
        # Override the model's own generation settings, which could change the scores.
        tokens = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.encoder.pad_id,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        return tokens[:, input_ids.shape[1] :]


def encoder_for(model: CausalLM, tokenizer: Tokenizer, task: Task) -> Encoder:
    """The token ids of a task for a model: prompts and label words, or for an encoder texts and logits."""
    if is_encoder(model.config):
        return HeadEncoder(model, tokenizer, task)
    return Encoder(tokenizer, task, model_window(model))


def _refuse_nan(scores: Tensor) -> None:
    if scores.isnan().any():
        raise InputError(
            "the model's scores are not numbers, because its weights have diverged or its dtype is too narrow: "
            "train with a lower learning rate, or use float32"
        )


def _evaluate_completions(
    scorer: Scorer, examples: Sequence[Example], progress: Progress | None, start: float
) -> Evaluation:
    truth = [example.label.strip() for example in examples]
    cut_before = scorer.truncated
    # One token more than the longest true completion, so that a longer answer does not count as a match.
    longest = max(len(scorer.encoder.encode_target(example.label, example.text)) for example in examples)
    generated = scorer.generate([example.text for example in examples], longest + 1, progress=progress)
    truncated = scorer.truncated - cut_before
    predictions = tuple(_first_lines(text, like) for text, like in zip(generated, truth, strict=True))
    totals, counts = scorer.completion_totals(examples)
    matches = sum(prediction == like for prediction, like in zip(predictions, truth, strict=True))
    return Evaluation(
        metrics=CompletionMetrics(
            exact_match=matches / len(examples),
            negative_log_likelihood=-float(totals.sum() / counts.sum()),
            count=len(examples),
        ),
        predictions=predictions,
        probabilities=torch.empty(len(examples), 0),
        seconds=time.perf_counter() - start,
        truncated=truncated,
        mode=scorer.mode,
    )


def _first_lines(text: str, like: str) -> str:
    """The first lines of `text`, as many as `like` has, stripped: a newline ends a demonstration's answer."""
    return "\n".join(text.strip().split("\n")[: like.count("\n") + 1]).strip()


@functools.cache
def _warn_of_whole_words(task: str) -> None:
    logger.warning(
        "two labels of task %r share their first token: all its labels are scored by whole words and their line end",
        task,
    )
