"""`probe` agrees, layer by layer, with the Scorer, the regularizers and calculations by hand."""

from __future__ import annotations

import pytest
import torch

from ofa import fused_regularizers
from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder, collate, scores_whole_words
from ofa.evaluation.scorer import Scorer
from ofa.probing.layerwise import probe
from ofa.probing.linear_probe import linear_probe
from ofa.tasks.task import Example, Task
from tests.device import DEVICE
from tests.ofa.anatomy.test_steps import _renamed_attention
from tests.ofa.given_back import restored

TASK = Task("mood", "Review: {text}\nSentiment:", ("negative", "positive"))
WHOLE = Task("number", "Question: {text}\nAnswer Type:", ("Number", "Numb", "Person"))
SHOTS = (
    Example("a warm and funny film", "positive"),
    Example("dull, slow and far too long", "negative"),
    Example("never drags", "positive"),
    Example("far too long", "negative"),
)
EXAMPLES = (
    Example("a film that drags", "negative"),
    Example("warm", "positive"),
    Example("slow and dull and funny but warm", "negative"),
)
QUESTIONS = (Example("how many islands are there?", "Number"), Example("who wrote it?", "Person"))


@pytest.fixture
def unchanged(tiny_model):
    yield from restored(*tiny_model)


def encoded(tokenizer, task=TASK, examples=EXAMPLES):
    encoder = Encoder(tokenizer, task, None)
    ids, mask = collate(encoder.encode_prompts([example.text for example in examples]), encoder.pad_id)
    return ids.to(DEVICE), mask.to(DEVICE)


# The logit lens


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("demonstrations", [(), SHOTS], ids=["prompt", "demonstrations"])
@pytest.mark.parametrize(
    ("task", "examples"), [(TASK, EXAMPLES), (WHOLE, QUESTIONS)], ids=["first token", "whole word"]
)
def test_the_lens_after_the_last_layer_equals_the_scorer(unchanged, task, examples, demonstrations, batch_size):
    """Accuracy, loss and every probability, also by whole words, with demonstrations and in other batches.

    Tolerance: the Scorer shares the key-value cache of prompts and demonstrations, the lens reads them whole.
    """
    model, tokenizer = unchanged
    shown = demonstrations if task is TASK else QUESTIONS[: len(demonstrations)]
    measured = probe(model, tokenizer, task, examples, demonstrations=shown, batch_size=batch_size)
    scorer = Scorer(model, tokenizer, task, demonstrations=shown)
    expected = scorer.log_probabilities([example.text for example in examples])
    torch.testing.assert_close(measured.lens.log_probabilities[-1], expected, rtol=1e-5, atol=1e-5)
    truth = torch.tensor([task.labels.index(example.label) for example in examples])
    assert measured.lens.accuracy[-1] == (expected.argmax(1) == truth).float().mean()
    loss = torch.nn.functional.nll_loss(expected, truth)
    assert float(measured.lens.loss[-1]) == pytest.approx(float(loss), rel=1e-5)
    assert measured.mode == scorer.mode


def test_whole_words_differ_from_first_tokens(tiny_model):
    """The two labels of the whole-word task share a token, so that the test above covers whole words."""
    encoder = Encoder(tiny_model[1], WHOLE, None)
    assert scores_whole_words(encoder.labels)
    assert len({word[:-1] for word in encoder.labels.values()}) > 1


@torch.no_grad()
def test_inner_layers_are_read_through_the_final_norm_and_the_head(tiny_model):
    """Oracle: the hidden states that transformers collects, decoded by hand at the labels' first tokens."""
    model, tokenizer = tiny_model
    measured = probe(model, tokenizer, TASK, EXAMPLES).lens.log_probabilities
    ids, mask = encoded(tokenizer)
    firsts = [word[0] for word in Encoder(tokenizer, TASK, None).labels.values()]
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    last = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
    expected = model.lm_head(model.model.norm(last))[:, firsts].log_softmax(1)
    torch.testing.assert_close(measured[0], expected.cpu(), rtol=1e-5, atol=1e-5)


# The linear probe


@torch.no_grad()
def test_the_linear_probe_is_trained_on_the_same_states_of_other_texts(tiny_model):
    model, tokenizer = tiny_model
    measured = probe(model, tokenizer, TASK, EXAMPLES, training=SHOTS, batch_size=2)
    assert measured.linear.log_probabilities.shape == (3, 3, 2)
    states = []
    for examples in (SHOTS, EXAMPLES):
        ids, mask = encoded(tokenizer, examples=examples)
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
        states.append(hidden[torch.arange(len(ids)), mask.sum(1) - 1].cpu())
    expected = linear_probe(states[0], torch.tensor([1, 0, 1, 0]), states[1])
    # Standardizing four texts magnifies float32 roundings of features that hardly vary.
    torch.testing.assert_close(measured.linear.log_probabilities[1], expected, rtol=0, atol=1e-3)


# The steps


@torch.no_grad()
def test_ratios_of_layers_are_those_of_the_hidden_states(tiny_model):
    """‖Z₂ − Z₁‖/‖Z₁ − Z₀‖ over the real tokens of each text, from what transformers collects."""
    model, tokenizer = tiny_model
    steps = probe(model, tokenizer, TASK, EXAMPLES, tokens="all").steps["layer"]
    ids, mask = encoded(tokenizer)
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    lengths = [((hidden[i + 1] - hidden[i]) * mask[..., None]).flatten(1).norm(dim=1) for i in (0, 1)]
    torch.testing.assert_close(steps.norms[:2], torch.stack(lengths).cpu(), rtol=1e-4, atol=0)
    torch.testing.assert_close(steps.ratios[0], (lengths[1] / lengths[0]).cpu(), rtol=1e-4, atol=0)


def test_the_sharpness_of_an_mlp_is_that_of_its_dense_jacobian(tiny_model):
    """h = −Σᵢ tr(J_ii P)/n of the second layer's MLP, whose tokens do not see each other, text by text."""
    model, tokenizer = tiny_model
    steps = probe(model, tokenizer, TASK, EXAMPLES).steps["sublayer"]
    layer = model.model.layers[1]
    norm, index = layer.post_attention_layernorm, 3
    assert (steps.layers[index], steps.branches[index], steps.estimator) == (1, "mlp", "exact")
    for text, example in enumerate(EXAMPLES):
        streams = []
        handle = norm.register_forward_pre_hook(lambda module, args, streams=streams: streams.append(args[0]))
        model(input_ids=encoded(tokenizer, examples=[example])[0])
        handle.remove()
        total = 0.0
        for z in streams[0][0].detach():
            jacobian = torch.autograd.functional.jacobian(lambda row: layer.mlp(norm(row)), z)
            sigma = (z.square().mean() + norm.variance_epsilon).sqrt()
            total += float((jacobian.diagonal() * norm.weight.detach() / sigma).sum())
        # The closed form and the dense Jacobian sum float32 products in other orders.
        assert float(steps.traces[index, text]) == pytest.approx(-total / len(streams[0][0]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "hutchinson", "samples": 3, "convention": "algorithm1", "tokens": "last", "seed": 5},
    ],
    ids=["default", "every option"],
)
def test_both_granularities_are_what_the_regularizers_measure(unchanged, options):
    """With the given options; a whole layer has no closed form, so hutchinson measures it."""
    model, tokenizer = unchanged
    measured = probe(model, tokenizer, TASK, EXAMPLES, **options)
    model.requires_grad_(False)
    model.eval()
    order = sorted(range(len(EXAMPLES)), key=lambda index: -len(encoded(tokenizer)[1][index].nonzero()))
    ids, mask = (part[order] for part in encoded(tokenizer))  # the probe's own batch, for equal random probes
    asked = options.get("estimator", "exact")
    names = {"sublayer": asked, "layer": "hutchinson"}
    for granularity, name in names.items():
        given = {**options, "estimator": name, "granularity": granularity}
        with fused_regularizers(model, 1.0, 1.0, **given) as regularizers, torch.no_grad(), regularizers.measuring():
            model(input_ids=ids, attention_mask=mask)
        steps, expected = measured.steps[granularity], regularizers.measurements
        assert steps.estimator == name
        for mine, theirs in (
            (steps.norms, expected.step_norms),
            (steps.ratios, expected.ratios),
            (steps.traces, expected.traces),
        ):
            assert torch.equal(mine[:, order], theirs.cpu())
        assert steps.step_ratio == pytest.approx(float(expected.step_ratio), rel=1e-6)
        assert steps.sharpness == pytest.approx(float(expected.sharpness), rel=1e-6)
    model.requires_grad_(True)
    model.model.norm.weight.requires_grad_(False)
    model.train()
    model.model.layers[0].eval()


def test_batches_do_not_change_what_is_measured(tiny_model):
    """Values are kept by text, so that a last batch of one counts as one; tolerance: sums over other paddings."""
    whole, parts = (probe(*tiny_model, TASK, EXAMPLES, batch_size=size).steps["sublayer"] for size in (16, 2))
    torch.testing.assert_close(parts.traces, whole.traces, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.ratios, whole.ratios, rtol=1e-4, atol=0)


def test_a_family_without_sublayer_boundaries_has_steps_of_layers(tiny_model):
    """OPT with the norm after the residual sum: one granularity only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    }
    config = AutoConfig.for_model("opt", vocab_size=384, do_layer_norm_before=False, pad_token_id=2, **size)
    measured = probe(AutoModelForCausalLM.from_config(config).eval().to(DEVICE), tiny_model[1], TASK, EXAMPLES)
    assert list(measured.steps) == ["layer"]
    assert measured.lens.accuracy.shape == (2,)


# As curves


def test_values_are_means_over_the_texts_with_their_standard_errors(tiny_model):
    measured = probe(*tiny_model, TASK, EXAMPLES, training=SHOTS)
    values = measured.values()
    counts = {}
    for value in values:
        counts[value.granularity, value.metric] = counts.get((value.granularity, value.metric), 0) + 1
    readouts = dict.fromkeys((("layer", f"{p}_{m}") for p in ("lens", "linear") for m in ("accuracy", "loss")), 3)
    steps = {(g, m): n - (m == "step_ratio") for g, n in (("layer", 3), ("sublayer", 6)) for m in
             ("step_norm", "step_ratio", "trace")}  # fmt: skip
    assert counts == {**readouts, **steps}
    second = next(value for value in values if (value.granularity, value.metric) == ("sublayer", "step_ratio"))
    ratios = measured.steps["sublayer"].ratios[0].double()
    assert (second.step, second.layer, second.branch) == (2, 1, "mlp")
    assert second.value == pytest.approx(float(ratios.mean()), rel=1e-6)
    spread = float(((ratios - ratios.mean()).square().sum() / 2 / 3).sqrt())
    assert second.standard_error == pytest.approx(spread, rel=1e-5)


def test_a_single_text_has_no_standard_error(tiny_model):
    assert {value.standard_error for value in probe(*tiny_model, TASK, EXAMPLES[:1]).values()} == {None}


def test_progress_counts_the_passes_of_all_texts(tiny_model):
    """Two granularities, the lens, and the training texts."""
    told = []
    probe(*tiny_model, TASK, EXAMPLES, training=SHOTS, batch_size=2, progress=lambda *args: told.append(args))
    assert told[-1] == (13, 13)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# Bad input


def test_an_interrupted_probe_leaves_the_model_as_it_was(unchanged):
    """Interrupted during a measured pass, and during the lens."""
    for passes in (1, 7):

        def stop(done, total, passes=passes):
            if done >= passes:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            probe(*unchanged, TASK, EXAMPLES, batch_size=1, progress=stop)


@pytest.mark.parametrize(
    ("task", "examples", "options", "message"),
    [
        (TASK, (), {}, r"task 'mood' has no example to probe with: give at least one"),
        (Task("sums"), EXAMPLES, {}, r"'sums' has no labels.*`ofa evaluate` scores open-ended"),
        (TASK, (Example("warm", "good"),), {}, r"'good' is not a label of task 'mood': use one of negative, positive"),
        (TASK, (Example(" ", "positive"),), {}, r"text 1 of 1 is blank"),
        (TASK, EXAMPLES, {"training": SHOTS[:1]}, r"of the linear probe have none of the label 'negative': give some"),
        (TASK, EXAMPLES, {"estimator": "guess"}, r"estimator must be 'auto', .*not 'guess'"),
        (TASK, EXAMPLES, {"batch_size": 0}, r"batch size is 0: give one of at least 1"),
    ],
    ids=["no examples", "open-ended", "unknown label", "empty text", "label untrained", "estimator", "batch size"],
)
def test_bad_input_is_refused_in_one_sentence(unchanged, task, examples, options, message):
    with pytest.raises(InputError, match=message):
        probe(*unchanged, task, examples, **options)


def test_a_model_whose_steps_are_unknown_is_refused_with_what_still_works(tiny_model):
    model, tokenizer = tiny_model
    for layer in model.model.layers:
        _renamed_attention(layer)
    with pytest.raises(InputError, match=r"not recognized.*no module self_attn.*`ofa evaluate` does not"):
        probe(model, tokenizer, TASK, EXAMPLES)


def test_a_model_that_is_already_regularized_is_refused(tiny_model):
    with fused_regularizers(tiny_model[0]), pytest.raises(InputError, match=r"already has regularizers"):
        probe(*tiny_model, TASK, EXAMPLES)


def test_weights_that_give_no_numbers_are_refused(tiny_model):
    with torch.no_grad():
        tiny_model[0].model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"of layer \d is not a number.*in float32"):
        probe(*tiny_model, TASK, EXAMPLES)
