"""What buffers of a browser's GPU hold, checked before a model is compiled."""

from __future__ import annotations

from collections.abc import Iterable

from mlc_llm.artifact import KVCacheLayout, TensorSpec
from mlc_llm.errors import OptionError, UnsupportedModel

# The size that web-llm asks a GPU for.
MAX_BUFFER_BYTES = 1 << 30


def check_buffers(
    params: Iterable[TensorSpec], kv_cache: KVCacheLayout, context_window_size: int
) -> None:
    """Raise UnsupportedModel or OptionError where a tensor does not fit into one buffer."""
    limit = f"buffers of WebGPU hold {MAX_BUFFER_BYTES >> 20:,} MiB"
    for spec in params:
        if spec.size_bytes > MAX_BUFFER_BYTES:
            raise UnsupportedModel(
                f"its {spec.name} has {spec.size_bytes >> 20:,} MiB, and {limit}; choose a "
                "quantization of fewer bits"
            )
    token = kv_cache.bytes_per_token // kv_cache.num_layers
    if token * context_window_size > MAX_BUFFER_BYTES:
        raise OptionError(
            f"context_window_size={context_window_size} takes "
            f"{token * context_window_size >> 20:,} MiB of keys and values a layer, and {limit}; "
            f"use {MAX_BUFFER_BYTES // token} or less, in --overrides and in mlc-chat-config.json"
        )
