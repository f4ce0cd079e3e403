"""What llama.cpp's converter does to tensors, undone: a table from changes to their inverses.

Knows arrays and sizes of `config.json`. Which tensor was changed how is data of the architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import ParameterMismatch
from mlc_llm.weights.gguf_parts import Change

Array = NDArray[Any]
Config = Mapping[str, Any]
Shape = tuple[int, ...]
_LARGEST_GROUP = 32  # columns that share a scale, in any format of codes


def _as_it_is(shape: Shape) -> Shape:
    return shape


@dataclass(frozen=True)
class Inverse:
    """How one change is undone.

    values: (stored, configuration, name for messages) -> as Hugging Face has it; shape: the same
    for extents. keeps_codes: whether codes and their scales can be treated as the values they are
    of, by the configuration; else such a matrix is decoded first.
    """

    values: Callable[[Array, Config, str], Array]
    shape: Callable[[Shape], Shape] = _as_it_is
    keeps_codes: Callable[[Config], bool] = lambda config: False


def _always(config: Config) -> bool:
    del config
    return True


def _check_heads(rows: Array, num_heads: int, parts: int, name: str) -> None:
    """Raise ParameterMismatch unless each head has the same number of rows in each part."""
    if len(rows) % (parts * num_heads):
        raise ParameterMismatch(
            f"{name} has {len(rows)} rows, which {num_heads} heads cannot share"
        )


def _restore_halves(heads_field: str) -> Callable[[Array, Config, str], Array]:
    """Undo the interleaving of q or k: rows (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, ...).

    Rotary position embedding pairs row i of a head with i + head_dim / 2.
    """

    def restore(rows: Array, config: Config, name: str) -> Array:
        heads = config[heads_field]
        if len(rows) % (2 * heads):
            raise ParameterMismatch(
                f"{name} has {len(rows)} rows, which {heads} heads cannot share"
            )
        paired = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
        return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)

    return restore


def _restore_groups(rows: Array, config: Config, name: str) -> Array:
    """Sort rows of all q, all k, all v back into q, k and v of each head."""
    heads = config["num_attention_heads"]
    _check_heads(rows, heads, 3, name)
    sorted_apart = rows.reshape(3, heads, len(rows) // (3 * heads), *rows.shape[1:])
    return np.ascontiguousarray(sorted_apart.swapaxes(0, 1)).reshape(rows.shape)


def _subtract_one(values: Array, config: Config, name: str) -> Array:
    del config, name
    result: Array = values.astype(np.float32) - np.float32(1)
    return result


def _transpose(values: Array, config: Config, name: str) -> Array:
    del config, name
    return np.ascontiguousarray(values.swapaxes(-1, -2)) if values.ndim > 1 else values


def _reshape(shape_of: Callable[[Shape], Shape]) -> Inverse:
    return Inverse(lambda values, config, name: values.reshape(shape_of(values.shape)), shape_of)


def _transposed_shape(shape: Shape) -> Shape:
    return (*shape[:-2], *shape[:-3:-1])


def _group_heads(rows: Array, config: Config, name: str) -> Array:
    """Undo the tiling of value heads of linear attention.

    Stored is the first value head of each key head, then the second of each; Hugging Face has all
    value heads of the first key head, then those of the second.
    """
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    _check_heads(rows, values, 1, name)
    tiled = rows.reshape(values // keys, keys, len(rows) // values, *rows.shape[1:])
    return np.ascontiguousarray(tiled.swapaxes(0, 1)).reshape(rows.shape)


def _group_last_heads(rows: Array, config: Config, name: str) -> Array:
    """Undo the tiling of rows of value heads that follow rows of queries and keys."""
    count = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    if len(rows) <= count:
        raise ParameterMismatch(f"{name} has {len(rows)} rows, {count} of them for values")
    return np.concatenate([rows[:-count], _group_heads(rows[-count:], config, name)])


def _group_columns(rows: Array, config: Config, name: str) -> Array:
    """Undo the tiling of value heads among the columns of a matrix, or of their scales."""
    return np.ascontiguousarray(_group_heads(rows.T, config, name).T)


def _has_whole_groups(config: Config) -> bool:
    return bool(config["linear_value_head_dim"] % _LARGEST_GROUP == 0)


def _to_decay_log(values: Array, config: Config, name: str) -> Array:
    """Return what -exp() was taken of."""
    del config, name
    with np.errstate(all="ignore"):  # quantizing finds what is no number
        logs: Array = np.log(-values.astype(np.float64)).astype(np.float32)
    return logs


def _to_grouped_decay_log(values: Array, config: Config, name: str) -> Array:
    return _group_heads(_to_decay_log(values, config, name), config, name)


def _convolution_shape(shape: Shape) -> Shape:
    return (shape[0], 1, *shape[1:])


def _to_grouped_convolution(values: Array, config: Config, name: str) -> Array:
    return _group_last_heads(values, config, name)[:, None]


INVERSES: dict[Change, Inverse] = {
    "q_halves": Inverse(_restore_halves("num_attention_heads"), keeps_codes=_always),
    "k_halves": Inverse(_restore_halves("num_key_value_heads"), keeps_codes=_always),
    "qkv_groups": Inverse(_restore_groups, keeps_codes=_always),
    "plus_one": Inverse(_subtract_one),
    "transposed": Inverse(_transpose, _transposed_shape),
    "flat": _reshape(lambda shape: (1, *shape) if len(shape) == 1 else shape),
    "flat_row": _reshape(lambda shape: (1, 1, shape[-1])),
    "tiled_rows": Inverse(_group_heads, keeps_codes=_always),
    "tiled_last_rows": Inverse(_group_last_heads, keeps_codes=_always),
    "tiled_columns": Inverse(_group_columns, keeps_codes=_has_whole_groups),
    "decay": Inverse(_to_decay_log),
    "convolution": _reshape(_convolution_shape),
    "tiled_decay": Inverse(_to_grouped_decay_log),
    "tiled_convolution": Inverse(_to_grouped_convolution, _convolution_shape),
}
