"""Pixels for a tower: against transformers, and what files may and may not say."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_models import CASES, IMAGES, REFERENCES, data_url, load_reference
from PIL import Image

from mlc_llm.errors import CorruptFile, OptionError, RequestError, UnsupportedModel
from mlc_llm.images import reader as reading
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.images.processing import ImageProcessing
from mlc_llm.images.reader import ImageReader, url_of_file

WHERE = "messages[0].content[0].image_url.url"


def reader_of(processing: ImageProcessing, size: int) -> ImageReader:
    return ImageReader(ImageInputs(131, size, 9, 32), processing, "<image>")


def png(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height), **options).save(stream, "PNG")
    return stream.getvalue()


def url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_the_reference(name: str) -> None:
    reference = load_reference(name)
    path = REFERENCES / name / "preprocessor_config.json"
    size = reference.pixels["wide.png"].shape[1]
    processing = ImageProcessing.from_huggingface(json.loads(path.read_text()), size, str(path))
    again = ImageProcessing.from_json(json.loads(json.dumps(processing.to_json())), size, "")
    assert again == processing
    reader = reader_of(processing, size)
    for image in IMAGES:
        found = reader.read(data_url(image), WHERE)
        assert found.dtype == np.float32 and found.flags.c_contiguous
        np.testing.assert_allclose(found, reference.pixels[image], atol=2e-6)


def test_old_files_mean_the_same() -> None:
    new = {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 40, "width": 40},
        "image_processor_type": "CLIPImageProcessorFast",
    }
    old = {"size": 40, "crop_size": 40, "feature_extractor_type": "CLIPFeatureExtractor"}
    found = [ImageProcessing.from_huggingface(config, 40, "file") for config in (new, old, {})]
    assert found == [ImageProcessing.usual(40)] * 3


def test_small_images_get_a_frame_and_large_ones_lose_theirs() -> None:
    plain = ImageProcessing(0, None, (5, 5), mean=(0.0,) * 3, std=(1.0,) * 3, rescale_factor=1.0)
    small = plain.apply(Image.new("RGB", (2, 3), (7, 8, 9)))
    assert small[:, 1:4, 2:4].tolist() == [[[v] * 2] * 3 for v in (7, 8, 9)]
    assert small.sum() == (7 + 8 + 9) * 6
    rows = np.arange(63, dtype=np.uint8).reshape(9, 7)
    large = plain.apply(Image.fromarray(np.stack([rows] * 3, axis=2)))
    assert np.array_equal(large[0], rows[2:7, 1:6])


def test_padding_to_a_square_has_the_mean_colour() -> None:
    config = {"do_pad": True, "size": {"height": 4, "width": 4}, "do_center_crop": False}
    config |= {"image_mean": [0.5, 0.25, 0.0], "do_normalize": True, "image_std": [1, 1, 1]}
    processing = ImageProcessing.from_huggingface(config, 4, "file")
    found = processing.apply(Image.new("RGB", (4, 2), (255, 255, 255)))
    assert np.abs(found[:, 0]).max() < 0.004 and np.abs(found[:, 3]).max() < 0.004
    assert found[:, 1:3].min() > 0.49


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, UnsupportedModel, "SiglipImageProces"),
        ({"size": {"longest_edge": 40}}, CorruptFile, "must be a number of pixels"),
        ({"size": True}, CorruptFile, "must be a number of pixels"),
        ({"crop_size": 39}, CorruptFile, "the vision tower takes 40"),
        ({"do_center_crop": False}, CorruptFile, "the vision tower takes 40"),
        ({"image_mean": [0.5]}, CorruptFile, "three numbers each"),
        ({"image_std": [0.5, 0.5, 0]}, CorruptFile, "above 0"),
        ({"image_mean": ["a", 0, 0]}, CorruptFile, "three numbers each"),
        ({"resample": 9}, CorruptFile, "resample must be from 0 to 5"),
    ],
)
def test_settings_that_cannot_be_honoured(
    config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ImageProcessing.from_huggingface(config, 40, "preprocessor_config.json")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/a.png", "images are not fetched, send the image itself"),
        ("file:///etc/passwd", "images are not fetched"),
        ("", "images are not fetched"),
        ("data:image/png;base64", "it must begin as"),
        ("data:image/png,abc", "it must begin as"),
        ("data:text/plain;base64,YWJj", "it must begin as"),
        ("data:image/png;base64,YW%Jj", "is not base64"),
        ("data:image/png;base64,YWJ", "is not base64"),
        ("data:image/png;base64,", "not an image that can be read"),
        (url_of(b"GIF89a"), "not an image that can be read"),
        (url_of(b"no image at all"), "not an image that can be read"),
        (url_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "not an image"),
        (url_of(png(30, 30)[:-40]), "not an image that can be read"),
        (url_of((REFERENCES / "wide.png").read_bytes()[:2000]), "not an image that can be read"),
    ],
)
def test_what_is_no_image_is_refused_by_its_place(url: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        reader_of(ImageProcessing.usual(20), 20).read(url, WHERE)
    assert caught.value.param == WHERE


def test_images_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(ImageProcessing.usual(20), 20)
    # 400 million pixels in half a megabyte.
    bomb = png(20000, 20000, "1")
    assert len(bomb) < 1 << 20
    with pytest.raises(RequestError, match=r"pixels; at most|more than 67,108,864 pixels"):
        reader.read(url_of(bomb), WHERE)
    with pytest.raises(RequestError, match="20,000 x 4,000 pixels; at most 67,108,864"):
        reader.read(url_of(png(20000, 4000, "1")), WHERE)
    # Resized to 20 pixels of width it would be as high as a tower.
    with pytest.raises(RequestError, match="1 x 60000 pixels is too long for its width"):
        reader_of(ImageProcessing.usual(336), 336).read(url_of(png(1, 60000)), WHERE)
    monkeypatch.setattr(reading, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(RequestError, match="at most 100 are taken, send a smaller one"):
        reader.read(data_url("wide.png"), WHERE)


def test_cameras_lay_pictures_on_their_side() -> None:
    picture = Image.new("RGB", (20, 20))
    picture.paste((255, 255, 255), (0, 0, 20, 10))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    stream = io.BytesIO()
    picture.save(stream, "PNG", exif=exif)
    found = reader_of(ImageProcessing.usual(20), 20).read(url_of(stream.getvalue()), WHERE)
    assert found[0, :, 19].min() > 0 > found[0, :, 0].max()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP"])
def test_other_formats_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    Image.new("RGB", (30, 20), (200, 100, 50)).save(path, kind)
    reader = reader_of(ImageProcessing.usual(20), 20)
    found = reader.read(url_of(path.read_bytes(), f"image/{kind.lower()}"), WHERE)
    colour = np.array([200, 100, 50]) / 255
    usual = ImageProcessing.usual(20)
    expected = (colour - usual.mean) / usual.std
    assert np.abs(found.mean(axis=(1, 2)) - expected).max() < 0.1


def test_a_picture_in_grey_or_with_a_palette_has_three_channels() -> None:
    reader = reader_of(ImageProcessing.usual(20), 20)
    for mode in ("L", "P", "LA", "1", "I;16"):
        assert reader.read(url_of(png(20, 20, mode)), WHERE).shape == (3, 20, 20)


def test_without_pillow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(OptionError, match=r"install it with `pip install 'mlc_llm\[vision\]'`"):
        reader_of(ImageProcessing.usual(20), 20).read(data_url("wide.png"), WHERE)


def test_files_become_data_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert url_of_file(REFERENCES / "wide.png") == data_url("wide.png")
    (tmp_path / "photo.JPG").write_bytes(b"abc")
    assert url_of_file(tmp_path / "photo.JPG") == "data:image/jpeg;base64,YWJj"
    with pytest.raises(OptionError, match="cannot be read"):
        url_of_file(tmp_path)
    monkeypatch.setattr(reading, "MAX_IMAGE_BYTES", 2)
    with pytest.raises(OptionError, match="has 3 bytes; at most 2 are taken"):
        url_of_file(tmp_path / "photo.JPG")
