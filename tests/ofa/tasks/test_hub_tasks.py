"""The nine tasks of the paper read each hub repository's layout and map its labels by name."""

from __future__ import annotations

import csv
import json
from collections import Counter
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from ofa.errors import InputError
from ofa.tasks import HUB_TASKS, Example, load_hub_dataset, load_hub_task

PER_CLASS = 3

# The labels as each repository numbers and names them. Written out here, not taken from the table under test.
SETFIT_NAMES = {
    "sst2": ("negative", "positive"),
    "sst5": ("very negative", "negative", "neutral", "positive", "very positive"),
    "subj": ("objective", "subjective"),
}
TREC_COARSE = ("DESC", "ENTY", "ABBR", "HUM", "NUM", "LOC")
HATE_SPEECH = ("noHate", "hate", "idk/skip", "relation")
CLASS_LABELS = {
    "agnews": ("World", "Sports", "Business", "Sci/Tech"),
    "dbpedia": (
        *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building"),
        *("NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"),
    ),
    "emo": ("others", "happy", "sad", "angry"),
    "mr": ("neg", "pos"),
}
PARQUET_FILES = {
    "agnews": "data/{split}-00000-of-00001.parquet",
    "dbpedia": "dbpedia_14/{split}-00000-of-00001.parquet",
    "emo": "emo2019/{split}/0000.parquet",
    "mr": "{split}.parquet",
}
WORDS = {
    "sst2": {"negative": "negative", "positive": "positive"},
    "sst5": {
        "very negative": "terrible",
        "negative": "negative",
        "neutral": "neutral",
        "positive": "positive",
        "very positive": "great",
    },
    "trec": {
        "ABBR": "Abbreviation",
        "ENTY": "Entity",
        "DESC": "Description",
        "HUM": "Person",
        "LOC": "Location",
        "NUM": "Number",
    },
    "agnews": {"World": "World", "Sports": "Sports", "Business": "Business", "Sci/Tech": "Technology"},
    "subj": {"objective": "objective", "subjective": "subjective"},
    "hatespeech18": {"noHate": "neutral", "hate": "hate"},
    "dbpedia": {
        "Company": "company",
        "EducationalInstitution": "school",
        "Artist": "artist",
        "Athlete": "athlete",
        "OfficeHolder": "politics",
        "MeanOfTransportation": "transportation",
        "Building": "building",
        "NaturalPlace": "nature",
        "Village": "village",
        "Animal": "animal",
        "Plant": "plant",
        "Album": "album",
        "Film": "film",
        "WrittenWork": "book",
    },
    "emo": {"others": "others", "happy": "happy", "sad": "sad", "angry": "angry"},
    "mr": {"neg": "negative", "pos": "positive"},
}
every_task = pytest.mark.parametrize("name", list(WORDS))


def numbered(names):
    """(integer, name, serial number) of every row, classes interleaved."""
    return [(label, name, serial) for serial in range(PER_CLASS) for label, name in enumerate(names)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def setfit_rows(names, split):
    return [
        {"text": f"{split} {name} {serial}", "label": label, "label_text": name}
        for label, name, serial in numbered(names)
    ]


def trec_rows(split):
    return [
        {
            "text": f"{split} {name} {serial}",
            "label": 10 + label,
            "label_text": "fine",
            "label_original": f"{name}:fine",
            "label_coarse": label,
            "label_coarse_text": "coarse",
            "label_coarse_original": name,
        }
        for label, name, serial in numbered(TREC_COARSE)
    ]


def parquet_split(name, split, *, names=True):
    rows = numbered(CLASS_LABELS[name])
    columns = {"label": [label for label, _, _ in rows]}
    columns["content" if name == "dbpedia" else "text"] = [f" {split} {word} {serial}" for _, word, serial in rows]
    if name == "dbpedia":
        columns["title"] = ["the title"] * len(rows)
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    features["label"] = datasets.ClassLabel(names=CLASS_LABELS[name]) if names else datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, features=features)


def write_repository(folder, name, suffix=".jsonl"):
    """A small local copy of a task's hub repository: its files and columns, three rows per class and split."""
    if name == "hatespeech18":
        write_rows(folder / f"train{suffix}", setfit_rows(HATE_SPEECH, "all"))
        return folder
    for split in ("train", "test"):
        if name == "trec":
            write_rows(folder / f"{split}{suffix}", trec_rows(split))
        elif name in SETFIT_NAMES:
            write_rows(folder / f"{split}{suffix}", setfit_rows(SETFIT_NAMES[name], split))
        else:
            path = folder / PARQUET_FILES[name].format(split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet_split(name, split).to_parquet(path)
    return folder


def expected(name, split):
    return {Example(f"{split} {source} {n}", word) for source, word in WORDS[name].items() for n in range(PER_CLASS)}


@every_task
def test_a_local_copy_of_the_repository_is_read_with_its_labels_by_name(name, tmp_path):
    data = load_hub_task(name, source=write_repository(tmp_path, name))
    if name == "hatespeech18":
        assert set(data.train) | set(data.test) == expected(name, "all")
        return
    assert set(data.train) == expected(name, "train")
    assert set(data.test) == expected(name, "test")
    assert len(data.train) == len(data.test) == PER_CLASS * len(WORDS[name])


@every_task
def test_templates_and_label_words_are_the_paper_s(name):
    templates = {
        "sst2": "Review: {text}\nSentiment:",
        "sst5": "Sentence: {text}\nSentiment:",
        "trec": "Question: {text}\nAnswer Type:",
        "agnews": "News: {text}\nType:",
        "subj": "Sentence: {text}\nLabel:",
        "hatespeech18": "Text: {text}\nLabel:",
        "dbpedia": "Input: {text}\nLabel:",
        "emo": "Dialogue: {text}\nEmotion:",
        "mr": "Review: {text}\nSentiment:",
    }
    task = HUB_TASKS[name].task
    assert (task.name, task.template, task.labels) == (name, templates[name], tuple(WORDS[name].values()))


@pytest.mark.parametrize("name", [*SETFIT_NAMES, "trec", "hatespeech18"])
def test_a_csv_copy_gives_the_same_as_the_json_lines(name, tmp_path):
    json_lines = write_repository(tmp_path / "jsonl", name)
    comma_separated = write_repository(tmp_path / "csv", name, suffix=".csv")
    assert load_hub_task(name, json_lines) == load_hub_task(name, str(comma_separated))


def test_hate_speech_keeps_two_labels_and_halves_the_rest_in_order(tmp_path):
    data = load_hub_task("hatespeech18", write_repository(tmp_path, "hatespeech18"))
    kept = [(n, source, word) for n in range(PER_CLASS) for source, word in (("noHate", "neutral"), ("hate", "hate"))]
    examples = [Example(f"all {source} {n}", word) for n, source, word in kept]
    assert list(data.train) == examples[:3]
    assert list(data.test) == examples[3:]


@pytest.mark.parametrize("name", list(CLASS_LABELS))
def test_integers_without_names_follow_the_documented_order(name, tmp_path):
    for split in ("train", "test"):
        parquet_split(name, split, names=False).to_parquet(tmp_path / f"{split}.parquet")
    assert set(load_hub_task(name, tmp_path).train) == expected(name, "train")


@pytest.mark.parametrize("name", list(SETFIT_NAMES))
def test_integers_are_used_where_the_label_text_is_missing(name, tmp_path):
    for split in ("train", "test"):
        rows = [{k: v for k, v in row.items() if k != "label_text"} for row in setfit_rows(SETFIT_NAMES[name], split)]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    assert set(load_hub_task(name, tmp_path).test) == expected(name, "test")


def test_names_win_over_the_integers_when_their_orders_differ(tmp_path):
    names = ("pos", "neg")
    for split in ("train", "test"):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"text": ["good", "bad"], "label": ["pos", "neg"]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    assert load_hub_task("mr", tmp_path).train == (Example("good", "positive"), Example("bad", "negative"))


def test_trec_refuses_integers_because_their_order_is_another(tmp_path):
    rows = [{"text": "who ?", "label_coarse_original": 3}]
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(InputError, match=r"row 1 of .*train\.jsonl: the label 3 is not one of SetFit/TREC-QC's"):
        load_hub_task("trec", tmp_path)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"sentence": "a", "label": 0}], r'no column "text" \(columns found: "sentence", "label"\)'),
        ([{"text": "a", "sentiment": 0}], r'no column "label_text" or "label" \(columns found: "text", "sentiment"\)'),
        ([{"text": "a", "label": 2}], "the label 2 is not one of SetFit/sst2's"),
        ([{"text": "a", "label": -1}], "the label -1 is not one of"),
        ([{"text": "a", "label": [1]}], r"the label \[1\] is not one of"),
        ([{"text": 5, "label": 1}], 'row 1 of .*"text" is 5, which is not text'),
        ([{"text": "a", "label": 1}], 'has no example of "negative"'),
        ([{"text": " ", "label": 1}], "has no row with"),
    ],
)
def test_other_data_in_the_place_of_the_repository_is_refused(rows, complaint, tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(InputError, match=complaint):
        load_hub_task("sst2", tmp_path)


def test_incomplete_and_damaged_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        load_hub_task("sst2", tmp_path / "none")
    with pytest.raises(InputError, match='no parquet, jsonl or csv file of the split "train"'):
        load_hub_task("sst2", tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"train\.parquet cannot be read as parquet"):
        load_hub_task("mr", tmp_path)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match='did you mean "dbpedia"'):
        load_hub_task("dbpedia14")


@pytest.fixture
def reachable(monkeypatch):
    """A hub that has every data set."""
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, hub_id, timeout: SimpleNamespace(siblings=[])
    )


@pytest.fixture
def hub(reachable, monkeypatch):
    """A stub of the hub that serves data sets in memory and records the requests."""

    class Hub:
        def __init__(self):
            self.splits = {}
            self.folder = None
            self.requests = []

        def load_dataset(self, path, **options):
            self.requests.append((path, options))
            if options["split"] not in self.splits:
                raise ValueError(f'Unknown split "{options["split"]}". Should be one of {list(self.splits)}.')
            return self.splits[options["split"]]

        def snapshot_download(self, path, **options):
            self.requests.append((path, options))
            return str(self.folder)

    stand_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    return stand_in


@every_task
def test_the_hub_is_asked_for_the_documented_repository_and_never_to_run_its_code(name, hub, tmp_path):
    hub_ids = {
        "sst2": "SetFit/sst2",
        "sst5": "SetFit/sst5",
        "trec": "SetFit/TREC-QC",
        "agnews": "fancyzhx/ag_news",
        "subj": "SetFit/subj",
        "hatespeech18": "SetFit/hate_speech18",
        "dbpedia": "fancyzhx/dbpedia_14",
        "emo": "SemEvalWorkshop/emo",
        "mr": "cornell-movie-review-data/rotten_tomatoes",
    }
    hub.folder = write_repository(tmp_path, name)
    for split in ("train", "test"):
        if name in CLASS_LABELS:
            hub.splits[split] = parquet_split(name, split)
        elif name == "trec":
            hub.splits[split] = datasets.Dataset.from_list(trec_rows(split))
        else:
            rows = setfit_rows(SETFIT_NAMES.get(name, HATE_SPEECH), split)
            hub.splits[split] = datasets.Dataset.from_list(rows)
    data = load_hub_task(name)
    assert Counter(example.label for example in data.train).keys() == set(WORDS[name].values())
    assert {path for path, _ in hub.requests} == {hub_ids[name]}
    assert all("trust_remote_code" not in options for _, options in hub.requests)
    if name == "emo":
        [(_, request)] = hub.requests
        assert (request["revision"], request["repo_type"]) == ("refs/convert/parquet", "dataset")
        assert request["allow_patterns"] == "emo2019/*/*.parquet"


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it.\nMore."), OSError(""), RuntimeError("broken")])
def test_a_broken_connection_explains_how_to_work_offline(error, reachable, monkeypatch):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError) as caught:
        load_hub_task("sst2")
    message = str(caught.value)
    assert "\n" not in message
    for way_out in ("SetFit/sst2", "local copy of the repository", "train.jsonl", "reviews, tickets, questions"):
        assert way_out in message


TEMPLATE = "{text}\nLabel:"


def classified(names, labels):
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    return datasets.Dataset.from_dict({"text": [f"t{label}" for label in labels], "label": labels}, features=features)


def test_any_data_set_brings_its_class_names_as_labels(hub):
    hub.splits = {"train": classified(["no", "yes"], [1, 0]), "test": classified(["no", "yes"], [0])}
    data = load_hub_dataset("someone/data", template=TEMPLATE)
    assert data.task.labels == ("no", "yes")
    assert data.train == (Example("t1", "yes"), Example("t0", "no"))
    assert data.test == (Example("t0", "no"),)
    assert [(path, options["split"]) for path, options in hub.requests] == [
        ("someone/data", "train"),
        ("someone/data", "test"),
    ]


def test_label_words_replace_class_names_and_name_bare_integers(hub):
    for names in (["no", "yes"], None):
        hub.splits = {"train": classified(names, [1, 0])}
        data = load_hub_dataset("a/b", template=TEMPLATE, label_words=("bad", "good"), test_split=None)
        assert data.train == (Example("t1", "good"), Example("t0", "bad"))
        assert data.task.labels == ("bad", "good")
        assert data.test == ()


def test_integers_without_names_are_labels_themselves_and_that_is_said(hub, caplog):
    hub.splits = {"train": classified(None, [1, 0])}
    assert load_hub_dataset("a/b", template=TEMPLATE, test_split=None).task.labels == ("0", "1")
    assert "the labels of a/b are numbers (0, 1)" in caplog.text


def test_a_template_reads_the_columns_of_a_data_set_and_rows_without_text_are_left_out(hub):
    columns = {"Premise": ["a", "b"], "text": ["c", " "], "label": ["x", "y"]}
    hub.splits = {"train": datasets.Dataset.from_dict(columns), "test": datasets.Dataset.from_dict(columns)}
    data = load_hub_dataset("a/b", template="{premise} / {text}:", label_words=("x", "y"))
    assert [data.task.prompt(example.text) for example in data.train] == ["a / c:"]


def test_labels_written_as_text_are_collected_from_all_splits(hub):
    hub.splits = {
        "train": datasets.Dataset.from_dict({"q": ["a", "b"], "kind": ["y", "x"]}),
        "test": datasets.Dataset.from_dict({"q": ["c"], "kind": ["z"]}),
    }
    options = {"template": TEMPLATE, "text_column": "q", "label_column": "kind"}
    assert load_hub_dataset("a/b", **options).task.labels == ("x", "y", "z")
    with pytest.raises(InputError, match=r'row 1 of a/b \(test\): the label "z"'):
        load_hub_dataset("a/b", **options, label_words=("x", "y"))


@pytest.mark.parametrize(
    ("split", "options", "complaint"),
    [
        (classified(None, [0, 2]), {"label_words": ("a", "b")}, r'row 2 .* the label "2" is not one of .*\(a, b\)'),
        (classified(["a", "b"], [0, -1]), {}, r'row 2 of a/b \(train\): the label "-1" is not'),
        (classified(["a", "b"], [0, 1]), {"template": "{title} {text}:"}, 'no column "title"'),
        (classified(["a", "b"], [0, 1]), {"text_column": "body"}, 'no column "body"'),
        (classified(["a", "b"], [0, 1]), {"label_column": "y"}, r'no column "y" \(columns found: "text", "label"\)'),
        (classified(["a", "b"], [0, 1]), {"test_split": "dev"}, 'split "dev".*could not be loaded'),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(hub, split, options, complaint):
    hub.splits = {"train": split}
    with pytest.raises(InputError, match=complaint):
        load_hub_dataset("a/b", **{"template": TEMPLATE, "test_split": None} | options)
