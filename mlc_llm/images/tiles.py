"""Large images as a grid of square tiles and one view of the whole, as Phi-3-vision takes them.

Knows the settings of its `preprocessor_config.json`, and the order of the rows that the encoder
makes of the views. Does not know files, nor what a tower does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, RequestError, UnsupportedModel
from mlc_llm.images.processing import CLIP_MEAN, CLIP_STD, check_colours

if TYPE_CHECKING:
    from PIL.Image import Image

# What comes first: the tiles, or the view of the whole.
ORDERS = ("sub_glb", "glb_sub")
# After the rows of its patches a view has one that ends a line, and one between whole and tiles.
NUM_MARKS = 2
MAX_TILES = 64
_KIND = "Phi3VImageProcessor"
_BILINEAR = 2  # Pillow's number
_WHITE = (255, 255, 255)
_CUBIC = -0.75  # the parameter of the bicubic filter, Keys 1981, as torch has it


@dataclass(frozen=True)
class Grid:
    """How an image becomes tiles: how many across and down, and its size in pixels before."""

    across: int
    down: int
    width: int
    height: int


@dataclass(frozen=True)
class TileProcessing:
    """Resize to fill at most num_crops tiles, pad with white, normalise: (value - mean) / std."""

    num_crops: int = 4
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @staticmethod
    def from_huggingface(config: Mapping[str, Any], num_rows: int, where: str) -> TileProcessing:
        """Read the content of `preprocessor_config.json`; `where` names it in errors.

        num_rows: tokens of a tile. Raises CorruptFile, and UnsupportedModel for another kind.
        """
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        if kind not in ("", _KIND):
            raise UnsupportedModel(
                f"{where}: image_processor_type {kind:.80} is not supported; supported: {_KIND}"
            )
        if config.get("do_convert_rgb") is False:
            raise UnsupportedModel(f"{where}: do_convert_rgb must be true, images are read as RGB")
        if (found := config.get("num_img_tokens", num_rows)) != num_rows:
            raise CorruptFile(
                f"{where}: num_img_tokens is {found!r:.40}, the model makes {num_rows} of a tile; "
                "the files belong to different models"
            )
        processing = TileProcessing(
            config.get("num_crops", TileProcessing.num_crops),
            tuple(config.get("image_mean") or CLIP_MEAN),
            tuple(config.get("image_std") or CLIP_STD),
        )
        processing.check(where)
        return processing

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str) -> TileProcessing:
        """Read what `to_json` returned. Raises CorruptFile."""
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in data.items()
        }
        try:
            processing = TileProcessing(**values)
            processing.check(where)
        except TypeError as error:
            raise CorruptFile(f"{where}: {error}; run gen_config again") from None
        return processing

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return dataclasses.asdict(self)

    def check(self, where: str) -> None:
        """Raise CorruptFile for what cannot be."""
        count = self.num_crops
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_TILES:
            raise CorruptFile(f"{where}: num_crops must be from 1 to {MAX_TILES}, is {count!r:.40}")
        check_colours(self.mean, self.std, where)

    def grid(self, width: int, height: int, size: int) -> Grid:
        """Return the largest grid of tiles of `size` pixels that the image's shape allows.

        Raises RequestError for images that are too thin.
        """
        if width < height:
            turned = self.grid(height, width, size)
            return Grid(turned.down, turned.across, turned.height, turned.width)
        ratio, across = width / height, 1
        while (across + 1) * math.ceil((across + 1) / ratio) <= self.num_crops:
            across += 1
        resized = int(across * size / ratio)
        if resized < 1:
            raise RequestError(
                f"an image of {width} x {height} pixels is too long for its width; cut it"
            )
        return Grid(across, -(-resized // size), across * size, resized)

    def apply(self, image: Image, size: int) -> NDArray[np.float32]:
        """Return the views of an RGB image, (1 + tiles, 3, size, size) float32.

        The whole image is the first, its tiles follow line by line. Raises RequestError.
        """
        from PIL import Image as images

        grid = self.grid(*image.size, size)
        # Pillow rounds between its two passes: high images are turned, so that widths come first.
        is_high = image.size[0] < image.size[1]
        if is_high:
            image = image.transpose(images.Transpose.TRANSPOSE)
        extents = (grid.width, grid.height)
        image = image.resize(extents[::-1] if is_high else extents, _BILINEAR)
        if is_high:
            image = image.transpose(images.Transpose.TRANSPOSE)
        across, down = grid.across, grid.down
        canvas = images.new("RGB", (across * size, down * size), _WHITE)
        left, top = (across * size - grid.width) // 2, (down * size - grid.height) // 2
        canvas.paste(image, (left, top))
        values = np.asarray(canvas).astype(np.float32) / np.float32(255)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        # (height, width, 3) -> (3, height, width)
        planes: NDArray[np.float32] = ((values - mean) / std).transpose(2, 0, 1)
        whole = _resize_cubic(_resize_cubic(planes, 2, size), 1, size)
        cut = planes.reshape(3, down, size, across, size).transpose(1, 3, 0, 2, 4)
        tiles = cut.reshape(down * across, 3, size, size)
        return np.ascontiguousarray(np.concatenate([whole[None], tiles]))


def arrange(tiling: str, num_rows: int, across: int, down: int) -> NDArray[np.int32]:
    """Return which rows of the views, one view after the other, make up an image, in order.

    tiling: one of `ORDERS`. A view has num_rows rows: a square of patches line by line, then the
    row that ends each line of an image and the one between its whole and its tiles.
    """
    side = math.isqrt(num_rows - NUM_MARKS)
    lines, columns = np.arange(down * side)[:, None], np.arange(across * side)
    views = 1 + lines // side * across + columns // side
    tiles = views * num_rows + lines % side * side + columns % side
    # A line ends with the mark of its own last view, which is there when the line is.
    ends = views[:, -1:] * num_rows + side * side
    parts = [np.hstack([tiles, ends]).ravel(), np.asarray([side * side + 1])]
    whole = np.arange(side * side).reshape(side, side)
    parts.append(np.hstack([whole, np.full((side, 1), side * side)]).ravel())
    if tiling == "glb_sub":
        parts.reverse()
    return np.concatenate(parts).astype(np.int32)


def most_rows(num_rows: int, max_tiles: int) -> int:
    """Return how many rows an image has at most: that of tiles one below the other."""
    side = math.isqrt(num_rows - NUM_MARKS)
    return (max_tiles + 1) * side * (side + 1) + 1


def _resize_cubic(planes: NDArray[np.float32], axis: int, size: int) -> NDArray[np.float32]:
    """Return (3, height, width) with `size` pixels along an axis, by four neighbours each.

    Nothing is averaged where it becomes smaller, as in the model's own processing.
    """
    extent = planes.shape[axis]
    places = (np.arange(size) + 0.5) * (extent / size) - 0.5
    floor = np.floor(places)
    away = [np.abs(places - floor - tap) for tap in (-1, 0, 1, 2)]
    result = np.zeros((*planes.shape[:axis], size, *planes.shape[axis + 1 :]), np.float32)
    shape = [size if i == axis else 1 for i in range(3)]
    for tap, distance in enumerate(away):
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
        far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        weights = np.where(distance <= 1, near, far).astype(np.float32).reshape(shape)
        index = np.clip(floor + tap - 1, 0, extent - 1).astype(np.int64)
        result += planes.take(index, axis) * weights
    return result
