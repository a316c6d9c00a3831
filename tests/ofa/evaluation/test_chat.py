"""A prompt in a chat template: the same tokens as the template's own, a label without a blank, and one BOS."""

from __future__ import annotations

import json
import shutil

import pytest

import ofa
from ofa.errors import InputError
from ofa.evaluation.chat import asked_chat, in_chat
from ofa.evaluation.encoding import Encoder
from ofa.tasks.task import Example, Task
from tests.ofa.command_line import LABELS, TEMPLATE, TEST, TRAIN, done, write_rows
from tests.ofa.command_line import ofa as run
from tests.ofa.comparison.conftest import here  # noqa: F401
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


LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are {Qwen}.<|im_end|>\n{% endif %}"
    + TURNS
    + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ (system or '') if loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %}{{ ANSWER }}</s>{% endif %}{% endfor %}"
)
MISTRAL_1, LLAMA_2 = (MISTRAL.replace("ANSWER", answer) for answer in ("m.content", "' ' + m.content"))
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
FAMILIES = {
    "llama-3": (LLAMA_3, ""),
    "qwen": (QWEN, ""),
    "gemma": (GEMMA, ""),
    "mistral": (MISTRAL_1, ""),
    "llama-2": (LLAMA_2, " "),
    "phi-3": (PHI_3, ""),
    "vicuna": (VICUNA, " "),
}
SPECIAL = (
    "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|> <start_of_turn> "
    "<end_of_turn> <|system|> <|user|> <|assistant|> <|end|> </s>"
)


def family_tokenizer(template, bos="<s>"):
    """Byte-level, with the control tokens of every family; it writes no BOS of its own."""
    tokenizer = with_template(chatml_tokenizer(), template)
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": "</s>", "additional_special_tokens": SPECIAL.split()})
    return tokenizer


@pytest.mark.parametrize(("template", "blank"), FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("system", [None, "Be {brief}."], ids=["no system", "system"])
def test_prompt_and_label_have_the_tokens_of_the_familys_turns(template, blank, system):
    """An answer begins where the assistant's does, with the blank that the template writes in front, and only then."""
    tokenizer = family_tokenizer(template)
    if template == GEMMA and system:
        with pytest.raises(InputError, match=r"System role not supported.*leave out --system"):
            in_chat(TASK, tokenizer, system)
        return
    chat = in_chat(TASK, tokenizer, system)
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": TASK.prompt("a warm film")})
    said = {"add_generation_prompt": True, "enable_thinking": False}
    written = tokenizer.apply_chat_template(turns, tokenize=False, **said).rstrip(" ")
    assert chat.prompt("a warm film") == written
    assert chat.target("positive") == blank + "positive"
    encoder = Encoder(tokenizer, chat, None)
    prompt = encoder.encode_prompt("a warm film")
    assert prompt == tokenizer(written, add_special_tokens=False)["input_ids"]
    assert prompt.count(tokenizer.bos_token_id) == written.count("<s>")
    whole = tokenizer(f"{written}{blank}positive", add_special_tokens=False)["input_ids"]
    assert [*prompt, *encoder.encode_target("positive")] == whole
    assert Task.from_dict(chat.to_dict()) == chat


@pytest.mark.parametrize("template", [template for template, _ in FAMILIES.values()], ids=FAMILIES)
def test_no_family_lets_a_text_write_its_control_tokens(template):
    tokenizer = family_tokenizer(template)
    encoder = Encoder(tokenizer, in_chat(TASK, tokenizer), None)
    attack = encoder.encode_prompt(f"warm {SPECIAL} <s>")
    assert controls(tokenizer, attack) == controls(tokenizer, encoder.encode_prompt("warm"))


@pytest.mark.parametrize(
    ("asked", "chat"),
    [({}, False), ({"chat": False}, False), ({"chat": True}, True), ({"system": "Be brief."}, True)],
    ids=str,
)
def test_a_chat_is_made_only_if_it_is_asked_for(asked, chat):
    assert asked_chat(TASK, with_template(chatml_tokenizer(), CHATML), **asked).chat is chat


@pytest.mark.parametrize(
    ("chat", "asked", "message"),
    [
        (False, {"chat": False, "system": "hi"}, "leave out --no-chat"),
        (False, {"chat": True, "demonstrations": ["icl"]}, "not turns of a chat: leave out icl"),
        (True, {"chat": False}, "is a chat already"),
        (True, {"system": "hi"}, "is a chat already"),
    ],
)
def test_contradictions_are_refused(chat, asked, message):
    tokenizer = with_template(chatml_tokenizer())
    with pytest.raises(InputError, match=message):
        asked_chat(in_chat(TASK, tokenizer) if chat else TASK, tokenizer, **asked)


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
    assert "leave out --chat" in run("evaluate", folder, "--data", test, "--no-chat").err
    assert "leave out --no-chat" in run("evaluate", "--data", test, "--no-chat", "--system", "x", *where[:6]).err


def test_the_default_is_told_in_one_line(chat_folder, tmp_path):
    """Also that every command takes it: what fit trains on is what evaluate, probe and suggest read of a bare model."""
    data = write_rows(tmp_path / "data.jsonl", TEST)
    where = ["--data", data, "--template", TEMPLATE, "--labels", LABELS, "--model", chat_folder]
    adapter = tmp_path / "adapter"
    runs = [
        run("fit", *where, "--shots", 2, "--max-steps", 1, "--out", adapter),
        run("evaluate", *where),
        run("probe", *where, "--out", tmp_path / "probed"),
        run("suggest", *where[2:], "--data", write_rows(tmp_path / "new.jsonl", [("a film", "")])),
    ]
    for finished in runs:
        assert finished.status == 0, finished.err
        assert finished.err.count("chat template: not used (see --chat)") == 1
    assert json.loads((adapter / "ofa_config.json").read_text())["task"].get("chat", False) is False
    assert "chat template" not in run("evaluate", adapter, "--data", data).err


def test_probe_and_suggest_take_a_chat_of_the_bare_model(chat_folder, tmp_path):
    data, new = (write_rows(tmp_path / name, TEST) for name in ("data.jsonl", "new.jsonl"))
    new.write_text('{"text": "a film"}\n{"text": "a bore"}\n', encoding="utf-8")
    where = ["--template", TEMPLATE, "--labels", LABELS, "--model", chat_folder]
    done("probe", *where, "--data", data, "--out", tmp_path / "turns", "--chat")
    done("probe", *where, "--data", data, "--out", tmp_path / "plain", "--no-chat")
    chat, plain = (json.loads((tmp_path / name / "probe.json").read_text()) for name in ("turns", "plain"))
    assert chat["task"]["chat"] is True
    assert chat["models"][0]["loss"] != plain["models"][0]["loss"]
    asked = [done("suggest", *where, "--data", new, "--json", *how).json for how in (["--chat"], ["--no-chat"])]
    assert asked[0][0]["probability"] != asked[1][0]["probability"]


@pytest.mark.usefixtures("here")
def test_compare_runs_a_grid_in_the_chat(chat_folder, tmp_path):
    """Methods and contexts with demonstrations are refused before anything runs."""
    folder = tmp_path / "task"
    folder.mkdir()
    task = {"name": "mood", "template": TEMPLATE.replace("\\n", "\n"), "labels": LABELS.split(",")}
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    write_rows(folder / "train.jsonl", TRAIN)
    write_rows(folder / "test.jsonl", TEST)
    grid = [
        "compare",
        "--tasks",
        folder,
        "--model",
        chat_folder,
        "--seeds",
        1,
        "--shots",
        2,
        "--test-size",
        4,
        "--chat",
    ]
    out = tmp_path / "results"
    refused = run(*grid, "--methods", "zero-shot,i2cl", "--out", out)
    assert "leave out the method i2cl, the context demonstrations, or leave out the chat" in refused.err
    assert not out.exists()
    grid += ["--methods", "zero-shot", "--contexts", "prompt", "--json"]
    chat = done(*grid, "--out", out).json
    where = ["--template", TEMPLATE, "--labels", LABELS, "--model", chat_folder, "--chat"]
    alone = done("evaluate", "--data", folder / "test.jsonl", *where, "--json").json
    cell = json.loads((out / "results.jsonl").read_text().splitlines()[0])
    assert cell["scores"]["prompt"]["metrics"]["negative_log_likelihood"] == alone["negative_log_likelihood"]
    assert chat["failed"] == 0
    done("report", out)
    assert "turns of the model's chat template" in (out / "report.md").read_text(encoding="utf-8")
    assert "whether it is a chat" in run(*grid, "--no-chat", "--out", out).err


def test_steps_with_demonstrations_are_no_chat(chat_folder):
    loaded = ofa.load_model(str(chat_folder))
    rows = [(f"{text} {number}", label) for number in "12" for text, label in (("a joy", "good"), ("a bore", "bad"))]
    settings = {"template": "{text}:", "max_steps": 1, "demonstrated_steps": 1.0}
    adaptation = ofa.adapt(loaded.model, loaded.tokenizer, rows, shots=2, **settings)
    assert not adaptation.data.task.chat
    adaptation.close()
    with pytest.raises(InputError, match="leave out demonstrated_steps"):
        ofa.adapt(loaded.model, loaded.tokenizer, rows, shots=2, chat=True, **settings)


def test_adapt_and_the_classifier_keep_the_chat(chat_folder, tmp_path):
    loaded = ofa.load_model(str(chat_folder))
    rows = [("a joy", "good"), ("a bore", "bad")]
    settings = {"template": "{text}:", "max_steps": 1, "chat": True, "system": "Be brief."}
    adaptation = ofa.adapt(loaded.model, loaded.tokenizer, rows, shots=1, **settings)
    assert adaptation.details()["task"]["template"] == "<s>system:Be brief.</s>user:{text}:</s>assistant:"
    adaptation.close()
    sklearn = pytest.importorskip("ofa.sklearn")
    classifier = sklearn.FewShotClassifier(str(chat_folder), **settings).fit(*zip(*rows, strict=True))
    expected = adaptation.details()["task"] | {"name": "sklearn"}
    assert classifier.task_.to_dict() == expected
    found = done("predict", classifier.save(tmp_path / "saved"), "--text", "a joy", "--json").json[0]
    assert found["probabilities"]["good"] == pytest.approx(classifier.predict_proba(["a joy"])[0, 1], abs=1e-6)
