"""The seam between engine and compiled code: what the engine asks of a model, without TVM."""

from __future__ import annotations

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
    the step whose logits are wanted.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    query_start: NDArray[np.int32]
    page_table: NDArray[np.int32]
    context_len: NDArray[np.int32]
    logit_rows: NDArray[np.int32]


class ModelRunner(Protocol):
    """A model ready to run steps on its own KV pages."""

    @property
    def metadata(self) -> LibraryMetadata:
        """What the library says of itself."""

    @property
    def num_pages(self) -> int:
        """KV pages there are."""

    def forward(self, step: Step) -> NDArray[Any]:
        """Run a step; returns logits (r, vocab) float32, valid until the next step."""

    def close(self) -> None:
        """Free the model's memory."""
