"""Triton kernels for CUDA, installed as mekd.kernels: one file per op, with its launcher, and what they share."""
