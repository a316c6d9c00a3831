"""Put a task's prompt into the user's turn of a model's chat template."""

from __future__ import annotations

from dataclasses import replace

from ofa.errors import InputError, first_sentence
from ofa.models.types import Tokenizer
from ofa.tasks.task import Task

_PROMPT = "the prompt goes here"


def in_chat(task: Task, tokenizer: Tokenizer, system: str | None = None) -> Task:
    """The task with its prompt as the user's turn; the answer begins where the assistant's turn does.

    The returned task is of this model alone, since its template has the model's control tokens. A model that can think
    first answers at once. Without `system`, the system prompt is the chat template's own, if it has one.

    Raises:
        InputError: the model has no chat template, or one that cannot be used.
    """
    if task.chat:
        raise InputError(f"the template of task {task.name!r} is a chat already: leave out --chat")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the model has no chat template: leave out --chat, or choose an instruct model")
    turns = [{"role": "system", "content": system}] if system is not None else []
    try:
        written = tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": _PROMPT}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    except Exception as error:  # templates are programs, and raise what they like
        advice = "leave out --system" if system is not None else "leave out --chat"
        raise InputError(f"the model's chat template failed ({first_sentence(error)}); {advice}") from error
    before, *after = str(written).split(_PROMPT)
    if len(after) != 1:
        raise InputError("the model's chat template does not show the user's turn once: leave out --chat")
    if system is not None and system.strip() not in before:
        raise InputError("the model's chat template leaves the system prompt out: leave out --system")
    return replace(task, template=_escaped(before) + task.template + _escaped(after[0]), chat=True)


def _escaped(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")
