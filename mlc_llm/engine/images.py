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

# Images, each with all of its views, whose rows are kept at a time, and one more where nothing else
# could be done.
MAX_HELD = 2
View = tuple[int, int]  # the key of an image, the number of one of its views


class ImageRunner(Protocol):
    """What of a runner is needed here."""

    def embed_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the rows (num_rows, hidden) of a view of an image."""


class ImageRows:
    """Makes the rows of images when they are needed and keeps them until they have K and V.

    A step makes those of one view at most, so that those who generate do not wait for more.
    """

    def __init__(self, runner: ImageRunner, inputs: ImageInputs) -> None:
        self.inputs = inputs
        self._runner = runner
        self._rows: dict[View, NDArray[np.float32]] = {}

    def check(self, request: Request) -> None:
        """Raise RequestError unless the images of a request fit the model and its prompt."""
        inputs, end = self.inputs, 0
        for image in request.images:
            if not self._fits(image):
                views = "" if inputs.max_views == 1 else f"up to {inputs.max_views} views of "
                raise RequestError(
                    f"an image has the shape {image.pixels.shape} and {image.num_rows} rows; this "
                    f"model takes {views}{(3, inputs.size, inputs.size)} and makes "
                    f"{inputs.num_rows} rows of each"
                )
            if not end <= image.first <= len(request.prompt) - image.num_rows:
                raise RequestError(
                    f"an image begins at token {image.first} of a prompt of "
                    f"{len(request.prompt)} tokens; it needs {image.num_rows} tokens"
                )
            end = image.end

    def _fits(self, image: PromptImage) -> bool:
        inputs, num_views = self.inputs, len(image.views)
        if image.views.shape[1:] != (3, inputs.size, inputs.size) or num_views > inputs.max_views:
            return False
        if image.order is None:
            return not inputs.tiling and image.num_rows == inputs.num_rows
        is_known = (image.order >= 0) & (image.order < num_views * inputs.num_rows)
        return (
            bool(inputs.tiling) and 0 < len(image.order) == image.num_rows and bool(is_known.all())
        )

    def limit(self, works: list[Work], sequence: Sequence, count: int) -> int:
        """Return how many of the next `count` tokens may join the works of a step.

        Rows of one view can be made in it, and those of no more than `MAX_HELD` images are kept;
        works alone are always let through.
        """
        missing = {
            view
            for work in works
            for view, _ in self._views_of(work.sequence, work.count)
            if view not in self._rows
        }
        max_held = MAX_HELD * self.inputs.max_views
        for view, place in self._views_of(sequence, count):
            if view not in self._rows and view not in missing:
                if missing or (works and len(self._rows) >= max_held):
                    return place - sequence.num_computed
                missing.add(view)
        return count

    def place(self, step: Step, works: list[Work], running: list[Sequence]) -> Step:
        """Return the step with the rows of images that its works bring; the encoder makes them.

        running: whose views are kept while tokens need them; all others are forgotten.
        """
        if self._rows:
            needed = {view for s in running for view, _ in self._views_of(s, s.num_left)}
            self._rows = {view: rows for view, rows in self._rows.items() if view in needed}
        image_rows = np.full(len(step.token_ids), -1, np.int32)
        blocks: list[NDArray[Any]] = []
        num_rows = start = 0
        for work in works:
            first = work.sequence.num_computed
            for image, low, high in _images_of(work.sequence, work.count):
                blocks.append(self._take(image, image.rows(low, high)))
                places = slice(start + low - first, start + high - first)
                image_rows[places] = np.arange(num_rows, num_rows + high - low)
                num_rows += high - low
            start += work.count
        if not blocks:
            return step
        return dataclasses.replace(step, image_rows=image_rows, image_embeds=np.concatenate(blocks))

    @property
    def num_held(self) -> int:
        """Views whose rows are kept now."""
        return len(self._rows)

    def _take(self, image: PromptImage, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return rows of an image's views, of which the encoder makes those that are not there."""
        block = np.empty((len(rows), self.inputs.width), np.float32)
        views, row_of_view = np.divmod(rows, self.inputs.num_rows)
        for number in np.unique(views).tolist():
            view = image.key, number
            if view not in self._rows:
                self._rows[view] = self._runner.embed_image(image.views[number])
            is_here = views == number
            block[is_here] = self._rows[view][row_of_view[is_here]]
        return block

    def _views_of(self, sequence: Sequence, count: int) -> Iterator[tuple[View, int]]:
        """Yield views that the next `count` tokens need, and which token needs them first."""
        for image, low, high in _images_of(sequence, count):
            views = image.rows(low, high) // self.inputs.num_rows
            numbers, firsts = np.unique(views, return_index=True)
            for index in np.argsort(firsts):
                yield (image.key, int(numbers[index])), low + int(firsts[index])


def _images_of(sequence: Sequence, count: int) -> Iterator[tuple[PromptImage, int, int]]:
    """Yield images among the next `count` tokens, and the first and the end of them there."""
    first = sequence.num_computed
    for image in sequence.state.request.images:
        low, high = max(image.first, first), min(image.end, first + count)
        if low < high:
            yield image, low, high
