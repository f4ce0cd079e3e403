"""The runners on a compiled library: parameters, KV pages, states and the call of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import LibraryMetadata
from mlc_llm.device import Device
from mlc_llm.errors import DeviceError
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.runtime.gpu_memory import GPUMemory
from mlc_llm.runtime.library import Library, free_pooled_memory
from mlc_llm.runtime.memory import HostMemory, aligned_zeros, as_aligned, as_array, as_tensor
from mlc_llm.runtime.runner import SampleRows, Step

# Of results of earlier steps, which the virtual machine's pool keeps. New memory costs 0.1 to
# 0.8 ms a MiB when it is first used, little beside steps whose results come to so much.
_MAX_KEPT_BYTES = 16 << 20


def padded_rows(num_rows: int) -> int:
    """Return how many rows are computed for so many: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ...

    The pool keeps memory for a result of each size, so there should be few sizes.
    """
    step = 1 << max((num_rows - 1).bit_length() - 2, 0)
    return -(-num_rows // step) * step


def wide_table(page_table: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return a table (1, p) filled up to 8, 16, 32 ... pages: each width has a graph of its own."""
    width = page_table.shape[1]
    wide = max(8, 1 << (width - 1).bit_length())
    return np.pad(page_table, ((0, 0), (0, wide - width)))


class CompiledRunner:
    """Owns a library's virtual machine, its parameters, KV pages and slots of recurrent state."""

    def __init__(
        self,
        library: Library,
        parameters: Sequence[NDArray[Any]],
        num_pages: int,
        num_state_slots: int = 0,
    ) -> None:
        """Take packed parameters (see parameters.py): used in place, or copied to the GPU.

        num_state_slots: sequences whose recurrent state is kept, in models that have one.
        """
        import tvm_ffi

        self._metadata = library.metadata
        self._num_pages = num_pages
        self._is_gpu = library.device.is_gpu
        self._memory: Any = GPUMemory(library.device) if self._is_gpu else HostMemory()
        self._images = ImageInputs.from_json(self._metadata.images)
        tensors = [self._memory.put(array) for array in parameters]
        end = len(tensors) - (0 if self._images is None else self._images.num_packed)
        self._parameters = tvm_ffi.Array(tensors[:end])
        # Entries of GPUs take all.
        self._image_parameters = tvm_ffi.Array(tensors if self._is_gpu else tensors[end:])
        self._pages = tvm_ffi.Array(self._make_pages())
        self._num_state_slots = num_state_slots if self._metadata.states else 0
        self._states = tvm_ffi.Array(
            [
                self._memory.zeros((num_state_slots, *spec.shape), spec.dtype)
                for spec in self._metadata.states
            ]
        )
        width = max(
            num_pages, -(-self._metadata.context_window_size // self._metadata.kv_cache.page_size)
        )
        self._max_table = wide_table(np.zeros((1, width), np.int32)).size
        self._result_sizes: set[int] = set()  # bytes
        machine = library.open_machine()
        is_encoder = self._metadata.model_task == "embedding"
        self._run_step: Any = machine["encode" if is_encoder else "forward"]
        limits = self._metadata
        chunk = limits.prefill_chunk_size if is_encoder else 0
        self._max_rows = max(chunk, limits.max_batch_size)
        self._embed_image: Any = None if self._images is None else machine["embed_image"]
        # What steps without images are given.
        width = 0 if self._images is None else self._images.width
        self._no_image = self._memory.zeros((1, width), "float32") if width else None
        self._sample: Any = None
        self._run_single: Any = None
        if not is_encoder:
            self._sample = _sampler_on_host(library) if self._is_gpu else machine["sample"]
        if self._is_gpu:
            self._run_single = None if is_encoder else machine["forward_single"]
            self._copy_pages: Any = machine["copy_pages"] if self._pages else None
            self._try_out(library.device)

    def _try_out(self, device: Device) -> None:
        """Run kernels, for which drivers make the library's code. Raises DeviceError."""
        try:
            if self._pages:
                self.copy_pages([0], [0])
            else:
                self.forward(_first_token())
            self._memory.wait()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DeviceError(
                f"the library does not run on {device} ({reason}); compile it again on this "
                "machine, or use --device cpu"
            ) from None

    def _make_pages(self) -> list[Any]:
        """Return the KV pages of each layer, zeros. Raises DeviceError."""
        layout, num_pages = self._metadata.kv_cache, self._num_pages
        shape = layout.page_shape(num_pages)
        try:
            return [self._memory.zeros(shape, layout.dtype) for _ in range(layout.num_layers)]
        except MemoryError:
            num_tokens = num_pages * layout.page_size
            raise DeviceError(
                f"the KV cache of {num_tokens:,} tokens takes "
                f"{num_tokens * layout.bytes_per_token / 2**30:,.1f} GiB, more than there is; "
                "lower context_window_size with --overrides"
            ) from None

    @property
    def metadata(self) -> LibraryMetadata:
        """What the library says of itself."""
        return self._metadata

    @property
    def num_pages(self) -> int:
        """KV pages there are."""
        return self._num_pages

    @property
    def num_state_slots(self) -> int:
        """Slots of recurrent state there are."""
        return self._num_state_slots

    def forward(self, step: Step) -> NDArray[Any]:
        """Run a step of a chat library; returns logits (r, vocab) float32, until the next step."""
        assert self._metadata.model_task != "embedding"
        return self._rows_of(step)

    def encode(self, step: Step) -> NDArray[np.float32]:
        """Run a step of an embedding library; returns (r, hidden) float32, until the next step."""
        assert self._metadata.model_task == "embedding"
        return self._rows_of(step)

    def _rows_of(self, step: Step) -> NDArray[np.float32]:
        num_rows = len(step.logit_rows)
        surplus = min(padded_rows(num_rows), self._max_rows) - num_rows
        arrays = [
            step.token_ids,
            step.positions,
            step.query_start,
            step.slots,
            step.page_table,
            step.context_len,
            np.pad(step.logit_rows, (0, surplus), "edge") if surplus > 0 else step.logit_rows,
        ]
        if self._states:
            assert step.state_slots is not None
            arrays.append(step.state_slots)
        is_single = len(step.token_ids) == len(step.context_len) == num_rows == 1
        # One of text has an entry of its own.
        is_single = is_single and self._run_single is not None and step.image_rows is None
        if self._images is not None and not is_single:
            no_rows = np.full(len(step.token_ids), -1, np.int32)
            arrays.append(no_rows if step.image_rows is None else step.image_rows)
        if is_single:
            # The entry may be recorded as a graph, which remembers where its inputs are.
            arrays[4] = wide_table(step.page_table)
            inputs = self._memory.place_fixed(arrays, self._max_table)
        else:
            inputs = self._memory.place(arrays)
        states = [inputs.pop(), self._states] if self._states else []
        if self._images is not None and not is_single:
            embeds = step.image_embeds
            inputs.append(self._no_image if embeds is None else self._memory.put(embeds))
        run = self._run_single if is_single else self._run_step
        rows: NDArray[np.float32] = self._memory.array(
            run(*inputs, self._pages, *states, self._parameters)[0]
        )
        self._bound_pool(rows.nbytes)
        return rows[:num_rows]

    def embed_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the rows (num_rows, hidden) of an image (3, size, size), the caller's to keep."""
        assert self._images is not None and pixels.shape == (3, *[self._images.size] * 2)
        image = self._memory.put(pixels)
        return np.array(self._memory.array(self._embed_image(image, self._image_parameters)))

    def _bound_pool(self, result_bytes: int) -> None:
        """Free the pool when results fill it: it keeps one of each size, and so of each r."""
        if result_bytes not in self._result_sizes:
            self._result_sizes.add(result_bytes)
            if sum(self._result_sizes) > _MAX_KEPT_BYTES:
                free_pooled_memory()
                self._result_sizes = {result_bytes}

    def sample(self, logits: NDArray[np.float32], rows: SampleRows) -> NDArray[np.int32]:
        """Choose a token for each row of logits (r, v): (r) int32."""
        settings = (rows.temperature, rows.top_p, rows.min_p, rows.top_k, rows.uniform)
        inputs = [as_tensor(as_aligned(array)) for array in (logits, *settings)]
        tokens: NDArray[np.int32] = as_array(self._sample(*inputs))
        return tokens

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy KV pages, in all layers: what each target held is replaced."""
        if self._is_gpu:
            numbers = [np.asarray(pages, np.int32) for pages in (sources, targets)]
            places = self._memory.place(numbers)
            for page in self._pages:
                self._copy_pages(page, *places)
            return
        for page in self._pages:
            array = as_array(page)
            array[list(targets)] = array[list(sources)]

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots of recurrent state, one after the other: a target may be a later source."""
        for source, target in zip(sources, targets, strict=True):
            for state in self._states:
                self._memory.copy_item(state, source, target)

    def touch_pages(self) -> None:
        """Write zeros to all pages: memory that was never written costs nothing to read."""
        for page in self._pages:
            self._memory.clear(page)

    def close(self) -> None:
        """Free the model's memory; the runner cannot be used afterwards."""
        self._run_step = self._sample = self._pages = self._parameters = None
        self._run_single = self._copy_pages = None
        self._embed_image = self._image_parameters = self._states = None


def _first_token() -> Step:
    """Return a step that begins a sequence without pages in the first slot of states."""
    zero = np.zeros(1, np.int32)
    return Step(
        token_ids=zero,
        positions=zero,
        slots=zero,
        query_start=np.array([0, 1], np.int32),
        page_table=zero.reshape(1, 1),
        context_len=zero + 1,
        logit_rows=zero,
        state_slots=zero,
    )


def _sampler_on_host(library: Library) -> Any:
    """Return what a library for a GPU has in place of `sample`: a kernel for the CPU."""
    kernel = library.module.get_function("sample_on_host", query_imports=True)

    def sample(logits: Any, *settings: Any) -> Any:
        tokens = as_tensor(aligned_zeros((int(logits.shape[0]),), np.int32))
        kernel(logits, *settings, tokens)
        return tokens

    return sample
