"""Layers rebuilt from their anatomy compute what they computed before, under whatever else is done to the model."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import ofa
from ofa.anatomy import fused_layers
from ofa.anatomy.steps import find
from ofa.regularizers.closed_form import branch_trace
from ofa_kernels import dispatch, reference
from tests import families, oracle
from tests.cases import over_pairs
from tests.ofa.traces import EVERY, frozen, hooks_of

SUMS = {name: families.STEPS[name] for name in families.BUILDERS if name not in ("bert", "opt_post_norm", "olmo2")}
"""Residual sums of the families with a norm after each."""
LOOPS = ("gptj", *(name for name in families.BUILDERS if name.startswith("falcon")))
"""Families whose model collects hidden states by itself."""
FUSED = [name for name in SUMS if name not in LOOPS]
SAME_BITS = [name for name in FUSED if name in oracle.RMS]
"""Families whose norms and sums are computed in the same order."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One item for each sum that was computed with a norm: whether its length was measured."""
    seen: list[bool] = []
    own = dispatch.norm_step

    def norm_step(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["measured"])
        return own(*args, **kwargs)

    monkeypatch.setattr(dispatch, "norm_step", norm_step)
    return seen


def given(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: v.to(dtype) if v.is_floating_point() else v for key, v in families.inputs(name).items()}


def tuned(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    model = families.build(name).to(dtype)
    ofa.tune_norms(model)
    return model


def results(model: nn.Module, name: str = "llama", call: Any = None) -> list[Tensor]:
    """Logits, and the loss' gradient in all norm scales in one row."""
    output = (model if call is None else call)(**given(name, next(model.parameters()).dtype))
    model.zero_grad()
    output.loss.backward()
    found = [scale.grad.float() for scale in oracle.scales(model).values()]  # type: ignore[union-attr]
    return [output.logits.detach(), torch.cat(found)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@over_pairs(name=FUSED, dtype=DTYPES, tunes=(True, False))
def test_outputs_are_the_models_own(name: str, dtype: str, tunes: bool, sums: list[bool]) -> None:
    """Every sum is fused. Bits are the same for RMSNorms in float32 or tuned; else some roundings of each layer.

    Measured at three layers: up to 3 eps of the largest logit, and 7 of the gradient's length.
    """
    model = families.build(name).to(DTYPES[dtype])
    if tunes:
        ofa.tune_norms(model)
    expected = results(model, name)
    assert ofa.fuse_layers(model) == {}
    sums.clear()
    found = results(model, name)
    assert sums == [False] * SUMS[name]
    if name in SAME_BITS and (tunes or dtype == "float32"):
        assert same(found, expected)
    eps = torch.finfo(DTYPES[dtype]).eps
    assert (found[0] - expected[0]).abs().max() <= 8 * eps * expected[0].abs().max()
    assert (found[1] - expected[1]).norm() <= 16 * eps * expected[1].norm()


@pytest.mark.parametrize("name", [name for name in families.BUILDERS if name not in FUSED])
def test_layers_that_do_not_fit_keep_their_own_forward_pass(name: str) -> None:
    """The reason is one clause, and nothing of the model is changed."""
    model = families.build(name)
    before = state(model)
    kept = ofa.fuse_layers(model)
    said = "hidden states between the layers" if name in LOOPS else "no norm follows a residual sum"
    assert tuple(kept) == find(model).layers
    assert all(said in reason for reason in kept.values())
    assert state(model) == before


def state(model: nn.Module) -> list[Any]:
    return [(type(module), sorted(vars(module))) for module in model.modules()] + [hooks_of(model)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("order", ["restore unfuse", "unfuse restore"])
def test_undoing_leaves_the_model_as_it_was(name: str, order: str) -> None:
    """Also with tuned norms of a half-precision model, whose class `tune_norms` replaces too, in either order."""
    model = families.build(name).bfloat16()
    before, names = state(model), [type(module).__name__ for module in model.modules()]
    ofa.tune_norms(model)
    ofa.fuse_layers(model)
    assert fused_layers.is_fused(model)
    assert [type(module).__name__ for module in model.modules()] == names
    for what in order.split():
        (ofa.restore_norms if what == "restore" else ofa.unfuse_layers)(model)
    assert state(model) == before


PAIRS = (("exact", "hutchinson, full"), ("exact, full", "hutchinson"))
PENALTIES = [
    *((name, kind, "sublayer") for index, name in enumerate(FUSED) for kind in PAIRS[index % 2]),
    *product(("gpt2", "phi"), ("hutchinson", "hutchinson, full"), ("layer",)),
]
"""Each family with both estimators and both gradients; each wiring has several families."""


@pytest.mark.parametrize(("name", "kind", "granularity"), PENALTIES)
def test_the_penalty_is_that_of_the_hooked_model(name: str, kind: str, granularity: str, sums: list[bool]) -> None:
    """Value and gradient in float64: sums in another order, 1e-16 each; a finite difference divides them by 1e-4."""
    model, batch = copy.deepcopy(frozen(name)), oracle.batch(name)
    if name != "vit":
        batch["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    found = {}
    with oracle.Float64():
        for fuse in (False, True):
            with ofa.fused_regularizers(model, 1.0, 1.0, **EVERY[kind], granularity=granularity, fuse=fuse) as reg:
                sums.clear()
                loss = model(**batch).loss + reg.penalty()
                # At the layer granularity hooks measure: no sum is the update of a step. The first pass finds ε.
                count = SUMS[name] if fuse else 0
                assert sums[len(sums) - count :] == [granularity == "sublayer"] * count
                gradients = torch.autograd.grad(loss, list(oracle.scales(model).values()))
                found[fuse] = [reg.measurements.step_norms, reg.measurements.traces, loss, *gradients]
            assert not fused_layers.is_fused(model)
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_hooks_do_not_compute_what_the_sums_know(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first layer's first norm, which follows no sum, has its 1/σ computed; no length is.

    Probes need no 1/σ beside them: the operation that moves the copies reads the rows, and knows it.
    """
    computed: list[str] = []

    def counting(module: Any, name: str) -> None:
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kw: computed.append(name) or own(*args, **kw))

    counting(branch_trace, "moments")
    counting(reference, "rstd")
    counting(dispatch, "squared_norm")
    model = tuned()
    with ofa.fused_regularizers(model, **EVERY[kind], fuse=True):
        model(**given("llama"))
        computed.clear()
        model(**given("llama"))
    assert computed == (["moments"] if kind == "exact" else [])


def test_closing_leaves_layers_fused_that_were_fused_before() -> None:
    model = tuned()
    ofa.fuse_layers(model)
    ofa.fused_regularizers(model, fuse=True).close()
    assert fused_layers.is_fused(model)


# As a guest in other libraries


def test_generation_is_the_models_own(sums: list[bool]) -> None:
    """With its cache, whose steps have one token."""
    model, ids = tuned(), given("llama")["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(input_ids=ids, **options)
    ofa.fuse_layers(model)
    sums.clear()
    assert torch.equal(model.generate(input_ids=ids, **options), plain)
    assert len(sums) == 5 * SUMS["llama"]


def test_hidden_states_have_their_whole_gradient(sums: list[bool]) -> None:
    """A norm computed ahead would take its gradient past them; later passes compute ahead again."""

    def asked(model: Any) -> list[Tensor]:
        output = model(**given("llama"), output_hidden_states=True)
        return [*output.hidden_states, *torch.autograd.grad(output.loss, output.hidden_states[1:-1])]

    model = tuned()
    expected = asked(model)
    ofa.fuse_layers(model)
    assert same(asked(model), expected)
    sums.clear()
    results(model)
    assert len(sums) == SUMS["llama"]


def read_output(module: nn.Module, seen: list[Tensor]) -> None:
    module.register_forward_hook(lambda module, args, output: seen.append(output))


def read_input(module: nn.Module, seen: list[Tensor]) -> None:
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def replace_forward(module: Any, seen: list[Tensor]) -> None:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(own(*args, **kwargs))
        return seen[-1]

    module.forward = forward


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("model.layers.0", read_output),
        ("model.layers.1", read_input),
        ("model.layers.0", replace_forward),
        ("model.layers.1.post_attention_layernorm", read_input),
        ("model.layers.1.input_layernorm", read_input),
        ("model.norm", read_input),
    ],
)
def test_a_hook_that_reads_a_sum_sees_its_whole_gradient(path: str, read: Callable[..., None]) -> None:
    seen: list[Tensor] = []
    found = []
    model = tuned()
    read(model.get_submodule(path), seen)
    for fuse in (False, True):
        model = tuned()
        if fuse:
            assert ofa.fuse_layers(model) == {}
        seen.clear()
        read(model.get_submodule(path), seen)
        loss = model(**given("llama")).loss
        found.append([*seen, *torch.autograd.grad(loss, seen)])
    assert same(*found)


def test_a_full_backward_hook_sees_the_whole_gradient() -> None:
    seen: list[list[Tensor]] = []
    for fuse in (False, True):
        model = tuned()
        if fuse:
            ofa.fuse_layers(model)
        model.model.layers[1].register_full_backward_hook(lambda module, inner, outer: seen.append([*inner, *outer]))
        batch = given("llama")
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=batch["labels"]).loss.backward()
    assert same(*seen)


@pytest.mark.parametrize("path", ["model.layers.0", "model.layers.1.mlp"])
def test_a_hook_that_changes_a_sum_or_a_branch_changes_the_same(path: str) -> None:
    """In place and by another tensor: what was computed ahead does not belong to it any more."""
    found = []
    for fuse in (False, True):
        model = tuned()
        if fuse:
            ofa.fuse_layers(model)
        model.get_submodule(path).register_forward_hook(lambda module, args, output: output.mul_(2))
        model.get_submodule(path).register_forward_hook(lambda module, args, output: output + 1)
        found.append(results(model))
    assert same(*found)


def test_what_was_computed_ahead_is_for_these_scales_and_this_tensor_alone() -> None:
    """A layer called by itself: the next norm, called later, uses the scales of then, and what the tensor then is."""
    model = tuned()
    ofa.fuse_layers(model)
    layers, norm = model.model.layers, model.model.layers[1].input_layernorm
    hidden = torch.randn(1, 4, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(4)[None])
    for change in (lambda output: norm.weight.data.mul_(2), lambda output: output.mul_(2), lambda output: None):
        with torch.no_grad():
            output = layers[0](hidden, position_embeddings=rotary)
            change(output)
            expected = nn.functional.rms_norm(output, (32,), norm.weight, 1e-6)
        torch.testing.assert_close(norm(output), expected)
        assert norm(output).requires_grad  # though the sum was computed without gradients


def test_a_sum_whose_norm_is_never_called_is_freed() -> None:
    model = tuned()
    ofa.fuse_layers(model)
    hidden = torch.randn(1, 4, 32)
    output = model.model.layers[0](hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(4)[None]))
    gone = weakref.ref(output)
    del output
    assert gone() is None


@pytest.mark.parametrize("first", [True, False])
def test_accelerates_hooks(first: bool, sums: list[bool]) -> None:
    """They replace `forward`. On before, the layer keeps its own and says so; on afterwards, they run the fused one."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tuned()
    expected = results(model)
    for fuse in (not first, first):
        if fuse:
            kept = ofa.fuse_layers(model)
        else:
            for layer in model.model.layers:
                add_hook_to_module(layer, AlignDevicesHook(io_same_device=True))
    assert set(kept.values()) == ({"its forward pass was replaced by another library's hook"} if first else set())
    sums.clear()
    assert same(results(model), expected)
    # The sum at the end of a layer may be read there.
    assert len(sums) == (0 if first else 3)


@pytest.mark.parametrize("inside", [False, True])
def test_lora_around_fused_layers_or_inside(inside: bool, sums: list[bool]) -> None:
    config = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    found = []
    for fuse in (False, True):
        model = tuned()
        if fuse and not inside:
            ofa.fuse_layers(model)
        torch.manual_seed(0)
        wrapped: Any = get_peft_model(model, config)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in path)
        if fuse and inside:
            assert ofa.fuse_layers(wrapped) == {}
        sums.clear()
        found.append(results(model, call=wrapped))
        assert len(sums) == (SUMS["llama"] if fuse else 0)
    assert same(*found)


def test_norms_that_peft_replaces_compute_by_themselves() -> None:
    model = tuned()
    ofa.fuse_layers(model)
    wrapped: Any = get_peft_model(model, LNTuningConfig(target_modules=["post_attention_layernorm"]))
    expected: Any = get_peft_model(tuned(), LNTuningConfig(target_modules=["post_attention_layernorm"]))
    for one in (wrapped, expected):
        one.base_model.model.model.layers[1].post_attention_layernorm.ln_tuning_layers["default"].weight.data *= 2
    assert torch.equal(wrapped(**given("llama")).logits, expected(**given("llama")).logits)


def with_dropout(model: Any) -> None:
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5


def checkpointing(model: Any, *, reentrant: bool) -> None:
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


OWN: dict[str, Callable[[Any], Any]] = {
    "dropout": with_dropout,
    "checkpointing": lambda model: checkpointing(model, reentrant=False),
    "reentrant checkpointing": lambda model: checkpointing(model, reentrant=True),
    "saved tensors on the host": lambda model: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.parametrize("what", OWN)
def test_layers_that_do_more_than_the_table_run_their_own_forward_pass(what: str, sums: list[bool]) -> None:
    found = []
    for fuse in (False, True):
        model = tuned()
        if fuse:
            ofa.fuse_layers(model)
        sums.clear()
        with OWN[what](model) or nullcontext():
            torch.manual_seed(0)
            found.append(results(model))
    assert same(*found)
    assert bool(sums) == (what == "saved tensors on the host")


def test_under_autocast_norms_have_its_dtypes(sums: list[bool]) -> None:
    """PyTorch's LayerNorm then returns float32 in a model of bfloat16."""
    found = []
    for fuse in (False, True):
        model = families.build("gpt2").bfloat16()
        if fuse:
            ofa.fuse_layers(model)
        sums.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(results(model, "gpt2"))
        assert not sums
    assert same(*found)


def test_without_gradients_and_in_inference_mode() -> None:
    model = tuned()
    ofa.fuse_layers(model)
    expected = tuned()(**given("llama")).logits
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(**given("llama")).logits, expected)


def test_forward_mode_and_batched_gradients() -> None:
    """What kernels have no rules for goes through the layers' own forward pass."""
    model = families.build("gpt2").double()
    ofa.fuse_layers(model)
    embedded = model.get_input_embeddings()(given("gpt2")["input_ids"]).detach()

    def logits(model: Any, hidden: Tensor) -> Tensor:
        return model(inputs_embeds=hidden, attention_mask=None).logits  # type: ignore[no-any-return]

    along = torch.ones_like(embedded)
    model.set_attn_implementation("eager")
    fused = torch.func.jvp(lambda hidden: logits(model, hidden), (embedded,), (along,))[1]
    ofa.unfuse_layers(model)
    torch.testing.assert_close(fused, torch.func.jvp(lambda hidden: logits(model, hidden), (embedded,), (along,))[1])


def test_a_compiled_model_is_one_graph() -> None:
    """The compiler fuses sums and norms by itself; hooks then measure the lengths."""
    torch.compiler.reset()
    model = tuned()
    model.model.layers = model.model.layers[:1]
    expected = results(model)
    ofa.fuse_layers(model)
    found = results(model, call=torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_layers_of_their_own(how: Callable[[Any], Any]) -> None:
    model = tuned()
    expected = results(model)
    ofa.fuse_layers(model)
    results(model)
    other = how(model)
    assert not fused_layers.is_fused(other)
    assert fused_layers.is_fused(model)
    assert [type(layer) for layer in other.model.layers] == [type(layer) for layer in tuned().model.layers]
    assert same(results(other), expected)
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert same(results(model), expected)


def test_the_pass_after_an_exception_is_right() -> None:
    model = tuned()
    ofa.fuse_layers(model)
    with ofa.fused_regularizers(model, sharpness=0.0) as reg:
        expected = [*results(model), reg.penalty()]

        def fail(*args: object) -> None:
            raise OSError("device lost")

        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(OSError, match="device lost"):
            model(**given("llama"))
        handle.remove()
        assert same([*results(model), reg.penalty()], expected)
