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
import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, ParameterMismatch
from mlc_llm.quantization.encoded import GroupCodes
from mlc_llm.quantization.formats import OTHER_ENCODING
from mlc_llm.weights.gguf_architectures import ARCHITECTURES
from mlc_llm.weights.gguf_codes import FORMATS, decode_blocks
from mlc_llm.weights.gguf_config import MAX_EXPERTS, build_config, find_architecture
from mlc_llm.weights.gguf_file import UNQUANTIZED, GGUFFile, GGUFTensor
from mlc_llm.weights.gguf_parts import Architecture, Change

__all__ = ["ARCHITECTURES", "GGUFSource"]

# Tables a program can compute from the configuration; not parameters.
_TABLES = re.compile(r"^(rope_freqs|rope_factors_(long|short)|(blk\.\d+\.)?attn_rot_embd)\.weight$")
_NUMBER = re.compile(r"(?<=^blk\.)\d+(?=\.)")


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
        for tensor in self._file.tensors.values():
            if not _TABLES.match(tensor.name):
                self._stored.update(_huggingface_names(tensor, architecture))

    def names(self) -> list[str]:
        """Return the Hugging Face names of all parameters."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises ParameterMismatch if unknown."""
        stored = self._find(name)
        shape = stored.tensor.shape
        if stored.change == "transposed" and len(shape) == 2:
            return shape[::-1]
        return (1, *shape) if stored.change == "flat" and len(shape) == 1 else shape

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor as Hugging Face has it, dequantized to float32 where it must be."""
        stored = self._find(name)
        values = self._file.read_tensor(stored.tensor)
        match stored.change:
            case "plus_one":
                return values.astype(np.float32) - np.float32(1)
            case "transposed" if values.ndim == 2:
                return np.ascontiguousarray(values.T)
            case "flat":
                return values.reshape(self.shape(name))
        return self._in_order(values, stored.change, name)

    def encoding(self, name: str) -> str | None:
        """Return the format that a tensor's codes fit, or OTHER_ENCODING; None for plain ones."""
        stored = self._find(name)
        kind = stored.tensor.type.name
        if kind in UNQUANTIZED or len(stored.tensor.shape) != 2:
            return None
        return (
            OTHER_ENCODING if stored.change == "transposed" else FORMATS.get(kind, OTHER_ENCODING)
        )

    def read_encoded(self, name: str) -> GroupCodes | None:
        """Return a tensor's codes in Hugging Face row order, None where they cannot be kept."""
        stored = self._find(name)
        tensor, change = stored.tensor, stored.change
        kind = tensor.type
        if kind.name not in FORMATS or len(tensor.shape) != 2 or change == "transposed":
            return None
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = self._file.map_tensor(tensor).reshape(-1, block_bytes)
        decoded = decode_blocks(blocks, kind.name, tensor.shape[0])
        minimum = decoded.minimum
        return dataclasses.replace(
            decoded,
            codes=self._in_order(decoded.codes, change, name),
            scale=self._in_order(decoded.scale, change, name),
            minimum=None if minimum is None else self._in_order(minimum, change, name),
        )

    def _in_order(self, rows: NDArray[Any], change: Change | None, name: str) -> NDArray[Any]:
        """Return rows as Hugging Face orders them."""
        match change:
            case "q_halves":
                return _restore_halves(rows, self.config["num_attention_heads"], name)
            case "k_halves":
                return _restore_halves(rows, self.config["num_key_value_heads"], name)
            case "qkv_groups":
                return _restore_groups(rows, self.config["num_attention_heads"], name)
        return rows

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

    Stacked experts become one tensor each.
    """
    stem, _, kind = tensor.name.rpartition(".")
    number = _NUMBER.search(stem)
    pattern = stem if number is None else f"blk.{{layer}}{stem[number.end() :]}"
    name = architecture.tensors.get(pattern) if kind in ("weight", "bias") else None
    if name is None:
        return {tensor.name: _Stored(tensor, None)}
    name = name.replace("{layer}", number[0] if number else "") + f".{kind}"
    change = architecture.changes.get(pattern)
    if change == "plus_one" and kind == "bias":
        change = None
    if "{expert}" not in name:
        return {name: _Stored(tensor, change)}
    if len(tensor.shape) < 2 or tensor.shape[0] > MAX_EXPERTS:
        raise CorruptFile(f"{tensor.path} has experts {tensor.name} of shape {list(tensor.shape)}")
    return {
        name.replace("{expert}", str(expert)): _Stored(part, change)
        for expert, part in enumerate(tensor.split())
    }


def _restore_halves(tensor: NDArray[Any], num_heads: int, name: str) -> NDArray[Any]:
    """Undo the interleaving of q and k rows: (x0, y0, x1, y1, ...) back to (x0, x1, ..., y0, ...).

    tensor: (heads * head_dim, ...); rotary position embedding pairs row i with i + head_dim / 2.
    """
    rows, *rest = tensor.shape
    if rows % (2 * num_heads):
        raise ParameterMismatch(f"{name} has {rows} rows, which {num_heads} heads cannot share")
    paired = tensor.reshape(num_heads, rows // num_heads // 2, 2, *rest)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(tensor.shape)


def _restore_groups(tensor: NDArray[Any], num_heads: int, name: str) -> NDArray[Any]:
    """Sort rows of all q, all k, all v back into q, k and v of each head."""
    rows, *rest = tensor.shape
    if rows % (3 * num_heads):
        raise ParameterMismatch(f"{name} has {rows} rows, which {num_heads} heads cannot share")
    sorted_apart = tensor.reshape(3, num_heads, rows // (3 * num_heads), *rest)
    return np.ascontiguousarray(sorted_apart.swapaxes(0, 1)).reshape(tensor.shape)
