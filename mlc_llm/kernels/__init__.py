"""Kernels: pure functions from shapes, dtypes and target to TIR; they know no model."""

from mlc_llm.kernels.call_stack import install

install()
