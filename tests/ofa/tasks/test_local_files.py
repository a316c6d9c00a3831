"""The user's files: the formats that are accepted, and refusals that name file, line and remedy."""

from __future__ import annotations

import datetime
import functools
import gzip
import io
import json
import re
import shutil
import zipfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ofa.errors import InputError
from ofa.tasks import Example, Task, TaskData, check_labels, read_examples, read_file, read_task_folder

TASK = Task("mood", "Text: {text}\nMood:", ("happy", "sad"))
GOOD_LINE = '{"text": "a fine day", "label": "happy"}\n'


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a, b", "label": "happy"}\n{"label": "sad", "text": "é", "id": 7}\n'),
        ("a.json-lines", '{"text": "a, b", "label": "happy"}\n\n{"label": "sad", "text": "é"}'),
        ("a.JSONL", '\ufeff{"text": "a, b", "label": "happy"}\r\n{"text": " é ", "label": "sad "}\r\n  \n'),
        ("a.csv", 'text,label\n"a, b",happy\né,sad\n'),
        ("a.csv", '\ufefflabel, text,id\r\nhappy,"a, b",1\r\n\r\nsad,é,2'),
        ("a.csv", "text;label\na, b;happy\né;sad\n"),
        ("a.csv", 'Text|LABEL|note\n"a, b"|happy|x, y\né|sad|z, w\n'),
        ("a.tsv", "text\tlabel\na, b\thappy\né\tsad\n"),
        ("a.csv", "text\tlabel\na, b\thappy\né\tsad\n".encode("utf-16")),
        ("a.json", ' [{"text": "a, b", "label": "happy"},\n {"text": "é", "label": "sad"}]'),
        ("a.json", '{"text": "a, b", "label": "happy"}\n{"text": "é", "label": "sad"}\n'),
        ("a.ndjson", '{"text": "a, b", "label": "happy"}\n{"text": "é", "label": "sad"}\n'),
        ("a.csv.gz", gzip.compress('text,label\n"a, b",happy\né,sad\n,\n'.encode(), mtime=0)),
        (
            "a.JSON.GZ",
            gzip.compress('[{"text": "a, b", "label": "happy"}, {"text": "é", "label": "sad"}]'.encode(), mtime=0),
        ),
        ("a.parquet", parquet(text=["a, b", "é"], label=["happy", "sad"], when=[datetime.date.today()] * 2)),
        ("a.parquet.gz", gzip.compress(parquet(text=["a, b", "é"], label=["happy", "sad"]), mtime=0)),
    ],
)
def test_every_supported_form_reads_the_same(write, name, content):
    assert read_examples(write(name, content)) == [Example("a, b", "happy"), Example("é", "sad")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "2 + 2 =", "completion": "4"}\n{"prompt": "def f():\\n", "completion": "  pass\\n"}\n'),
        ("a.csv", 'prompt,completion\n2 + 2 =,4\n"def f():\n","  pass\n"\n'),
    ],
)
def test_prompt_and_completion_pairs_are_taken_as_written(write, name, content):
    """Also a completion that is a number, or that starts with significant blanks."""
    pairs = [Example("2 + 2 =", "4"), Example("def f():\n", "  pass\n")]
    assert read_examples(write(name, content), task=Task("pairs")) == pairs
    assert read_examples(write(name, content), task=Task("sums")) == pairs


def test_unicode_line_separators_inside_a_text_do_not_break_the_line(write):
    path = write("a.jsonl", '{"text": "a\u2028b\x85c", "label": "happy"}\n')
    assert read_examples(path)[0].text == "a\u2028b\x85c"


def test_a_csv_text_may_span_lines_and_later_lines_are_still_counted_right(write):
    path = write("a.csv", 'text,label\n"first\nsecond",happy\nthird,\n')
    assert "a.csv, line 4: the label is empty" in refusal(read_examples, path)
    path = write("b.csv", 'text,label\n"first\nsecond",happy\n')
    assert read_examples(path) == [Example("first\nsecond", "happy")]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "text", 'unknown suffix ".txt": use .jsonl, .csv, .tsv, .json,'),
        ("a.csv.gz", "text", "is not a complete gzip file"),
        ("a.csv.gz", gzip.compress(b"text,label\na,happy\n" * 999, mtime=0)[:60], "is not a complete gzip file"),
        ("a.parquet", "text", "cannot be read as parquet"),
        ("a.csv", "text,label,text\na,happy,b\n", 'line 1 has two columns "text": rename one'),
        ("a.jsonl", '{"text": "a", "text": "b", "label": "happy"}\n', 'line 1 has two values for "text"'),
        ("a.json", '{"data":\n[]}', "line 1, column 9 is broken JSON"),
        ("a.json", '["a"]', "item 1 is not a JSON object"),
        ("a.csv", "text;label\na;b;happy\n", "separator ';' in double quotes, or name the right one with --separator"),
        ("a", "text", 'unknown suffix ""'),
        ("a.jsonl", "", "has no examples: add rows with text and label"),
        ("a.csv", "", "has no examples"),
        ("a.csv", "text,label\n", "has no examples"),
        ("a.jsonl", GOOD_LINE + '{"text": "b", "label"\n', "line 2, column 22 is broken JSON"),
        ("a.jsonl", GOOD_LINE + "[1]\n", "line 2 is not a JSON object"),
        ("a.jsonl", "[" * 200_000 + "\n", "line 1 is JSON that cannot be read"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}\n", "line 1 is JSON that cannot be read"),
        ("a.jsonl", GOOD_LINE + '{"txt": "b", "label": "sad"}\n', 'line 2 has no column "text"'),
        ("a.jsonl", '{"txt": "b", "label": "sad"}\n', '(columns found: "txt", "label")'),
        ("a.csv", "sentence,label\nb,sad\n", '(columns found: "sentence", "label")'),
        ("a.csv", "a joy,happy\nb,sad\n", "or write a header line if these are values"),
        ("a.csv", "text,label\na, b,sad\n", "line 2 has 3 cells but the header has 2"),
        ("a.csv", "text,label\na\n", "line 2 has 1 cells but the header has 2"),
        ("a.csv", 'text,label\n"a" b,sad\n', "line 2 is broken CSV"),
        ("a.csv", 'text,label\nx,sad\n"a,sad\n', "line 3 is broken CSV"),
        ("a.jsonl", '{"text": [5], "label": "sad"}\n', "line 1: the text is [5], which is not text"),
        ("a.jsonl", '{"text": null, "label": "sad"}\n', "line 1: the text is empty"),
        ("a.jsonl", '{"text": "b", "label": ["sad"]}\n', 'line 1: the label is ["sad"]'),
        ("a.jsonl", GOOD_LINE + '{"text": "", "label": "sad"}\n', "line 2: the text is empty"),
        ("a.jsonl", GOOD_LINE + '{"text": " \\n\\t", "label": "sad"}\n', "line 2: the text is empty"),
        ("a.jsonl", '{"text": "b", "label": " "}\n', "line 1: the label is empty"),
        ("a.csv", "text,label\n ,sad\n", "line 2: the text is empty"),
        ("a.jsonl", '{"text": "\\ud83d", "label": "sad"}\n', "line 1 holds half of a surrogate pair"),
        ("a.csv", "text,label\nb,sad\nb\0,sad\n", "line 3: the text holds a NUL character"),
        ("a.jsonl", '{"text": "b", "label": "s\\u0000ad"}\n', "line 1: the label holds a NUL character"),
        ("a.jsonl", GOOD_LINE.encode() + b'{"text": "caf\xe9", "label": "sad"}\n', "line 2 is not UTF-8"),
        ("a.csv", "text,label\nb,sad\n".encode("utf-16-le"), "is not UTF-8 text but may be UTF-16"),
        ("a.csv", "text,label\nb,sad\n".encode("utf-16")[:-1], "is not UTF-16"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name_and_line(write, name, content, complaint):
    path = write(name, content)
    message = refusal(read_examples, path)
    assert str(path) in message
    assert complaint in message
    assert "\n" not in message


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "does not exist" in refusal(read_examples, tmp_path / "none.jsonl")
    (tmp_path / "folder.csv").mkdir()
    assert "is not a file" in refusal(read_examples, str(tmp_path / "folder.csv"))


def test_pairs_without_a_prompt_column_are_refused(write):
    assert 'no column "prompt"' in refusal(read_examples, write("a.jsonl", GOOD_LINE), task=Task("pairs"))
    file = write("b.jsonl", '{"prompt": "a", "completion": [4]}')
    assert "not text" in refusal(read_examples, file, task=Task("pairs"))


def test_an_unknown_label_is_refused_with_its_line_and_the_nearest_label(write):
    path = write("a.jsonl", "\n" + GOOD_LINE + '{"text": "b", "label": "Hapy"}\n')
    message = refusal(read_examples, path, task=TASK)
    assert "a.jsonl, line 3" in message
    assert '"Hapy" is not one of the labels of the task (happy, sad), did you mean "happy"?' in message


def test_a_cell_may_exceed_the_csv_module_s_default_limit(write):
    assert (
        read_examples(write("a.csv", f"text,label\n{'long ' * 50_000},happy\n"))[0].text == ("long " * 50_000).strip()
    )


def test_a_separator_can_be_named(write):
    path = write("a.csv", "text:label\na, b; c:happy\n")
    assert read_examples(path, separator=":") == [Example("a, b; c", "happy")]
    assert "is not one character" in refusal(read_examples, path, separator="::")


LABELS = [
    # (what a file holds, the words of the task, the label)
    (2, ("1", "2"), "2"),
    ("2.0", ("1", "2"), "2"),
    (2.0, ("1", "2"), "2"),
    ("1.0", ("1.0", "2.0"), "1.0"),
    (0, ("no", "yes"), "no"),
    ("1", ("no", "yes"), "yes"),
    (1.0, ("no", "yes"), "yes"),
    (True, ("no", "yes"), "yes"),
    ("False", ("no", "yes"), "no"),
    (True, ("True", "False"), "True"),
    ("TRUE", ("true", "false"), "true"),
    (0.5, ("0.5", "1.5"), "0.5"),
    ("007", ("007", "008"), "007"),
    (0, ("1", "2"), None),
    (2, ("no", "yes"), None),
    (-1, ("no", "yes"), None),
    (0.5, ("no", "yes"), None),
    ("01", ("no", "yes"), None),
    (True, ("a", "b", "c"), None),
    (1.0, (), "1"),
    ("1.0", (), "1"),
    (True, (), "true"),
    (0.5, (), "0.5"),
]


# Full product: each format has its own types, and a rule for each of them.
@pytest.mark.parametrize(("value", "words", "label"), LABELS)
@pytest.mark.parametrize("form", ["json", "parquet", "csv"])
def test_a_label_means_the_same_in_every_file(write, form, value, words, label):
    """Text, digits, floats and booleans by one rule; None: refused."""
    row = {"text": "a", "label": value}
    content = {
        "json": json.dumps([row]),
        "parquet": parquet(**{name: [one] for name, one in row.items()}),
        "csv": f"text,label\na,{value}\n",
    }[form]
    path = write(f"a.{form}", content)
    task = Task("t", "{text}:", words) if words else None
    if label is None:
        assert "is not one of the labels" in refusal(read_examples, path, task=task)
    else:
        found = read_examples(path, task=task)[0].label
        assert found == label or (form == "csv" and found.lower() == label)


def test_parquet_of_datasets_brings_the_names_of_its_integers(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).to_parquet(tmp_path / "a.parquet")
    read = functools.partial(read_file, tmp_path / "a.parquet", template="{text}:")
    assert read().task.labels == ("no", "yes")
    assert read().train == (Example("a", "yes"),)
    assert read(labels=("bad", "good")).train == (Example("a", "good"),)


def test_a_file_is_a_task_with_the_labels_that_occur(write, caplog):
    path = write("stars.csv", "Review,stars\nb,10\na,2\n")
    data = read_file(path, template="{text}:", text_column="review", label_column="Stars")
    assert data.task == Task("stars", "{text}:", ("2", "10"), "review", "Stars")
    assert data.train == (Example("b", "10"), Example("a", "2"))
    assert "are numbers (2, 10): --labels gives words" in caplog.text


def test_a_template_reads_the_columns_it_names(write):
    path = write("nli.csv", "premise,text,label\na,b,happy\n,c,sad\n")
    data = read_file(path, template="{premise} / {text}:")
    assert [data.task.prompt(example.text) for example in data.train] == ["a / b:", " / c:"]
    complaint = refusal(read_file, path, template="{premis} / {text}:")
    assert (
        'line 2 has no column "premis" (columns found: "premise", "text", "label"), did you mean "premise"' in complaint
    )


def test_check_labels_counts_from_one_and_lists_the_labels():
    examples = [Example("a", "sad"), Example("b", "blue")]
    message = refusal(check_labels, examples, TASK, "the test examples")
    assert message.startswith('example 2 of the test examples: the label "blue"')
    assert "(happy, sad)" in message
    check_labels(examples[:1], TASK, "here")
    check_labels(examples, Task("pairs"), "here")


def task_folder(write, **files):
    write("task/task.json", json.dumps(TASK.to_dict()))
    for name, content in files.items():
        write("task/" + name.replace("_", "."), content)
    return write("task/notes.md", "").parent


@pytest.mark.parametrize("as_text", [True, False])
def test_a_task_folder_reads_task_train_and_test(write, as_text):
    folder = task_folder(write, train_jsonl=GOOD_LINE, test_csv="text,label\nrain,sad\n")
    data = read_task_folder(str(folder) if as_text else folder)
    assert data == TaskData(TASK, (Example("a fine day", "happy"),), (Example("rain", "sad"),))


def test_a_task_folder_may_lack_test_examples(write):
    assert read_task_folder(task_folder(write, train_jsonl=GOOD_LINE)).test == ()


def test_a_task_folder_is_read_from_inside_an_archive(write, tmp_path):
    """The package, with its demo tasks, may be imported from a zip file."""
    folder = task_folder(write, train_jsonl=GOOD_LINE)
    archive = shutil.make_archive(str(tmp_path / "tasks"), "zip", folder.parent, folder.name)
    zipped = zipfile.Path(archive).joinpath("task")
    assert read_task_folder(zipped) == read_task_folder(folder)


def test_an_open_ended_task_folder_holds_pairs(write):
    write("task/task.json", '{"name": "sums", "labels": []}')
    folder = write("task/train.jsonl", '{"prompt": "2 + 2 =", "completion": "4"}').parent
    assert read_task_folder(folder) == TaskData(Task("sums"), (Example("2 + 2 =", "4"),))


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "has no train.jsonl or train.csv"),
        ({"train_jsonl": GOOD_LINE, "train_csv": "text,label\nb,sad\n"}, "both train.jsonl and train.csv"),
        ({"train_jsonl": GOOD_LINE, "test_csv": "text,label\nb,glum\n"}, 'test.csv, line 2: the label "glum"'),
        ({"train_jsonl": ""}, "train.jsonl has no examples"),
        ({"train_jsonl": GOOD_LINE, "task_json": '{"name": "x"}'}, 'task.json: the task has no "labels"'),
        ({"train_jsonl": GOOD_LINE, "task_json": '{\n"name": x}'}, "task.json, line 2, column 9 is broken JSON"),
        ({"train_jsonl": GOOD_LINE, "task_json": "[]"}, "task.json: a task must be a JSON object"),
    ],
)
def test_a_task_folder_that_cannot_be_used_is_refused(write, files, complaint):
    assert complaint in refusal(read_task_folder, task_folder(write, **files))


def test_a_missing_folder_and_a_missing_task_file_are_refused(tmp_path):
    assert "is not a folder" in refusal(read_task_folder, tmp_path / "none")
    assert re.search(r"task\.json does not exist.*template", refusal(read_task_folder, tmp_path))
