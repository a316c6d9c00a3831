"""What models call the modules of a branch: projections, head norms, routers, activations."""

from __future__ import annotations

MLP_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    ("fc1", None, "fc2"),
    ("c_fc", None, "c_proj"),
    ("fc_in", None, "fc_out"),
    ("dense_h_to_4h", None, "dense_4h_to_h"),
    ("Wi", "Wi", "Wo"),
)
"""Gate, up and down projections of an MLP, relative to its module; a repeated name is one fused projection."""


ATTENTION_NAMES = tuple(
    (*projections, output)
    for projections in (
        ("q_proj", "k_proj", "v_proj"),
        ("qkv_proj",) * 3,
        ("c_attn",) * 3,
        ("query_key_value",) * 3,
        ("Wqkv",) * 3,
    )
    for output in ("o_proj", "out_proj", "dense", "c_proj", "Wo")
)
"""Query, key, value and output projections of an attention, relative to its module."""

ENCODER_ATTENTION_NAMES = (("query", "key", "value"), ("query_proj", "key_proj", "value_proj"))
"""Query, key and value projections where the output projection is in another module, as in BERT."""


HEAD_NORMS = ("q_norm", "k_norm")


ROUTER_NAMES = ("gate", "router")
"""The linear map of a mixture of experts that chooses the experts."""


ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation")
"""The activation between a module's projections."""
