"""IA3 scales only keys, values and the MLP's inner activation."""

from __future__ import annotations

import pytest
import torch

from ofa.methods import ia3, method
from tests import families
from tests.device import DEVICE
from tests.ofa.given_back import SHOTS, TASK
from tests.ofa.methods.grown import with_vocabulary_of

IDS = torch.tensor([[5, 9, 40, 33, 21, 8]], device=DEVICE)
TRAINING = {"epochs": 2, "batch_size": 4, "learning_rate": 0.05}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("family", "outputs", "inner"),
    [
        ("llama", ("k_proj", "v_proj"), "down_proj"),
        ("qwen2", ("k_proj", "v_proj"), "down_proj"),
        ("opt", ("k_proj", "v_proj"), "fc2"),
        ("gptj", ("k_proj", "v_proj"), "fc_out"),
        ("gpt2", ("c_attn",), "c_proj"),
        ("falcon", ("query_key_value",), "dense_4h_to_h"),
    ],
)
def test_the_logits_are_those_of_activations_scaled_by_hand(tiny_model, family, outputs, inner):
    """By hooks at the model's own modules: outputs, bias included, and the input of the MLP's last projection.

    The families are those where PEFT's own row would scale queries in place of keys, and fused ones. Float64.
    """
    model = with_vocabulary_of(tiny_model[1], families.build(family))
    model.double()
    base = logits(model)
    with ia3.fit(model, tiny_model[1], TASK, SHOTS, 5, **TRAINING) as predictor:
        adapted = logits(model)
        assert predictor.notes == {"adapted": sorted((*outputs, inner))}
        scales = {
            path.partition(".ia3_l")[0]: value.detach().clone().flatten()
            for path, value in model.named_parameters()
            if value.requires_grad
        }
    assert not torch.allclose(adapted, base, rtol=1e-3)
    assert len(scales) == 3 * (len(outputs) + 1)
    for path, scale in scales.items():
        module = model.get_submodule(path)
        if path.endswith(inner):
            module.register_forward_pre_hook(lambda module, args, scale=scale: (args[0] * scale,))
        else:
            assert path.endswith(outputs)
            module.register_forward_hook(lambda module, args, output, scale=scale: output * scale)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-9, atol=1e-11)


def test_the_first_loss_is_the_base_model_s(tiny_model):
    """Scales are initially 1."""
    first = []
    for name in ("ia3", "norm-tuning"):
        with method(name)(*tiny_model, TASK, SHOTS, 5, **TRAINING) as predictor:
            first.append(predictor.training.records[0].loss)
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_llama_2_7b_has_614400_scales():
    """The count of METHODS: (4096 + 4096 + 11008) · 32 layers; shapes alone, on the meta device."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(model, ia3.config_for(model))
    assert adapted.get_nb_trainable_parameters()[0] == 614_400
