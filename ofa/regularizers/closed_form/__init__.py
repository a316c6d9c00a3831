"""The exact trace of a branch in closed form.

`modules` finds the modules and their weights; `recognize` decides by a trial run what they compute (activation, rotary
embedding, layout of fused projections) or why there is no closed form; `taps` and `attention_interface` collect the
activations of a pass; `branch_trace` computes the trace from them.
"""
