"""From an image's pixels to what a model's tower was trained on, as transformers does it.

Knows the settings of `preprocessor_config.json`. Does not know files, nor what a tower does.
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

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels that an image may have, and may come to have when it is resized: 192 MiB of them.
MAX_PIXELS = 1 << 26
# Under which a configuration holds the content of preprocessor_config.json.
PROCESSOR_KEY = "preprocessor_config"
_KINDS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
_NUM_FILTERS = 6  # Pillow's filters have the numbers from 0 to 5; 3 is bicubic
# What CLIP was trained on, of all its sizes.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageProcessing:
    """Resize, cut out the middle, normalise: (value * rescale_factor - mean) / std.

    shortest_edge: pixels of the shorter side after resizing, 0 where `resize_to` (height, width)
    says both; neither resizes. crop: (height, width) of the middle, zeros where the image is
    smaller. resample: the number of Pillow's filter. pads_to_square: a frame of the mean colour
    comes first.
    """

    shortest_edge: int = 0
    resize_to: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: int = 3
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    pads_to_square: bool = False

    @staticmethod
    def usual(size: int) -> ImageProcessing:
        """Return what a CLIP tower for `size` pixels takes, where nothing else is said."""
        return ImageProcessing(size, None, (size, size))

    @staticmethod
    def from_huggingface(config: Mapping[str, Any], size: int, where: str) -> ImageProcessing:
        """Read the content of `preprocessor_config.json`; `where` names it in errors.

        size: pixels of the tower's images. Raises CorruptFile, and UnsupportedModel for another
        kind of processing.
        """
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        if kind and kind.removesuffix("Fast").removesuffix("Pil") not in _KINDS:
            raise UnsupportedModel(
                f"{where}: image_processor_type {kind:.80} is not supported; "
                f"supported: {', '.join(_KINDS)}"
            )

        def does(step: str, usual: bool = True) -> bool:
            return bool(config.get(f"do_{step}", usual))

        has_values = does("normalize")
        wanted = config.get("size") or {"shortest_edge": size}
        edge, both = _read_size(wanted, where) if does("resize") else (0, None)
        cut = _read_size(config.get("crop_size") or size, where)
        processing = ImageProcessing(
            edge,
            both,
            (cut[1] or (cut[0], cut[0])) if does("center_crop") else None,
            config.get("resample", 3),
            float(config.get("rescale_factor", 1 / 255)) if does("rescale") else 1.0,
            tuple(config.get("image_mean") or CLIP_MEAN) if has_values else (0.0, 0.0, 0.0),
            tuple(config.get("image_std") or CLIP_STD) if has_values else (1.0, 1.0, 1.0),
            does("pad", False),
        )
        processing.check(size, where)
        return processing

    @staticmethod
    def from_json(data: Mapping[str, Any], size: int, where: str) -> ImageProcessing:
        """Read what `to_json` returned. Raises CorruptFile."""
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in data.items()
        }
        try:
            processing = ImageProcessing(**values)
            processing.check(size, where)
        except TypeError as error:
            raise CorruptFile(f"{where}: {error}; run gen_config again") from None
        return processing

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return dataclasses.asdict(self)

    def check(self, size: int, where: str) -> None:
        """Raise CorruptFile unless images come out with `size` pixels each way."""
        check_colours(self.mean, self.std, where, self.rescale_factor)
        if not isinstance(self.resample, int) or not 0 <= self.resample < _NUM_FILTERS:
            raise CorruptFile(f"{where}: resample must be from 0 to 5, is {self.resample!r:.40}")
        if (found := self.crop or self.resize_to) != (size, size):
            raise CorruptFile(
                f"{where}: images are made {found} pixels high and wide, the vision tower takes "
                f"{size}; the files belong to different models"
            )

    def apply(self, image: Image) -> NDArray[np.float32]:
        """Return (3, height, width) float32 of an RGB image. Raises RequestError if too thin."""
        if self.pads_to_square:
            image = _pad_to_square(image, self.mean)
        width, height = image.size
        target = self.resize_to
        if self.shortest_edge:
            short, long = min(width, height), max(width, height)
            edges = self.shortest_edge, self.shortest_edge * long // short
            target = edges if height <= width else edges[::-1]
        if target is not None:
            if target[0] * target[1] > MAX_PIXELS:
                raise RequestError(
                    f"an image of {width} x {height} pixels is too long for its width; cut it"
                )
            image = image.resize((target[1], target[0]), self.resample)
        values = np.asarray(image)  # (height, width, 3)
        if self.crop is not None:
            values = _cut_middle(values, *self.crop)
        scaled = values.astype(np.float32) * np.float32(self.rescale_factor)
        normal = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))


def check_colours(
    mean: tuple[float, ...], std: tuple[float, ...], where: str, factor: float = 1.0
) -> None:
    """Raise CorruptFile unless mean and std are three numbers each, and the factor is one."""
    numbers = (*mean, *std, factor)
    is_real = all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
    if not is_real or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise CorruptFile(
            f"{where}: image_mean {mean!r:.60} and image_std {std!r:.60} must be three "
            "numbers each, those of image_std above 0"
        )


def _read_size(value: Any, where: str) -> tuple[int, tuple[int, int] | None]:
    """Return the shorter edge, or 0, and height and width where both are said."""
    if isinstance(value, Mapping) and "shortest_edge" in value:
        value = value["shortest_edge"]
    sizes = [value]
    if isinstance(value, Mapping):
        sizes = [value.get("height"), value.get("width")]
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 1 << 13:
            raise CorruptFile(
                f"{where}: a size must be a number of pixels, a shortest_edge, or height and "
                f"width, up to 8192; it is {value!r:.80}"
            )
    return (sizes[0], None) if len(sizes) == 1 else (0, (sizes[0], sizes[1]))


def _pad_to_square(image: Image, mean: tuple[float, ...]) -> Image:
    from PIL import Image as images

    side = max(image.size)
    if side * side > MAX_PIXELS:
        raise RequestError(
            f"an image of {image.size[0]} x {image.size[1]} pixels is too large to be made square; "
            "send a smaller one"
        )
    colour = tuple(int(value * 255) for value in mean)
    square = images.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.size[0]) // 2, (side - image.size[1]) // 2))
    return square


def _cut_middle(values: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Return the middle (height, width, 3); what lies outside of the image is zero."""
    for axis, wanted in ((0, height), (1, width)):
        lacking = wanted - values.shape[axis]
        if lacking > 0:
            before = -(-lacking // 2)
            pads = [(before, lacking - before) if i == axis else (0, 0) for i in range(3)]
            values = np.pad(values, pads)
    top, left = (values.shape[0] - height) // 2, (values.shape[1] - width) // 2
    return values[top : top + height, left : left + width]
