"""Define a task: a template, the label words that answer it, and labelled examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ofa.errors import InputError, refuse_surrogates
from ofa.tasks.columns import Columns
from ofa.tasks.template import Template

TEXT_SLOT = "{text}"
PAIR_COLUMNS = ("prompt", "completion")
LABELLED_COLUMNS = ("text", "label")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text; in an open-ended task the text is the prompt and the label its completion.

    Example:
        >>> ofa.Example("a warm film", "positive").label
        'positive'
    """

    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """A template that turns a text into a prompt, and the label words that answer it.

    The template names columns of the data in braces. `{text}` stands for `text_column`; the answer is in
    `label_column`. Their defaults are text and label. Without labels the task is open-ended: its examples are pairs,
    and the default columns are prompt and completion. In a `chat` the template ends where the assistant's turn begins.
    A label has a space in front only if the template ends in one (see `ofa.evaluation.chat`).

    Raises:
        InputError: the template or the labels cannot work.

    Example:
        >>> task = ofa.Task("mood", "Review: {text}\\nSentiment:", ("negative", "positive"))
        >>> task.prompt("a warm film"), task.target("positive"), task.open_ended
        ('Review: a warm film\\nSentiment:', ' positive', False)
        >>> task.demonstration(ofa.Example("a bore", "negative"))
        'Review: a bore\\nSentiment: negative\\n'
        >>> ofa.Task("nli", "{premise} / {text}:", ("yes", "no")).text_of({"premise": "it rains", "text": "it is wet"})
        'it rains / it is wet'
        >>> ofa.Task.from_dict(task.to_dict()) == task
        True
    """

    name: str
    template: str = TEXT_SLOT
    labels: tuple[str, ...] = ()
    text_column: str = ""
    label_column: str = ""
    chat: bool = False

    def __post_init__(self) -> None:
        """Check the fields, turn a list of labels into a tuple, and name the columns."""
        _check_name(self.name)
        if not isinstance(self.chat, bool):
            raise InputError(f"chat of a task must be true or false, not {self.chat!r}")
        _check_template(self.template, blank_at_end=self.open_ended or self.chat)
        _check_labels(self.labels)
        object.__setattr__(self, "labels", tuple(self.labels))
        names = LABELLED_COLUMNS if self.labels else PAIR_COLUMNS
        for field, default in zip(("text_column", "label_column"), names, strict=True):
            object.__setattr__(self, field, _column(getattr(self, field), field) or default)
        if self.label_column in self.columns.names:
            raise InputError(
                f"the template {self.template!r} shows the model {{{self.label_column}}}, the column of the answer: "
                "leave it out, or name another column of labels"
            )

    @property
    def open_ended(self) -> bool:
        """True if the task has no label set."""
        return not self.labels

    @cached_property
    def columns(self) -> Columns:
        """The columns of a row for its text and its label."""
        return Columns(self.parts, self.text_column, self.label_column, pairs=self.open_ended)

    @cached_property
    def parts(self) -> Template:
        """The template in parts, without a space at the end that belongs to the answer of a chat."""
        return Template.parse(self.template.removesuffix(self._before_answer) if self.chat else self.template)

    @property
    def _before_answer(self) -> str:
        if self.chat:
            return " " if self.template.endswith(" ") else ""
        return "" if self.open_ended else " "

    def text_of(self, row: object, where: str = "the row") -> str:
        """The text of a row of data, values by column; with a single column in the template, `row` may be its value.

        With several columns, the text is their values joined by the template's literals between them.

        Raises:
            InputError: the row lacks a column of the template, or has no text.
        """
        if isinstance(row, Mapping):
            return self.columns.text(row, where)
        if len(self.parts.slots) > 1:
            raise InputError(
                f"{where} is one text, but the template has the columns {', '.join(self.columns.names)}: give a value "
                "of each by its name"
            )
        return self.columns.text({self.columns.names[0]: row}, where)

    def prompt(self, text: str) -> str:
        """The template around a text from `text_of`; braces in the text are literal."""
        return self.parts.head + text + self.parts.tail

    def target(self, label: str) -> str:
        """The text after the prompt: the label with a leading space, if it has one; a completion is unchanged."""
        return self._before_answer + label

    def demonstration(self, example: Example) -> str:
        """One example as a demonstration: prompt, label and newline."""
        return self.prompt(example.text) + self.target(example.label) + "\n"

    def to_dict(self) -> dict[str, object]:
        """The task as JSON values: its fields, and the columns of its template; `chat` only if it is one."""
        return {
            "name": self.name,
            "template": self.template,
            "labels": list(self.labels),
            "text_column": self.text_column,
            "label_column": self.label_column,
            "columns": list(self.columns.names),
            **({"chat": True} if self.chat else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Task:
        """The task of a JSON object with name, template, labels, the two columns and chat; other keys are ignored.

        With an empty list of labels the task is open-ended, and the template is optional.

        Raises:
            InputError: a key is missing, or a value is wrong.
        """
        if not isinstance(values, Mapping):
            raise InputError(f'a task must be a JSON object with "name", "template" and "labels", not {values!r}')
        required = ("name", "template", "labels") if values.get("labels") else ("name", "labels")
        missing = [key for key in required if key not in values]
        if missing:
            raise InputError(f"the task has no {_quoted(missing)}: add it (labels: [] for prompt and completion pairs)")
        # The values may have any JSON type; the constructor checks them.
        others = {name: values[name] for name in ("text_column", "label_column", "chat") if name in values}
        return cls(values["name"], values.get("template", TEXT_SLOT), values["labels"], **others)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TaskData:
    """A task with its examples; the test examples may be empty.

    Example:
        >>> data = ofa.load_task([("a joy", "good"), ("a bore", "bad")], template="{text}:")
        >>> data.task.labels, len(data.train), data.test
        (('bad', 'good'), 2, ())
    """

    task: Task
    train: tuple[Example, ...]
    test: tuple[Example, ...] = ()


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"the name of a task must be a non-empty text, not {name!r}")
    refuse_surrogates(name, f"the name of a task, {name!r},")


def _check_template(template: object, *, blank_at_end: bool) -> None:
    if not isinstance(template, str):
        raise InputError(f"the template of a task must be a text with {TEXT_SLOT}, not {template!r}")
    refuse_surrogates(template, f"the template of a task, {template!r},")
    slots = Template.parse(template).slots
    if not slots:
        raise InputError(
            f"the template {template!r} has no {TEXT_SLOT}: put it, or other columns in braces, where the data goes"
        )
    for slot in slots:
        if (times := slots.count(slot)) > 1:
            raise InputError(f"the template {template!r} has {{{slot}}} {times} times: use it once")
    if template != template.rstrip() and not blank_at_end:
        # The label's first token includes its leading space.
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
    refuse_surrogates(label, f"a label of a task, {label!r},")
    if label != label.strip() or "\n" in label:
        raise InputError(f"the label {label!r} has surrounding whitespace or a line break: remove it")


def _column(name: object, field: str) -> str:
    if not isinstance(name, str):
        raise InputError(f"the {field} of a task must be the name of a column, not {name!r}")
    return name.strip()


def _quoted(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)
