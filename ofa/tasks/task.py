"""What a task is: a template, the label words that answer it, and labelled examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ofa.errors import InputError

TEXT_SLOT = "{text}"


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text; in an open-ended task the text is the prompt and the label its completion."""

    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """How a text becomes a prompt and which words answer it.

    Without labels the task is open-ended: its examples are prompt and completion pairs. Raises `InputError` for a
    template or labels that cannot work.
    """

    name: str
    template: str = TEXT_SLOT
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields, and turn a list of labels into a tuple."""
        _check_name(self.name)
        _check_template(self.template, self.open_ended)
        _check_labels(self.labels)
        object.__setattr__(self, "labels", tuple(self.labels))

    @property
    def open_ended(self) -> bool:
        """Whether the task has no label set."""
        return not self.labels

    def prompt(self, text: str) -> str:
        """The template with the text in place; other braces, in the template or the text, stay as they are."""
        return self.template.replace(TEXT_SLOT, text)

    def target(self, label: str) -> str:
        """What follows the prompt: the label with its leading space, or an open-ended task's completion as written."""
        return label if self.open_ended else " " + label

    def demonstration(self, example: Example) -> str:
        """Prompt, label and line end: one example as it stands before the prompt to be answered."""
        return self.prompt(example.text) + self.target(example.label) + "\n"

    def to_dict(self) -> dict[str, object]:
        """The task as JSON values: name, template, labels."""
        return {"name": self.name, "template": self.template, "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Task:
        """The task of a JSON object with name, template and labels; other keys are ignored.

        With an empty list of labels the task is open-ended and the template may be left out. Raises `InputError` for
        a missing key or a wrong value.
        """
        if not isinstance(values, Mapping):
            raise InputError(f'a task must be a JSON object with "name", "template" and "labels", not {values!r}')
        required = ("name", "template", "labels") if values.get("labels") else ("name", "labels")
        missing = [key for key in required if key not in values]
        if missing:
            raise InputError(f"the task has no {_quoted(missing)}: add it (labels: [] for prompt and completion pairs)")
        # The values may be of any JSON type here; the checks on construction refuse the wrong ones.
        return cls(values["name"], values.get("template", TEXT_SLOT), values["labels"])  # type: ignore[arg-type]


@dataclass(frozen=True)
class TaskData:
    """A task with its examples; the test examples may be empty."""

    task: Task
    train: tuple[Example, ...]
    test: tuple[Example, ...] = ()


def unescape_template(template: str) -> str:
    r"""Turn the two-character escapes \n and \t, as a shell hands them over, into a newline and a tab."""
    return template.replace("\\n", "\n").replace("\\t", "\t")


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"the name of a task must be a non-empty text, not {name!r}")


def _check_template(template: object, open_ended: bool) -> None:
    if not isinstance(template, str):
        raise InputError(f"the template of a task must be a text that contains {TEXT_SLOT}, not {template!r}")
    slots = template.count(TEXT_SLOT)
    if slots != 1:
        raise InputError(
            f"the template {template!r} contains {TEXT_SLOT} {slots} times: it must contain it exactly once"
        )
    if template != template.rstrip() and not open_ended:
        # The label brings its own leading space, which is part of its first token.
        raise InputError(
            f"the template {template!r} ends in whitespace: remove it, the label adds its own leading space"
        )


def _check_labels(labels: object) -> None:
    if not isinstance(labels, list | tuple):
        raise InputError(f"the labels of a task must be a list of texts, not {labels!r}")
    for label in labels:
        _check_label(label)
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise InputError(f"the labels of a task must differ, but {_quoted(repeated)} is listed more than once")
    if len(labels) == 1:
        raise InputError(f'a task needs at least two labels, but "{labels[0]}" is the only one: add the others')


def _check_label(label: object) -> None:
    if not isinstance(label, str):
        raise InputError(f"a label must be a text, not {label!r}: write label names, in quotes")
    if not label.strip():
        raise InputError("a label of the task is empty: write a word that answers the template")
    if label != label.strip() or "\n" in label:
        raise InputError(f"the label {label!r} has surrounding whitespace or a line break: remove it")


def _quoted(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)
