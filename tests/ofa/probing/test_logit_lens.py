"""The lens reads the residual stream after every layer and decodes it as the model decodes its last layer."""

from __future__ import annotations

import pytest
import torch

from ofa import anatomy
from ofa.probing.logit_lens import LogitLens
from tests import families
from tests.cases import CAUSAL
from tests.device import DEVICE
from tests.ofa.given_back import state

TOKENS = range(64)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], device=DEVICE)
LAST = torch.tensor([[5], [3]])
ROWS = torch.arange(2)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_states_and_logits_equal_the_model_s_own(name):
    """Inner states equal those that transformers collects; after the last layer the lens equals the model's logits.

    The families' final modules have norms, projections, scales and soft-caps. Padding is on the right.
    Tolerance: the same float32 operations on batches of another shape.
    """
    model, ids = families.build(name), families.inputs(name)["input_ids"]
    before = state(model)
    lens = LogitLens(model, anatomy.find(model).layers)
    states = lens.states(ids, MASK, LAST)
    told = lens.log_probabilities(states[-1], TOKENS)
    assert state(model) == before
    expected = model(input_ids=ids, attention_mask=MASK, output_hidden_states=True)
    torch.testing.assert_close(told, expected.logits[ROWS, LAST].log_softmax(-1), rtol=1e-5, atol=1e-5)
    # Without the last state, to which transformers applies the final norm.
    hidden = torch.stack([layer[ROWS, LAST] for layer in expected.hidden_states[1:-1]])
    torch.testing.assert_close(states[:-1], hidden, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inner_layers_go_through_the_final_norm_and_the_head():
    """Oracle: by hand for a Llama, at several positions, decoded in chunks and in one piece."""
    model, ids = families.build("llama"), families.inputs("llama")["input_ids"]
    lens = LogitLens(model, anatomy.find(model).layers)
    states = lens.states(ids, MASK, torch.tensor([[0, 5], [1, 3]]))
    expected = model.lm_head(model.model.norm(states)).log_softmax(-1)
    told = lens.log_probabilities(states, TOKENS)
    torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(lens.log_probabilities(states, [7, 3]), told[..., [7, 3]])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ofa.probing.logit_lens._ROWS", 5)
        torch.testing.assert_close(lens.log_probabilities(states, TOKENS), told, rtol=1e-5, atol=1e-5)
