"""Layers on `tvm.relax.frontend.nn`; they know kernels and shapes, no model family."""
