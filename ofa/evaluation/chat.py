"""Put a task's prompt into the user's turn of a model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ofa.errors import InputError, first_sentence
from ofa.models.types import Tokenizer
from ofa.tasks.task import Task

_PROMPT = "the prompt goes here"
_ANSWER = "the answer goes here"


def asked_chat(
    task: Task,
    tokenizer: Tokenizer,
    chat: bool | None = None,
    system: str | None = None,
    *,
    demonstrations: Sequence[str] = (),
) -> Task:
    """The task, `in_chat` if asked for by `chat` or by a system prompt; docs/studies.md says why not by default.

    `demonstrations` names what puts demonstrations in front of a prompt. They are not turns, so that a chat is refused
    beside them.

    Raises:
        InputError: the options contradict each other or the task, or the model has no chat template that can be used.
    """
    if chat is False and system is not None:
        raise InputError("a system prompt is a turn of a chat: leave it out, or leave out --no-chat")
    if task.chat and (chat is not None or system is not None):
        raise InputError(f"the template of task {task.name!r} is a chat already: leave out --chat, --no-chat, --system")
    if not chat and system is None:
        return task
    if demonstrations:
        raise InputError(
            f"demonstrations are not turns of a chat: leave out {', '.join(demonstrations)}, or leave out the chat"
        )
    return in_chat(task, tokenizer, system)


def is_open(task: Task, tokenizer: Tokenizer, chat: bool | None, system: str | None) -> bool:
    """True if no option decides, and the model has a chat template."""
    return chat is None and system is None and _has_template(tokenizer) and not task.chat


def in_chat(task: Task, tokenizer: Tokenizer, system: str | None = None) -> Task:
    """The task with its prompt as the user's turn; the answer begins where the assistant's turn does.

    The returned task is of this model alone, since its template has the model's control tokens. A model that can think
    first answers at once. Without `system`, the system prompt is the chat template's own, if it has one. The template
    ends in a blank if the chat template has one in front of an answer.

    Raises:
        InputError: the model has no chat template, or one that cannot be used.
    """
    if not _has_template(tokenizer):
        raise InputError("the model has no chat template: leave out --chat, or choose an instruct model")
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": _PROMPT})
    try:
        written = _rendered(tokenizer, turns, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and raise what they like
        advice = "leave out --system" if system is not None else "leave out --chat"
        raise InputError(f"the model's chat template failed ({first_sentence(error)}); {advice}") from error
    before, *after = written.split(_PROMPT)
    if len(after) != 1:
        raise InputError("the model's chat template does not show the user's turn once: leave out --chat")
    if system is not None and system.strip() not in before:
        raise InputError("the model's chat template leaves the system prompt out: leave out --system")
    end = after[0].rstrip(" ") + (" " if _blank_before_answer(tokenizer, turns, written) else "")
    return replace(task, template=_escaped(before) + task.template + _escaped(end), chat=True)


def _blank_before_answer(tokenizer: Tokenizer, turns: Sequence[Mapping[str, str]], written: str) -> bool:
    """Whether an answer follows a blank, either of the assistant's turn or of the prompt for it."""
    if written.endswith(" "):
        return True
    try:
        answered = _rendered(tokenizer, [*turns, {"role": "assistant", "content": _ANSWER}])
    except Exception:  # the prompt for the turn is all that is known
        return False
    return answered.startswith(f"{written} {_ANSWER}")


def _rendered(tokenizer: Tokenizer, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )
    )


def _has_template(tokenizer: Tokenizer) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _escaped(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")
