"""Ways in which checkpoint tensors become parameters, beside joining them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.models.base import Family
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.plan import ParamRule

Parts = Sequence[NDArray[Any]]
Combine = Callable[[Parts], NDArray[Any]]


def transpose(parts: Parts) -> NDArray[Any]:
    """Return an (in, out) matrix as (out, in)."""
    return np.ascontiguousarray(parts[0].T)


def regroup_qkv(num_groups: int, sizes: tuple[int, int, int]) -> Combine:
    """Turn rows that lie group by group, [q; k; v] in each, into all q, all k, all v.

    sizes: rows of q, k and v in a group.
    """
    ends = np.cumsum(sizes)

    def combine(parts: Parts) -> NDArray[Any]:
        (rows,) = parts
        grouped = rows.reshape(num_groups, int(ends[-1]), *rows.shape[1:])
        split = np.split(grouped, ends[:-1], axis=1)
        return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in split])

    return combine


def add_one(parts: Parts) -> NDArray[Any]:
    """Return a norm's weights as what they multiply with, where they are stored less one."""
    return parts[0].astype(np.float32) + np.float32(1)


def normalize_rows(parts: Parts) -> NDArray[Any]:
    """Return a matrix with rows of length one."""
    weight = parts[0].astype(np.float32)
    length = np.linalg.norm(weight, axis=1, keepdims=True)
    return np.asarray(weight / np.maximum(length, np.float32(1e-7)))


def renamed(*pairs: tuple[str, str]) -> Callable[[DecoderConfig, str], ParamRule]:
    """Return the rule of a family whose checkpoints only call parts of names differently.

    pairs: what parameter names contain -> what stands there in a checkpoint, applied in order.
    """

    def rule(config: DecoderConfig, parameter: str) -> ParamRule:
        del config
        name = parameter
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        return ParamRule((name,))

    return rule


def beside_images(text: Family) -> Callable[[DecoderConfig, str], ParamRule]:
    """Return the rule of checkpoints that have a text model as `language_model`, beside images."""

    def rule(config: DecoderConfig, parameter: str) -> ParamRule:
        found = text.rule_for(parameter, config)
        names = tuple(f"language_model.{name}" for name in found.sources)
        return dataclasses.replace(found, sources=names)

    return rule
