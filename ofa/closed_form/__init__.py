"""What the exact trace must know of a branch beyond its wiring: weights, pre-activations, attention heads.

`parts` names the modules, `fit` decides by a trial run what they compute (which activation, which rotary embedding, how
a fused projection is laid out) or why there is no closed form, `constants` holds what depends on the weights alone, and
the two forms, `mlp` and `attention`, are hooks that collect one branch's tensors and end in its trace.
"""
