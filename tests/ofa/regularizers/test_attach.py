"""Attaching the regularizers, measuring, adding to the loss, refusals, and closing."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import ofa
from ofa import InputError, anatomy
from ofa.regularizers.options import RegularizerOptions
from ofa_kernels.philox import PROBES
from tests import families, oracle
from tests.device import DEVICE
from tests.ofa import traces
from tests.ofa.traces import gradients, hooks_of


# `gradient="full"`: its copies are in the batch of every module.
@pytest.mark.parametrize(
    ("name", "granularity", "gradient"),
    [*((*case, "full") for case in oracle.CASES), *((name, "layer", "preconditioner") for name in families.BUILDERS)],
)
def test_measuring_does_not_change_the_task(name: str, granularity: str, gradient: str) -> None:
    """Each family: same loss, logits and gradients; after close(), bit-identical and with the same hooks."""
    model, given = oracle.model(name), oracle.batch(name)
    before_hooks = hooks_of(model)
    options = {"estimator": "hutchinson", "granularity": granularity, "gradient": gradient, "samples": 2}
    with oracle.Float64():
        plain = model(**given)
        expected = gradients(model, plain.loss)
        with ofa.fused_regularizers(model, **options) as reg:
            measured = model(**given)
            actual = gradients(model, measured.loss)
            assert reg.penalty().isfinite()
            assert hooks_of(model) != before_hooks
        again = model(**given)
    # A wider batch may sum in another order: some roundings of 2⁻⁵³ per layer.
    close = {"rtol": 0, "atol": 0} if gradient == "preconditioner" else {"rtol": 1e-8, "atol": 1e-8}
    for one, other in zip(
        (measured.logits, measured.loss, *actual), (plain.logits, plain.loss, *expected), strict=True
    ):
        torch.testing.assert_close(one, other, **close)
    assert torch.equal(again.logits, plain.logits)
    assert hooks_of(model) == before_hooks


def test_closing_leaves_nothing() -> None:
    """State and flags are as before; closing twice and attaching again work; nothing is kept alive."""
    model = families.build("llama")
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    for _ in range(2):
        reg = ofa.fused_regularizers(model)
        (model(**families.inputs("llama")).loss + reg.penalty()).backward()
        reg.close()
        reg.close()
    model.zero_grad(set_to_none=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(hooks_of(model).values())
    ofa.fused_regularizers(model)
    gone = weakref.ref(model)
    del model, reg
    gc.collect()
    assert gone() is None


def test_attaching_twice_is_refused() -> None:
    model = families.build("llama")
    with ofa.fused_regularizers(model), pytest.raises(InputError, match="already has regularizers attached; close"):
        ofa.fused_regularizers(model)
    ofa.fused_regularizers(model).close()


def test_without_gradients_nothing_is_measured_unless_asked() -> None:
    """Evaluation costs nothing and keeps the last measurement; only inside measuring() it is measured."""
    model, given = families.build("llama"), families.inputs("llama")
    with ofa.fused_regularizers(model) as reg:
        with torch.no_grad():
            model(**given)
        assert reg.passes == 0
        with pytest.raises(RuntimeError, match="no forward pass has been measured"):
            reg.penalty()
        with torch.inference_mode(), reg.measuring() as same:
            model(**given)
        assert same is reg
        assert reg.passes == 1
        first = reg.measurements
        with torch.no_grad():
            model(**given)
        assert reg.measurements is first


def test_the_parts_of_the_model_may_be_called_alone() -> None:
    """Calls from outside the model's forward are not measured, before and after a pass, with and without gradients."""
    model, given = families.build("llama"), families.inputs("llama")
    plain = model.model(given["input_ids"]).last_hidden_state
    with ofa.fused_regularizers(model) as reg:
        for _ in range(2):
            assert torch.equal(model.model(given["input_ids"]).last_hidden_state, plain)
            with torch.no_grad():
                assert torch.equal(model.model(given["input_ids"]).last_hidden_state, plain)
            model(**given)
        assert reg.passes == 2


def test_a_forward_that_raises_leaves_the_next_one_right() -> None:
    """After an exception there is no stale penalty, and the next pass measures the same as without it."""
    model, given = families.build("llama"), families.inputs("llama")
    broken = False

    def fail(module: nn.Module, args: Any) -> None:
        if broken:
            raise OSError("device lost")

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
    with ofa.fused_regularizers(model) as reg:
        model(**given)
        broken = True
        with pytest.raises(OSError, match="device lost"):
            model(**given)
        with pytest.raises(RuntimeError, match="no forward pass has been measured"):
            reg.penalty()
        broken, reg.passes = False, 7
        model(**given)
        after = reg.measurements
        reg.passes = 7
        model(**given)
        assert torch.equal(after.traces, reg.measurements.traces)
        assert torch.equal(after.step_norms, reg.measurements.step_norms)


def test_skipped_layers_are_noticed() -> None:
    """A pass that skips a step has no penalty."""
    model = families.build("llama")
    with ofa.fused_regularizers(model):
        del model.model.layers[2]
        model.config.num_hidden_layers = 2
        with pytest.raises(RuntimeError, match="went through 4 of 6 steps"):
            model(**families.inputs("llama"))


def test_two_zero_weights_cost_nothing() -> None:
    """Both weights 0: no hooks, a zero penalty, also without a forward pass."""
    model = families.build("llama")
    with ofa.fused_regularizers(model, 0.0, 0.0) as reg:
        assert not any(hooks_of(model).values())
        assert float(reg.penalty()) == 0.0


@pytest.mark.parametrize("weights", [(2.0, 0.0), (0.0, 3.0), (2.0, 3.0)])
def test_a_term_of_weight_zero_is_not_measured(weights: tuple[float, float]) -> None:
    """A term of weight 0 is not measured, and the penalty is λ₁J + λ₂H."""
    model = families.build("llama")
    with ofa.fused_regularizers(model, *weights) as reg:
        model(**families.inputs("llama"))
        measured, penalty = reg.measurements, reg.penalty()
    lengths = (measured.step_norms, measured.ratios, measured.step_ratio)
    traces = (measured.traces, measured.sharpness)
    for weight, fields in zip(weights, (lengths, traces), strict=True):
        assert all((field is not None) == (weight > 0) for field in fields)
    terms = (measured.step_ratio, measured.sharpness)
    torch.testing.assert_close(penalty, sum(w * term for w, term in zip(weights, terms, strict=True) if w))


@pytest.mark.parametrize("as_tuple", [False, True], ids=["output", "tuple"])
def test_into_loss_adds_the_penalty(as_tuple: bool) -> None:
    """`into_loss=True` adds exactly penalty() to the model's own loss, also as the first item of a tuple."""
    model, given = families.build("llama"), families.inputs("llama")
    plain = model(**given).loss
    with ofa.fused_regularizers(model, 1.0, 1.0, into_loss=True) as reg:
        output = model(**given, return_dict=not as_tuple)
        loss = output[0] if as_tuple else output.loss
        # The task loss in a wider batch differs by some roundings of 2⁻²⁴.
        torch.testing.assert_close(loss, plain + reg.penalty(), rtol=1e-5, atol=0)
        assert output[0] is loss
        loss.backward()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_shares_of_micro_batches_add_up_to_one(name: str) -> None:
    """With Trainer's `num_items_in_batch`, counted as Trainer counts, the penalty weighs 1 per optimizer step."""
    model, given = families.build(name), families.inputs(name, sequences=3)
    if name != "bert":
        given["labels"] = given["labels"].clone()
        given["labels"][0, :4] = -100
        given["labels"][1, 5:] = -100
    parts = [{key: value[rows] for key, value in given.items()} for rows in (slice(0, 1), slice(1, 3))]
    items = _items_as_trainer_counts(model, given["labels"])
    shares = []
    with ofa.fused_regularizers(model, 1.0, 1.0, into_loss=True) as reg:
        for part in parts:
            loss = model(**part, num_items_in_batch=items).loss
            with torch.no_grad():
                plain = model(**part, num_items_in_batch=items).loss
            shares.append(float((loss - plain) / reg.penalty()))
    # A difference of losses in float32: some roundings of 2⁻²⁴ of a loss some ten times the penalty's share.
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert min(shares) > 0.05


def _items_as_trainer_counts(model: nn.Module, labels: Tensor) -> Tensor:
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(model=model, args=TrainingArguments(output_dir="unused", report_to=[], use_cpu=DEVICE == "cpu"))
    return trainer._get_num_items_in_batch([{"labels": labels}], torch.device(DEVICE))


def test_shifted_labels_are_counted_as_they_are() -> None:
    """`shift_labels` of padding-free collators decide the share if given."""
    model, given = families.build("llama"), families.inputs("llama")
    shifted = torch.full_like(given["labels"], -100)
    shifted[:, :3] = given["labels"][:, 1:4]
    with ofa.fused_regularizers(model, 1.0, 1.0, into_loss=True) as reg:
        loss = model(**given, shift_labels=shifted, num_items_in_batch=12).loss
        with torch.no_grad():
            plain = model(**given, shift_labels=shifted, num_items_in_batch=12).loss
        torch.testing.assert_close(loss - plain, reg.penalty() / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("items", [0, torch.tensor(0, device=DEVICE)], ids=["number", "tensor"])
def test_a_step_without_labels_changes_nothing(items: Any) -> None:
    """All answers may be truncated: a share of 0/0 would make every scale NaN."""
    model, given = traces.built("llama"), families.inputs("llama")
    given["labels"] = torch.full_like(given["labels"], -100)
    with ofa.fused_regularizers(model, 1.0, 1.0, into_loss=True):
        loss = model(**given, num_items_in_batch=items).loss
        assert not any(gradient.any() for gradient in gradients(model, loss))


def test_into_loss_without_a_loss_is_refused() -> None:
    """Without the model's loss (label smoothing, compute_loss_func), training would silently lack the penalty."""
    model = families.build("llama")
    with (
        ofa.fused_regularizers(model, into_loss=True),
        pytest.raises(InputError, match=r"computes its own loss.*add reg\.penalty"),
    ):
        model(families.inputs("llama")["input_ids"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_is_refused_or_switched_off(name: str) -> None:
    """Cached tokens have no rows to measure: an explicit cache is refused, a default one is switched off."""
    from transformers import DynamicCache

    model, given = families.build(name), families.inputs(name)
    with ofa.fused_regularizers(model) as reg:
        assert model(**given).past_key_values is None
        for asked in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
            with pytest.raises(InputError, match="cannot use a key-value cache"):
                model(**given, **asked)
            with pytest.raises(RuntimeError, match="no forward pass has been measured"):
                reg.penalty()
        with torch.no_grad():
            assert model(**given).past_key_values is not None
            assert model(**given, use_cache=True).past_key_values is not None


def test_active_dropout_is_refused_where_it_matters() -> None:
    """Dropout is larger than finite differences: refused with the trace; step ratio, eval mode and rate 0 are fine."""
    model, given = families.build("gpt2").train(), families.inputs("gpt2")
    with ofa.fused_regularizers(model) as reg:
        with pytest.raises(InputError, match=r"dropout is active in transformer\.drop"):
            model(**given)
        model.eval()
        model(**given)
        assert reg.penalty().isfinite()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**given)
    model.transformer.drop.p = 0.1
    with ofa.fused_regularizers(model, sharpness=0.0) as reg:
        model(**given)
        assert reg.penalty().isfinite()


def test_dropout_kept_as_a_number_is_noticed() -> None:
    """Llama's attention calls F.dropout with the module's rate."""
    model = families.build("llama").train()
    model.model.layers[2].self_attn.attention_dropout = 0.1
    with ofa.fused_regularizers(model), pytest.raises(InputError, match=r"layers\.2\.self_attn"):
        model(**families.inputs("llama"))


def test_the_signature_has_the_defaults_of_the_options() -> None:
    """The two are written out; the command line and the training settings have theirs from the second."""
    signature = inspect.signature(ofa.fused_regularizers).parameters
    fields = {name: field.default for name, field in RegularizerOptions.model_fields.items()}
    assert {name: parameter.default for name, parameter in signature.items() if name in fields} == fields
    assert signature.keys() - fields == {"model", "into_loss", "fuse"}


@pytest.mark.parametrize(("name", "known"), [("probe", PROBES), ("granularity", anatomy.GRANULARITIES)])
def test_the_options_know_what_lower_floors_do(name: str, known: tuple[str, ...]) -> None:
    assert get_args(RegularizerOptions.model_fields[name].annotation) == known


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"estimator": "exactly"}, "estimator must be 'auto', 'exact' or 'hutchinson', not 'exactly'"),
        ({"probe": "uniform"}, "probe must be 'rademacher' or 'gaussian', not 'uniform'"),
        ({"convention": "paper"}, "convention must be 'theory' or 'algorithm1', not 'paper'"),
        ({"tokens": "first"}, "tokens must be 'no-sinks', 'all' or 'last', not 'first'"),
        ({"granularity": "token"}, "granularity must be 'sublayer' or 'layer', not 'token'"),
        ({"step_ratio": -1.0}, "step_ratio must be greater than or equal to 0, not -1.0"),
        ({"sharpness": float("nan")}, "sharpness must be a finite number, not nan"),
        ({"sharpness": "auto"}, "sharpness='auto' weighs the term against a training run's loss"),
        ({"sharpness": float("inf")}, "sharpness must be a finite number, not inf"),
        ({"samples": 0}, "samples must be greater than or equal to 1, not 0"),
        ({"gradient": "half"}, "gradient must be 'preconditioner' or 'full', not 'half'"),
        ({"radial": "some"}, "radial must be 'channels', 'exact' or 'none', not 'some'"),
        ({"every": 0}, "every must be greater than or equal to 1, not 0"),
        ({"every": 2, "gradient": "full"}, "every > 1 reuses a measured gradient, and"),
        ({"epsilon": 0.0}, "epsilon must be greater than 0, not 0.0"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_in_a_sentence(option: dict[str, Any], message: str) -> None:
    """One sentence names the option and its allowed values; nothing stays attached."""
    model = families.build("llama")
    with pytest.raises(InputError) as error:
        ofa.fused_regularizers(model, **option)
    assert str(error.value).startswith(message)
    assert not any(hooks_of(model).values())
    ofa.fused_regularizers(model).close()


@pytest.mark.parametrize("tokens", ["no-sinks", "all", "last"])
@pytest.mark.parametrize("kind", traces.EVERY)
def test_rows_that_are_all_padding_do_not_count(kind: str, tokens: str) -> None:
    """A batch filled up to a fixed size has the penalty and the gradient of its real rows."""
    model = traces.frozen("llama")
    ids = oracle.batch("llama")["input_ids"][:1]
    dummies = torch.full((3, ids.shape[1]), 3, device=DEVICE)
    filled = {"input_ids": torch.cat([ids, dummies]), "attention_mask": torch.cat([torch.ones_like(ids), 0 * dummies])}
    found = []
    for given in ({"input_ids": ids}, filled):
        with oracle.Float64(), ofa.fused_regularizers(model, 1.0, 1.0, tokens=tokens, **traces.EVERY[kind]) as reg:
            loss = model(**given).logits[0].square().mean() + reg.penalty()
            found.append([loss.detach(), *gradients(model, loss)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, **traces.DENSE)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    """A mask that includes cached tokens is longer than the stream."""
    model, given = families.build("vit"), families.inputs("vit")
    model.forward = _with_mask(model.forward)
    with ofa.fused_regularizers(model), pytest.raises(InputError, match=r"shape \(2, 3\) but the hidden states"):
        model(**given, attention_mask=torch.ones(2, 3, device=DEVICE))


def _with_mask(forward: Any) -> Any:
    def accepting(pixel_values: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        return forward(pixel_values, labels=labels)

    return accepting


def test_the_seed_decides_the_probes_and_each_pass_has_its_own() -> None:
    """The same seed gives the same numbers; another seed or pass gives others."""
    model, given = families.build("llama"), families.inputs("llama")

    def traces(seed: int) -> Tensor:
        with ofa.fused_regularizers(model, estimator="hutchinson", seed=seed) as reg, torch.no_grad(), reg.measuring():
            measured = []
            for _ in range(2):
                model(**given)
                measured.append(reg.measurements.traces)
            return torch.stack(measured)

    first = traces(0)
    assert torch.equal(first, traces(0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, traces(1))
    assert not torch.equal(first, traces(-1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "olmo2", "bert"])
def test_a_bfloat16_model_trains(name: str) -> None:
    """Tuned float32 scales in a bfloat16 model: finite penalty, gradients in float32 for every scale of a step."""
    model = families.build(name).to(torch.bfloat16)
    tuned = ofa.tune_norms(model)
    with ofa.fused_regularizers(model, 1.0, 1.0) as reg:
        (model(**families.inputs(name)).loss + reg.penalty()).backward()
        assert reg.penalty().dtype == torch.float32
    for scale in tuned:
        assert scale.grad.dtype == torch.float32
        assert scale.grad.isfinite().all()
