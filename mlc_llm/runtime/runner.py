"""The seam between engine and compiled code: what the engine asks of a model, without TVM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import LibraryMetadata


@dataclass(frozen=True)
class Step:
    """One step: new tokens of b sequences, ragged. All arrays int32.

    token_ids, positions, slots: (n), sequence after sequence. query_start: (b + 1), offsets of
    the sequences in them. page_table: (b, p), pages of each sequence, padded with any page.
    context_len: (b), tokens of each sequence with those of this step. logit_rows: (r), tokens of
    the step whose logits are wanted. state_slots: (b), where the recurrent state of each sequence
    is, for models that have one; what begins at position 0 begins with zeros, whatever is there.
    image_rows: (n), for steps with images: -1 for text, else the row of image_embeds (m, hidden),
    float32, that stands in place of a token.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    query_start: NDArray[np.int32]
    page_table: NDArray[np.int32]
    context_len: NDArray[np.int32]
    logit_rows: NDArray[np.int32]
    state_slots: NDArray[np.int32] | None = None
    image_rows: NDArray[np.int32] | None = None
    image_embeds: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class SampleRows:
    """How each row of logits is sampled. All arrays (r).

    temperature (below 1e-5 is greedy), top_p and min_p (0 for none): float32. top_k: int32, 0 for
    all. uniform: float64 in [0, 1), the draw.
    """

    temperature: NDArray[np.float32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    top_k: NDArray[np.int32]
    uniform: NDArray[np.float64]


class ModelRunner(Protocol):
    """A model ready to run steps on its own KV pages and slots of recurrent state."""

    @property
    def metadata(self) -> LibraryMetadata:
        """What the library says of itself."""

    @property
    def num_pages(self) -> int:
        """KV pages there are."""

    @property
    def num_state_slots(self) -> int:
        """Slots of recurrent state there are; 0 for models without."""

    def forward(self, step: Step) -> NDArray[Any]:
        """Run a step; returns logits (r, vocab) float32, the caller's until the next step.

        What a token's logits are does not depend, to the bit, on what else is in the step nor on
        how its sequence was cut into steps.
        """

    def embed_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the rows (num_rows, hidden) of an image, the caller's to keep; see `ImageInputs`.

        Only for libraries whose metadata say that they take images.
        """

    def sample(self, logits: NDArray[np.float32], rows: SampleRows) -> NDArray[np.int32]:
        """Choose a token for each row of logits (r, v): (r) int32."""

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy KV pages, in all layers: what each target held is replaced."""

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots of recurrent state, one after the other: a target may be a later source."""

    def close(self) -> None:
        """Free the model's memory."""


class EncodingRunner(Protocol):
    """An embedding model ready to run steps on its own KV pages."""

    @property
    def metadata(self) -> LibraryMetadata:
        """What the library says of itself."""

    @property
    def num_pages(self) -> int:
        """KV pages there are."""

    def encode(self, step: Step) -> NDArray[np.float32]:
        """Run a step; returns hidden states (r, hidden) float32, the caller's until the next."""

    def close(self) -> None:
        """Free the model's memory."""
