"""The operations as PyTorch knows them: schema, shapes, autograd, and the launch of the kernels of the same name.

Importing this needs PyTorch only; Triton is imported by the first launch.
"""
