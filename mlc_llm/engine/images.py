"""Rows of images between the encoder that makes them and the steps that read them.

Knows which tokens of a sequence an image stands in place of. Decodes no files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlc_llm.engine.request import Request
from mlc_llm.engine.scheduler import Work
from mlc_llm.engine.sequence import Sequence
from mlc_llm.errors import RequestError
from mlc_llm.images.inputs import ImageInputs, PromptImage
from mlc_llm.runtime.runner import Step

# Images whose rows are kept at a time, and one more where nothing else could be done.
MAX_HELD = 2


class ImageRunner(Protocol):
    """What of a runner is needed here."""

    def embed_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the rows (num_rows, hidden) of an image."""


class ImageRows:
    """Makes the rows of images when they are needed and keeps them until they have K and V.

    A step makes those of one image at most, so that those who generate do not wait for more.
    """

    def __init__(self, runner: ImageRunner, inputs: ImageInputs) -> None:
        self.inputs = inputs
        self._runner = runner
        self._rows: dict[int, NDArray[np.float32]] = {}  # by the keys of images

    def check(self, request: Request) -> None:
        """Raise RequestError unless the images of a request fit the model and its prompt."""
        inputs, end = self.inputs, 0
        for image in request.images:
            shape = (3, inputs.size, inputs.size)
            if image.pixels.shape != shape or image.num_rows != inputs.num_rows:
                raise RequestError(
                    f"an image has the shape {image.pixels.shape} and {image.num_rows} rows; this "
                    f"model takes {shape} and makes {inputs.num_rows} rows of it"
                )
            if not end <= image.first <= len(request.prompt) - image.num_rows:
                raise RequestError(
                    f"an image begins at token {image.first} of a prompt of "
                    f"{len(request.prompt)} tokens; images need {inputs.num_rows} tokens each"
                )
            end = image.end

    def limit(self, works: list[Work], sequence: Sequence, count: int) -> int:
        """Return how many of the next `count` tokens may join the works of a step.

        Rows of one image can be made in it, and no more than `MAX_HELD` are kept; works alone are
        always let through.
        """
        missing = {
            image.key
            for work in works
            for image, _, _ in _images_of(work.sequence, work.count)
            if image.key not in self._rows
        }
        for image, low, _ in _images_of(sequence, count):
            if image.key not in self._rows and image.key not in missing:
                if missing or (works and len(self._rows) >= MAX_HELD):
                    return low - sequence.num_computed
                missing.add(image.key)
        return count

    def place(self, step: Step, works: list[Work], running: list[Sequence]) -> Step:
        """Return the step with the rows of images that its works bring; the encoder makes them.

        running: whose images are kept; all others are forgotten.
        """
        if self._rows:
            needed = {i.key for s in running for i, _, _ in _images_of(s, s.num_left)}
            self._rows = {key: rows for key, rows in self._rows.items() if key in needed}
        image_rows = np.full(len(step.token_ids), -1, np.int32)
        blocks: list[NDArray[Any]] = []
        num_rows = start = 0
        for work in works:
            first = work.sequence.num_computed
            for image, low, high in _images_of(work.sequence, work.count):
                if image.key not in self._rows:
                    self._rows[image.key] = self._runner.embed_image(image.pixels)
                blocks.append(self._rows[image.key][low - image.first : high - image.first])
                places = slice(start + low - first, start + high - first)
                image_rows[places] = np.arange(num_rows, num_rows + high - low)
                num_rows += high - low
            start += work.count
        if not blocks:
            return step
        return dataclasses.replace(step, image_rows=image_rows, image_embeds=np.concatenate(blocks))

    @property
    def num_held(self) -> int:
        """Images whose rows are kept now."""
        return len(self._rows)


def _images_of(sequence: Sequence, count: int) -> Iterator[tuple[PromptImage, int, int]]:
    """Yield images among the next `count` tokens, and the first and the end of them there."""
    first = sequence.num_computed
    for image in sequence.state.request.images:
        low, high = max(image.first, first), min(image.end, first + count)
        if low < high:
            yield image, low, high
