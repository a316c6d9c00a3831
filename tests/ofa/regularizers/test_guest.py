"""Models that are wrapped, copied or changed while regularizers are attached: right numbers, or one sentence."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import ofa
from ofa import InputError
from ofa.regularizers.attach import Regularizers, attached
from tests.families import build, inputs
from tests.ofa.traces import EVERY, hooks_of

ANY_MODEL = ("hutchinson", "hutchinson, full")
"""Estimators that work for any branch."""
CAUSAL = {"task_type": "CAUSAL_LM"}
LORA = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **CAUSAL)
IA3 = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL)


def tuned(*, seed: int = 0) -> Any:
    """A llama whose norms are tuned."""
    model = build("llama", seed=seed)
    ofa.tune_norms(model)
    return model


def attach(model: nn.Module, kind: str = "exact", **options: Any) -> Regularizers:
    return ofa.fused_regularizers(model, 1.0, 1.0, **EVERY[kind], **options)


def measure(model: nn.Module, reg: Regularizers, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """Loss, penalty, and the gradients of their sum in all scales, of the regularizers' first pass."""
    reg.passes = 0
    loss = (call or model)(**inputs("llama")).loss
    total = loss + reg.penalty()
    scales = [p for path, p in model.named_parameters() if p.dim() == 1 and "norm" in path and p.requires_grad]
    return [loss.detach(), reg.penalty().detach(), *torch.autograd.grad(total, scales)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit-identical: it is the same computation."""
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def numbers(model: nn.Module, kind: str, call: Callable[..., Any] | None = None, **options: Any) -> list[Tensor]:
    with attach(model, kind, **options) as reg:
        return measure(model, reg, call)


def outer_and_inner(kind: str) -> tuple[Any, Any]:
    """A wrapper and the model inside, either of which may be passed as the model."""
    model = tuned()
    if kind == "decoder":
        return model, model.model
    if kind == "compiled":
        return torch.compile(model, backend="eager"), model
    return get_peft_model(model, LORA), model


@pytest.mark.parametrize("kind", ["decoder", "compiled", "lora"])
def test_attaching_to_a_wrapper_and_to_its_model_is_refused(kind: str) -> None:
    """Both would measure the same branches; `attached` finds the first."""
    outer, inner = outer_and_inner(kind)
    for first, second in ((outer, inner), (inner, outer)):
        reg = attach(first, "hutchinson")
        with pytest.raises(InputError, match="shares modules with, already has regularizers attached"):
            attach(second, "hutchinson")
        assert attached(second) is reg
        reg.close()
        assert attached(second) is attached(first) is None


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("inside", [False, True])
def test_lora_around_tuned_norms_is_measured_as_the_bare_model(kind: str, inside: bool) -> None:
    """Fresh LoRA changes nothing: same loss, penalty and gradients."""
    model = tuned()
    expected = numbers(model, kind)
    wrapped: Any = get_peft_model(model, LORA)
    only_norms(model)
    assert same(numbers(model if inside else wrapped, kind, wrapped), expected)


@pytest.mark.parametrize("config", [LORA, IA3], ids=["lora", "ia3"])
def test_adapters_are_in_the_closed_form_as_merged(config: Any) -> None:
    """Trained adapters have the traces and gradients of the merged model."""
    model = tuned()
    wrapped: Any = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for path, parameter in model.named_parameters():
        if "lora_" in path or "ia3_" in path:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    only_norms(model)
    found = numbers(wrapped, "exact")
    assert not same(found, numbers(tuned(), "exact"))
    merged = wrapped.merge_and_unload()
    only_norms(merged)
    for one, other in zip(found, numbers(merged, "exact"), strict=True):
        # Some hundred products in another order, 2⁻²⁴ each, through three layers.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def only_norms(model: nn.Module) -> None:
    """Train only norms, as the full gradient of the closed form requires."""
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in path)


def test_lora_added_after_attaching_is_refused() -> None:
    """The closed form would read weights without the adapters."""
    model = tuned()
    with attach(model):
        get_peft_model(model, LORA)
        with pytest.raises(InputError, match=r"self_attn\.q_proj was replaced after the regularizers were attached"):
            model(**inputs("llama"))
        with torch.no_grad():
            model(**inputs("llama"))


@pytest.mark.parametrize("kind", ANY_MODEL)
def test_lora_added_after_attaching_is_measured_inside_of_branches(kind: str) -> None:
    """Inside a branch it is part of the branch; around the branch's first or last module it is refused."""
    model = tuned()
    expected = numbers(model, kind)
    with attach(model, kind) as reg:
        get_peft_model(model, LORA)
        only_norms(model)
        assert same(measure(model, reg), expected)
    opt = build("opt")
    with attach(opt, kind):
        get_peft_model(opt, LoraConfig(target_modules=["fc1"], **CAUSAL))
        with pytest.raises(InputError, match=r"fc1 was replaced after the regularizers were attached"):
            opt(**inputs("opt"))


def test_prompt_tuning_measures_the_virtual_tokens_too() -> None:
    """They are rows of the stream: attached to wrapper or base, with or without a mask, the numbers are the same."""
    model = tuned()
    wrapped: Any = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, **CAUSAL))
    mask = torch.ones_like(inputs("llama")["input_ids"])
    seen = []
    for root in (wrapped, wrapped.base_model):
        for given in (inputs("llama"), {**inputs("llama"), "attention_mask": mask}):
            with attach(root) as reg:
                wrapped(**given)
                seen.append([reg.measurements.traces.detach(), reg.measurements.step_norms.detach()])
    prompts = wrapped.get_prompt(batch_size=2)
    embedded = torch.cat((prompts, model.get_input_embeddings()(inputs("llama")["input_ids"])), 1)
    with attach(model) as reg:
        model(inputs_embeds=embedded)
        expected = [reg.measurements.traces.detach(), reg.measurements.step_norms.detach()]
    for found in seen:
        for one, other in zip(found, expected, strict=True):
            # A mask selects another attention kernel: some roundings of 2⁻²⁴.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_norms_that_peft_tunes_are_refused() -> None:
    """PEFT's layers keep their own scales, which we would not measure; also if added later."""
    config = LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"], **CAUSAL)
    wrapped = get_peft_model(build("llama"), config)
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(InputError, match=r"layers\.0\.input_layernorm is inside PEFT's LN tuning"):
            attach(model)
    model = tuned()
    with attach(model), pytest.raises(InputError, match="nor wrapped by code that copies it; close"):
        get_peft_model(model, config)


@pytest.mark.parametrize("kind", EVERY)
def test_two_models_take_turns(kind: str) -> None:
    """Forward A, forward B, backward A, backward B, closed in the order of attaching: the same as separately."""
    models = [tuned(seed=seed) for seed in range(2)]
    models[1].config = models[0].config
    for module in models[1].modules():
        if hasattr(module, "config"):
            module.config = models[0].config
    name = models[0].config._attn_implementation
    expected = [numbers(model, kind) for model in models]
    regs = [attach(model, kind) for model in models]
    losses = [model(**inputs("llama")).loss for model in models]
    for model, reg, loss, known in zip(models, regs, losses, expected, strict=True):
        gradients = torch.autograd.grad(loss + reg.penalty(), [p for p in model.parameters() if p.requires_grad])
        assert same([loss, reg.penalty(), *gradients], known)
    regs[0].close()
    assert same(measure(models[1], regs[1]), expected[1])
    regs[1].close()
    assert models[0].config._attn_implementation == name


def test_models_that_share_layers_cannot_both_be_measured() -> None:
    """The hooks of one would count passes of the other; a shared embedding alone is allowed."""
    one, other = tuned(), tuned(seed=1)
    other.model.embed_tokens = one.model.embed_tokens
    with attach(one):
        attach(other).close()
        other.model.layers[1] = one.model.layers[1]
        with pytest.raises(InputError, match="shares modules with"):
            attach(other)


@pytest.mark.parametrize("kind", EVERY)
def test_a_copy_has_nothing_attached(kind: str) -> None:
    """`copy.deepcopy`, as for weight averages or a reference model: equal, without hooks, and can be attached to."""
    model = tuned()
    bare, plain = hooks_of(copy.deepcopy(model)), model(**inputs("llama")).logits
    reg = attach(model, kind)
    expected = measure(model, reg)
    copied = copy.deepcopy(nn.ModuleList([model]))[0]
    assert hooks_of(copied) == bare
    assert vars(copied).keys() == vars(tuned()).keys()
    assert copied.config._attn_implementation == "sdpa"
    assert torch.equal(copied(**inputs("llama")).logits, plain)
    assert same(numbers(copied, kind), expected)
    assert same(measure(model, reg), expected)
    reg.close()
    assert "__deepcopy__" not in vars(model)


def test_parts_are_not_copied_and_nothing_is_pickled(tmp_path: Path) -> None:
    """Hooks cannot be copied; a saved configuration names the model's own attention function."""
    model = tuned()
    with attach(model):
        with pytest.raises(InputError, match="part of a model with regularizers attached cannot be copied"):
            copy.deepcopy(model.model.layers[0])
        with pytest.raises(InputError, match="cannot be pickled or sent to another process"):
            torch.save(model, tmp_path / "model.pt")
        model.save_pretrained(tmp_path)
        assert "ofa" not in (tmp_path / "config.json").read_text()
        again: Any = type(model)(copy.deepcopy(model.config))
    with attach(again.requires_grad_(False)):
        pass
    assert again.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", EVERY)
def test_generation_is_unchanged(kind: str) -> None:
    """generate() has no gradients and a cache: the same tokens, unmeasured; use_cache in the config does not matter."""
    model, ids = tuned(), inputs("llama")["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(input_ids=ids, **options)
    assert model.config.use_cache
    with attach(model, kind) as reg:
        expected = measure(model, reg)
        assert torch.equal(model.generate(input_ids=ids, **options), plain)
        assert reg.passes == 1
        assert same(measure(model, reg), expected)
        with reg.measuring(), pytest.raises(InputError, match="cannot use a key-value cache"):
            model.generate(input_ids=ids, **options)


class Interrupting(nn.Module):
    """Raises an exception in a module's forward or backward pass while `armed`."""

    armed: type[BaseException] | None = None

    def __init__(self, module: nn.Module, *, backward: bool = False) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []
        self._backward = backward
        module.register_forward_hook(self.strike)

    def strike(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        if self.armed is None:
            return None
        self.seen.append(weakref.ref(hidden))
        if not self._backward:
            raise self.armed("device lost")
        hidden.register_hook(self.fail)
        return None

    def fail(self, gradient: Tensor) -> None:
        raise OSError("device lost")


PLACES = (
    "layers.1.post_attention_layernorm",
    "layers.1.self_attn",
    "layers.1.self_attn.k_proj",
    "layers.1.mlp.up_proj",
)


@pytest.mark.parametrize("kind", EVERY)
# PyTorch calls no hook after these exceptions; the next pass cleans up.
@pytest.mark.parametrize(
    ("path", "error"),
    [
        *((f"model.{place}", OSError) for place in PLACES),
        ("lm_head", OSError),
        (f"model.{PLACES[-1]}", KeyboardInterrupt),
    ],
)
def test_the_pass_after_an_exception_in_forward_is_right(kind: str, path: str, error: type[BaseException]) -> None:
    """Nothing is kept alive, an unmeasured pass works, and the next measured one is bit-identical to the first."""
    model = tuned()
    place = Interrupting(model.get_submodule(path))
    with torch.no_grad():
        plain = model(**inputs("llama")).logits
    with attach(model, kind) as reg:
        expected = measure(model, reg)
        place.armed = error
        with pytest.raises(error, match="device lost"):
            model(**inputs("llama"))
        place.armed = None
        with torch.no_grad():  # PyTorch calls no hook after a KeyboardInterrupt; the next pass cleans up
            assert torch.equal(model(**inputs("llama")).logits, plain)
        gc.collect()
        assert [tensor() for tensor in place.seen] == [None]
        with pytest.raises(RuntimeError, match="no forward pass has been measured"):
            reg.penalty()
        assert same(measure(model, reg), expected)
    with torch.no_grad():
        assert torch.equal(model(**inputs("llama")).logits, plain)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_pass_after_an_exception_in_backward_is_right(kind: str, checkpointing: bool) -> None:
    """Also if it recomputes layers."""
    model = tuned()
    if checkpointing:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    place = Interrupting(model.model.layers[1].mlp, backward=True)
    with attach(model, kind) as reg:
        expected = measure(model, reg)
        place.armed = OSError
        with pytest.raises(OSError, match="device lost"):
            measure(model, reg)
        place.armed = None
        assert same(measure(model, reg), expected)


@pytest.mark.parametrize("kind", EVERY)
def test_threads_with_a_model_each_measure_as_alone(kind: str) -> None:
    """They share a registry of attention functions, PyTorch's level of dual numbers, and its stance on compiling."""
    models = [tuned(seed=seed) for seed in range(2)]
    expected = [[numbers(model, kind, seed=seed) for _ in range(4)] for seed, model in enumerate(models)]
    found: dict[int, Any] = {}
    started = threading.Barrier(2)

    def work(index: int) -> None:
        started.wait()
        try:
            found[index] = [numbers(models[index], kind, seed=index) for _ in range(4)]
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, known in enumerate(expected):
        assert isinstance(found[index], list), found[index]
        assert all(same(*pair) for pair in zip(found[index], known, strict=True))


def test_a_second_thread_in_the_same_pass_is_refused() -> None:
    """Its rows would count as the first thread's; the first thread's pass is unchanged."""
    model, refused = tuned(), []

    def second() -> None:
        try:
            with torch.no_grad():
                model(**inputs("llama"))
        except InputError as error:
            refused.append(str(error))

    def start(module: nn.Module, args: Any) -> None:
        if not refused:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    expected = numbers(model, "exact")
    model.model.layers[1].register_forward_pre_hook(start)
    with attach(model) as reg:
        assert same(measure(model, reg), expected)
        second()
    assert refused == [
        "another thread is in a measured forward pass of this model; give every thread a model of its own, or let "
        "them take turns"
    ]


@pytest.mark.parametrize("kind", EVERY)
def test_regularizers_that_are_not_closed_are_freed_with_their_model(kind: str) -> None:
    """Dropped regularizers stay attached, as `into_loss=True` needs, until the model is freed."""
    model = tuned()
    plain = numbers(model, kind)
    reg = weakref.ref(attach(model, kind, into_loss=True))
    gc.collect()
    assert attached(model) is reg()
    # The same seed and pass; one float32 sum is elsewhere.
    torch.testing.assert_close(model(**inputs("llama")).loss, plain[0] + plain[1], rtol=1e-6, atol=0)
    gone = weakref.ref(model)
    del model
    for _ in range(2):  # first the model, then the objects that its graph kept alive
        gc.collect()
    assert gone() is reg() is None
