"""Triton kernels. Imported at the first launch only, so that nothing else needs Triton.

A program of the kernels of rows works on one row at a time, as a tile of (GROUPS, 32) channels: 32 channels share one
word of a random counter. Those of the curvature have tiles of rows by columns. The operations around them are in
`ofa_kernels.ops`, under the same file names.
"""
