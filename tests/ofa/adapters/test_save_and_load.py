"""An adapter is a PEFT LN-tuning folder: every loader gives the same logits, and a refused one changes nothing."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ofa
from ofa.adapters.folder import CARD, CONFIG, DETAILS, WEIGHTS
from ofa.adapters.read import read_adapter
from ofa.errors import InputError
from tests import oracle
from tests.cases import CAUSAL
from tests.device import DEVICE
from tests.families import BUILDERS, build, inputs

# PEFT warns about every norm, and tunes it anyway.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# Raised by safetensors on a full disk; not an OSError.
NO_SPACE_IN_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
KINDS = ["llama", "gemma", "gemma3", "qwen3", "mixtral", "gpt_oss", "gpt2", "falcon_two_norms", "opt_post_norm"]
"""One family for each kind of norm (RMSNorm, 1+w, on heads, with a shift, two in parallel, after the sum) and of
checkpoint (sandwiches and experts, which transformers renames). All the others differ in names, and those are in every
family's folder."""
FIRST_NORM = "model.layers.0.input_layernorm.weight"


@dataclass(frozen=True)
class Saved:
    """An adapter of a family, and the model's logits with and without it."""

    name: str
    pristine: nn.Module
    folder: Path
    base: Path
    tuned_logits: torch.Tensor
    base_logits: torch.Tensor

    def fresh(self):
        return copy.deepcopy(self.pristine)


@pytest.fixture(autouse=True, scope="module")
def _no_gradients():
    with torch.no_grad():
        yield


def logits(model, name="llama"):
    if name in oracle.EXPERTS:
        model.set_experts_implementation("eager")  # not part of the saved configuration
    return model(**inputs(name)).logits


def tune(model):
    """Give every scale another value, none of them equal."""
    for index, scale in enumerate(ofa.tune_norms(model)):
        scale.add_(torch.linspace(-0.2, 0.3, scale.numel()).to(DEVICE) + 0.01 * index)


def save(name, root):
    model = build(name)
    base, folder = root / "base", root / "adapter"
    model.save_pretrained(base)
    pristine, base_logits = copy.deepcopy(model), logits(model, name)
    tune(model)
    ofa.save_adapter(model, folder, base_model=str(base), details={"seed": 42, "shots": 5})
    return Saved(name, pristine, folder, base, logits(model, name), base_logits)


@pytest.fixture(scope="module", params=BUILDERS)
def saved(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Read only; `damaged` has a copy to write into."""
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def damaged(llama, tmp_path):
    return Path(shutil.copytree(llama.folder, tmp_path / "damaged"))


def snapshot(model):
    """The state that a refusal or a merge must not change: objects, values, flags and hooks."""
    return (
        {path: (id(p), p.requires_grad, p.clone()) for path, p in model.named_parameters(remove_duplicate=False)},
        [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()],
    )


def assert_untouched(model, before):
    parameters, hooks = snapshot(model)
    assert hooks == before[1]
    assert parameters.keys() == before[0].keys()
    for path, (own, requires_grad, value) in parameters.items():
        assert (own, requires_grad) == before[0][path][:2], path
        assert torch.equal(value, before[0][path][2]), path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Loaders of a folder.


@pytest.mark.parametrize("saved", [*KINDS, "bert", "vit"], indirect=True)
def test_peft_loads_and_merges_it(saved):
    model = PeftModel.from_pretrained(saved.fresh(), saved.folder).eval()
    assert torch.equal(logits(model, saved.name), saved.tuned_logits)
    assert torch.equal(logits(model.merge_and_unload(), saved.name), saved.tuned_logits)


@pytest.mark.parametrize("saved", [*KINDS, "bert", "vit"], indirect=True)
def test_transformers_loads_it(saved):
    model = saved.fresh()
    model.load_adapter(str(saved.folder))
    assert torch.equal(logits(model.eval(), saved.name), saved.tuned_logits)


@pytest.mark.parametrize("saved", KINDS, indirect=True)
def test_peft_finds_the_base_of_a_causal_model(saved):
    model = AutoPeftModelForCausalLM.from_pretrained(saved.folder).eval().to(DEVICE)
    assert torch.equal(logits(model, saved.name), saved.tuned_logits)


def test_ofa_loads_it_and_restores_the_base(saved):
    model = saved.fresh()
    before = snapshot(model)
    assert not torch.equal(saved.tuned_logits, saved.base_logits)
    assert ofa.load_adapter(model, saved.folder).base == str(saved.base)
    assert torch.equal(logits(model, saved.name), saved.tuned_logits)
    ofa.restore_norms(model)
    assert_untouched(model, before)
    assert torch.equal(logits(model, saved.name), saved.base_logits)


@pytest.mark.parametrize("saved", [*KINDS, "bert", "vit"], indirect=True)
def test_a_merged_checkpoint_is_an_ordinary_one(saved, tmp_path):
    model = saved.fresh()
    before = snapshot(model)
    out = ofa.merge(model, saved.folder, tmp_path / "merged")
    assert_untouched(model, before)
    assert torch.equal(logits(type(model).from_pretrained(out).eval().to(DEVICE), saved.name), saved.tuned_logits)
    assert contents(out).keys() == contents(saved.base).keys()


def test_the_folder_equals_one_written_by_peft(saved):
    model, held = saved.fresh(), load_file(saved.folder / WEIGHTS)
    config, details = (json.loads((saved.folder / name).read_text()) for name in (CONFIG, DETAILS))
    norms = {path: module for path, module in model.named_modules() if "Norm" in type(module).__name__}
    own = {f"{path}.{name}": value for path, norm in norms.items() for name, value in norm.named_parameters()}
    with safe_open(saved.folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    layers = {
        f"base_model.model.{path.replace(suffix, '')}.ln_tuning_layers{suffix}"
        for path in own
        for suffix in (".weight", ".bias")
        if path.endswith(suffix)
    }
    assert held.keys() == layers
    assert {value.dtype for value in held.values()} == {torch.float32}
    assert config["peft_type"] == "LN_TUNING"
    assert config["target_modules"] == sorted(norms)
    assert config["base_model_name_or_path"] == str(saved.base)
    assert config["task_type"] == ("CAUSAL_LM" if saved.name in CAUSAL else None)
    assert details["parameters"] == sum(norm.weight.numel() for norm in norms.values())
    assert (details["seed"], details["shots"], details["base_model"]) == (42, 5, str(saved.base))
    assert set(details["versions"]) == {"ofa-adapt", "torch", "transformers", "peft"}
    assert contents(saved.folder).keys() == {WEIGHTS, CONFIG, DETAILS, CARD}


def test_an_adapter_of_the_default_model_is_small(tmp_path):
    """SmolLM2-135M's shape, 35,136 scales; only its norms are real tensors."""
    fields = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=576, intermediate_size=1536, **fields))
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.to_empty(device="cpu").weight.fill_(1.0)
    ofa.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / DETAILS).read_text())["parameters"] == 35_136
    assert sum(len(content) for content in contents(tmp_path).values()) < 1_000_000


# Other precisions, other states of the model.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("narrow_first", [False, True], ids=["float32 to narrow", "narrow to float32"])
def test_the_base_is_recognized_in_another_precision(llama, tmp_path, dtype, narrow_first):
    """Fitted in float32 and used in half precision, or the reverse."""
    models = [llama.fresh(), llama.fresh().to(dtype)]
    first, second = reversed(models) if narrow_first else models
    tune(first)
    ofa.save_adapter(first, tmp_path)
    ofa.load_adapter(second, tmp_path)
    # The scales are float32 on both sides, so they are not rounded.
    assert torch.equal(second.get_parameter(FIRST_NORM), first.get_parameter(FIRST_NORM))


def test_merging_keeps_the_dtype_of_the_base(llama, tmp_path):
    model = llama.fresh().to(torch.bfloat16)
    out = ofa.merge(model, llama.folder, tmp_path)
    held = load_file(out / "model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.bfloat16}
    scale = read_adapter(llama.folder).parameters[FIRST_NORM]
    assert torch.equal(held[FIRST_NORM], scale.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_leaves_a_tuned_model_tuned(llama, tmp_path, dtype):
    """Training may continue after a merge: the optimizer holds these parameters."""
    model = llama.fresh().to(dtype)
    scales = ofa.tune_norms(model)
    scales[0].zero_()
    before = snapshot(model)
    out = ofa.merge(model, llama.folder, tmp_path)
    assert_untouched(model, before)
    merged = load_file(out / "model.safetensors")
    scale = read_adapter(llama.folder).parameters[FIRST_NORM]
    assert torch.equal(merged[FIRST_NORM], scale.to(dtype))


def test_norms_that_an_adapter_leaves_out_are_merged_from_the_base(llama, damaged, tmp_path):
    """Not from the given model, whose norms may be tuned."""
    edit_tensors(without_one)(damaged)
    (damaged / DETAILS).unlink()  # as in a folder that PEFT wrote
    left_out = set(read_adapter(llama.folder).parameters) - set(read_adapter(damaged).parameters)
    model = llama.fresh()
    tune(model)
    merged = load_file(ofa.merge(model, damaged, tmp_path / "out") / "model.safetensors")
    assert len(left_out) == 1
    assert all(torch.equal(merged[path], llama.pristine.get_parameter(path).cpu()) for path in left_out)


def test_loading_replaces_what_was_tuned(llama):
    model = llama.fresh()
    for scale in ofa.tune_norms(model):
        scale.zero_()
    ofa.load_adapter(model, llama.folder)
    assert torch.equal(logits(model), llama.tuned_logits)


def test_merging_over_an_old_checkpoint_replaces_it(llama, tmp_path):
    out = shutil.copytree(llama.base, tmp_path / "out")
    ofa.merge(llama.fresh(), llama.folder, out, overwrite=True)
    assert torch.equal(logits(type(llama.pristine).from_pretrained(out).eval().to(DEVICE)), llama.tuned_logits)


# Refusals: one sentence, and nothing changes.


def edit_json(name, **fields):
    def edit(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def with_nan(tensors):
    next(iter(tensors.values()))[3] = float("nan")


def without_one(tensors):
    tensors.pop(next(iter(tensors)))


def with_unknown_norm(tensors):
    tensors["base_model.model.model.layers.9.input_layernorm.ln_tuning_layers.weight"] = torch.ones(32)


def with_lora(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 2)


def cut_short(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


class Bomb:
    """A pickle that leaves a trace if it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def only_pickle(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(folder / "ran")))


def replaced_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


DAMAGE = {
    "no folder": (shutil.rmtree, "is not an adapter folder: it has no adapter_config.json"),
    "a file": (replaced_by_file, "is not an adapter folder: it has no adapter_config.json"),
    "no adapter_config": (lambda folder: (folder / CONFIG).unlink(), "it has no adapter_config.json"),
    "broken JSON": (lambda folder: (folder / CONFIG).write_text('{"peft'), r"adapter_config.json cannot be read \("),
    "JSON that is no object": (lambda folder: (folder / CONFIG).write_text("[]"), "does not hold a JSON object"),
    "binary JSON": (lambda folder: (folder / DETAILS).write_bytes(b"\xff\xfe"), "ofa_config.json cannot be read"),
    "another method": (edit_json(CONFIG, peft_type="VERA"), "holds a VERA adapter, .*; give an adapter of the kind"),
    "no tensors": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "cut short": (cut_short, r"adapter_model.safetensors is damaged or truncated \("),
    "empty file": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is damaged or truncated"),
    "no tensor in it": (edit_tensors(dict.clear), "holds no tensors"),
    "NaN": (edit_tensors(with_nan), "is damaged: .* is not finite"),
    "a norm less": (edit_tensors(without_one), "is damaged: it holds 192 of the 224 scales that ofa_config.json"),
    "tensors of another method": (edit_tensors(with_lora), "lora_A.weight, which is no norm scale"),
    "pickle": (only_pickle, "adapter_model.bin is a pickle, which can run code"),
    "unknown norm": (edit_tensors(with_unknown_norm), "this model has no norm model.layers.9.input_layernorm.weight"),
    "another base": (
        edit_json(DETAILS, base_fingerprint="0" * 64, base_fingerprint_float16="0" * 64),
        "was made for .*base, and this model's own norms differ; load that base instead",
    ),
}


@pytest.mark.parametrize("use", ["load", "merge"])
@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_folder_that_cannot_be_used_is_refused_in_a_sentence(llama, damaged, tmp_path, use, damage, words):
    damage(damaged)
    model = llama.fresh()
    before = snapshot(model)
    with pytest.raises(InputError, match=words) as refusal:
        ofa.load_adapter(model, damaged) if use == "load" else ofa.merge(model, damaged, tmp_path / "out")
    assert_untouched(model, before)
    assert "\n" not in str(refusal.value)
    assert str(damaged) in str(refusal.value)
    assert not (tmp_path / "out").exists()
    assert not (damaged / "ran").exists()


def other_width():
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=64)
    )


WRONG_MODELS = {
    "another base of the same shape": (lambda: build("llama", seed=1), "this model's own norms differ"),
    "another width": (other_width, "of another width: .* has 64 channels here and 32 in the adapter"),
    "another family": (lambda: build("gpt2"), "this model has no norm model"),
}


@pytest.mark.parametrize(("make", "words"), WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_another_model_is_refused(llama, make, words):
    model = make()
    before = snapshot(model)
    with pytest.raises(InputError, match=f"was made for .*base.*{words}.*; load that base instead"):
        ofa.load_adapter(model, llama.folder)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_cannot_be_loaded_are_not_saved(llama, tmp_path, value):
    """And the existing adapter stays."""
    model = llama.fresh()
    ofa.tune_norms(model)[3][5] = value
    shutil.copytree(llama.folder, tmp_path / "out")
    with pytest.raises(InputError, match=r"layernorm\.weight is not finite.*lower learning rate"):
        ofa.save_adapter(model, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(llama.folder)


def test_a_tuned_model_is_still_its_own_base(llama, tmp_path):
    """The fingerprint is of the scales that the model was loaded with, not of the tuned ones."""
    model = llama.fresh()
    tune(model)
    before = snapshot(model)
    ofa.load_adapter(model, llama.folder)
    other = build("llama", seed=1)
    ofa.tune_norms(other)[0].zero_()
    with pytest.raises(InputError, match="own norms differ"):
        ofa.load_adapter(other, llama.folder)
    # The adapter holds the values of `tune`, so loading it changes nothing.
    assert_untouched(model, before)


# Output.


def writers(llama):
    """Both ways to write a folder."""
    return {
        "save": lambda out, **options: ofa.save_adapter(llama.fresh(), out, **options),
        "merge": lambda out, **options: ofa.merge(llama.fresh(), llama.folder, out, **options),
    }


@pytest.mark.parametrize("writer", ["save", "merge"])
def test_existing_output_is_kept_without_overwrite(llama, tmp_path, writer):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"already holds notes.txt; choose another one or pass --overwrite"):
        writers(llama)[writer](tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    writers(llama)[writer](tmp_path, overwrite=True)
    assert contents(tmp_path)["notes.txt"] == b"mine"


@pytest.mark.parametrize("writer", ["save", "merge"])
def test_output_below_a_file_is_refused(llama, tmp_path, writer):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"output folder .*file/below cannot be written \(Not a directory\)"):
        writers(llama)[writer](tmp_path / "file" / "below")
    assert contents(tmp_path) == {"file": b"mine"}


def fail_on_call(monkeypatch, target, nth, error):
    """Make the nth call of a function fail halfway."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) < nth:
            return original(*args, **kwargs)
        for path in args:
            if isinstance(path, Path) and path.suffix == ".tmp":
                path.write_bytes(b"half")
        raise error

    module, _, name = target.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    monkeypatch.setattr(target, failing)


FAILURES = {
    "scales": ("safetensors.torch.save_file", 1, NO_SPACE),
    "scales, as safetensors says it": ("safetensors.torch.save_file", 1, NO_SPACE_IN_SAFETENSORS),
    "first text": ("ofa.files._flush", 1, NO_SPACE),
    "second text": ("ofa.files._flush", 2, NO_SPACE),
    "third text": ("ofa.files._flush", 3, NO_SPACE),
    "move": ("os.replace", 1, NO_SPACE),
}


@pytest.mark.parametrize("existed", [False, True], ids=["new folder", "over an old adapter"])
@pytest.mark.parametrize(("target", "nth", "error"), FAILURES.values(), ids=FAILURES)
def test_a_disk_that_fills_up_leaves_the_old_adapter_whole(llama, tmp_path, monkeypatch, existed, target, nth, error):
    """Never a mixture: new scales with old labels would be wrong silently."""
    out = tmp_path / "out"
    if existed:
        shutil.copytree(llama.folder, out)
    before = contents(out)
    fail_on_call(monkeypatch, target, nth, error)
    with pytest.raises(InputError, match=r"cannot be written \(.*No space left on device.*; nothing there was changed"):
        ofa.save_adapter(llama.fresh(), out, overwrite=existed)
    assert contents(out) == before
    monkeypatch.undo()
    # After freeing the disk, it succeeds without --overwrite.
    ofa.save_adapter(llama.fresh(), out, overwrite=existed)
    assert contents(out).keys() == {WEIGHTS, CONFIG, DETAILS, CARD}


@pytest.mark.parametrize("error", [NO_SPACE, NO_SPACE_IN_SAFETENSORS], ids=["system", "safetensors"])
def test_a_merge_that_fails_midway_leaves_the_old_checkpoint(llama, tmp_path, monkeypatch, error):
    out = Path(shutil.copytree(llama.base, tmp_path / "out"))
    model, before = llama.fresh(), contents(out)

    def save_pretrained(folder, **options):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(model, "save_pretrained", save_pretrained)
    with pytest.raises(InputError, match=r"checkpoint .*out cannot be written \(.*No space left on device"):
        ofa.merge(model, llama.folder, out, overwrite=True)
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]
