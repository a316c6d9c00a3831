"""Push to the hub and load from it: the real client against a stub of the hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

import ofa
from ofa.adapters.folder import CARD, CONFIG, DETAILS, WEIGHTS
from ofa.adapters.push import push_to_hub
from ofa.errors import InputError
from tests.hub import OWNER_TOKEN, READER_TOKEN, running_hub
from tests.ofa.command_line import ofa as command

# PEFT warns about every norm, and tunes it anyway.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

BASE, REPOSITORY = "owner/tiny-base", "owner/reviews-ofa"
IDS = torch.tensor([[5, 9, 30, 77, 12]])


@pytest.fixture
def hub(monkeypatch, tiny_folder):
    """A hub stub that has the base; this process is logged in as its owner."""
    with running_hub() as server:
        server.add("models", BASE, {file.name: file.read_bytes() for file in tiny_folder.iterdir()})
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks plain LFS
        monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
        yield server


@pytest.fixture
def tuned(tiny_model):
    """On the CPU, where another process computes the same bits."""
    model = tiny_model[0].cpu()
    with torch.no_grad():
        for scale in ofa.tune_norms(model):
            scale.add_(torch.linspace(-0.2, 0.3, scale.numel()))
    return model


@pytest.fixture
def adapter(tuned, tmp_path) -> Path:
    """An adapter folder of `ofa fit`, with records, figure and, from a killed run, a checkpoint."""
    task = {"name": "reviews", "template": "Review: {text}\nSentiment:", "labels": ["bad", "good"]}
    folder = ofa.save_adapter(tuned, tmp_path / "adapter", base_model=BASE, details={"task": task, "shots": 5})
    for name in ("metrics.jsonl", "training.png", "checkpoint.safetensors", "notes.txt"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def of_a_folder(tuned, tiny_folder, tmp_path) -> Path:
    return ofa.save_adapter(tuned, tmp_path / "of a folder", base_model=str(tiny_folder))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


# A reader on another machine: PEFT alone, then this package with a download. The client's address is fixed at import.
READER = """
import json, sys
import torch
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
import ofa

base, repository, ids = json.loads(sys.argv[1])
answers = lambda model: model.eval()(torch.tensor(ids)).logits.flatten().tolist()
with torch.no_grad():
    opened = answers(AutoPeftModelForCausalLM.from_pretrained(repository))
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = answers(model)
    ofa.load_adapter(model, snapshot_download(repository))
    print(json.dumps({"peft": opened, "base": plain, "ofa": answers(model)}))
"""


def test_a_pushed_adapter_loads_by_name_with_equal_logits(hub, of_a_folder, tuned, tmp_path):
    """Bit-identical, because float32 is not rounded; the adapter's base was a local folder.

    With one thread, as in this process: several share a product in parts of their own.
    """
    page = push_to_hub(of_a_folder, REPOSITORY, base_model=BASE, private=True)
    assert page == f"{hub.url}/{REPOSITORY}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER, json.dumps([BASE, REPOSITORY, IDS.tolist()])],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read, expected = json.loads(done.stdout), logits(tuned).flatten().tolist()
    assert read["peft"] == expected
    assert read["ofa"] == expected
    assert read["base"] != expected


def test_only_the_adapter_s_own_files_are_sent_in_one_commit(hub, adapter):
    """No checkpoint and no notes; readers never see half of an adapter."""
    push_to_hub(adapter, REPOSITORY, message="first try")
    repository = hub.repositories["models", REPOSITORY]
    assert repository.files.keys() == {WEIGHTS, CONFIG, DETAILS, CARD}
    assert repository.messages == ["first try"]
    assert not repository.private
    assert repository.files[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    push_to_hub(adapter, "owner/with-metrics", metrics=True, private=True)
    other = hub.repositories["models", "owner/with-metrics"]
    assert other.files.keys() == {WEIGHTS, CONFIG, DETAILS, CARD, "metrics.jsonl", "training.png"}
    assert other.private


def test_the_card_names_the_repository(hub, adapter):
    """It replaces the local folder; the owner's edits of the card stay."""
    written = (adapter / CARD).read_text() + "\nTried on film reviews only.\n"
    (adapter / CARD).write_text(written)
    push_to_hub(adapter, REPOSITORY)
    card = ModelCard(hub.files(REPOSITORY)[CARD].decode())
    assert card.data.base_model == BASE
    assert f'from_pretrained("{REPOSITORY}")' in card.text
    assert f"hf download {REPOSITORY} --local-dir adapter\nofa predict adapter" in card.text
    assert "PATH_OF_THIS_FOLDER" not in card.text
    assert card.text.endswith("Tried on film reviews only.\n")
    assert (adapter / CARD).read_text() == written


def test_a_base_on_this_machine_is_refused_with_the_way_out(hub, of_a_folder, tiny_folder):
    with pytest.raises(InputError, match=r"only on this machine, so others could not use it.*--base-model HUB_ID"):
        push_to_hub(of_a_folder, REPOSITORY)
    assert ("models", REPOSITORY) not in hub.repositories
    with pytest.raises(InputError, match="is no hub id; give the base model as --base-model owner/name"):
        push_to_hub(of_a_folder, REPOSITORY, base_model=str(tiny_folder))


def test_the_base_s_name_stands_where_its_path_stood(hub, of_a_folder, tiny_folder):
    """In configuration, details and card: no local path is published."""
    push_to_hub(of_a_folder, REPOSITORY, base_model=BASE)
    files = hub.files(REPOSITORY)
    assert not any(str(tiny_folder.parent).encode() in content for content in files.values())
    assert json.loads(files[CONFIG])["base_model_name_or_path"] == BASE
    assert json.loads(files[DETAILS])["base_model"] == BASE
    assert ModelCard(files[CARD].decode()).data.base_model == BASE


def test_an_adapter_without_a_base_name_gets_the_given_one(hub, tuned, tmp_path):
    """A model built in a script has no name, so pushing its adapter requires one."""
    tuned.config.name_or_path = ""
    folder = ofa.save_adapter(tuned, tmp_path / "nameless")
    with pytest.raises(InputError, match="does not say its base model, so others could not use it"):
        push_to_hub(folder, REPOSITORY)
    push_to_hub(folder, REPOSITORY, base_model=BASE)
    assert f"tuned norm scales of `{BASE}`" in hub.files(REPOSITORY)[CARD].decode()


def test_an_existing_repository_is_changed_only_with_overwrite(hub, adapter):
    hub.add("models", REPOSITORY, {"precious.txt": b"mine"})
    with pytest.raises(InputError, match=f"{REPOSITORY} already exists on the hub; .* with --overwrite"):
        push_to_hub(adapter, REPOSITORY)
    assert hub.files(REPOSITORY) == {"precious.txt": b"mine"}
    push_to_hub(adapter, REPOSITORY, overwrite=True)
    assert {WEIGHTS, "precious.txt"} <= hub.files(REPOSITORY).keys()


def without_token(hub, adapter, patch):
    patch.delenv("HF_TOKEN")
    patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")


def with_token(token):
    return lambda hub, adapter, patch: patch.setenv("HF_TOKEN", token)


def without_network(hub, adapter, patch):
    patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def line_that_breaks(hub, adapter, patch):
    def broken(*_, **__):
        raise ConnectionError("Connection reset by peer")

    patch.setattr(huggingface_hub.HfApi, "create_commit", broken)


def broken_card(hub, adapter, patch):
    (adapter / CARD).write_text("---\ntags: [one\n---\n")


REFUSALS = {
    "no token": (without_token, "there is no hub token on this machine; log in with `hf auth login`"),
    "an unknown token": (with_token("hf_unknown_secret"), "the hub does not know this token; log in again"),
    "a token that may only read": (
        with_token(READER_TOKEN),
        f"the token may not write to {REPOSITORY}; use",
    ),
    "no network": (without_network, r"the hub cannot be reached \(.*\); connect"),
    "a line that breaks": (line_that_breaks, r"cannot be reached \(Connection reset by peer\).*with --overwrite if"),
    "no adapter": (lambda hub, adapter, patch: (adapter / CONFIG).unlink(), "is not an adapter folder: it has no"),
    "a broken card": (broken_card, "the front matter of .*README.md cannot be read .* correct it, or delete the file"),
}


@pytest.mark.parametrize(("spoil", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_pushed_is_refused_in_a_sentence(hub, adapter, monkeypatch, spoil, words, caplog, capfd):
    """One sentence, nothing on the hub, and the token is neither in the message nor in any output."""
    spoil(hub, adapter, monkeypatch)
    with pytest.raises(InputError, match=words) as refusal, caplog.at_level("DEBUG"):
        push_to_hub(adapter, REPOSITORY)
    assert "\n" not in str(refusal.value)
    assert not hub.repositories.get(("models", REPOSITORY), hub.repositories["models", BASE]).files.keys() & {WEIGHTS}
    told = [str(refusal.value), caplog.text, *capfd.readouterr()]
    assert not any("secret" in text for text in told)


@pytest.mark.parametrize("name", ["owner/has space", "a/b/c", "-x", "owner/x..y"])
def test_a_name_that_no_repository_can_have_is_refused(hub, adapter, name):
    with pytest.raises(InputError, match="is not a valid hub repository; write owner/name"):
        push_to_hub(adapter, name)


def test_the_command_prints_the_repository_s_url(hub, adapter, tuned):
    done = command("push", adapter, REPOSITORY, "--private", "--metrics")
    assert (done.status, done.out) == (0, f"{hub.url}/{REPOSITORY}\n")
    assert done.err == f'try: AutoPeftModelForCausalLM.from_pretrained("{REPOSITORY}")\n'
    assert hub.repositories["models", REPOSITORY].private
    again = command("push", adapter, REPOSITORY)
    assert (again.status, again.out) == (2, "")
    assert again.err.startswith(f"ofa: {REPOSITORY} already exists on the hub")


def test_a_missing_card_is_generated(hub, adapter):
    (adapter / CARD).unlink()
    push_to_hub(adapter, REPOSITORY)
    assert ModelCard(hub.files(REPOSITORY)[CARD].decode()).data.base_model == BASE
