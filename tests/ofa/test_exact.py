"""The closed form of the trace against dense Jacobians, probes and differences; and as a guest of model and loop."""

from __future__ import annotations

import copy
import gc
import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import ofa
from ofa import InputError
from ofa.closed_form.constants import AttentionProducts, MlpProducts
from tests import families, oracle
from tests.device import DEVICE
from tests.ofa.traces import (
    CLOSED,
    PADDED,
    VARIANTS,
    Failing,
    assert_dense,
    assert_gradient,
    batch,
    built,
    by_token,
    freeze,
    frozen,
    gradients,
    hooks_of,
    measuring,
    own_blocks,
    own_token_trace,
    solved,
    spread,
    training_model,
    variant,
)


@pytest.mark.parametrize(("name", "padded"), PADDED)
def test_every_token_has_the_trace_of_the_dense_jacobian(name: str, padded: bool) -> None:
    """Each family with a closed form, with and without padding on either side: tr(J_ii P_i), and h_t of the real ones.

    Padding adds exactly nothing and is counted nowhere.
    """
    assert_dense(frozen(name), batch(name, padded), solved(name, padded))


@pytest.mark.parametrize("case", VARIANTS)
def test_settings_of_a_family_are_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a configuration changes inside a branch is in the trace: short windows, scales of scores, biases."""
    name, extra = VARIANTS[case]
    model = variant(monkeypatch, name, **extra)
    given = oracle.batch(name, tokens=7, sequences=1)
    with oracle.Float64():
        blocks = [own_blocks(step) for step in oracle.steps(name, model, given, "sublayer")]
    assert_dense(model, given, blocks)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("packed", ["positions", "mask", "bias"])
def test_packed_sequences_and_attention_implementations(implementation: str, packed: str) -> None:
    """Two sequences in one row, kept apart by positions that restart, by a boolean mask or by a bias."""
    model = copy.deepcopy(frozen("llama"))
    model.set_attn_implementation(implementation)
    given = oracle.batch("llama", tokens=7, sequences=1)
    given["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=DEVICE)
    apart = torch.ones(1, 1, 7, 7, device=DEVICE).tril().bool()
    apart[..., 3:, :3] = False
    if packed != "positions":
        # Eager attention adds its mask, so that it cannot be boolean there.
        boolean = packed == "mask" and implementation == "sdpa"
        given["attention_mask"] = apart if boolean else torch.where(apart, 0.0, -1e30).double()
    with oracle.Float64():
        steps = oracle.steps("llama", model, given, "sublayer")
        dense = steps[0].dense(0)
        assert (dense[3:, :, :3] == 0).all()
        blocks = [own_blocks(step) for step in steps]
    assert_dense(model, given, blocks)


@pytest.mark.parametrize("name", CLOSED)
def test_float32_is_close(name: str) -> None:
    """In float32 each h_t is that of the dense Jacobian in float64 to 10⁻⁴: a thousand roundings of 2⁻²⁴."""
    with torch.no_grad():
        traces = by_token(
            copy.deepcopy(frozen(name)).float(),
            {k: v.float() if v.is_floating_point() else v for k, v in oracle.batch(name).items()},
        )[1]
    expected = [-block.diagonal(dim1=-2, dim2=-1).sum(-1).mean(-1) for block in solved(name, False)]
    torch.testing.assert_close(traces.double(), torch.stack(expected).detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "falcon_two_norms"])
def test_probes_and_differences_agree_with_it(name: str) -> None:
    """The estimators have one limit: 400 probes of either kind stay within 3 standard errors, differences within h²."""
    samples, h, given, model = 400, 1e-4, oracle.batch(name, sequences=1), frozen(name)
    with oracle.Float64(), torch.no_grad():
        exact = by_token(model, given)[1][:, 0]
        means = {
            estimator: by_token(model, given, estimator=estimator, samples=samples, seed=11)[1][:, 0]
            for estimator in ("hutchinson", "jvp")
        }
        for index, step in enumerate(oracle.steps(name, model, given, "sublayer")):
            dense = step.dense(0)
            error = 3 * spread(dense, "rademacher", len(dense)) / math.sqrt(samples)
            for mean in means.values():
                assert abs(float(mean[index] - exact[index])) <= error
            # Every entry of the diagonal by a central difference, whose error is h² times a third derivative.
            slopes = 0.0
            for token in range(step.stream.shape[1]):
                moves = step.stream.new_zeros(step.stream.shape[2], *step.stream.shape[1:])
                moves[:, token].fill_diagonal_(h)
                moves = moves * step.right * step.left.unsqueeze(-1)
                changes = [
                    step.function(step.stream + move) - step.function(step.stream - move) for move in moves[:, None]
                ]
                slopes += sum(float(change[0, token, k]) for k, change in enumerate(changes)) / (2 * h)
            assert -slopes / len(dense) == pytest.approx(float(exact[index]), rel=1e-5, abs=1e-5)
            assert own_token_trace(dense) == pytest.approx(-float(exact[index]), rel=1e-8)


@pytest.mark.parametrize("name", CLOSED)
def test_the_penalty_has_the_gradient_of_its_differences(name: str) -> None:
    """λ₁J + λ₂H along a direction in every γ, by autograd and by central differences."""
    model, given = frozen(name), oracle.batch(name, sequences=1, tokens=4)
    with oracle.Float64(), measuring(model, step_ratio=0.7) as reg:
        assert_gradient(model, given, reg)


def test_the_gradient_is_right_with_padding() -> None:
    """Fully masked rows put neither NaN into the gradient of γ nor a part of it."""
    with oracle.Float64(), measuring(frozen("llama")) as reg:
        assert_gradient(frozen("llama"), batch("llama", padded=True), reg)


@pytest.mark.parametrize("name", CLOSED)
def test_attention_has_a_part_in_the_gradient(name: str) -> None:
    """The trace of each attention step depends on the γ of that step; and it is the reference's gradient."""
    model, given = frozen(name), oracle.batch(name, sequences=1)
    with measuring(model) as reg:
        model(**given)
        traces = reg.measurements.traces
        for index, step in enumerate(reg.steps):
            if step.branches[0].role == "attention":
                scale = model.get_submodule(step.branches[0].norm.path).weight
                (gradient,) = torch.autograd.grad(traces[index].sum(), scale, retain_graph=True)
                assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", CLOSED)
def test_the_reference_has_the_same_value_and_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OFA_KERNELS=reference, plain PyTorch and its autograd, against what runs otherwise."""
    model, given, results = frozen(name), batch(name, padded=name != "vit"), []
    for kernels in ("reference", ""):
        monkeypatch.setenv("OFA_KERNELS", kernels)
        with oracle.Float64(), measuring(model, step_ratio=1.0) as reg:
            loss = model(**given).loss + reg.penalty()
            results.append([loss.detach(), *gradients(model, loss)])
    for one, other in zip(*results, strict=True):
        # Another order of summing in float64: some roundings of 2⁻⁵³ of the largest entry.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * float(other.abs().max()))


def test_it_has_no_variance() -> None:
    """Passes and seeds give the same bits, and half of the steps the values of all of them."""
    model, given = built("llama"), families.inputs("llama")
    runs = []
    for options in ({}, {"seed": 9}, {"steps": 0.5}):
        with measuring(model, **options) as reg, torch.no_grad(), reg.measuring():
            for _ in range(2):
                model(**given)
                runs.append(reg.measurements.traces)
    assert all(torch.equal(traces, runs[0]) for traces in runs[:4])
    for half in runs[4:]:
        seen = ~half.isnan()
        assert seen.all(1).sum() == seen.any(1).sum() == 3
        # A step that is not measured has fewer rows in its last projection, whose sums a GPU may order otherwise:
        # 2⁻²⁴ each, through three layers.
        torch.testing.assert_close(half[seen], runs[0][seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLOSED)
def test_the_task_is_not_changed_by_being_measured(name: str) -> None:
    """Same loss, logits and gradients with more rows in the last projections; closed, the same bits and hooks."""
    model, given = frozen(name), oracle.batch(name)
    hooks, implementation = hooks_of(model), model.config._attn_implementation
    plain = model(**given)
    expected = gradients(model, plain.loss)
    with measuring(model, step_ratio=1.0):
        measured = model(**given)
        actual = gradients(model, measured.loss)
        with torch.no_grad():
            unmeasured = model(**given)
    # The same products in a wider batch may be summed in another order: 2⁻⁵³, or 2⁻²⁴ in norms that narrow to float32.
    torch.testing.assert_close(measured.logits, plain.logits, rtol=1e-6, atol=1e-6)
    for one, other in zip((measured.loss, *actual), (plain.loss, *expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(unmeasured.logits, plain.logits)
    assert torch.equal(model(**given).logits, plain.logits)
    assert hooks_of(model) == hooks
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "falcon", "gpt_neox", "phi3"])
def test_bfloat16_is_close_to_float32(name: str) -> None:
    """A bfloat16 model with tuned float32 scales trains, and measures the trace of float32 up to a twentieth."""
    given, measured = families.inputs(name), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = families.build(name)
        model.get_input_embeddings().weight.data /= 0.15  # σ ≈ 1, as in trained models behind the first layers
        tuned = ofa.tune_norms(model.to(dtype))
        with measuring(model, step_ratio=1.0) as reg:
            (model(**given).loss + reg.penalty()).backward()
            measured[dtype] = reg.measurements.traces.detach()
        assert all(scale.grad.dtype == torch.float32 and scale.grad.isfinite().all() for scale in tuned)
    assert measured[torch.bfloat16].dtype == torch.float32
    # 2⁻⁹ for each of the dozen roundings between a stream and its branch's end, and for those of all steps before.
    error = (measured[torch.bfloat16] - measured[torch.float32]).norm()
    assert error <= 0.05 * measured[torch.float32].norm()


def test_autocast_is_close_to_float32() -> None:
    """Under autocast the branches run in bfloat16; the constants and the trace stay in float32."""
    model, given, measured = built("llama"), families.inputs("llama"), []
    model.get_input_embeddings().weight.data /= 0.15
    for enabled in (False, True):
        with measuring(model) as reg, torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            model(**given)
            measured.append(reg.measurements.traces.detach())
            assert all(gradient.isfinite().all() for gradient in gradients(model, model(**given).loss + reg.penalty()))
    assert (measured[1] - measured[0]).norm() <= 0.05 * measured[0].norm()  # as for bfloat16 above


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the constants of a branch were computed, by kind."""
    counts: Counter[str] = Counter()

    def counting(kind: type, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, *args: Any) -> Any:
            counts[kind.__name__] += 1
            return own(self, *args)

        return forward

    for kind in (MlpProducts, AttentionProducts):
        monkeypatch.setattr(kind, "forward", counting(kind, kind.forward))
    return counts


def _step(model: nn.Module) -> None:
    scales = list(oracle.scales(model).values())
    model(**families.inputs("llama")).loss.backward()
    torch.optim.SGD(scales, lr=0.1).step()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer step": _step,
    "data": lambda model: model.model.layers[2].input_layernorm.weight.data.add_(0.1),
    "weight written to": lambda model: model.model.layers[0].mlp.up_proj.weight.mul_(1.1),
    "weight's data replaced": lambda model: setattr(
        model.model.layers[1].self_attn.k_proj.weight, "data", torch.randn(16, 32).to(DEVICE)
    ),
    "weight replaced": lambda model: setattr(
        model.model.layers[1].mlp.down_proj, "weight", nn.Parameter(torch.randn(32, 48).to(DEVICE), requires_grad=False)
    ),
    "weight moved": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_constants_are_computed_when_something_changed(change: str, computed: Counter[str]) -> None:
    """Once for all passes while γ and weights stay what they were, and once more behind a change, from new values."""
    model, given = built("llama"), families.inputs("llama")
    with measuring(model) as reg:
        for times in (1, 2):
            for _ in range(3):
                model(**given)
                reg.penalty().backward()
            assert computed == {"MlpProducts": 3 * times, "AttentionProducts": 3 * times}
            if times == 1:
                CHANGES[change](model)
                computed_before = dict(computed)
                with torch.no_grad():
                    model(**given)
                assert computed == computed_before
        kept = reg.measurements.traces.detach()
    fresh = by_token(model, given)[1]
    # Float32 sums in one order or another, depending on whether there is a graph to keep for.
    torch.testing.assert_close(kept, fresh, rtol=1e-5, atol=1e-5)


def test_only_the_branches_of_sampled_steps_have_constants_computed(computed: Counter[str]) -> None:
    """One of six steps a pass: its own constants, once for all passes that it is sampled in while γ stays as it is."""
    model, given = built("llama"), families.inputs("llama")
    with measuring(model, steps=1 / 6) as reg:
        for _ in range(2):
            sampled: set[int] = set()
            for _ in range(6):
                model(**given)
                sampled |= set(reg.measurements.traces.isfinite().all(1).nonzero().flatten().tolist())
                assert computed.total() == len(sampled)
            assert len(sampled) > 1
            with torch.no_grad():
                model.model.layers[0].input_layernorm.weight.mul_(1.1)
            computed.clear()


def test_micro_batches_share_constants_and_each_has_its_gradient(computed: Counter[str]) -> None:
    """Two forwards, then two backwards, with constants computed once: the gradients are those of each pass alone."""
    model = frozen("gpt2")
    given = [oracle.batch("gpt2", seed=seed) for seed in (0, 1)]
    alone = []
    for one in given:
        with measuring(model) as reg:
            model(**one)
            alone.append(torch.autograd.grad(reg.penalty(), list(oracle.scales(model).values())[:-1]))
    computed.clear()
    with measuring(model) as reg:
        penalties = []
        for one in given:
            model(**one)
            penalties.append(reg.penalty())
        together = [torch.autograd.grad(penalty, list(oracle.scales(model).values())[:-1]) for penalty in penalties]
    assert computed == {"MlpProducts": 3, "AttentionProducts": 3}
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_constants_of_inference_mode_serve_training(family: str, computed: Counter[str]) -> None:
    """Measured in inference mode first: its tensors cannot be in a graph, and the constants are in the next one.

    Gemma's scale is 1 more than its weight, a tensor that the pass makes.
    """
    model, given = built(family), families.inputs(family)
    with measuring(model) as reg:
        with torch.inference_mode(), reg.measuring():
            model(**given)
            first = reg.measurements.traces.clone()
        model(**given)
        reg.penalty().backward()
        torch.testing.assert_close(reg.measurements.traces, first)
    assert computed == {"MlpProducts": 3, "AttentionProducts": 3}


class Int8Linear(nn.Linear):
    """A projection whose weight is stored in eight bits."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.factor = like.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((like.weight.detach() / self.factor).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.weight.float() * self.factor).mT


def _quantized() -> nn.Module:
    model = built("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
    return model


def _with_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(families.build("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model.get_base_model()


def _with_mish() -> nn.Module:
    model = built("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Mish()
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (lambda: built("bert"), "the norm stands behind bert.encoder.layer.0.attention"),
    "gemma2": (lambda: built("gemma2"), "a norm stands between model.layers.0.self_attn and the stream"),
    "gemma3": (lambda: built("gemma3"), "a norm stands between model.layers.0.self_attn and the stream"),
    "olmo2": (lambda: built("olmo2"), "the norm stands behind model.layers.0.self_attn"),
    "falcon_alibi": (
        lambda: built("falcon_alibi"),
        "transformer.h.0.self_attention does more than project, rotate and attend",
    ),
    "layer": (lambda: built("llama"), "a step of granularity 'layer' is more than one branch behind one norm"),
    "trained": (
        lambda: families.build("llama"),
        "model.layers.0.self_attn.q_proj is trained, and the closed form takes the weights as constants",
    ),
    "quantized": (_quantized, "the weight of model.layers.0.mlp.up_proj is quantized"),
    "lora": (
        _with_lora,
        "model.layers.0.self_attn.q_proj is a peft.tuners.lora.layer.Linear, not a plain linear map",
    ),
    "activation": (
        _with_mish,
        "the activation in front of model.layers.0.mlp.down_proj is none of silu, gelu, gelu_tanh, relu",
    ),
}


@pytest.mark.parametrize("estimator", ["exact", "local_jvp"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_closed_form_is_refused_with_the_reason(case: str, estimator: str) -> None:
    """One sentence: what is asked for, why not, and the ways out. Nothing stays attached."""
    build, reason = REFUSED[case]
    model, granularity = build(), "layer" if case == "layer" else "sublayer"
    hooks, implementation = hooks_of(model), model.config._attn_implementation
    with pytest.raises(InputError) as error:
        measuring(model, estimator=estimator, granularity=granularity)
    start = f"estimator='{estimator}' does not know the inside of this {model.config.model_type} model, because "
    assert str(error.value) == f"{start}{reason}; use estimator='hutchinson' or 'jvp'"
    assert hooks_of(model) == hooks
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("case", REFUSED)
def test_auto_falls_back_and_says_why(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """One warning with the reason, and `hutchinson` measures."""
    build, reason = REFUSED[case]
    model, granularity = build(), "layer" if case == "layer" else "sublayer"
    name = "bert" if case == "bert" else "llama"
    with (
        caplog.at_level(logging.INFO, "ofa"),
        measuring(model, estimator="auto", granularity=granularity, samples=2) as reg,
    ):
        assert reg.estimator == "hutchinson"
        model(**families.inputs(name))
        assert reg.measurements.traces.isfinite().all()
    (record,) = [record for record in caplog.records if record.name == "ofa.regularizers"]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"estimator='auto' chose hutchinson with 2 probe(s) for a {model.config.model_type} model, because {reason}"
    )


def test_auto_chooses_exact_where_it_can(caplog: pytest.LogCaptureFixture) -> None:
    """Without a warning."""
    model = built("llama")
    with caplog.at_level(logging.INFO, "ofa"), measuring(model, estimator="auto") as reg:
        assert reg.estimator == "exact"
    (record,) = [record for record in caplog.records if record.name == "ofa.regularizers"]
    assert (record.levelno, record.getMessage()) == (logging.INFO, "estimator='auto' chose exact for a llama model")


@pytest.mark.parametrize("estimator", ["exact", "local_jvp"])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "model.layers.1.self_attn.v_proj"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("llama", "lm_head"),
        ("falcon", "transformer.h.1.self_attention.dense"),
        ("opt", "model.decoder.layers.1.activation_fn"),
    ],
)
def test_an_exception_in_a_branch_leaves_nothing_behind(name: str, path: str, estimator: str) -> None:
    """The model fails in the middle of a branch: nothing listens any more, and the next pass measures the same bits."""
    model, given = built(name), families.inputs(name)
    plain, module = model(**given).logits, model.get_submodule(path)
    with measuring(model, estimator=estimator) as reg:
        model(**given)
        whole, chosen = reg.measurements.traces, reg._trace_estimator
        module.forward = Failing(module).forward
        with pytest.raises(OSError, match="device lost"):
            model(**given)
        del module.forward
        taps = [form.tap for form in chosen._forms.values()] if estimator == "exact" else list(chosen._taps.values())
        assert not any(tap.open or tap._seen for tap in taps)
        with pytest.raises(RuntimeError, match="no forward pass has been measured"):
            reg.penalty()
        with torch.no_grad():
            assert torch.equal(model(**given).logits, plain)
        reg.passes = 0
        model(**given)
        assert torch.equal(reg.measurements.traces, whole)


@pytest.mark.parametrize("estimator", ["exact", "local_jvp"])
@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_parts_may_be_called_alone_and_text_generated(name: str, estimator: str) -> None:
    """Between passes: the decoder, a branch and generate() do what they always do, and the next pass is unchanged."""
    model, given = built(name), families.inputs(name)
    decoder, ids = model.base_model, given["input_ids"]
    branch = next(module for path, module in model.named_modules() if path.endswith("1.mlp"))
    hidden = torch.randn(2, 3, 32).to(DEVICE)

    def alone() -> list[Tensor]:
        return [decoder(ids).last_hidden_state, branch(hidden), model.generate(ids, max_new_tokens=3, do_sample=False)]

    plain = alone()
    with measuring(model, estimator=estimator) as reg:
        traces = []
        for _ in range(2):
            assert all(torch.equal(*pair) for pair in zip(alone(), plain, strict=True))
            reg.passes = 0
            model(**given)
            traces.append(reg.measurements.traces)
    assert torch.equal(*traces)


@pytest.mark.parametrize("estimator", ["exact", "local_jvp"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon_two_norms"])
def test_checkpointing_changes_neither_loss_nor_gradient(name: str, estimator: str) -> None:
    """Two passes, then both backwards: layers that are run again are measured as the first time."""
    results = []
    for checkpointing in (False, True):
        model = freeze(training_model(name, checkpointing=checkpointing))
        with measuring(model, step_ratio=1.0, estimator=estimator, steps=0.7, into_loss=True):
            losses = [model(**oracle.batch(name, seed=seed)).loss for seed in (0, 1)]
            results.append([part for loss in losses for part in (loss.detach(), *gradients(model, loss))])
    for one, other in zip(*results, strict=True):
        # The recomputation does the same operations in the same order; only sums of gradients may change their order.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_two_models_at_once(shared: bool) -> None:
    """Each measures itself, also where both hold one configuration, whose name is back when the last one closes."""
    first, given = built("llama"), families.inputs("llama")
    second = freeze(type(first)(first.config).to(DEVICE) if shared else families.build("llama", seed=1))
    assert (second.config is first.config) == shared
    alone = [by_token(model, given)[1] for model in (first, second)]
    one, other = measuring(first), measuring(second)
    with torch.no_grad(), one.measuring(), other.measuring():
        first(**given)
        second(**given)
        first(**given)
        assert torch.equal(one.measurements.traces, alone[0])
        assert torch.equal(other.measurements.traces, alone[1])
        one.close()
        assert second.config._attn_implementation == "ofa_sdpa"
        second(**given)
        assert torch.equal(other.measurements.traces, alone[1])
    other.close()
    assert first.config._attn_implementation == second.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_a_model_can_be_collected(name: str, closed: bool) -> None:
    """Neither hooks nor the registry of attention functions keep it alive; what is saved of it shows nothing of us."""
    model = built(name)
    reg = measuring(model)
    model(**families.inputs(name))
    assert "ofa_" not in model.config.to_json_string()
    if closed:
        reg.close()
        reg.close()
        assert not any(hooks_of(model).values())
    gone = weakref.ref(model)
    del model, reg
    gc.collect()
    assert gone() is None


def test_another_attention_function_must_be_chosen_before() -> None:
    """set_attn_implementation while attached ends the next measured pass in a sentence; the choice outlives close()."""
    model, given = built("llama"), families.inputs("llama")
    with measuring(model):
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn was changed after .* set_attn_impl\w+ before"):
            model(**given)
    assert model.config._attn_implementation == "eager"
    assert by_token(model, given)[1].isfinite().all()


def test_a_projection_that_was_replaced_is_noticed() -> None:
    """Another module in the place of a projection: no stale trace, but a sentence that names it."""
    model, given = built("llama"), families.inputs("llama")
    with measuring(model):
        model.model.layers[1].mlp.down_proj = nn.Linear(48, 32, bias=False).to(DEVICE)
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj was exchanged after"):
            model(**given)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a graph keeps at the end of a forward pass, parameters apart, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            reference = StorageWeakRef(storage)
            seen[reference.cdata] = reference, storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    kept = sum(size for reference, size in seen.values() if not reference.expired())
    assert loss.requires_grad
    return kept


def test_the_graph_keeps_little_more() -> None:
    """Activations kept for the backward pass: below 1.5 times those of norm tuning alone, in the same model."""
    model = built("llama")
    given = families.inputs("llama", sequences=4, tokens=48)
    plain = saved_bytes(model, lambda: model(**given).loss)
    with measuring(model, step_ratio=1.0) as reg:
        measured = saved_bytes(model, lambda: model(**given).loss + reg.penalty())
    assert measured < 1.5 * plain
