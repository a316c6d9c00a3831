"""Every method of `ofa fit --method` leaves a folder that PEFT and ofa open with the logits of the trained model."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import ofa
from ofa.adapters.folder import CARD, CONFIG, DETAILS, WEIGHTS
from ofa.adapters.open import opened_adapter, put_adapter
from ofa.adapters.read import PREFIX, read_any_adapter
from ofa.errors import InputError
from ofa.evaluation.scorer import Scorer
from ofa.methods import ADAPTER_METHODS, WITH_NORMS
from tests.ofa.given_back import state
from tests.ofa.test_adaptation import DATA, TASK, TEXTS

QUICK = {"max_steps": 2, "batch_size": 2}
PEFT_METHODS = ("lora", "ia3", "soft-prompt", "lora-ofa", "ia3-ofa")
MERGED = ("lora", "ia3", "lora-ofa", "ia3-ofa")


def logits(model, tokenizer):
    """At the prompt's last token."""
    inputs = tokenizer("Review: a film that drags\nSentiment:", return_tensors="pt").to(model.device)
    with torch.no_grad():
        return model.eval()(**inputs).logits[0, -1].clone()


@pytest.fixture
def saved(tiny_model, tmp_path):
    """Adapt by a method, save, give the model back; the folder, and logits and probabilities of the trained model."""

    def make(method, **settings):
        model, tokenizer = tiny_model
        adaptation = ofa.adapt(model, tokenizer, DATA, shots=2, seed=3, method=method, **QUICK, **settings)
        trained = logits(adaptation.predictor.scorer.model, tokenizer), adaptation.predict_proba(TEXTS)
        folder = adaptation.save(tmp_path / "adapter")
        adaptation.close()
        return folder, *trained

    return make


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_peft_opens_what_was_trained(saved, tiny_model, method):
    """The trained logits, not the base's."""
    model, tokenizer = tiny_model
    folder, trained, _ = saved(method)
    opened = AutoPeftModelForCausalLM.from_pretrained(folder)
    # A merged scale or a fused norm rounds differently: a few float32 roundings of logits below 1.
    torch.testing.assert_close(logits(opened.to(model.device), tokenizer), trained, rtol=0, atol=1e-6)
    assert not torch.allclose(logits(model, tokenizer), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_it_opens_again_with_equal_probabilities(saved, tiny_model, method):
    model, tokenizer = tiny_model
    folder, _, trained = saved(method)
    opened = put_adapter(model, read_any_adapter(folder), ExitStack())
    torch.testing.assert_close(Scorer(opened, tokenizer, TASK).predict_proba(TEXTS), trained, rtol=0, atol=1e-6)


def test_short_names_of_targets_are_taken_out_again(saved, tiny_model, monkeypatch):
    """PEFT shortens the names of twenty targets and more, as larger models have them, to their common ends."""
    monkeypatch.setattr("peft.tuners.tuners_utils.MIN_TARGET_MODULES_FOR_OPTIMIZATION", 1)
    model, tokenizer = tiny_model
    folder, _, trained = saved("lora")
    targets = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["target_modules"]
    assert targets == ["q_proj", "v_proj"]
    before = state(model)
    with opened_adapter(model, read_any_adapter(folder)) as opened:
        torch.testing.assert_close(Scorer(opened, tokenizer, TASK).predict_proba(TEXTS), trained, rtol=0, atol=1e-6)
    assert state(model) == before


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_the_folder_says_how_it_was_made(saved, method):
    """The method's own defaults too, which differ from those of norm tuning."""
    folder, *_ = saved(method)
    details = json.loads((folder / DETAILS).read_text(encoding="utf-8"))
    assert details["method"] == method
    rates = {"lora": None, "lora-ofa": None, "ia3": 3e-3, "ia3-ofa": 3e-3, "soft-prompt": 0.1}
    assert details["settings"]["learning_rate"] == rates[method]
    assert details["parameters"] == sum(value.numel() for value in load_file(folder / WEIGHTS).values())
    card = (folder / CARD).read_text(encoding="utf-8")
    assert ("448 of which are tuned norm scales" in card) == (method in WITH_NORMS)
    assert "adapter for mood" in card


@pytest.mark.parametrize("method", MERGED)
def test_merging_gives_a_plain_checkpoint_and_leaves_the_model(saved, tiny_model, tmp_path, method):
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny_model
    folder, trained, _ = saved(method)
    before = state(model)
    out = ofa.merge(model, folder, tmp_path / "merged", tokenizer=tokenizer)
    assert state(model) == before
    merged = AutoModelForCausalLM.from_pretrained(out).to(model.device)
    # W + BA is rounded once more than Wx + BAx: a few units of float32 at logits below 1.
    torch.testing.assert_close(logits(merged, tokenizer), trained, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", WITH_NORMS)
def test_norms_beside_an_adapter_are_its_modules_to_save(saved, method):
    """Every norm whole and nothing else, under the names that PEFT saves such modules by."""
    folder, *_ = saved(method)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    norms = [f"model.layers.{layer}.{name}_layernorm" for layer in range(3) for name in ("input", "post_attention")]
    assert sorted(config["modules_to_save"]) == sorted([*norms, "model.norm"])
    tensors = load_file(folder / WEIGHTS)
    assert {f"base_model.model.{norm}.weight" for norm in norms} < tensors.keys()
    opened = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert tensors.keys() == get_peft_model_state_dict(opened, save_embedding_layers=False).keys()


def test_scales_beside_an_adapter_stay_float32_in_a_narrow_model(saved, tiny_model, tmp_path):
    """Opened as they were trained; a merged checkpoint has the base's dtype."""
    model, tokenizer = tiny_model
    model.to(torch.bfloat16)
    folder, trained, probabilities = saved("lora-ofa")
    assert load_file(folder / WEIGHTS)["base_model.model.model.norm.weight"].dtype == torch.float32
    before = state(model)
    with opened_adapter(model, read_any_adapter(folder)) as opened:
        assert torch.equal(Scorer(opened, tokenizer, TASK).predict_proba(TEXTS), probabilities)
    assert state(model) == before
    merged = load_file(ofa.merge(model, folder, tmp_path / "merged") / "model.safetensors")
    assert merged["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(logits(put_adapter(model, read_any_adapter(folder), ExitStack()), tokenizer), trained)


def test_a_norm_whose_name_ends_another_module_s_is_refused(tiny_model):
    """PEFT would save and replace that module, too."""
    model, tokenizer = tiny_model
    model.twin = nn.ModuleDict({"model": nn.ModuleDict({"norm": nn.Identity()})})
    with pytest.raises(InputError, match=r"take the module twin\.model\.norm for a norm"):
        ofa.adapt(model, tokenizer, DATA, shots=2, method="lora-ofa")


@pytest.mark.parametrize("place", ["a pool", "load_adapter", "a GGUF file"])
def test_what_holds_norm_scales_alone_refuses_it(saved, tiny_model, tmp_path, place):
    folder, *_ = saved("lora-ofa")
    into = {
        "a pool": lambda: ofa.AdapterPool(tiny_model[0]).add("mood", folder),
        "load_adapter": lambda: ofa.load_adapter(tiny_model[0], folder),
        "a GGUF file": lambda: ofa.merge_gguf(folder, tmp_path / "base.gguf", tmp_path / "out.gguf"),
    }
    remedy = "of the kind LN-tuning, or make a checkpoint of this one with `ofa merge .* --out FOLDER` and use that"
    with pytest.raises(InputError, match=f"holds a LoRA adapter, .* {remedy}"):
        into[place]()


def test_a_soft_prompt_cannot_be_merged(saved, tiny_model, tmp_path):
    folder, *_ = saved("soft-prompt")
    with pytest.raises(InputError, match="soft prompt, which is an input and cannot be merged"):
        ofa.merge(tiny_model[0], folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def other_norms(model):
    with torch.no_grad():
        model.model.norm.weight += 0.5


DAMAGE = {
    "a tensor is missing": ("lora", lambda t: t.pop(next(iter(t))), "does not fit this model .*is in one of them only"),
    "another width": (
        "lora",
        lambda t: t.update({k: v[:, :8].clone() for k, v in t.items() if "lora_A" in k}),
        "does not fit",
    ),
    "not finite": ("lora", lambda t: next(iter(t.values())).fill_(float("nan")), "is not finite"),
    "a norm is missing": ("lora-ofa", lambda t: t.pop(f"{PREFIX}model.norm.weight"), r"model\.norm.* is missing"),
}


@pytest.mark.parametrize(("method", "change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(saved, tiny_model, method, change, message):
    """PEFT itself only warns of parameters that are missing."""
    folder, *_ = saved(method)
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=message):
        put_adapter(tiny_model[0], read_any_adapter(folder), ExitStack())


def test_other_whole_modules_are_refused(saved, tiny_model):
    """PEFT saves any module beside an adapter; here only norms and the heads of classifiers are known."""
    folder, *_ = saved("lora")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}), encoding="utf-8")
    with pytest.raises(InputError, match="lm_head is none of its norms"):
        put_adapter(tiny_model[0], read_any_adapter(folder), ExitStack())


def test_another_base_is_refused(saved, tiny_model):
    folder, *_ = saved("lora")
    other_norms(tiny_model[0])
    with pytest.raises(InputError, match="this model's own norms differ"):
        put_adapter(tiny_model[0], read_any_adapter(folder), ExitStack())


@pytest.mark.parametrize("method", ["lora", "lora-ofa"])
def test_a_stopped_run_resumes_to_the_same_tensors(tiny_model, tmp_path, method):
    """The checkpoint holds LoRA's matrices, the scales beside them, and moments."""
    model, tokenizer = tiny_model

    def run(name, **options):
        with_folder = {"folder": tmp_path / name, "shots": 2, "seed": 3, "method": method, "epochs": 2, "batch_size": 2}
        adaptation = ofa.adapt(model, tokenizer, DATA, **{**with_folder, **options})
        adaptation.save(tmp_path / name, overwrite=True)
        adaptation.close()
        return (tmp_path / name / WEIGHTS).read_bytes()

    whole = run("whole")
    with pytest.raises(ZeroDivisionError):
        run("stopped", progress=lambda record, total: 1 / (3 - record.step))
    assert not (tmp_path / "stopped" / CONFIG).exists()
    assert run("stopped", resume=True) == whole


REFUSED = {
    "a regularizer": ({"method": "lora", "step_ratio": 0.1}, "step_ratio is a setting of OFA, and lora has no"),
    "a term": ({"method": "norm-tuning", "step_ratio": 0.1}, "norm-tuning means step_ratio=0"),
    "norms beside LoRA": ({"method": "lora", "with_norms": True}, "are the methods lora-ofa and ia3-ofa; choose one"),
    "no format": ({"method": "i2cl"}, "the result of i2cl has no adapter format of PEFT"),
    "a typing error": ({"method": "loar"}, 'there is no method "loar"'),
    "guided, resumed": ({"method": "guided", "resume": True}, "keeps no checkpoint and cannot be resumed"),
    "another rank": ({"method": "lora-r1", "rank": 4}, "lora-r1 means rank=1"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_method_does_not_have_is_refused(tiny_model, options, message):
    model, tokenizer = tiny_model
    before = state(model)
    with pytest.raises(InputError, match=message):
        ofa.adapt(model, tokenizer, DATA, shots=2, seed=3, **options)
    assert state(model) == before


def test_guided_runs_leave_their_metrics(tiny_model, tmp_path):
    model, tokenizer = tiny_model
    adaptation = ofa.adapt(
        model, tokenizer, DATA, shots=2, seed=3, method="guided-first-order", folder=tmp_path / "run", **QUICK
    )
    adaptation.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
    shutil.rmtree(tmp_path / "run")
