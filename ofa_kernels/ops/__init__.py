"""The kernels as PyTorch operations: schema, shapes, autograd and launch, in files named like the kernels'.

Importing this needs only PyTorch; the first launch imports Triton.
"""
