"""The closed form of the trace against dense Jacobians, probes and differences; its hooks in model and loop."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ofa import InputError
from ofa.regularizers.estimators.exact import Exact
from tests import families, oracle
from tests.cases import CLOSED
from tests.device import DEVICE
from tests.ofa.traces import (
    DENSE,
    PADDED,
    VARIANTS,
    Failing,
    assert_dense,
    assert_gradient,
    batch,
    built,
    freeze,
    frozen,
    gradients,
    hooks_of,
    measuring,
    own_token_trace,
    scale_gradients,
    solve,
    solved,
    traces_of,
    training_model,
    variant,
)


@pytest.mark.parametrize(("name", "padded"), PADDED)
def test_traces_and_their_gradients_are_those_of_dense_jacobians(name: str, padded: bool) -> None:
    """Each family with a closed form, with and without padding on either side: h_t, and ∂h_t/∂γ with C held fixed.

    Padding does not contribute. One convention each, since the two differ only in sign.
    """
    convention, sign = ("algorithm1", -1.0) if padded else ("theory", 1.0)
    assert_dense(frozen(name), batch(name, padded), solved(name, padded), sign=sign, convention=convention)


@pytest.mark.parametrize("case", VARIANTS)
def test_settings_of_a_family_are_in_the_trace(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short windows, scales of scores, biases."""
    name, extra = VARIANTS[case]
    model = variant(monkeypatch, name, **extra)
    given = oracle.batch(name, tokens=7, sequences=1)
    assert_dense(model, given, solve(name, model, given))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("packed", ["positions", "mask", "bias"])
def test_packed_sequences_and_attention_implementations(implementation: str, packed: str) -> None:
    """Two sequences in one row, separated by restarting positions, a boolean mask or a bias."""
    model = copy.deepcopy(frozen("llama"))
    model.set_attn_implementation(implementation)
    given = oracle.batch("llama", tokens=7, sequences=1)
    given["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=DEVICE)
    apart = torch.ones(1, 1, 7, 7, device=DEVICE).tril().bool()
    apart[..., 3:, :3] = False
    if packed != "positions":
        # Eager attention adds its mask, which then cannot be boolean.
        boolean = packed == "mask" and implementation == "sdpa"
        given["attention_mask"] = apart if boolean else torch.where(apart, 0.0, -1e30).double()
    with oracle.Float64():
        dense = oracle.steps("llama", model, given, "sublayer")[0].dense(0)
    assert (dense[3:, :, :3] == 0).all()
    assert_dense(model, given, solve("llama", model, given))


# A family of each kind of mask, position and expert; each family's batch has the traces of its dense Jacobians above.
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3", "olmo2", "gpt_oss", "falcon_alibi", "falcon_two_norms", "vit"]
)
def test_a_batch_has_the_traces_of_its_sequences(name: str) -> None:
    """The traces of each, and the mean of the gradients."""
    model, given = frozen(name), oracle.batch(name)
    found = []
    for rows in (slice(None), slice(0, 1), slice(1, 2)):
        with oracle.Float64(), measuring(model) as reg:
            model(**{key: value[rows] for key, value in given.items()})
            found.append((reg.measurements.traces, scale_gradients(model, reg.penalty())))
    (whole, slopes), *alone = found
    torch.testing.assert_close(whole, torch.cat([traces for traces, _ in alone], 1), **DENSE)
    for path, slope in slopes.items():
        torch.testing.assert_close(slope, (alone[0][1][path] + alone[1][1][path]) / 2, **DENSE)


# A family of each norm and activation; test_precision.py has the narrow dtypes of all.
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "cohere", "phi", "gpt_oss", "falcon_alibi", "vit"])
def test_float32_is_close(name: str) -> None:
    """In float32 h_t and its gradient are those of float64 to 10⁻⁴: a thousand roundings of 2⁻²⁴."""
    found = []
    for dtype in (torch.float64, torch.float32):
        model = copy.deepcopy(frozen(name)).to(dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in oracle.batch(name).items()}
        with measuring(model) as reg:
            model(**given)
            slopes = torch.cat(list(scale_gradients(model, reg.penalty()).values()))
            found.append((reg.measurements.traces.double(), slopes.double()))
    (traces, slopes), (narrow, narrow_slopes) = found
    torch.testing.assert_close(narrow, traces, rtol=1e-4, atol=1e-4)
    assert float((narrow_slopes - slopes).norm()) <= 1e-4 * float(slopes.norm())


@pytest.mark.parametrize("name", ["llama", "falcon_two_norms"])
def test_differences_agree_with_it(name: str) -> None:
    """Every entry of the diagonal by a central difference, whose error is h² times a third derivative.

    The probes have their own test.
    """
    h, given, model = 1e-4, oracle.batch(name, sequences=1), frozen(name)
    with oracle.Float64(), torch.no_grad():
        exact = traces_of(model, given)[:, 0]
        for index, step in enumerate(oracle.steps(name, model, given, "sublayer")):
            slopes = 0.0
            for token in range(step.stream.shape[1]):
                moves = step.stream.new_zeros(step.stream.shape[2], *step.stream.shape[1:])
                moves[:, token].fill_diagonal_(h)
                moves = moves * step.right * step.left.unsqueeze(-1)
                changes = [
                    step.function(step.stream + move) - step.function(step.stream - move) for move in moves[:, None]
                ]
                slopes += sum(float(change[0, token, k]) for k, change in enumerate(changes)) / (2 * h)
            assert -slopes / step.stream.shape[1] == pytest.approx(float(exact[index]), rel=1e-5, abs=1e-5)
            assert own_token_trace(step.dense(0)) == pytest.approx(-float(exact[index]), rel=1e-8)


ALIKE = ("mistral", "smollm3", "gemma", "gpt_neox_sequential", "falcon", "falcon_sequential", "mixtral")
"""Families with nothing of their own: each part of them is in a llama, gemma2, gpt_neox, or another Falcon or MoE."""


@pytest.mark.parametrize("name", [name for name in CLOSED if name not in ALIKE])
def test_the_full_gradient_is_that_of_differences(name: str) -> None:
    """λ₁J + λ₂H along a direction in every γ, those of norms on heads included, by autograd and by differences."""
    model, given = frozen(name), oracle.batch(name, sequences=1, tokens=4)
    with oracle.Float64(), measuring(model, step_ratio=0.7, gradient="full") as reg:
        assert_gradient(model, given, reg)


def test_the_full_gradient_is_right_with_padding() -> None:
    """Fully masked rows add neither NaN nor anything else to the gradient of γ."""
    with oracle.Float64(), measuring(frozen("llama"), gradient="full") as reg:
        assert_gradient(frozen("llama"), batch("llama", padded=True), reg)


@pytest.mark.parametrize("name", CLOSED)
def test_attention_has_a_part_in_the_gradient(name: str) -> None:
    """The sharpness depends on the γ of each attention, in at least one convention: softplus may be flat in one."""
    model, found = frozen(name), []
    for convention in ("theory", "algorithm1"):
        with measuring(model, convention=convention) as reg:
            model(**oracle.batch(name, sequences=1))
            found.append(scale_gradients(model, reg.penalty()))
    norms = [branch.norm.path for step in reg.steps for branch in step.branches if branch.role == "attention"]
    assert len(norms) == 3
    assert all(max(float(one[path].abs().max()) for one in found) > 1e-3 for path in norms)


def test_it_has_no_variance() -> None:
    """Bit-identical over passes and seeds."""
    model, given = built("llama"), families.inputs("llama")
    runs = [traces_of(model, given, seed=seed) for seed in (0, 0, 9)]
    assert all(torch.equal(traces, runs[0]) for traces in runs)


@pytest.mark.parametrize("name", CLOSED)
def test_the_task_is_not_changed_by_being_measured(name: str) -> None:
    """While measured and after close(): bit-identical loss, logits and gradients, and the same hooks."""
    model, given = frozen(name), oracle.batch(name)
    hooks, implementation = hooks_of(model), model.config._attn_implementation
    plain = model(**given)
    expected = gradients(model, plain.loss)
    with measuring(model, step_ratio=1.0):
        measured = model(**given)
        actual = gradients(model, measured.loss)
    assert torch.equal(measured.logits, plain.logits)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert torch.equal(model(**given).logits, plain.logits)
    assert hooks_of(model) == hooks
    assert model.config._attn_implementation == implementation


def test_weights_may_be_trained_with_the_curvature_held_fixed() -> None:
    """The held curvature includes theirs; the full gradient would lack their part."""
    model, given = built("llama"), families.inputs("llama")
    weight = model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    with measuring(model) as reg:
        model(**given)
        assert torch.autograd.grad(reg.penalty(), weight, allow_unused=True) == (None,)
    weight.requires_grad_(False)
    with measuring(model, gradient="full"):
        model(**given)
        weight.requires_grad_()
        with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj is trained, .* gradient='preconditioner'"):
            model(**given)


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


def _with_mish() -> nn.Module:
    model = built("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Mish()
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (lambda: built("bert"), "the norm of bert.encoder.layer.0.attention comes after the residual sum"),
    "layer": (lambda: built("llama"), "with granularity='layer' a step is more than one branch with one norm"),
    "quantized": (_quantized, "the weight of model.layers.0.mlp.up_proj is quantized in a way that is not known here"),
    "activation": (
        _with_mish,
        "the activation before model.layers.0.mlp.down_proj is none of silu, gelu, gelu_tanh, relu, quick_gelu",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_without_a_closed_form_are_refused_with_the_reason(case: str) -> None:
    """One sentence: what was asked for, why it fails, what to use. Nothing stays attached."""
    build, reason = REFUSED[case]
    model, granularity = build(), "layer" if case == "layer" else "sublayer"
    hooks, implementation = hooks_of(model), model.config._attn_implementation
    with pytest.raises(InputError) as error:
        measuring(model, granularity=granularity)
    start = f"estimator='exact' has no closed form for this {model.config.model_type} model, because "
    assert str(error.value) == f"{start}{reason}; use estimator='hutchinson'"
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
def test_an_exception_in_a_branch_leaves_no_state(name: str, path: str) -> None:
    """The model fails inside a branch: taps are stopped, and the next pass is bit-identical."""
    model, given = built(name), families.inputs(name)
    plain, module = model(**given).logits, model.get_submodule(path)
    with measuring(model) as reg:
        model(**given)
        whole, chosen = reg.measurements.traces, reg._trace_estimator
        module.forward = Failing(module).forward
        with pytest.raises(OSError, match="device lost"):
            model(**given)
        del module.forward
        assert not any(tap.started for tap in chosen._taps.values())
        with pytest.raises(RuntimeError, match="no forward pass has been measured"):
            reg.penalty()
        with torch.no_grad():
            assert torch.equal(model(**given).logits, plain)
        reg.passes = 0
        model(**given)
        assert torch.equal(reg.measurements.traces, whole)


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_parts_may_be_called_alone_and_text_generated(name: str) -> None:
    """Between passes the decoder, a branch and generate() work as usual, and the next pass is unchanged."""
    model, given = built(name), families.inputs(name)
    decoder, ids = model.base_model, given["input_ids"]
    branch = next(module for path, module in model.named_modules() if path.endswith("1.mlp"))
    hidden = torch.randn(2, 3, 32).to(DEVICE)

    def alone() -> list[Tensor]:
        return [decoder(ids).last_hidden_state, branch(hidden), model.generate(ids, max_new_tokens=3, do_sample=False)]

    plain = alone()
    with measuring(model) as reg:
        traces = []
        for _ in range(2):
            assert all(torch.equal(*pair) for pair in zip(alone(), plain, strict=True))
            reg.passes = 0
            model(**given)
            traces.append(reg.measurements.traces)
    assert torch.equal(*traces)


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_two_norms"])
def test_checkpointing_computes_the_curvature_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes, then both backwards with recomputed layers: same losses and gradients, no second curvature."""
    results, counts, own = [], [], Exact.leave
    for checkpointing in (False, True):
        model = freeze(training_model(name, checkpointing=checkpointing))
        counts.append(0)

        def leave(*args: object) -> object:
            counts[-1] += 1
            return own(*args)

        monkeypatch.setattr(Exact, "leave", leave)
        with measuring(model, step_ratio=1.0, into_loss=True):
            losses = [model(**oracle.batch(name, seed=seed)).loss for seed in (0, 1)]
            results.append([part for loss in losses for part in (loss.detach(), *gradients(model, loss))])
    assert counts == [12, 12]
    for one, other in zip(*results, strict=True):
        # The recomputation does the same operations in the same order; only sums of gradients may change their order.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_two_models_at_once(shared: bool) -> None:
    """Each measures itself, also with a shared configuration, whose name returns when the last one closes."""
    first, given = built("llama"), families.inputs("llama")
    second = freeze(type(first)(first.config).to(DEVICE) if shared else families.build("llama", seed=1))
    assert (second.config is first.config) == shared
    alone = [traces_of(model, given) for model in (first, second)]
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
    """Neither hooks nor the registry keep it alive, and its saved files have the original names."""
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
    """set_attn_implementation while attached makes the next measured pass raise; the new setting survives close()."""
    model, given = built("llama"), families.inputs("llama")
    with measuring(model):
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn was changed after .* set_attn_impl\w+ before"):
            model(**given)
    assert model.config._attn_implementation == "eager"
    assert traces_of(model, given).isfinite().all()


def test_a_projection_that_was_replaced_is_noticed() -> None:
    """A replaced projection is named in an error instead of giving a stale trace."""
    model, given = built("llama"), families.inputs("llama")
    with measuring(model):
        model.model.layers[1].mlp.down_proj = nn.Linear(48, 32, bias=False).to(DEVICE)
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj was replaced after"):
            model(**given)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes saved for the backward pass, without parameters, each storage counted once."""
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


@pytest.mark.parametrize(("gradient", "most"), [("preconditioner", 1.01), ("full", 6.0)])
def test_the_graph_keeps_little_more(gradient: str, most: float) -> None:
    """Bytes saved for the backward pass, relative to norm tuning alone."""
    model = built("llama")
    given = families.inputs("llama", sequences=4, tokens=48)
    plain = saved_bytes(model, lambda: model(**given).loss)
    with measuring(model, gradient=gradient) as reg:
        measured = saved_bytes(model, lambda: model(**given).loss + reg.penalty())
    assert measured < most * plain
