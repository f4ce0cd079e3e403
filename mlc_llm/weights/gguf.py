"""GGUF checkpoints under Hugging Face names: tensor names, row order and `config.json` content.

Architectures are data of gguf_architectures.py. The container is read by gguf_file.py; the
tokenizer is rebuilt by prepare/gguf_tokenizer.py.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, ParameterMismatch
from mlc_llm.quantization.encoded import GroupCodes
from mlc_llm.quantization.formats import OTHER_ENCODING
from mlc_llm.weights.gguf_architectures import ARCHITECTURES
from mlc_llm.weights.gguf_changes import INVERSES
from mlc_llm.weights.gguf_codes import FORMATS, decode_blocks
from mlc_llm.weights.gguf_config import MAX_EXPERTS, build_config, find_architecture
from mlc_llm.weights.gguf_file import UNQUANTIZED, GGUFFile, GGUFTensor
from mlc_llm.weights.gguf_metadata import MetadataReader
from mlc_llm.weights.gguf_parts import Architecture, Change
from mlc_llm.weights.gguf_ranking import ANSWERS_NAME, find_score_tokens

__all__ = ["ARCHITECTURES", "GGUFSource"]

# Tables a program can compute from the configuration; not parameters.
_TABLES = re.compile(r"^(rope_freqs|rope_factors_(long|short)|(blk\.\d+\.)?attn_rot_embd)\.weight$")
# Where names have the number of an expert, or the letter of another part of a stacked tensor.
_PART = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"(?<=^blk\.)\d{1,9}(?=\.)")


@dataclass(frozen=True)
class _Stored:
    """Where a parameter lies: a tensor of the file, or one expert's part of it."""

    tensor: GGUFTensor
    change: Change | None


class GGUFSource:
    """A `.gguf` file (or all parts of a split one); satisfies EncodedSource."""

    def __init__(self, path: Path) -> None:
        """Read headers and rebuild the configuration.

        Raises CorruptFile, or UnsupportedModel naming an architecture or feature we do not know.
        """
        self._file = GGUFFile(path)
        name, architecture = find_architecture(self._file)
        self.config: dict[str, Any] = build_config(self._file, name, architecture)
        self._stored: dict[str, _Stored] = {}
        further = MetadataReader(self._file, name).further_layers()
        tensors = dict(self._file.tensors)
        if find_score_tokens(self._file) is not None:
            tensors.pop(ANSWERS_NAME, None)  # rows of the embeddings
        for tensor in tensors.values():
            if not _TABLES.match(tensor.name) and _layer_of(tensor.name) not in further:
                self._stored.update(_huggingface_names(tensor, architecture))

    def names(self) -> list[str]:
        """Return the Hugging Face names of all parameters."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises ParameterMismatch if unknown."""
        stored = self._find(name)
        shape = stored.tensor.shape
        return shape if stored.change is None else INVERSES[stored.change].shape(shape)

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor as Hugging Face has it, dequantized to float32 where it must be."""
        stored = self._find(name)
        values = self._file.read_tensor(stored.tensor)
        if stored.change is None:
            return values
        return INVERSES[stored.change].values(values, self.config, name)

    def encoding(self, name: str) -> str | None:
        """Return the format that a tensor's codes fit, or OTHER_ENCODING; None for plain ones."""
        stored = self._find(name)
        kind = stored.tensor.type.name
        if kind in UNQUANTIZED or len(stored.tensor.shape) != 2:
            return None
        return FORMATS.get(kind, OTHER_ENCODING) if self._keeps_codes(stored) else OTHER_ENCODING

    def read_encoded(self, name: str) -> GroupCodes | None:
        """Return a tensor's codes in Hugging Face row order, None where they cannot be kept."""
        stored = self._find(name)
        tensor, kind = stored.tensor, stored.tensor.type
        if kind.name not in FORMATS or len(tensor.shape) != 2 or not self._keeps_codes(stored):
            return None
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = self._file.map_tensor(tensor).reshape(-1, block_bytes)
        decoded = decode_blocks(blocks, kind.name, tensor.shape[0])
        if stored.change is None:
            return decoded
        undo, minimum = INVERSES[stored.change].values, decoded.minimum
        return dataclasses.replace(
            decoded,
            codes=undo(decoded.codes, self.config, name),
            scale=undo(decoded.scale, self.config, name),
            minimum=None if minimum is None else undo(minimum, self.config, name),
        )

    def _keeps_codes(self, stored: _Stored) -> bool:
        return stored.change is None or INVERSES[stored.change].keeps_codes(self.config)

    def files(self) -> list[Path]:
        """Return the parts of the file."""
        return self._file.parts

    def close(self) -> None:
        """Forget the headers; mappings live as long as the arrays handed out."""
        self._stored = {}

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise ParameterMismatch(f"{self._file.path} has no tensor for {name}")
        return self._stored[name]


def _huggingface_names(tensor: GGUFTensor, architecture: Architecture) -> dict[str, _Stored]:
    """Translate a name; an unknown one stays, so that the converter reports it as surplus.

    Stacked experts, and parts of other stacked tensors, become one tensor each.
    """
    number = _NUMBER.search(tensor.name)
    whole = _pattern(tensor.name, number)
    pattern, _, kind = whole.rpartition(".")
    name = architecture.exact.get(whole)
    if name is not None:
        pattern = whole
    elif kind in ("weight", "bias") and pattern in architecture.tensors:
        name = f"{architecture.tensors[pattern]}.{kind}"
    else:
        return {tensor.name: _Stored(tensor, None)}
    name = name.replace("{layer}", number[0] if number else "")
    change = architecture.changes.get(pattern)
    if change == "plus_one" and kind == "bias":
        change = None
    place = _PART.search(name)
    if place is None:
        return {name: _Stored(tensor, change)}
    count, letters = tensor.shape[0], "" if place[1] == "expert" else place[1]
    if len(tensor.shape) < 2 or count > MAX_EXPERTS or (letters and count != len(letters)):
        what = "parts" if letters else "experts"
        raise CorruptFile(f"{tensor.path} has {what} {tensor.name} of shape {list(tensor.shape)}")
    return {
        name.replace(place[0], letters[part] if letters else str(part)): _Stored(content, change)
        for part, content in enumerate(tensor.split())
    }


def _layer_of(name: str) -> int | None:
    """Return the number of a tensor's block, None for others."""
    number = _NUMBER.search(name)
    return int(number[0]) if number else None


def _pattern(name: str, number: re.Match[str] | None) -> str:
    """Return a name with `{layer}` for the number of its block."""
    return name if number is None else f"blk.{{layer}}{name[number.end() :]}"
