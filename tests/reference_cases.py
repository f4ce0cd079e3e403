"""The stored parity references: which there are, where they lie, and their arrays.

Knows the layout of `tests/references`. Needs neither torch nor transformers, which made the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

REFERENCES = Path(__file__).parent / "references"


@dataclass(frozen=True)
class Reference:
    """What transformers computed: float32 logits (n, vocab) of n tokens, and what follows them."""

    token_ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    greedy_tokens: NDArray[np.int32]


@dataclass(frozen=True)
class ReferenceCase:
    """One tiny checkpoint: a Hugging Face directory with a tokenizer and a reference."""

    name: str
    model_type: str
    dtype: str

    @property
    def directory(self) -> Path:
        """The Hugging Face directory."""
        return REFERENCES / self.name

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        data: dict[str, Any] = json.loads((self.directory / "config.json").read_text())
        return data

    def load(self) -> Reference:
        """Return the stored arrays."""
        with np.load(self.directory / "reference.npz") as arrays:
            return Reference(arrays["token_ids"], arrays["logits"], arrays["greedy_tokens"])

    def __str__(self) -> str:
        return self.name


def read_cases() -> list[ReferenceCase]:
    """Return the cases that `cases.json` describes."""
    return [
        ReferenceCase(item["name"], item["model_type"], item.get("dtype", "float32"))
        for item in json.loads((REFERENCES / "cases.json").read_text())
    ]


CASES = read_cases()


def get_case(name: str) -> ReferenceCase:
    """Return the case of that name; raises KeyError."""
    return {case.name: case for case in CASES}[name]
