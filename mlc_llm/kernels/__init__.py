"""Kernels: pure functions from shapes, dtypes and target to TIR; they know no model."""
