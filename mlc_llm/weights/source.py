"""What a checkpoint is to the converter: named tensors, read one at a time.

Tensor names and shapes are those of Hugging Face, whatever the file format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from mlc_llm.quantization.encoded import Encoded


class WeightSource(Protocol):
    """A checkpoint. `config` is the content of a Hugging Face `config.json`."""

    config: dict[str, Any]

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it. Raises ParameterMismatch if unknown."""
        ...

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor as float32, float16 or bfloat16; it may be a view of the mapped file.

        Raises ParameterMismatch if unknown, UnsupportedModel on other dtypes, CorruptFile.
        """
        ...

    def files(self) -> list[Path]:
        """Return the files the tensors lie in."""
        ...

    def close(self) -> None:
        """Let go of everything held; the source cannot be used afterwards."""
        ...


@runtime_checkable
class EncodedSource(WeightSource, Protocol):
    """A checkpoint that can hand out quantized tensors as they are.

    A source that changes tensors while it reads them is none.
    """

    def encoding(self, name: str) -> str | None:
        """Return the format that a tensor's codes fit, see `quantization.formats`.

        "other" where none does, None where it has no codes; only GGUF files have. Does not read it.
        """
        ...

    def read_encoded(self, name: str) -> Encoded | None:
        """Return a tensor as it is stored, or None where it is not quantized.

        Rows are in Hugging Face order. Raises ParameterMismatch if unknown, CorruptFile.
        """
        ...
