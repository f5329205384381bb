"""Triton kernels for CUDA, installed as mekd.kernels. One file per op; there is none yet."""
