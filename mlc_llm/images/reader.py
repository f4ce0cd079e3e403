"""Images as clients send them: a data URL in, pixels for a model out. Fetches nothing."""

from __future__ import annotations

import base64
import binascii
import io
import mimetypes
import struct
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import OptionError, RequestError
from mlc_llm.images.inputs import ImageInputs, PromptImage
from mlc_llm.images.processing import MAX_PIXELS, ImageProcessing
from mlc_llm.images.tiles import TileProcessing, arrange

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGES = 16  # of a request
MAX_IMAGE_BYTES = 20 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# What Pillow raises for bytes that are not what their beginning says.
_DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError),
    *(struct.error, zlib.error),
)


class ImageReader:
    """Reads images for one model; safe to call from several threads.

    token: the text that stands for an image in the model's prompts.
    """

    def __init__(
        self, inputs: ImageInputs, processing: ImageProcessing | TileProcessing, token: str
    ) -> None:
        self.inputs, self.token = inputs, token
        self._processing = processing
        # One at a time: an image of some hundred kilobytes may take as many megabytes.
        self._lock = threading.Lock()

    def read(self, url: str, where: str) -> NDArray[np.float32]:
        """Return the pixels of a data URL, float32, as `PromptImage` has them.

        Raises RequestError that names the field `where`, OptionError where Pillow is not installed.
        """
        return self.place(url, where, 0).pixels

    def place(self, url: str, where: str, first: int) -> PromptImage:
        """Return the image of a data URL, its rows from the place `first` of a prompt on.

        Raises as `read` does.
        """
        data, inputs = decode_url(url, where), self.inputs
        with self._lock:
            try:
                image, processing = open_image(data, where), self._processing
                if isinstance(processing, ImageProcessing):
                    return PromptImage(processing.apply(image), first, inputs.num_rows)
                grid = processing.grid(*image.size, inputs.size)
                order = arrange(inputs.tiling, inputs.num_rows, grid.across, grid.down)
                pixels = processing.apply(image, inputs.size)
            except RequestError as error:
                raise RequestError(f"{where}: {error}", where) from None
        return PromptImage(pixels, first, len(order), order)


def url_of_file(path: Path) -> str:
    """Return an image file as a data URL. Raises OptionError where it cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise OptionError(
                f"{path} has {size:,} bytes; at most {MAX_IMAGE_BYTES:,} are taken, choose a "
                "smaller image"
            )
        data = path.read_bytes()
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); check the path") from None
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def decode_url(url: str, where: str) -> bytes:
    """Return the bytes of a data URL. Raises RequestError that names the field `where`."""
    head, comma, text = url.partition(",")
    if url[:5].lower() != "data:":
        raise RequestError(
            f"{where} is {url[:40]!r}; images are not fetched, send the image itself as "
            '"data:image/png;base64,..."',
            where,
        )
    kind, _, encoding = head[5:].lower().rpartition(";")
    if not comma or encoding.strip() != "base64" or not kind.startswith("image/"):
        raise RequestError(
            f'{where} begins with {url[:40]!r}; it must begin as "data:image/png;base64," does',
            where,
        )
    if len(text) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise RequestError(
            f"{where} is an image of {len(text) * 3 // 4:,} bytes; at most {MAX_IMAGE_BYTES:,} "
            "are taken, send a smaller one",
            where,
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where} is not base64 ({error}); encode it again", where) from None


def open_image(data: bytes, where: str) -> Image:
    """Return the first picture of a file as RGB, upright and on white where it is transparent.

    Raises RequestError that names the field `where`, OptionError where Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise OptionError(
            "images need the package Pillow; install it with `pip install 'mlc_llm[vision]'`"
        ) from None
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise RequestError(
                f"{where} is an image of {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} "
                "are taken, send a smaller one",
                where,
            )
        # Cameras store pictures lying on their side, and how to turn them.
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except bombs:
        raise RequestError(
            f"{where} is an image of more than {MAX_PIXELS:,} pixels; send a smaller one", where
        ) from None
    except _DAMAGE as error:
        raise RequestError(
            f"{where} is not an image that can be read ({str(error)[:200]}); send one of the "
            f"formats {', '.join(FORMATS)}",
            where,
        ) from None
