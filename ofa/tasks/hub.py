"""Load tasks from the Hugging Face hub: the nine of the paper, and any data set with text and label columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ofa.errors import InputError
from ofa.tasks.columns import (
    Columns,
    are_numbers,
    did_you_mean,
    find_column,
    label_word,
    sorted_labels,
    unknown_label,
)
from ofa.tasks.duplicates import warn_of_alike_labels, warn_of_duplicates, warn_of_shared_texts
from ofa.tasks.hub_access import HubDataset, find_dataset
from ofa.tasks.local import draft, examples_of, warn_of_number_labels
from ofa.tasks.tables import Row
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
    other_labels_dropped: bool = False
    """True if rows with any other label are dropped, not refused."""
    halved: bool = False
    """True if the hub has one split only, whose first half trains and whose second half tests."""
    config: str | None = None
    revision: str | None = None
    data_files: str | None = None
    """Pattern of a {split}'s parquet files in that revision, if the repository does not declare them."""

    @property
    def task(self) -> Task:
        """The task without its data."""
        return Task(self.name, self.template, self.labels)


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
            label_columns=("label_coarse_original",),  # the integers of label_coarse follow another order: 0 is DESC
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
            halved=True,  # without the few rows labelled idk/skip (2) and relation (3)
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
            data_files="emo2019/{split}/*.parquet",
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


def load_hub_task(name: str, *, offline: bool = False) -> TaskData:
    """Load one of `HUB_TASKS` from the hub; with `offline`, or if it cannot be reached, from this machine's caches.

    Whitespace around a text is stripped, and rows without text are dropped. Raises `InputError` if the data cannot be
    loaded or does not match the table.
    """
    if name not in HUB_TASKS:
        hint = did_you_mean(name, tuple(HUB_TASKS))
        raise InputError(f'there is no task "{name}" from the paper (there are {", ".join(HUB_TASKS)}){hint}')
    row = HUB_TASKS[name]
    found = find_dataset(
        row.hub_id, config=row.config, revision=row.revision, data_files=row.data_files, offline=offline
    )
    train = _labelled_examples(row, found, "train")
    if row.halved:
        half = len(train) // 2
        train, test = train[:half], train[half:]
    else:
        test = _labelled_examples(row, found, "test")
    for split, examples in (("training", train), ("test", test)):
        _check_every_label(row, examples, split)
    return TaskData(row.task, tuple(train), tuple(test))


def load_hub_dataset(
    hub_id: str,
    *,
    template: str,
    text_column: str = "",
    label_column: str = "",
    label_words: Sequence[str] = (),
    offline: bool = False,
) -> TaskData:
    """Load the splits train and test of any data set of the hub that has the columns of the template and of the label.

    `label_words` are the words for the integers 0, 1, … in the data; the data's own names are the default. With
    `offline` only the cache is read. Rows without text are dropped. Raises `InputError` if it cannot be loaded or used.
    """
    columns = draft(template, False, text_column, label_column).columns
    found = find_dataset(hub_id, offline=offline)
    tables = [_column_table(found.split(split), f"{hub_id} ({split})", columns) for split in ("train", "test")]
    names = tables[0].label_names.get(find_column(columns.label_column, tables[0].columns, hub_id), ())
    words = tuple(label_words) or names
    train, test = (examples_of(table.rows_with_text(columns), columns, words, table.label_names) for table in tables)
    for table, examples in zip(tables, (train, test), strict=True):
        if not examples:
            raise InputError(f"{table.where} has no row with {' and '.join(columns.names)}: choose another split")
        warn_of_duplicates(examples, table.where, pairs=False)
    warn_of_shared_texts(train, test, hub_id)
    labels = words or sorted_labels(example.label for example in (*train, *test))
    if not words:
        warn_of_alike_labels((*train, *test), hub_id)
        if are_numbers(labels):
            warn_of_number_labels(hub_id, labels)
    return TaskData(Task(hub_id, template, labels, text_column, label_column), tuple(train), tuple(test))


@dataclass(frozen=True)
class _Table:
    """One split in memory: the values of the requested columns, and the names of the integers of class columns."""

    where: str
    columns: Mapping[str, Sequence[object]]
    label_names: Mapping[str, tuple[str, ...]]

    def rows_with_text(self, columns: Columns) -> Iterator[tuple[str, Row]]:
        """Each row with a text as (where it stands, values by column)."""
        for number, values in enumerate(zip(*self.columns.values(), strict=True), start=1):
            where, row = f"row {number} of {self.where}", dict(zip(self.columns, values, strict=True))
            if columns.text_or_none(row, where) is not None:
                yield where, row


def _labelled_examples(row: HubTask, found: HubDataset, split: str) -> list[Example]:
    dataset = found.split(split)
    label_column = next((name for name in row.label_columns if name in dataset.column_names), row.label_columns[-1])
    columns = replace(row.task, text_column=row.text_column, label_column=label_column).columns
    table = _column_table(dataset, f"{row.hub_id} ({split})", columns)
    names = table.label_names.get(label_column, ())
    examples = []
    for where, values in table.rows_with_text(columns):
        value = values[label_column]
        named = names[value] if isinstance(value, int) and 0 <= value < len(names) else value
        word = label_word(named, row.labels, row.source_labels)
        if word is not None:
            examples.append(Example(columns.text(values, where), word))
        elif not row.other_labels_dropped:
            raise unknown_label(str(named), row.source_labels, where)
    return examples


def _check_every_label(row: HubTask, examples: Sequence[Example], split: str) -> None:
    seen = {example.label for example in examples}
    absent = [label for label in row.labels if label not in seen]
    if absent:
        raise InputError(
            f'{row.hub_id} ({split} examples) has no example of "{absent[0]}": get the complete {row.hub_id}'
        )


def _column_table(dataset: Dataset, where: str, columns: Columns) -> _Table:
    """Load only the columns of the template and of the label into memory.

    Raises:
        InputError: one of them is missing.
    """
    import datasets

    flags = {columns.text_column: "--text-column", columns.label_column: "--label-column"}
    wanted = [*columns.names, columns.label_column]
    present = [find_column(name, dataset.column_names, where, flags.get(name)) for name in wanted]
    names = {
        name: tuple(dataset.features[name].names)
        for name in present
        if isinstance(dataset.features[name], datasets.ClassLabel)
    }
    return _Table(where, dataset.select_columns(list(dict.fromkeys(present)))[:], names)
