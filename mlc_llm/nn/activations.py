"""Activation functions by the names that Hugging Face configurations give them."""

from __future__ import annotations

from collections.abc import Mapping

# Name in a configuration -> kernel (`kernels.cpu.elementwise.ACTIVATIONS`).
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
