"""What the exact trace must know of a branch beyond its wiring: weights, pre-activations, attention heads.

`modules` finds the modules and their weights, `recognize` decides by a trial run what they compute (which activation,
which rotary embedding, how a fused projection is laid out) or why there is no closed form, `taps` collect what goes by
in a branch, `attention_interface` what the attention function sees, and `branch_trace` computes the trace.
"""
