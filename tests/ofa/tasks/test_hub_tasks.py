"""The nine tasks of the paper read each hub repository's layout and map its labels by name."""

from __future__ import annotations

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


def hub_split(name, split):
    """A split of a task's repository: its columns, three rows per class."""
    if name in CLASS_LABELS:
        return parquet_split(name, split)
    if name == "trec":
        return datasets.Dataset.from_list(trec_rows(split))
    return datasets.Dataset.from_list(setfit_rows(SETFIT_NAMES.get(name, HATE_SPEECH), split))


def expected(name, split):
    return {Example(f"{split} {source} {n}", word) for source, word in WORDS[name].items() for n in range(PER_CLASS)}


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
def test_the_documented_repository_is_read_with_its_labels_by_name_and_its_code_is_never_run(name, hub, tmp_path):
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
    hub.folder = tmp_path
    for split in ("train", "test"):
        hub.splits[split] = hub_split(name, split)
        (tmp_path / "emo2019" / split).mkdir(parents=True)
        hub.splits[split].to_parquet(tmp_path / "emo2019" / split / "0000.parquet")
    data = load_hub_task(name)
    if name == "hatespeech18":
        kept = [Example(f"train {source} {n}", word) for n in range(PER_CLASS) for source, word in WORDS[name].items()]
        assert (list(data.train), list(data.test)) == (kept[:3], kept[3:])
    else:
        assert set(data.train) == expected(name, "train")
        assert set(data.test) == expected(name, "test")
        assert len(data.train) == len(data.test) == PER_CLASS * len(WORDS[name])
    assert {path for path, _ in hub.requests} == {hub_ids[name]}
    assert all("trust_remote_code" not in options for _, options in hub.requests)
    if name == "emo":
        train, test = (request for _, request in hub.requests)
        assert (train["revision"], train["repo_type"]) == ("refs/convert/parquet", "dataset")
        assert (train["allow_patterns"], test["allow_patterns"]) == tuple(
            f"emo2019/{split}/*.parquet" for split in ("train", "test")
        )


@pytest.mark.parametrize("name", ["agnews", "dbpedia", "mr"])
def test_integers_without_names_follow_the_documented_order(name, hub):
    hub.splits = {split: parquet_split(name, split, names=False) for split in ("train", "test")}
    assert set(load_hub_task(name).train) == expected(name, "train")


@pytest.mark.parametrize("name", list(SETFIT_NAMES))
def test_integers_are_used_where_the_label_text_is_missing(name, hub):
    hub.splits = {split: hub_split(name, split).remove_columns("label_text") for split in ("train", "test")}
    assert set(load_hub_task(name).test) == expected(name, "test")


def test_names_win_over_the_integers_when_their_orders_differ(hub):
    hub.splits = dict.fromkeys(("train", "test"), classified(["pos", "neg"], [0, 1]))
    assert load_hub_task("mr").train == (Example("t0", "positive"), Example("t1", "negative"))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"sentence": "a", "label": 0}, r'no column "text" \(columns found: "sentence", "label"\)'),
        ({"text": "a", "sentiment": 0}, r'no column "label" \(columns found: "text", "sentiment"\)'),
        ({"text": "a", "label": 2}, 'row 1 of SetFit/sst2 .*the label "2" is not one of'),
        ({"text": "a", "label": -1}, 'the label "-1" is not one of'),
        ({"text": "a", "label": [1]}, r"the label is \[1\], which is not text"),
        ({"text": "a", "label": 1}, 'has no example of "negative"'),
        ({"text": " ", "label": 1}, 'has no example of "negative"'),
    ],
)
def test_other_data_in_the_place_of_the_repository_is_refused(row, complaint, hub):
    hub.splits = dict.fromkeys(("train", "test"), datasets.Dataset.from_list([row]))
    with pytest.raises(InputError, match=complaint):
        load_hub_task("sst2")


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it.\nMore."), OSError(""), RuntimeError("broken")])
def test_a_broken_connection_explains_how_to_work_offline(error, reachable, monkeypatch):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError) as caught:
        load_hub_task("sst2")
    message = str(caught.value)
    assert "\n" not in message
    for way_out in ("SetFit/sst2", "train.jsonl", "reviews, tickets, questions"):
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
        hub.splits = dict.fromkeys(("train", "test"), classified(names, [1, 0]))
        data = load_hub_dataset("a/b", template=TEMPLATE, label_words=("bad", "good"))
        assert data.train == data.test == (Example("t1", "good"), Example("t0", "bad"))
        assert data.task.labels == ("bad", "good")


def test_integers_without_names_are_labels_themselves_and_that_is_said(hub, caplog):
    hub.splits = dict.fromkeys(("train", "test"), classified(None, [1, 0]))
    assert load_hub_dataset("a/b", template=TEMPLATE).task.labels == ("0", "1")
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
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(hub, split, options, complaint):
    hub.splits = dict.fromkeys(("train", "test"), split)
    with pytest.raises(InputError, match=complaint):
        load_hub_dataset("a/b", **{"template": TEMPLATE} | options)


def test_a_data_set_without_a_test_split_is_refused(hub):
    hub.splits = {"train": classified(["a", "b"], [0, 1])}
    with pytest.raises(InputError, match=r'split "test".*could not be loaded'):
        load_hub_dataset("a/b", template=TEMPLATE)
