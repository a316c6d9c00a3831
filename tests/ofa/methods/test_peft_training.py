"""Common behavior of LoRA, IA3 and soft prompt: training, seeds, contexts, families, and restoring the model."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ofa.errors import InputError
from ofa.evaluation.encoding import Encoder
from ofa.evaluation.scorer import Scorer
from ofa.methods import ia3, lora, method, soft_prompt
from ofa.models.introspection import evaluating, trainable
from ofa.tasks.task import Example, Task
from ofa.training.loop import Interrupted
from tests import families
from tests.cases import CAUSAL
from tests.device import DEVICE
from tests.ofa.given_back import SHOTS, TASK, TEXTS, state
from tests.ofa.methods.grown import with_vocabulary_of

METHODS = ("lora", "lora-r1", "ia3", "soft-prompt", "lora-ofa", "ia3-ofa")
WITH_OFA = ("lora-ofa", "ia3-ofa")
LAYER_ADAPTERS = ("lora", "ia3")
QUICK = {"epochs": 2, "batch_size": 2}
LEARNING = {
    name: {"epochs": 8, "batch_size": 4, "learning_rate": rate}
    for name, rate in (
        ("lora", 0.01),
        ("lora-r1", 0.01),
        ("ia3", 0.3),
        ("soft-prompt", 0.1),
        ("lora-ofa", 0.01),
        ("ia3-ofa", 0.03),
    )
}
"""Steps enough, and of a size, that the loss of the tiny model falls from ln 384 by 0.1 nats and more."""
SAME_FIRST_TOKEN = Task(name="mood", template=TASK.template, labels=("positive", "position"))


class Broken(Exception):
    pass


def everything(model):
    """`state`, and what PEFT could leave besides: other modules, other attributes, another configuration."""
    modules = [(path, id(module), sorted(vars(module))) for path, module in model.named_modules()]
    return state(model), modules, model.config.to_dict()


@pytest.fixture
def unchanged(tiny_model):
    """A tiny model with mixed modes and flags; checks that the test restores them."""
    model, tokenizer = tiny_model
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model.config.pretraining_tp = 2
    before = everything(model)
    yield model, tokenizer
    assert everything(model) == before


def trained(loaded, name, seed=5, **options):
    """Trained parameters and records of a method's run; the model is restored."""
    with method(name)(*loaded, TASK, SHOTS, seed, **{**QUICK, **options}) as predictor:
        tuned = trainable(predictor.scorer.model)
        return {path: value.detach().clone() for path, value in tuned.items()}, predictor.training.records


# Training


@pytest.mark.parametrize("name", WITH_OFA)
def test_the_terms_reach_the_scales_beside_an_adapter(unchanged, name):
    """Without them the same scales and adapter are trained, to other values; both terms are in the records."""
    tuned, records = trained(unchanged, name, step_ratio=1e-2)
    plain, _ = trained(unchanged, name, step_ratio=0.0, sharpness=0.0)
    scales = {path for path in tuned if "norm" in path}
    assert len(scales) == 7
    assert tuned.keys() == plain.keys() > scales
    assert all(not torch.equal(tuned[path], plain[path]) for path in scales)
    assert all(record.sharpness > 0 and record.step_ratio > 0 for record in records)


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_learns_its_shots_and_close_brings_the_model_back(unchanged, name):
    """The loss falls; closed (twice), the model scores as before, to the bit."""
    model, tokenizer = unchanged
    base = Scorer(model, tokenizer, TASK).predict_proba(TEXTS)
    predictor = method(name)(model, tokenizer, TASK, SHOTS, 5, **LEARNING[name])
    losses = [record.loss for record in predictor.training.records]
    assert losses[-1] < losses[0] - 0.1
    tuned = trainable(predictor.scorer.model)
    assert predictor.trainable_parameters == sum(parameter.numel() for parameter in tuned.values())
    probabilities = predictor.predict_proba(TEXTS)
    assert not torch.equal(probabilities, base)
    assert torch.equal(predictor.evaluate(SHOTS).probabilities, predictor.predict_proba([shot.text for shot in SHOTS]))
    predictor.close()
    predictor.close()
    assert torch.equal(Scorer(model, tokenizer, TASK).predict_proba(TEXTS), base)


@pytest.mark.parametrize(
    ("name", "rate", "steps"), [("lora", 1e-3, 48), ("lora-r1", 1e-3, 48), ("ia3", 3e-3, 48), ("soft-prompt", 0.1, 50)]
)
def test_each_method_has_the_settings_of_its_source(unchanged, name, rate, steps):
    """Learning rate at the end of the warm-up, and the number of steps: an epoch is one step here."""
    seen = []

    def progress(record, total):
        seen.append((record.learning_rate, total))
        if record.step == 3:  # 5 % of the steps
            raise Broken

    with pytest.raises(Broken):
        method(name)(*unchanged, TASK, SHOTS, 5, progress=progress)
    assert seen[-1] == (pytest.approx(rate), steps)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_fixes_the_parameters_to_the_bit(unchanged, name):
    """In any state of the global generator; another seed gives other parameters."""
    first, records = trained(unchanged, name)
    torch.manual_seed(999)
    torch.rand(7)
    again, own = trained(unchanged, name)
    assert all(torch.equal(again[path], value) for path, value in first.items())
    assert [record.loss for record in own] == [record.loss for record in records]
    other, _ = trained(unchanged, name, seed=6)
    assert any(not torch.equal(other[path], value) for path, value in first.items())


@pytest.mark.parametrize("name", METHODS)
def test_the_global_generator_is_left_as_norm_tuning_leaves_it(unchanged, name):
    """Initial values have a generator of their own; a refused fit draws nothing."""
    trained(unchanged, "norm-tuning")
    expected = torch.get_rng_state()
    trained(unchanged, name)
    assert torch.equal(torch.get_rng_state(), expected)
    with pytest.raises(InputError, match="not one example"):
        method(name)(*unchanged, TASK, (), 6)
    assert torch.equal(torch.get_rng_state(), expected)


def test_validation_keeps_the_epoch_of_the_best_accuracy(unchanged):
    """Validated on its shots with swapped labels, a run that learns is best at an early epoch, not the last."""
    model, tokenizer = unchanged
    exchanged = {"positive": "negative", "negative": "positive"}
    validation = [Example(shot.text, exchanged[shot.label]) for shot in SHOTS]
    accuracies, parameters = [], []

    def progress(record, total):
        accuracies.append(Scorer(model, tokenizer, TASK).accuracy(validation))
        parameters.append({path: value.detach().clone() for path, value in trainable(model).items()})

    tuned, _ = trained(unchanged, "lora", **LEARNING["lora"], validation=validation, progress=progress)
    best = accuracies.index(max(accuracies))
    assert max(accuracies) > accuracies[-1]
    assert all(torch.equal(tuned[path], value) for path, value in parameters[best].items())


# Contexts


@pytest.mark.parametrize("task", [TASK, SAME_FIRST_TOKEN], ids=["first token", "whole word"])
@pytest.mark.parametrize("name", METHODS)
def test_demonstrations_in_context_are_shared_and_change_no_score(unchanged, name, task):
    """The prefix's cache is computed once; the scores are those of whole sequences through the adapted model."""
    model, tokenizer = unchanged
    shots = [Example(shot.text, task.labels[index % 2]) for index, shot in enumerate(SHOTS)]
    with method(name)(model, tokenizer, task, shots, 5, **QUICK, learning_rate=0.1) as predictor:
        assert predictor.contexts == ("prompt", "demonstrations")
        for demonstrations in ((), SHOTS[:1]):
            behind = [Example(shot.text, task.labels[0]) for shot in demonstrations]
            got = predictor.evaluate(shots, demonstrations=behind, batch_size=3).probabilities
            expected = whole_sequence_scores(predictor.scorer.model, tokenizer, task, shots, behind)
            # Sums in another order: a prefix by itself, padding in a batch.
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        ids = predictor.scorer.encoder.encode_demonstrations(shots)
        assert predictor.scorer.shared_prefix(ids).reuses_cache


def whole_sequence_scores(model, tokenizer, task, examples, demonstrations):
    """Label probabilities from one plain pass per label word, the words' tokens being read one after the other."""
    encoder = Encoder(tokenizer, task, 256)
    prefix = encoder.encode_demonstrations(demonstrations)
    rows = []
    for example in examples:
        prompt = [*prefix, *encoder.encode_prompt(example.text, demonstrations=prefix)]
        whole = len({word[0] for word in encoder.labels.values()}) < len(encoder.labels)
        words = [word if whole else word[:1] for word in encoder.labels.values()]
        rows.append(torch.stack([log_likelihood(model, prompt, word) for word in words]))
    return torch.stack(rows).softmax(1).cpu()


def log_likelihood(model, prompt, word):
    ids = torch.tensor([[*prompt, *word]], device=DEVICE)
    with evaluating(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(word) - 1 : -1]
    if len(word) == 1:  # the first token's logit, as the softmax over the labels is all that follows
        return logits[0, word[0]]
    return logits.log_softmax(-1)[range(len(word)), list(word)].sum()


# Models


@pytest.fixture(scope="module")
def family(request, tiny_folder):
    """A model of each causal family, shared by the methods, which must restore it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    return with_vocabulary_of(tokenizer, families.build(request.param)), tokenizer


# A soft prompt changes embeddings only, whose scale and positions differ.
@pytest.mark.parametrize(
    ("family", "module"),
    [
        *((name, module) for name in CAUSAL for module in (lora, ia3)),
        *((name, soft_prompt) for name in ("llama", "gemma2", "granite", "gpt2", "opt", "falcon_alibi", "gpt_oss")),
    ],
    indirect=["family"],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition(".")[2],
)
def test_every_causal_family_is_trained_and_restored(family, module):
    """Other names of projections, fused ones, GPT-2's transposed ones, learned positions, scaled embeddings."""
    model, tokenizer = family
    before = everything(model)
    with module.fit(model, tokenizer, TASK, SHOTS, 5, epochs=2, batch_size=4, learning_rate=0.01) as predictor:
        losses = [record.loss for record in predictor.training.records]
        assert losses[-1] < losses[0]
        with_cache = predictor.evaluate(SHOTS[:2], demonstrations=SHOTS[2:3]).probabilities
        expected = whole_sequence_scores(predictor.scorer.model, tokenizer, TASK, SHOTS[:2], SHOTS[2:3])
        torch.testing.assert_close(with_cache, expected, rtol=1e-4, atol=1e-6)
    assert everything(model) == before


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_reads_no_text_is_refused(tiny_model, name):
    with pytest.raises(InputError, match=r"a \w+Classification is not a causal language model"):
        method(name)(families.build("vit"), tiny_model[1], TASK, SHOTS, 5)


@pytest.mark.parametrize("name", METHODS)
def test_adapters_are_float32_in_a_bfloat16_model(tiny_model, name):
    """A step of 1e-3 would be lost near a bfloat16 1; the model itself stays as it is and the loss falls."""
    model, tokenizer = tiny_model
    model.bfloat16()
    before = everything(model)
    with method(name)(model, tokenizer, TASK, SHOTS, 5, **LEARNING[name]) as predictor:
        tuned = trainable(predictor.scorer.model)
        assert {value.dtype for value in tuned.values()} == {torch.float32}
        assert {value.dtype for value in model.parameters() if not value.requires_grad} == {torch.bfloat16}
        losses = [record.loss for record in predictor.training.records]
        assert losses[-1] < losses[0] - 0.1
    assert everything(model) == before


@pytest.mark.parametrize(("name", "parameters"), [("lora", 3 * 8 * 224), ("ia3", 3 * 192), ("soft-prompt", 64)])
def test_stored_bytes_are_those_of_the_file_that_peft_writes(unchanged, tmp_path, name, parameters):
    """Counts by formula: r·(64 + 64 + 64 + 32) and 32 + 32 + 128 per layer; one vector of 64."""
    from peft import get_peft_model

    model, tokenizer = unchanged
    config = {"lora": lambda model: lora.config_for(model, 8, 16.0), "ia3": ia3.config_for}.get(
        name, soft_prompt.config_for
    )
    with method(name)(model, tokenizer, TASK, SHOTS, 5, **QUICK) as predictor:
        assert predictor.trainable_parameters == parameters
        stored = predictor.stored_bytes
    get_peft_model(copy.deepcopy(model), config(model)).save_pretrained(tmp_path)
    assert stored == sum(tensor.nbytes for tensor in load_file(tmp_path / "adapter_model.safetensors").values())


# Failures


def at_step_2(act):
    def progress(record, total):
        if record.step == 2:
            act()

    return {"progress": progress}


def fail():
    raise Broken


FAILURES = {
    "an exception of the caller": (Broken, at_step_2(fail)),
    "Ctrl-C": (Interrupted, at_step_2(lambda: signal.raise_signal(signal.SIGINT))),
    "a wrong setting": (InputError, {"epochs": 0}),
    "an unknown setting": (InputError, {"norm": True}),
    "an empty text": (InputError, {"validation": [Example(" ", "positive")]}),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", METHODS)
def test_a_fit_that_fails_leaves_the_model_as_it_was(unchanged, name, failure):
    """And it can be fitted again."""
    error, options = FAILURES[failure]
    before = everything(unchanged[0])
    with pytest.raises(error):
        method(name)(*unchanged, TASK, SHOTS, 5, **{**QUICK, **options})
    assert everything(unchanged[0]) == before
    assert trained(unchanged, name, epochs=1)[0]


class Doubling(nn.Module):
    """Nothing that PEFT knows how to adapt."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("name", LAYER_ADAPTERS)
def test_a_module_that_peft_cannot_adapt_is_refused_and_the_others_are_put_back(unchanged, name):
    """It is in the last layer, so that PEFT has replaced those of the first two by then."""
    attention = unchanged[0].model.layers[2].self_attn
    own = attention.v_proj
    attention.v_proj = Doubling(own)
    before = everything(unchanged[0])
    with pytest.raises(InputError, match=r"PEFT cannot adapt this model by (LORA|IA3): .*Doubling"):
        method(name)(*unchanged, TASK, SHOTS, 5)
    assert everything(unchanged[0]) == before
    attention.v_proj = own


@pytest.mark.parametrize("name", LAYER_ADAPTERS)
def test_a_model_without_known_projections_is_refused(unchanged, name):
    layers = unchanged[0].model.layers
    for layer in layers:
        layer.self_attn.queries = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(InputError, match="no projections of an attention were found by name in a LlamaForCausalLM"):
        method(name)(*unchanged, TASK, SHOTS, 5)
    for layer in layers:
        own = {"q_proj": layer.self_attn.queries, **layer.self_attn._modules}
        del own["queries"]
        layer.self_attn._modules = own


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITH_OFA])
@pytest.mark.parametrize("setting", ["sharpness", "estimator"])
def test_settings_of_regularizers_are_refused(unchanged, name, setting):
    """They would be ignored silently."""
    with pytest.raises(InputError, match=f"{setting} is a setting of OFA"):
        method(name)(*unchanged, TASK, SHOTS, 5, **{setting: 1e-3})


def test_relative_steps_without_norm_scales_are_refused(unchanged):
    """A and B have no pretrained size; the message does not ask for a call that the command line has not."""
    with pytest.raises(InputError, match="lora trains none; leave relative out"):
        method("lora")(*unchanged, TASK, SHOTS, 5, relative=True)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("present", ["injected", "wrapped"])
def test_a_model_with_an_adapter_is_refused(tiny_model, name, present):
    """PEFT would stack the adapters, and removing the second would also remove the first."""
    from peft import get_peft_model

    model, tokenizer = tiny_model
    wrapped = get_peft_model(model, lora.config_for(model, 2, 4.0))
    with pytest.raises(InputError, match="already has a PEFT adapter"):
        method(name)(model if present == "injected" else wrapped, tokenizer, TASK, SHOTS, 5)
