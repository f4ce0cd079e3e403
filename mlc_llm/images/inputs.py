"""What images a library takes, and the images of a prompt. Knows no files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile


@dataclass(frozen=True)
class ImageInputs:
    """A library takes images (3, size, size) float32, each of which becomes num_rows rows.

    token_id stands in a prompt for each row; rows have `width` items of float32. num_packed of the
    packed parameters, the last ones, are for `embed_image`.
    """

    token_id: int
    size: int
    num_rows: int
    width: int
    num_packed: int = 0

    @property
    def size_bytes(self) -> int:
        """Return the bytes that the rows of an image take."""
        return self.num_rows * self.width * 4

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any] | None) -> ImageInputs | None:
        """Read the field of a library's metadata; None for models without images."""
        if data is None:
            return None
        try:
            return ImageInputs(**data)
        except TypeError as error:
            raise CorruptFile(
                f"the library's metadata was not made by this release ({error}); compile it again"
            ) from None


@dataclass(frozen=True)
class PromptImage:
    """An image of a prompt: its pixels, (3, size, size) float32, and where its rows begin."""

    pixels: NDArray[np.float32]
    first: int
    num_rows: int

    @property
    def end(self) -> int:
        """Return the place after the last row."""
        return self.first + self.num_rows

    @cached_property
    def key(self) -> int:
        """A number that no token has and, but for a broken hash, no other image."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).data)
        return -1 - int.from_bytes(digest.digest(), "big")
