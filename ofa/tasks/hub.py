"""Load tasks from the Hugging Face hub: the nine of the paper, and any data set with text and label columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ofa.errors import InputError
from ofa.tasks.columns import Columns, are_numbers, did_you_mean, find_column, sorted_labels
from ofa.tasks.duplicates import warn_of_alike_labels, warn_of_duplicates, warn_of_shared_texts
from ofa.tasks.hub_access import HubDataset, find_dataset
from ofa.tasks.local import draft, examples_of, warn_of_number_labels
from ofa.tasks.tables import Row, Table
from ofa.tasks.task import Example, Task, TaskData

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HubTask:
    """One task of the paper: the location of its data, the labels in the data, and the label words."""

    name: str
    hub_id: str
    template: str
    labels: tuple[str, ...]
    """The label words, in the paper's order."""
    source_labels: tuple[str, ...]
    """The data's own names of the labels, in the order of `labels`."""
    label_columns: tuple[str, ...] = ("label",)
    """Columns that may hold the label; the first one present is read."""
    text_column: str = "text"
    integers_in_order: bool = True
    """True if the integer i in the data means `labels[i]`; if False, only names are accepted."""
    other_labels_dropped: bool = False
    """True if rows with any other label are dropped, not refused."""
    train_split: str = "train"
    test_split: str | None = "test"
    """None if the hub has none: the first half of the training split then trains, and the second half tests."""
    config: str | None = None
    revision: str | None = None
    data_files: str | None = None
    """Pattern of the files of all splits in that revision, if the repository does not declare them."""

    @property
    def task(self) -> Task:
        """The task without its data."""
        return Task(self.name, self.template, self.labels)

    @property
    def label_words(self) -> dict[object, str]:
        """The label word of each case-folded name and each integer in the data."""
        words: dict[object, str] = {
            name.casefold(): label for name, label in zip(self.source_labels, self.labels, strict=True)
        }
        return words | dict(enumerate(self.labels)) if self.integers_in_order else words


NAMED_OR_NUMBERED = ("label_text", "label")

HUB_TASKS: Mapping[str, HubTask] = {
    row.name: row
    for row in (
        HubTask(
            name="sst2",
            hub_id="SetFit/sst2",
            template="Review: {text}\nSentiment:",
            labels=("negative", "positive"),
            source_labels=("negative", "positive"),
            label_columns=NAMED_OR_NUMBERED,
        ),
        HubTask(
            name="sst5",
            hub_id="SetFit/sst5",
            template="Sentence: {text}\nSentiment:",
            labels=("terrible", "negative", "neutral", "positive", "great"),
            source_labels=("very negative", "negative", "neutral", "positive", "very positive"),
            label_columns=NAMED_OR_NUMBERED,
        ),
        HubTask(
            name="trec",
            hub_id="SetFit/TREC-QC",
            template="Question: {text}\nAnswer Type:",
            labels=("Abbreviation", "Entity", "Description", "Person", "Location", "Number"),
            source_labels=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
            label_columns=("label_coarse_original",),
            integers_in_order=False,  # those of label and label_coarse follow another order: 0 is DESC
        ),
        HubTask(
            name="agnews",
            hub_id="fancyzhx/ag_news",
            template="News: {text}\nType:",
            labels=("World", "Sports", "Business", "Technology"),
            source_labels=("World", "Sports", "Business", "Sci/Tech"),
        ),
        HubTask(
            name="subj",
            hub_id="SetFit/subj",
            template="Sentence: {text}\nLabel:",
            labels=("objective", "subjective"),
            source_labels=("objective", "subjective"),
            label_columns=NAMED_OR_NUMBERED,
        ),
        HubTask(
            name="hatespeech18",
            hub_id="SetFit/hate_speech18",
            template="Text: {text}\nLabel:",
            labels=("neutral", "hate"),
            source_labels=("noHate", "hate"),
            label_columns=NAMED_OR_NUMBERED,
            other_labels_dropped=True,
            test_split=None,  # halved without the few rows labelled idk/skip (2) and relation (3)
        ),
        HubTask(
            name="dbpedia",
            hub_id="fancyzhx/dbpedia_14",
            template="Input: {text}\nLabel:",
            labels=(
                *("company", "school", "artist", "athlete", "politics", "transportation", "building"),
                *("nature", "village", "animal", "plant", "album", "film", "book"),
            ),
            source_labels=(
                *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation"),
                *("Building", "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"),
            ),
            text_column="content",
            config="dbpedia_14",
        ),
        HubTask(
            name="emo",
            hub_id="SemEvalWorkshop/emo",
            template="Dialogue: {text}\nEmotion:",
            labels=("others", "happy", "sad", "angry"),
            source_labels=("others", "happy", "sad", "angry"),
            config="emo2019",
            revision="refs/convert/parquet",  # the main one is a loading script, which is never run
            data_files="emo2019/*/*.parquet",
        ),
        HubTask(
            name="mr",
            hub_id="cornell-movie-review-data/rotten_tomatoes",
            template="Review: {text}\nSentiment:",
            labels=("negative", "positive"),
            source_labels=("neg", "pos"),
        ),
    )
}


def load_hub_task(name: str, source: str | Path | None = None, *, offline: bool = False) -> TaskData:
    """Load one of `HUB_TASKS` from the hub, or from `source`, a local copy of its hub repository.

    If the hub cannot be reached, and with `offline`, the cached copy is read. Whitespace around a text is stripped, and
    rows without text are dropped. Raises `InputError` if the data cannot be loaded or does not match the table.
    """
    if name not in HUB_TASKS:
        hint = did_you_mean(name, tuple(HUB_TASKS))
        raise InputError(f'there is no task "{name}" from the paper (there are {", ".join(HUB_TASKS)}){hint}')
    row = HUB_TASKS[name]
    data = Path(source) if source is not None else _hub_copy(row, offline)
    train = _labelled_examples(row, row.train_split, data)
    if row.test_split is None:
        half = len(train) // 2
        train, test = train[:half], train[half:]
    else:
        test = _labelled_examples(row, row.test_split, data)
    for split, examples in (("training", train), ("test", test)):
        _check_every_label(row, examples, split, source)
    return TaskData(row.task, tuple(train), tuple(test))


def load_hub_dataset(
    hub_id: str,
    *,
    template: str,
    text_column: str = "",
    label_column: str = "",
    label_words: Sequence[str] = (),
    test_split: str | None = "test",
    offline: bool = False,
) -> TaskData:
    """Load any data set of the hub that has the columns of the template and of the label.

    `label_words` are the words for the integers 0, 1, … in the data; the data's own names are the default. With
    `offline` only the cache is read; `test_split=None` loads no test examples. Rows without text are dropped. Raises
    `InputError` if it cannot be loaded or used.
    """
    splits = [split for split in ("train", test_split) if split is not None]
    columns = draft(template, False, text_column, label_column).columns
    found = find_dataset(hub_id, offline=offline)
    tables = [_column_table(found.split(split), f"{hub_id} ({split})", columns) for split in splits]
    names = tables[0].label_names.get(find_column(columns.label_column, tables[0].columns, hub_id), ())
    words = tuple(label_words) or names
    read = [examples_of(table.rows_with_text(columns), columns, words, table.label_names) for table in tables]
    for table, examples in zip(tables, read, strict=True):
        if not examples:
            raise InputError(f"{table.where} has no row with {' and '.join(columns.names)}: choose another split")
        warn_of_duplicates(examples, table.where, pairs=False)
    for examples in read[1:]:
        warn_of_shared_texts(read[0], examples, hub_id)
    labels = words or sorted_labels(example.label for part in read for example in part)
    if not words:
        warn_of_alike_labels([example for part in read for example in part], hub_id)
        if are_numbers(labels):
            warn_of_number_labels(hub_id, labels)
    task = Task(hub_id, template, labels, text_column, label_column)
    return TaskData(task, tuple(read[0]), tuple(read[1]) if len(read) > 1 else ())


@dataclass(frozen=True)
class _Table:
    """One split in memory: the values of the requested columns, and the names of the integers of class columns."""

    where: str
    found: tuple[str, ...]
    columns: Mapping[str, Sequence[object]]
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def column(self, *candidates: str) -> str:
        """The first of these columns that exists."""
        for name in candidates:
            if name in self.columns:
                return name
        wanted = " or ".join(f'"{name}"' for name in candidates)
        found = ", ".join(f'"{name}"' for name in self.found) or "none"
        raise InputError(f"{self.where} has no column {wanted} (columns found: {found}): name the right column")

    def rows_with_text(self, columns: Columns) -> Iterator[tuple[str, Row]]:
        """Each row with a text as (where it stands, values by column)."""
        for number, values in enumerate(zip(*self.columns.values(), strict=True), start=1):
            where, row = f"row {number} of {self.where}", dict(zip(self.columns, values, strict=True))
            if columns.text_or_none(row, where) is not None:
                yield where, row


def _hub_copy(row: HubTask, offline: bool) -> HubDataset | Path:
    found = find_dataset(row.hub_id, config=row.config, revision=row.revision, offline=offline)
    # `datasets` does not find individually named files in its cache again; the hub client's cache does.
    return found.folder(row.data_files) if row.data_files else found


def _labelled_examples(row: HubTask, split: str, data: HubDataset | Path) -> list[Example]:
    columns = (row.text_column, *row.label_columns)
    if isinstance(data, Path):
        table = _read_folder(data, row, split, columns)
    else:
        table = _table(data.split(split), f"{row.hub_id} ({split})", columns)
    label_column = table.column(*row.label_columns)
    words, names = row.label_words, table.label_names.get(label_column)
    labels = [words.get(_number_or_name(value, names)) for value in table.columns[label_column]]
    if None in labels and not row.other_labels_dropped:
        number = labels.index(None) + 1
        value, known = table.columns[label_column][number - 1], ", ".join(row.source_labels)
        raise InputError(
            f"row {number} of {table.where}: the label {value!r} is not one of {row.hub_id}'s ({known}): "
            "get the original data set"
        )
    return _examples(table, row.text_column, label_column, labels)


def _examples(table: _Table, text_column: str, label_column: str, labels: Iterable[str | None]) -> list[Example]:
    """The examples of the rows that have a text and a label."""
    examples = []
    texts = table.columns[table.column(text_column)]
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        if not isinstance(text, str):
            raise InputError(
                f'row {number} of {table.where}: "{text_column}" is {text!r}, which is not text: name the right column'
            )
        if label is not None and text.strip():
            examples.append(Example(text.strip(), label))
    if not examples:
        raise InputError(f'{table.where} has no row with "{text_column}" and "{label_column}": choose another split')
    return examples


def _number_or_name(value: object, names: tuple[str, ...] | None) -> str | int | None:
    """A value of a label column as its case-folded name, an integer without a name, or None for anything else."""
    if isinstance(value, str) and value.isdigit():  # from a CSV copy
        value = int(value)
    if isinstance(value, int) and names and 0 <= value < len(names):
        value = names[value]
    if isinstance(value, str):
        return value.casefold()
    return value if isinstance(value, int) else None


def _check_every_label(row: HubTask, examples: Sequence[Example], split: str, source: str | Path | None) -> None:
    seen = {example.label for example in examples}
    absent = [label for label in row.labels if label not in seen]
    if absent:
        where = f"{source or row.hub_id} ({split} examples)"
        raise InputError(f'{where} has no example of "{absent[0]}": get the complete {row.hub_id}')


def _read_folder(folder: Path, row: HubTask, split: str, columns: Sequence[str]) -> _Table:
    files = _split_files(folder, row, split)
    where = " and ".join(map(str, files))
    tables = [Table(file) for file in files]
    rows = [values for table in tables for _, values in table]
    found = tuple(rows[0]) if rows else ()
    values = {name: [row.get(name) for row in rows] for name in columns if name in found}
    return _Table(where, found, values, tables[0].class_names)


def _split_files(folder: Path, row: HubTask, split: str) -> list[Path]:
    """The files of a split, in any layout used by hub repositories."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a local copy of the hub repository {row.hub_id}")
    for base in (folder, folder / "data", folder / (row.config or "default")):
        for suffix in (".parquet", ".jsonl", ".csv"):
            for pattern in (f"{split}{suffix}", f"{split}-*{suffix}", f"{split}/*{suffix}"):
                files = sorted(base.glob(pattern))
                if files:
                    return files
    raise InputError(f'{folder} has no parquet, jsonl or csv file of the split "{split}": copy all of {row.hub_id}')


def _column_table(dataset: Dataset, where: str, columns: Columns) -> _Table:
    """Load only the columns of the template and of the label into memory.

    Raises:
        InputError: one of them is missing.
    """
    flags = {columns.text_column: "--text-column", columns.label_column: "--label-column"}
    wanted = [*columns.names, columns.label_column]
    return _table(dataset, where, [find_column(name, dataset.column_names, where, flags.get(name)) for name in wanted])


def _table(dataset: Dataset, where: str, columns: Sequence[str]) -> _Table:
    """Load only the named columns that exist into memory."""
    import datasets

    present = [name for name in dict.fromkeys(columns) if name in dataset.column_names]
    names = {
        name: tuple(dataset.features[name].names)
        for name in present
        if isinstance(dataset.features[name], datasets.ClassLabel)
    }
    values = dataset.select_columns(present)[:] if present else {}
    return _Table(where, tuple(dataset.column_names), values, names)
