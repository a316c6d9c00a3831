"""LoRA is W + (α/r) B A on the query and value projections only."""

from __future__ import annotations

import pytest
import torch

from ofa.anatomy.projections import find_projections
from ofa.errors import InputError
from ofa.methods import lora, method
from tests import families, oracle
from tests.device import DEVICE
from tests.ofa.given_back import SHOTS, TASK
from tests.ofa.methods.grown import with_vocabulary_of

IDS = torch.tensor([[5, 9, 40, 33, 21, 8]], device=DEVICE)
TRAINING = {"epochs": 2, "batch_size": 4, "learning_rate": 0.05}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


SEPARATE = ("self_attn.q_proj", "self_attn.v_proj")


@pytest.mark.parametrize(
    ("family", "targets", "rank", "alpha"),
    [
        ("llama", SEPARATE, 8, 16.0),
        ("llama", SEPARATE, 1, 16.0),
        ("llama", SEPARATE, 3, 6),
        ("gptj", ("attn.q_proj", "attn.v_proj"), 8, 16.0),
        ("phi", SEPARATE, 8, 16.0),
        ("gpt2", ("attn.c_attn",), 8, 16.0),
        ("gpt_neox", ("attention.query_key_value",), 8, 16.0),
        ("phi3", ("self_attn.qkv_proj",), 8, 16.0),
    ],
)
def test_the_logits_are_those_of_weights_changed_by_hand(tiny_model, family, targets, rank, alpha):
    """GPT-2 keeps W transposed; a fused projection gets one A and B. Float64, so that only rounding differs."""
    model = with_vocabulary_of(tiny_model[1], families.build(family))
    model.double()
    base = logits(model)
    with lora.fit(model, tiny_model[1], TASK, SHOTS, 5, rank=rank, alpha=alpha, **TRAINING):
        adapted = logits(model)
        tuned = {path: value.detach().clone() for path, value in model.named_parameters() if value.requires_grad}
    assert not torch.allclose(adapted, base, rtol=1e-3)
    paths = sorted({path.partition(".lora_")[0] for path in tuned})
    assert [path.split(".")[-2:] for path in paths] == [target.split(".") for _ in range(3) for target in targets]
    for path in paths:
        A, B = (tuned.pop(f"{path}.lora_{name}.default.weight") for name in "AB")
        assert A.shape[0] == B.shape[1] == rank
        change = alpha / rank * B @ A
        weight = model.get_submodule(path).weight
        weight.data += change.T if family == "gpt2" else change
    assert not tuned
    torch.testing.assert_close(logits(model), adapted, rtol=1e-9, atol=1e-11)


def test_the_first_loss_is_the_base_model_s(tiny_model):
    """B is initially 0."""
    model, tokenizer = tiny_model
    first = {}
    for name in ("lora", "norm-tuning"):
        with method(name)(model, tokenizer, TASK, SHOTS, 5, **TRAINING) as predictor:
            first[name] = predictor.training.records[0].loss
    # The same sums, in float32, with zeros added to some.
    assert first["lora"] == pytest.approx(first["norm-tuning"], rel=1e-6)


@pytest.mark.parametrize("rank", [1, 8])
def test_the_number_of_parameters_follows_from_the_rank(tiny_model, rank):
    """r·(inputs + outputs) of q (64 → 64) and v (64 → 32) in three layers, four bytes each."""
    with lora.fit(*tiny_model, TASK, SHOTS, 5, rank=rank, epochs=1) as predictor:
        assert predictor.trainable_parameters == 3 * rank * (64 + 64 + 64 + 32)
        assert predictor.stored_bytes == 4 * predictor.trainable_parameters
        assert predictor.notes == {"rank": rank, "alpha": 16.0, "adapted": ["q_proj", "v_proj"]}


def test_lora_r1_is_lora_of_rank_1(tiny_model):
    """Bit-identical; any other rank is refused."""
    losses = []
    for name, options in (("lora", {"rank": 1}), ("lora-r1", {}), ("lora-r1", {"rank": 1})):
        with method(name)(*tiny_model, TASK, SHOTS, 5, **options, **TRAINING) as predictor:
            losses.append([record.loss for record in predictor.training.records])
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(InputError, match="lora-r1 means rank=1, not 4"):
        method("lora-r1")(*tiny_model, TASK, SHOTS, 5, rank=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "the rank of LoRA is 0"),
        ({"rank": 2.5}, "the rank of LoRA is 2.5"),
        ({"rank": "8"}, "the rank of LoRA is '8'"),
        ({"alpha": 0}, "the alpha of LoRA is 0"),
        ({"alpha": "16"}, "the alpha of LoRA is '16'"),
    ],
)
def test_an_invalid_rank_or_alpha_is_refused(tiny_model, options, message):
    with pytest.raises(InputError, match=message):
        lora.fit(*tiny_model, TASK, SHOTS, 5, **options)


@pytest.mark.parametrize("name", [name for name in families.BUILDERS if name not in ("bert", "vit", "phi")])
def test_the_projections_are_those_of_pefts_mapping_where_it_has_one(name):
    """Except for phi, where PEFT's row also has the MLP; this LoRA is of q and v only."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MAPPING

    model = families.build(name)
    found = find_projections(model)
    own = {path.rpartition(".")[2] for path in (*found.query, *found.value)}
    unknown = {"smollm3", "granite", "phi3", "olmo2", "cohere", "qwen3_moe", "gpt_oss"}
    assert (model.config.model_type not in MAPPING) == (name in unknown)
    assert own == set(MAPPING.get(model.config.model_type, own))
    assert len(found.query) == len(found.value) == 3
    assert len(found.down) == (0 if name in oracle.EXPERTS else 3)
