"""What images a library takes, and the images of a prompt. Knows no files.

A view is what the encoder sees at a time: a whole image, or one of its tiles (`images/tiles.py`).
"""

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
from mlc_llm.images.tiles import most_rows


@dataclass(frozen=True)
class ImageInputs:
    """A library takes views (3, size, size) float32, each of which becomes num_rows rows.

    token_id stands in a prompt for each row of an image; rows have `width` items of float32.
    num_packed of the packed parameters, the last ones, are for `embed_image`. An image has
    max_views at most; tiling is the order of its parts, one of `tiles.ORDERS`, where it has several
    views, and "" where an image is its only view and has all of its rows.
    """

    token_id: int
    size: int
    num_rows: int
    width: int
    num_packed: int = 0
    max_views: int = 1
    tiling: str = ""

    @property
    def size_bytes(self) -> int:
        """Return the bytes that the rows of an image's views take."""
        return self.max_views * self.num_rows * self.width * 4

    @property
    def max_rows(self) -> int:
        """Return how many tokens of a prompt an image takes at most."""
        return most_rows(self.num_rows, self.max_views - 1) if self.tiling else self.num_rows

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
    """An image of a prompt: its pixels, (3, size, size) float32, and where its rows begin.

    With several views pixels are (views, 3, size, size), and order (num_rows) int32 says which of
    the views' rows, one view after the other, each row of the image is.
    """

    pixels: NDArray[np.float32]
    first: int
    num_rows: int
    order: NDArray[np.int32] | None = None

    @property
    def views(self) -> NDArray[np.float32]:
        """Return what the encoder sees, (views, 3, size, size) float32."""
        return self.pixels if self.pixels.ndim == 4 else self.pixels[None]

    def rows(self, low: int, high: int) -> NDArray[np.int32]:
        """Return which of the views' rows stand at the places `low` to `high` of the prompt."""
        if self.order is None:
            return np.arange(low - self.first, high - self.first, dtype=np.int32)
        return self.order[low - self.first : high - self.first]

    @property
    def end(self) -> int:
        """Return the place after the last row."""
        return self.first + self.num_rows

    @cached_property
    def key(self) -> int:
        """A number that no token has and, but for a broken hash, no other image."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).data)
        if self.order is not None:
            digest.update(np.ascontiguousarray(self.order).data)
        return -1 - int.from_bytes(digest.digest(), "big")
