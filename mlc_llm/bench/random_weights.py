"""Parameters out of thin air: random weights in a library's own layout, without any checkpoint.

Knows the names and dtypes of quantized parameters. Weights have the magnitude of trained ones, so
that nothing overflows; what the model says is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import LibraryMetadata, TensorSpec, numpy_dtype
from mlc_llm.runtime.library import Library
from mlc_llm.runtime.memory import aligned_zeros
from mlc_llm.runtime.parameters import pack_parameters

_WEIGHT_SCALE = 0.02
_TABLE_SIZE = 1 << 16  # as many as an uint16 can choose from
_CHUNK = 1 << 20
# What configurations call the number of experts.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Parameters of one kind begin at different places of the same values. In elements, keeps alignment.
_STAGGER, _NUM_STAGGERS = 64, 61


def random_parameters(library: Library, bits: int, seed: int) -> list[NDArray[Any]]:
    """Return random parameters packed for a library; `bits` is the width of integer codes, or 0.

    Before packing, all parameters of a kind share their memory, so that only the packed ones and
    the largest portable ones take space.
    """
    specs = library.metadata.params
    source = RandomSource(specs, bits, seed)
    packed = pack_parameters(library, (source.view(spec) for spec in specs))
    # What came back unpacked is still shared; a model reads each parameter from its own memory.
    return [_own(array) if source.shares(array) else array for array in packed]


def weight_bytes_of(metadata: LibraryMetadata, parameters: Sequence[NDArray[Any]]) -> int:
    """Return the bytes of packed parameters that a decode step of one sequence reads.

    All of them, but for tables of which only rows are read, and experts (stacked in arrays of three
    dimensions) that a token has not.
    """
    specs, model_config = metadata.params, metadata.model_config
    total = sum(array.nbytes for array in parameters)
    tables = set(metadata.lookup_tables)
    total -= sum(spec.size_bytes for spec in specs if spec.name.rpartition(".")[0] in tables)
    found = (model_config.get(name) for name in _NUM_EXPERTS)
    num_experts = next((count for count in found if count), None)
    if num_experts:
        idle = num_experts - (model_config.get("num_experts_per_tok") or num_experts)
        shapes = ((spec.shape, spec.size_bytes) for spec in specs)
        total -= sum(
            size // num_experts * idle
            for shape, size in shapes
            if len(shape) == 3 and shape[0] == num_experts
        )
    return total


class RandomSource:
    """One array of random values for each kind of parameter; parameters are views of them."""

    def __init__(self, specs: Sequence[TensorSpec], bits: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._bits = bits
        self._num_views = 0
        sizes: dict[tuple[str, str], int] = {}
        for spec in specs:
            key = _kind_of(spec), spec.dtype
            sizes[key] = max(sizes.get(key, 0), _count(spec))
        self._values = {key: self._fill(*key, size) for key, size in sizes.items()}

    def view(self, spec: TensorSpec) -> NDArray[Any]:
        """Return values for a parameter, aligned, on shared memory."""
        start = self._num_views % _NUM_STAGGERS * _STAGGER
        self._num_views += 1
        values = self._values[_kind_of(spec), spec.dtype]
        return values[start : start + _count(spec)].reshape(spec.shape)

    def shares(self, array: NDArray[Any]) -> bool:
        """Return whether an array lies in the shared memory."""
        return any(np.may_share_memory(array, values) for values in self._values.values())

    def _fill(self, kind: str, dtype_name: str, size: int) -> NDArray[Any]:
        dtype = numpy_dtype(dtype_name)
        table = self._table(kind).astype(dtype)
        values = aligned_zeros((size + _NUM_STAGGERS * _STAGGER,), dtype)
        for start in range(0, len(values), _CHUNK):
            part = values[start : start + _CHUNK]
            part[...] = table[self._random.integers(0, _TABLE_SIZE, len(part), np.uint16)]
        return values

    def _table(self, kind: str) -> NDArray[Any]:
        random = self._random
        if kind == "codes":
            max_int = (1 << (self._bits - 1)) - 1
            words = np.zeros(_TABLE_SIZE, np.uint32)
            for position in range(32 // self._bits):
                codes = random.integers(0, 2 * max_int, _TABLE_SIZE, np.uint32, endpoint=True)
                words |= codes << np.uint32(position * self._bits)
            return words
        if kind == "scales" and self._bits == 0:
            return random.uniform(0.5, 1.5, _TABLE_SIZE)  # of 8-bit floats, which have the size
        if kind == "scales":
            # Codes are even over their range, so this gives weights of the wanted deviation.
            return random.uniform(1, 2.5, _TABLE_SIZE) * _WEIGHT_SCALE / (1 << (self._bits - 1))
        normal = random.standard_normal(_TABLE_SIZE)
        return 1 + 0.1 * normal if kind == "norms" else _WEIGHT_SCALE * normal


def _kind_of(spec: TensorSpec) -> str:
    if spec.dtype == "uint32":
        return "codes"
    if spec.name.endswith((".q_scale", ".scales", ".weight_scale_inv")):
        return "scales"
    return "norms" if len(spec.shape) == 1 and not spec.name.endswith(".bias") else "weights"


def _count(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64))


def _own(array: NDArray[Any]) -> NDArray[Any]:
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy
