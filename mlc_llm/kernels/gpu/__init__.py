"""Kernels for GPUs: computations that are scheduled by rule, and a few bound to threads by hand."""
