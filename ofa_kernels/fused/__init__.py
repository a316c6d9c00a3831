"""Operations with derivatives written by hand, in plain PyTorch for every device.

What autograd keeps of the reference's traces is several times what a training step keeps anyway. These keep the tensors
that the model keeps as well, compute the rest again in the backward pass, and work through the rows in blocks.
"""
