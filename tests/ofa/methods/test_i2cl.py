"""Context vectors are branch outputs, mixed into every token by coefficients; only these are trained."""

from __future__ import annotations

import signal

import pytest
import torch

from ofa import anatomy
from ofa.errors import InputError
from ofa.evaluation.scorer import Scorer
from ofa.methods.i2cl import NOISE, Mixture, context_vectors, fit
from ofa.models.introspection import evaluating
from ofa.tasks.task import Example
from ofa.training.loop import Diverged, Interrupted
from tests import families
from tests.cases import CAUSAL, POST_NORM
from tests.device import DEVICE
from tests.ofa.given_back import at_step_2, restored, state
from tests.ofa.label_models import ROUNDING, TASK, sharpened

SHOTS = (Example("a warm and funny film", "positive"), Example("dull, slow and far too long", "negative"))
OTHERS = (Example("never drags", "positive"), Example("far too long", "negative"), Example("warm", "positive"))
TEXTS = ["a warm film", "dull", "slow and far too long, but it never drags after the first hour"]


@pytest.fixture
def llama(tiny_model):
    model, tokenizer = tiny_model
    return sharpened(model), tokenizer


@torch.no_grad()
def llama_by_hand(model, ids, change=lambda index, out: out):
    """(branch outputs, logits (T, V)), every branch called by itself; `change(index, output)` is what is added."""
    decoder, total = model.model, len(ids)
    hidden = decoder.embed_tokens(torch.tensor([ids], device=DEVICE))
    rotation = decoder.rotary_emb(hidden, torch.arange(total, device=DEVICE)[None])
    mask = hidden.new_full((1, 1, total, total), -1e9).triu(1)
    outputs = []
    for layer in decoder.layers:
        for norm, branch in ((layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)):
            told = {"position_embeddings": rotation, "attention_mask": mask} if branch is layer.self_attn else {}
            out = branch(norm(hidden), **told)
            out = out[0] if isinstance(out, tuple) else out
            hidden = hidden + change(len(outputs), out)
            outputs.append(out)
    return outputs, model.lm_head(decoder.norm(hidden))[0]


@torch.no_grad()
def neox_by_hand(model, ids, change=lambda index, out: out):
    """The same for GPT-NeoX, whose two branches read one stream."""
    decoder, total = model.gpt_neox, len(ids)
    hidden = decoder.embed_in(torch.tensor([ids], device=DEVICE))
    rotation = decoder.rotary_emb(hidden, torch.arange(total, device=DEVICE)[None])
    mask = hidden.new_full((1, 1, total, total), -1e9).triu(1)
    outputs = []
    for layer in decoder.layers:
        attended = layer.attention(layer.input_layernorm(hidden), attention_mask=mask, position_embeddings=rotation)[0]
        own = [attended, layer.mlp(layer.post_attention_layernorm(hidden))]
        hidden = hidden + sum(change(len(outputs) + i, out) for i, out in enumerate(own))
        outputs.extend(own)
    return outputs, model.get_output_embeddings()(decoder.final_layer_norm(hidden))[0]


def vectors_by_hand(model, tokenizer, examples):
    """Each demonstration alone with its line end, its last token, averaged."""
    rows = []
    for example in examples:
        ids = tokenizer(TASK.demonstration(example))["input_ids"]
        rows.append(torch.stack([out[0, -1] for out in llama_by_hand(model, ids)[0]]))
    return torch.stack(rows).mean(0)


def scores_by_hand(model, tokenizer, vectors, coefficients):
    """Label scores, one text at a time, with β·out + λ·v at every position."""
    words = [tokenizer(f"a {label}")["input_ids"][1] for label in TASK.labels]
    rows = []
    for text in TEXTS:
        ids = tokenizer(TASK.prompt(text))["input_ids"]
        mixed = llama_by_hand(model, ids, lambda i, out: coefficients[i, 1] * out + coefficients[i, 0] * vectors[i])
        rows.append(mixed[1][-1, words])
    return torch.stack(rows).log_softmax(1).float().cpu()


def some_coefficients(branches, seed=3):
    """λ around 0.3, β around 1, all different; (branches, 2)."""
    drawn = torch.rand(branches, 2, generator=torch.Generator().manual_seed(seed))
    return drawn * 0.2 + torch.tensor([0.2, 0.9])


def mixed_by(model, vectors, coefficients):
    """A mixture with these coefficients, λ and β of every branch."""
    mixture = Mixture(model, vectors)
    with mixture.calibrating(0) as own, torch.no_grad():
        own["lambda"].copy_(coefficients[:, 0])
        own["beta"].copy_(coefficients[:, 1])
    return mixture


NEUTRAL = torch.tensor([0.0, 1.0]).expand(6, 2)
"""Coefficients that change nothing."""


# Vectors and mixtures


def test_vectors_are_the_mean_branch_outputs_after_each_demonstration(llama):
    model, tokenizer = llama
    own = context_vectors(model, Scorer(model, tokenizer, TASK).encoder, SHOTS)
    torch.testing.assert_close(torch.stack(own), vectors_by_hand(model, tokenizer, SHOTS))


def test_scores_are_those_of_a_mixture_by_hand(llama):
    """Every branch, every position, in batches with padding."""
    model, tokenizer = llama
    scorer, coefficients = Scorer(model, tokenizer, TASK), some_coefficients(6)
    plain = scorer.log_probabilities(TEXTS)
    mixture = mixed_by(model, context_vectors(model, scorer.encoder, SHOTS), coefficients)
    assert torch.equal(mixture.coefficients, coefficients)
    mixture.attach()
    scores = scorer.log_probabilities(TEXTS)
    mixture.detach()
    vectors = vectors_by_hand(model, tokenizer, SHOTS)
    expected = scores_by_hand(model, tokenizer, vectors, coefficients)
    torch.testing.assert_close(scores, expected, atol=ROUNDING, rtol=0)
    assert (scores - plain).abs().min() > 0.001


def test_parallel_branches_are_mixed_one_by_one():
    """GPT-NeoX; oracle: a loop by hand. Float64, so that the order of the sum changes nothing above 1e-12."""
    model = families.build("gpt_neox").double()
    ids = [5, 9, 17, 33, 8]
    vectors = [out[0, -1] for out in neox_by_hand(model, [7, 3, 40])[0]]
    coefficients = some_coefficients(6)
    mixture = mixed_by(model, vectors, coefficients)
    mixture.attach()
    with evaluating(model):
        actual = model(input_ids=torch.tensor([ids], device=DEVICE)).logits[0]
    mixture.detach()
    mixed = neox_by_hand(model, ids, lambda i, out: coefficients[i, 1] * out + coefficients[i, 0] * vectors[i])[1]
    torch.testing.assert_close(actual, mixed, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in POST_NORM])
def test_lambda_0_and_beta_1_change_nothing_in_any_wiring(name):
    """Bit-identical in every wiring, because 1·out + 0·v is not rounded; all 4L coefficients have a gradient."""
    model = families.build(name)
    inputs = {key: value for key, value in families.inputs(name).items() if key == "input_ids"}
    branches = sum(len(step.branches) for step in anatomy.find(model).steps())
    assert branches == 6
    vectors = list(torch.randn(branches, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    mixture = mixed_by(model, vectors, NEUTRAL)
    expected = model(**inputs).logits
    mixture.attach()
    assert torch.equal(model(**inputs).logits, expected)
    with mixture.calibrating(5) as coefficients:
        model(**inputs).logits.square().sum().backward()
        assert all((parameter.grad != 0).all() for parameter in coefficients.values())
    mixture.detach()
    assert torch.equal(model(**inputs).logits, expected)


# Calibration


def coefficients_of(predictor):
    """λ and β (2L, 2) from the notes."""
    return torch.tensor([predictor.notes["lambda"], predictor.notes["beta"]]).T


def test_noise_has_its_defined_size_and_only_while_calibrating(llama):
    """0.001 of each token's norm per channel, by the seed; none without gradients or after calibration."""
    model, tokenizer = llama
    vectors = context_vectors(model, Scorer(model, tokenizer, TASK).encoder, SHOTS)
    mixture = mixed_by(model, vectors, NEUTRAL)
    branch = model.model.layers[1].mlp
    hidden = torch.randn(4, 500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out = branch(hidden).detach()
    mixture.attach()

    def noise(seed):
        with mixture.calibrating(seed):
            return (branch(hidden) - out).detach() / out.norm(dim=-1, keepdim=True)

    first = noise(5)
    # 128,000 draws: mean and deviation are known to 1/√128000 = 0.28 %, so that 2 % is seven standard errors.
    assert first.std().item() == pytest.approx(NOISE, rel=0.02)
    assert abs(first.mean().item()) < 0.02 * NOISE
    assert torch.equal(noise(5), first)
    assert not torch.equal(noise(6), first)
    with mixture.calibrating(5), torch.no_grad():
        assert torch.equal(branch(hidden), out)
    assert torch.equal(branch(hidden), out)
    mixture.detach()


def test_the_norm_of_the_noise_carries_no_gradient(llama):
    """∂/∂β of the sum of β·out + noise is the sum of out, whatever the noise."""
    model, tokenizer = llama
    mixture = mixed_by(model, context_vectors(model, Scorer(model, tokenizer, TASK).encoder, SHOTS), NEUTRAL)
    branch = model.model.layers[0].mlp
    hidden = torch.randn(2, 5, 64, dtype=torch.float64).to(DEVICE).requires_grad_()
    (expected,) = torch.autograd.grad(branch(hidden).sum(), hidden)
    mixture.attach()
    with mixture.calibrating(5):
        (actual,) = torch.autograd.grad(branch(hidden).sum(), hidden)
    mixture.detach()
    torch.testing.assert_close(actual, expected)


def test_calibration_trains_the_coefficients_and_nothing_else(llama):
    """From λ = 0.1 and β = 1; the predictions afterwards equal the mixture by hand."""
    model, tokenizer = llama
    vectors = vectors_by_hand(model, tokenizer, SHOTS)
    parameters = [parameter.clone() for parameter in model.parameters()]
    with fit(model, tokenizer, TASK, SHOTS, 5, epochs=25) as predictor:
        coefficients, records = coefficients_of(predictor), predictor.training.records
        scores = predictor.scorer.log_probabilities(TEXTS)
        assert predictor.trainable_parameters == 12
        assert predictor.contexts == ("prompt",)
        assert predictor.stored_bytes == 12 * 4 + 6 * 64 * 8
        assert all(torch.equal(old, new) for old, new in zip(parameters, model.parameters(), strict=True))
    assert records[-1].loss < records[0].loss
    # 25 steps of at most 0.01 bound the distance from the start; every coefficient has moved.
    moved = (coefficients - torch.tensor([0.1, 1.0])).abs()
    assert moved.min() > 0
    assert moved.max() < 0.25
    expected = scores_by_hand(model, tokenizer, vectors, coefficients)
    torch.testing.assert_close(scores, expected, atol=ROUNDING, rtol=0)


def test_the_settings_are_the_methods_own(llama):
    """100 epochs in batches of 2, a rate of 0.01 (warmed up over 5 % of the steps); the caller's replace them."""
    model, tokenizer = llama
    for options, total, peak in (({}, 200, 0.01), ({"epochs": 20, "learning_rate": 0.1, "batch_size": 4}, 20, 0.1)):
        first = []

        def stop(record, total, seen=first):
            seen.append((total, record.learning_rate))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fit(model, tokenizer, TASK, [*SHOTS, *OTHERS[:2]], 5, progress=stop, **options)
        assert first == [(total, pytest.approx(peak / (0.05 * total)))]


def test_the_seed_fixes_the_coefficients_despite_other_draws(llama):
    """Noise has a generator of its own, independent of the caller's draws."""
    model, tokenizer = llama

    def coefficients(seed, progress=None):
        with fit(model, tokenizer, TASK, SHOTS, seed, epochs=3, batch_size=1, progress=progress) as predictor:
            return coefficients_of(predictor)

    first = coefficients(5)
    assert torch.equal(coefficients(5, lambda record, total: torch.rand(3)), first)
    assert not torch.equal(coefficients(6), first)


def test_validation_keeps_the_best_epoch(llama, monkeypatch):
    """The second, by its accuracy; validation has no noise."""
    model, tokenizer = llama
    seen, accuracies = [], iter((0.5, 0.75, 0.75, 0.25))

    def accuracy(scorer, examples):
        seen.append(scorer.log_probabilities(TEXTS))
        assert torch.equal(scorer.log_probabilities(TEXTS), seen[-1])
        return next(accuracies)

    monkeypatch.setattr(Scorer, "accuracy", accuracy)
    with fit(model, tokenizer, TASK, SHOTS, 5, epochs=4, validation=SHOTS) as predictor:
        assert predictor.training.best_epoch == 2
        assert torch.equal(predictor.scorer.log_probabilities(TEXTS), seen[1])


# Refusals, and restoring the model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_ratio": 0.1}, "i2cl means step_ratio=0.0"),
        ({"epochs": 0}, "epochs must be"),
        ({"depth": 3}, "setting depth"),
    ],
)
def test_wrong_settings_are_refused(llama, options, message):
    with pytest.raises(InputError, match=message):
        fit(*llama, TASK, SHOTS, 5, **options)


def test_demonstrations_that_do_not_fit_the_window_are_left_out(llama):
    model, tokenizer = llama
    encoder = Scorer(model, tokenizer, TASK).encoder
    huge = Example("warm " * 400, "positive")
    own = context_vectors(model, encoder, [huge, *SHOTS])
    torch.testing.assert_close(torch.stack(own), vectors_by_hand(model, tokenizer, SHOTS))
    for examples in ((), [huge]):
        with pytest.raises(InputError, match="no demonstration fits"):
            fit(model, tokenizer, TASK, examples, 5)


@pytest.fixture
def unchanged(llama):
    yield from restored(*llama)


def test_the_model_has_only_hooks_until_closed(unchanged):
    model, tokenizer = unchanged
    before = state(model)
    predictor = fit(model, tokenizer, TASK, SHOTS, 5, epochs=2)
    fitted = state(model)
    assert sum(map(sum, fitted.pop("hooks"))) == sum(map(sum, before.pop("hooks"))) + 6
    assert fitted == before
    predictor.close()
    predictor.close()


BREAKS = {
    "an exception of the caller": (ZeroDivisionError, at_step_2(lambda: 1 // 0)),
    "Ctrl-C": (Interrupted, at_step_2(lambda: signal.raise_signal(signal.SIGINT))),
    "divergence": (Diverged, {"learning_rate": 1e30}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_fit_that_fails_leaves_the_model_as_it_was(unchanged, name):
    error, options = BREAKS[name]
    with pytest.raises(error):
        fit(*unchanged, TASK, SHOTS, 5, **{"epochs": 4, **options})


def test_a_fit_that_fails_at_the_vectors_leaves_the_model_as_it_was(unchanged):
    model, tokenizer = unchanged
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        fit(model, tokenizer, TASK, SHOTS, 5)
    handle.remove()
