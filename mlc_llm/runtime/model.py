"""The `ModelRunner` on a compiled library: parameters, KV pages and the `forward` call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import LibraryMetadata, numpy_dtype
from mlc_llm.errors import DeviceError
from mlc_llm.runtime.library import Library
from mlc_llm.runtime.memory import aligned_zeros, as_aligned, as_array, as_tensor
from mlc_llm.runtime.runner import SampleRows, Step


class CompiledRunner:
    """Owns a library's virtual machine, its parameters and KV pages."""

    def __init__(
        self, library: Library, parameters: Sequence[NDArray[Any]], num_pages: int
    ) -> None:
        """Take packed parameters (see parameters.py), which are used in place."""
        import tvm_ffi

        self._metadata = library.metadata
        self._num_pages = num_pages
        self._parameters = tvm_ffi.Array([as_tensor(array) for array in parameters])
        layout = self._metadata.kv_cache
        # Zeros are not touched here: memory is taken page by page as the context grows.
        try:
            pages = [
                aligned_zeros(layout.page_shape(num_pages), numpy_dtype(layout.dtype))
                for _ in range(layout.num_layers)
            ]
        except MemoryError:
            num_tokens = num_pages * layout.page_size
            raise DeviceError(
                f"the KV cache of {num_tokens:,} tokens takes "
                f"{num_tokens * layout.bytes_per_token / 2**30:,.1f} GiB, more than there is; "
                "lower context_window_size with --overrides"
            ) from None
        self._pages = tvm_ffi.Array([as_tensor(array) for array in pages])
        machine = library.open_machine()
        self._forward: Any = machine["forward"]
        self._sample: Any = machine["sample"]

    @property
    def metadata(self) -> LibraryMetadata:
        """What the library says of itself."""
        return self._metadata

    @property
    def num_pages(self) -> int:
        """KV pages there are."""
        return self._num_pages

    def forward(self, step: Step) -> NDArray[Any]:
        """Run a step; returns logits (r, vocab) float32, valid until the next step."""
        arrays = (
            step.token_ids,
            step.positions,
            step.query_start,
            step.slots,
            step.page_table,
            step.context_len,
            step.logit_rows,
        )
        inputs = [as_tensor(_aligned_int32(array)) for array in arrays]
        logits = self._forward(*inputs, self._pages, self._parameters)[0]
        return as_array(logits)

    def sample(self, logits: NDArray[np.float32], rows: SampleRows) -> NDArray[np.int32]:
        """Choose a token for each row of logits (r, v): (r) int32."""
        settings = (rows.temperature, rows.top_p, rows.min_p, rows.top_k, rows.uniform)
        inputs = [as_tensor(as_aligned(array)) for array in (logits, *settings)]
        tokens: NDArray[np.int32] = as_array(self._sample(*inputs))
        return tokens

    def touch_pages(self) -> None:
        """Write zeros to all pages: memory that was never written costs nothing to read."""
        for page in self._pages:
            as_array(page)[...] = 0

    def close(self) -> None:
        """Free the model's memory; the runner cannot be used afterwards."""
        self._forward = self._sample = self._pages = self._parameters = None


def _aligned_int32(array: NDArray[np.int32]) -> NDArray[np.int32]:
    copy: NDArray[np.int32] = aligned_zeros(array.shape, np.int32)
    copy[...] = array
    return copy
