"""The stored reference models that take images, converted and compiled at most once."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import TinyModels

REFERENCES = Path(__file__).parent / "image_references"
_CASES = {c["name"]: c["model_type"] for c in json.loads((REFERENCES / "cases.json").read_text())}
CASES = [name for name, model_type in _CASES.items() if model_type == "llava"]
# Models that see tiles of images, and the images of their chat, in order.
TILED_CASES = [name for name, model_type in _CASES.items() if model_type == "phi3_v"]
TILED_IMAGES = ("strip.png", "high.png", "strip.png")
IMAGES = ("square.png", "wide.png", "high.png")
# The images of the reference's chat, in order.
CHAT_IMAGES = ("wide.png", "high.png", "wide.png")
IMAGE_TOKEN_ID = 131


@dataclass(frozen=True)
class ImageReference:
    """What transformers computed: pixels and rows of images, and a chat with three of them."""

    pixels: dict[str, NDArray[np.float32]]
    rows: dict[str, NDArray[np.float32]]
    token_ids: list[int]
    logits: NDArray[np.float32]
    greedy_tokens: list[int]

    @property
    def num_rows(self) -> int:
        """Rows of an image."""
        return len(self.rows["wide.png"])

    @property
    def image_rows(self) -> NDArray[np.int32]:
        """For each token of the chat the row of its images one after the other, -1 for text."""
        is_image = np.asarray(self.token_ids) == IMAGE_TOKEN_ID
        return np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)


def data_url(image: str) -> str:
    """Return one of the images as clients send it."""
    return "data:image/png;base64," + base64.b64encode((REFERENCES / image).read_bytes()).decode()


def load_tiled_reference(name: str) -> ImageReference:
    """Return the arrays of a case of `TILED_CASES`; pixels are (views, 3, size, size)."""
    return load_reference(name, tuple(dict.fromkeys(TILED_IMAGES)))


def load_reference(name: str, images: tuple[str, ...] = IMAGES) -> ImageReference:
    """Return the arrays of a case."""
    with np.load(REFERENCES / name / "reference.npz") as arrays:
        return ImageReference(
            {image: arrays[f"pixels_{image}"] for image in images},
            {image: arrays[f"rows_{image}"] for image in images},
            arrays["token_ids"].tolist(),
            arrays["logits"],
            arrays["greedy_tokens"].tolist(),
        )


class ImageModels(TinyModels):
    """Artifacts, libraries and runners as `TinyModels` has them, of models that take images."""

    def artifact(self, name: str, quantization: str = "q0f32") -> Path:
        """Return a directory of weights, tokenizer and chat config."""
        from mlc_llm.prepare.progress import NullProgress
        from mlc_llm.prepare.resolve import convert_weights, write_chat_config_for

        output = self.root / name / quantization
        if not output.exists():
            source = REFERENCES / name
            write_chat_config_for(source, output, quantization=quantization)
            convert_weights(source, output, quantization=quantization, progress=NullProgress())
        return output

    def image_runner(self, name: str, *args: Any, **overrides: Any) -> Any:
        """Return a runner that takes images."""
        return self.runner(name, *args, **overrides)
