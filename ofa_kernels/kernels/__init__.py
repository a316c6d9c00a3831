"""Triton kernels, imported by the first launch only; `ofa_kernels.ops` launches them from files of the same name.

Row kernels work on one row at a time, as a tile of (GROUPS, 32) channels: 32 channels share one word of a random
counter. Curvature kernels have tiles of rows by columns.
"""
