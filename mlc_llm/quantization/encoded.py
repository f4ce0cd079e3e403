"""Weights that a checkpoint holds quantized, as it holds them: what sources hand to schemes.

Knows arrays. Does not know files, and not which layer a weight belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupCodes:
    """A matrix (out, in) of codes; a weight is (code - zero) * scale, or code * scale + minimum.

    codes (out, in) uint8; scale and minimum (out, in / group size) float32.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: int = 0
    minimum: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class AwqArrays:
    """A matrix (out, in) in AutoAWQ's layout, see `nn.packed_linear.AwqLinear`.

    qweight (in, out / 8) and qzeros (in / group size, out / 8), uint32 or int32; scales
    (in / group size, out) float16.
    """

    qweight: NDArray[Any]
    qzeros: NDArray[Any]
    scales: NDArray[Any]


@dataclass(frozen=True)
class Float8Blocks:
    """A matrix (out, in) of float8_e4m3fn and the float32 scales of its blocks.

    activation_scale: what a static scheme divides activations by, where the checkpoint says it.
    """

    weight: NDArray[Any]
    scale: NDArray[np.float32]
    activation_scale: float | None = None


Encoded = GroupCodes | AwqArrays | Float8Blocks


def all_of(kind: type[Any], parts: Sequence[Any]) -> bool:
    """Return whether all parts are of one kind."""
    return all(isinstance(part, kind) for part in parts)
