"""ModernBERT's exact trace against dense Jacobians: attention in both directions, local in some layers, without a first
norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import ofa
from ofa import anatomy
from tests.ofa.encoders import KINDS
from tests.oracle import Float64


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("modernbert", vocab_size=64, **KINDS["modernbert"] | {"num_hidden_layers": 3})
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    for path, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.3 * noise if path.endswith("norm.weight") else 0.2 * noise
    return model


def dense_trace(model: Any, step: Any, call: dict[str, Any]) -> float:
    """−tr(J P) per token, of the own-token blocks of the branch's Jacobian at the stream of one sequence."""
    (branch,) = step.branches
    norm, module = model.get_submodule(branch.norm.path), model.get_submodule(branch.entry)
    stream = call[branch.norm.path]["args"][0]
    others = call[branch.entry]["kwargs"]

    def function(point: torch.Tensor) -> torch.Tensor:
        found = module(norm(point), **others)
        return found[0] if isinstance(found, tuple) else found

    jacobian = torch.autograd.functional.jacobian(function, stream)[0, :, :, 0]
    own = torch.stack([jacobian[token, :, token] for token in range(stream.shape[1])])
    deviation = (stream[0].var(-1, correction=0) + norm.eps).sqrt()
    scale = norm.weight / deviation[:, None]
    return -float((own.diagonal(dim1=1, dim2=2) * scale).sum() / stream.shape[1])


def test_the_exact_trace_is_the_dense_one(model: Any) -> None:
    """Every norm of the stream preconditions a step; the first attention, which has none, is left out."""
    found = anatomy.find(model)
    assert [step.branches[0].entry for step in found.sublayer_steps[:3]] == [
        "model.layers.0.mlp",
        "model.layers.1.attn",
        "model.layers.1.mlp",
    ]
    assert len(found.layer_steps) == 3
    ids = torch.randint(3, 64, (1, 14), generator=torch.Generator().manual_seed(0))
    calls: dict[str, dict[str, Any]] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: calls.update({path: {"args": args, "kwargs": kwargs}}),
            with_kwargs=True,
        )
        for step in found.sublayer_steps
        for path in (step.branches[0].norm.path, step.branches[0].entry)
    ]
    with Float64():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        for handle in handles:
            handle.remove()
        expected = [dense_trace(model, step, calls) for step in found.sublayer_steps]
        ofa.tune_norms(model)
        with ofa.fused_regularizers(
            model, sharpness=1.0, step_ratio=1.0, estimator="exact", radial="exact"
        ) as regularizers:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            measured = regularizers.measurements.traces[:, 0].tolist()
    assert measured == pytest.approx(expected, rel=1e-6, abs=1e-9)
