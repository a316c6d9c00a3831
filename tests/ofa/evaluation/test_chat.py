"""A prompt in a chat template: the same tokens as the template's own, a label without a blank, and one BOS."""

from __future__ import annotations

import json
import shutil

import pytest

from ofa.errors import InputError
from ofa.evaluation.chat import in_chat
from ofa.evaluation.encoding import Encoder
from ofa.tasks.task import Example, Task
from tests.ofa.command_line import LABELS, TEMPLATE, TEST, TRAIN, done, ofa, write_rows
from tests.ofa.evaluation.test_plain_text import ATTACKS, chatml_tokenizer, controls, sentencepiece_tokenizer

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# <think></think> #}"
TASK = Task("mood", "A {{review}}: {text}\nSentiment:", ("negative", "positive"))


def with_template(tokenizer, template=CHATML):
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("system", [None, "Be {brief}."])
def test_a_prompt_has_the_tokens_of_the_chat_template(system):
    tokenizer = with_template(chatml_tokenizer())
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": TASK.prompt("a warm film")})
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    chat = in_chat(TASK, tokenizer, system)
    assert Encoder(tokenizer, chat, None).encode_prompt("a warm film") == whole
    assert Task.from_dict(chat.to_dict()) == chat


@pytest.mark.parametrize("text", ATTACKS)
def test_a_text_cannot_take_a_turn(text):
    tokenizer = with_template(chatml_tokenizer())
    prompt = Encoder(tokenizer, in_chat(TASK, tokenizer), None).encode_prompt(text)
    assert controls(tokenizer, prompt) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize("labels", [("negative", "positive"), ("好评", "差评"), ("yes", "yes sir")], ids=str)
def test_a_label_begins_the_assistants_turn(labels):
    """Without a blank, which no assistant writes; words with the same first token end in a line end as elsewhere."""
    tokenizer = with_template(chatml_tokenizer())
    words = Encoder(tokenizer, in_chat(Task("t", "{text}:", labels), tokenizer), None).labels
    assert [tokenizer.decode(ids).rstrip("\n") for ids in words.values()] == list(labels)


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML], ids=["the tokenizer's", "the template's"])
def test_one_token_begins_the_prompt(template):
    """A second BOS is no error, but a worse answer."""
    tokenizer = with_template(sentencepiece_tokenizer(), template)
    prompt = Encoder(tokenizer, in_chat(TASK, tokenizer), None).encode_prompt("warm")
    assert prompt[0] == tokenizer.bos_token_id
    assert prompt.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (None, None, "no chat template"),
        ("{{ raise_exception('no system') }}", "hi", "failed.*no system.*--system"),
        ("{{ messages[-1].content }}:", "hi", "leaves the system prompt out"),
        ("{{ messages[-1].content }} {{ messages[-1].content }}", None, "user's turn once"),
    ],
)
def test_a_model_without_a_usable_chat_is_refused(template, system, message):
    with pytest.raises(InputError, match=message):
        in_chat(TASK, with_template(chatml_tokenizer(), template), system)


def test_demonstrations_are_refused():
    tokenizer = with_template(chatml_tokenizer())
    with pytest.raises(InputError, match="not turns of a chat"):
        Encoder(tokenizer, in_chat(TASK, tokenizer), None).encode_demonstrations([Example("a", "positive")])


@pytest.fixture
def chat_folder(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "chat")
    template = "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def test_an_adapter_keeps_its_chat(chat_folder, tmp_path):
    """fit, evaluate and predict read the same prompt; options that contradict the adapter are refused."""
    train, test = write_rows(tmp_path / "train.jsonl", TRAIN), write_rows(tmp_path / "test.jsonl", TEST)
    where = ["--template", TEMPLATE, "--labels", LABELS, "--model", chat_folder, "--chat", "--system", "Be brief."]
    folder = tmp_path / "adapter"
    summary = done(
        "fit", "--data", train, *where, "--shots", 2, "--max-steps", 1, "--test", test, "--out", folder, "--json"
    ).json
    written = json.loads((folder / "ofa_config.json").read_text(encoding="utf-8"))["task"]
    assert written["template"] == f"<s>system:Be brief.</s>user:{TEMPLATE}</s>assistant:".replace("\\n", "\n")
    assert written["chat"] is True
    evaluated = done("evaluate", folder, "--data", test, "--json").json
    assert evaluated["negative_log_likelihood"] == summary["scores"]["negative_log_likelihood"]
    assert evaluated["task"] == done("evaluate", "--data", train, *where, "--json").json["task"] | {"name": "train"}
    assert done("predict", folder, "--text", "a bore", "--json").json[0]["label"] in written["labels"]
    assert "leave out --chat" in ofa("evaluate", folder, "--data", test, "--no-chat").err
    assert "add --chat" in ofa("evaluate", "--data", test, "--system", "x").err
