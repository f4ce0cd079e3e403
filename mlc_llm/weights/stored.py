"""A tensor as a checkpoint file stores it: dtype, shape, place. Knows no file format and no model.

Dtypes have NumPy's names, with ml_dtypes' for those NumPy lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile

# No tensor is larger along one dimension; keeps products of extents small numbers.
MAX_EXTENT = 1 << 40
MAX_DIMENSIONS = 32

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    **{
        name: np.dtype(name)
        for name in (
            *("float64", "float32", "float16", "bool"),
            *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        )
    },
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
    },
}


class StoredTensor(Protocol):
    """One tensor of a file."""

    @property
    def path(self) -> Path:
        """The file it lies in."""
        ...

    @property
    def dtype(self) -> str:
        """A key of STORED_DTYPES."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents, checked against the file."""
        ...

    def read(self) -> NDArray[Any]:
        """Return it, read-only; a view of the mapped file where that is possible."""
        ...


def map_bytes(path: Path, offset: int, size_bytes: int) -> NDArray[np.uint8]:
    """Map a part of a file, read-only. Raises CorruptFile."""
    if size_bytes == 0:
        return np.zeros(0, np.uint8)
    try:
        mapped: NDArray[np.uint8] = np.memmap(path, np.uint8, "r", offset, (size_bytes,))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path} cannot be read ({error}); fetch it again") from None
    return mapped


def count_values(shape: Sequence[int]) -> int:
    """Return the product of extents, of any size."""
    count = 1
    for extent in shape:
        count *= extent
    return count
