"""Convert a checkpoint into an artifact's weights: read, combine, store, one parameter at a time.

Knows plans and sources. Does not know model families, schemes or file formats; shards.py writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import TensorSpec
from mlc_llm.errors import CorruptFile, ParameterMismatch
from mlc_llm.models.plan import ParamPlan, Stack, concatenate
from mlc_llm.weights.shards import ShardWriter
from mlc_llm.weights.source import EncodedSource, WeightSource

# Raised whenever the bytes written for the same plan and source change.
_FORMAT_VERSION = 1

# Buffers that older checkpoints store although programs compute them.
_NO_PARAMETER = re.compile(
    r"(^|\.)(rotary(_pos)?_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|masked_bias|attn\.bias|position_ids)$"
)
_HEAD_NAME = "lm_head.weight"


@dataclass(frozen=True)
class ConvertSummary:
    """What was written. num_parameters counts the values of the model before quantization."""

    num_tensors: int
    num_parameters: int
    size_bytes: int

    @property
    def bits_per_parameter(self) -> float:
        """Average bits a parameter takes on disk, scales included."""
        return self.size_bytes * 8 / max(1, self.num_parameters)


def convert(
    plan: Sequence[ParamPlan],
    source: WeightSource,
    output: Path,
    progress: Callable[[int, int, str], None],
    unused: tuple[str, ...] = (),
) -> ConvertSummary:
    """Write the weights of `plan` as shards and index into the directory `output`.

    unused: what names of tensors begin with that the model has no use for.
    Names and shapes are checked before anything is written; the index is written last. A run that
    was interrupted continues where it stopped if source and plan are the same. Holds one parameter
    and its stored form at a time. `progress` gets (done, total, parameter name).
    Raises ParameterMismatch, CorruptFile, UnsupportedModel, StorageError.
    """
    names = frozenset(source.names())
    plan = [dataclasses.replace(item, rule=item.rule.fitting(names)) for item in plan]
    _check_names(plan, source, unused)
    for item in plan:
        _check_source_shapes(item, source)
    specs = [spec for item in plan for spec in item.outputs]
    writer = ShardWriter(output, specs, _fingerprint(plan, source))
    progress(0, len(plan), "")
    for done, item in enumerate(plan, start=1):
        if not all(writer.has(spec.name) for spec in item.outputs):
            for spec, array in zip(item.outputs, _make_outputs(item, source), strict=True):
                _check_output(spec, array)
                writer.add(spec, array)
        progress(done, len(plan), item.name)
    summary = ConvertSummary(
        num_tensors=len(specs),
        num_parameters=sum(math.prod(item.shape) for item in plan),
        size_bytes=sum(spec.size_bytes for spec in specs),
    )
    writer.publish(
        {
            "ParamSize": summary.num_tensors,
            "ParamBytes": summary.size_bytes,
            "BitsPerParam": summary.bits_per_parameter,
        }
    )
    return summary


def _make_outputs(item: ParamPlan, source: WeightSource) -> tuple[NDArray[Any], ...]:
    try:
        kept = _keep_encoding(item, source)
        if kept is not None:
            return kept
        parts = [source.read(name) for name in item.rule.sources]
        combined = item.rule.combine(parts)
        del parts
        if combined.shape != item.shape:
            raise ParameterMismatch(_shape_message(item, combined.shape))
        return item.store(combined)
    except CorruptFile as error:
        raise CorruptFile(f"{item.name}: {error}") from error


def _keep_encoding(item: ParamPlan, source: WeightSource) -> tuple[NDArray[Any], ...] | None:
    """Return the outputs made of tensors as the checkpoint quantized them, None if that is not
    possible.
    """
    if item.store_encoded is None or not isinstance(source, EncodedSource):
        return None
    parts = [source.read_encoded(name) for name in item.rule.sources]
    return None if None in parts else item.store_encoded(parts)


def _check_output(spec: TensorSpec, array: NDArray[Any]) -> None:
    if array.shape != spec.shape or str(array.dtype) != spec.dtype:
        raise ParameterMismatch(
            f"{spec} was planned, but {list(array.shape)} {array.dtype} was made; "
            "the plan and the way it stores weights disagree"
        )


def _check_names(plan: Sequence[ParamPlan], source: WeightSource, unused: tuple[str, ...]) -> None:
    """Every tensor of the plan must be there, and no other but known buffers and unused ones."""
    wanted = {name for item in plan for name in item.rule.sources}
    found = set(source.names())
    ignored = {
        name for name in found - wanted if _NO_PARAMETER.search(name) or name.startswith(unused)
    }
    if source.config.get("tie_word_embeddings"):
        ignored.add(_HEAD_NAME)
    missing, surplus = sorted(wanted - found), sorted(found - wanted - ignored)
    surplus = [name for name in surplus if not _adds_nothing(name, source)]
    if missing or surplus:
        raise ParameterMismatch(
            "the checkpoint does not fit the model its configuration describes:"
            + (f" missing {_abbreviate(missing)};" if missing else "")
            + (f" surplus {_abbreviate(surplus)};" if surplus else "")
            + " check that config.json and weights belong together"
        )


def _adds_nothing(name: str, source: WeightSource) -> bool:
    """Return whether a tensor is a bias of zeros: GPTQ checkpoints have them for layers without."""
    return name.endswith(".bias") and len(source.shape(name)) == 1 and not np.any(source.read(name))


def _check_source_shapes(item: ParamPlan, source: WeightSource) -> None:
    """Check shapes without reading, where the way parts are combined is known."""
    combine = item.rule.combine
    if combine is not concatenate and not isinstance(combine, Stack):
        return
    shapes = [source.shape(name) for name in item.rule.sources]
    rows = sum(shape[0] if shape else 0 for shape in shapes)
    shape = (rows, *shapes[0][1:]) if shapes[0] else ()
    wanted = item.shape
    if isinstance(combine, Stack):
        wanted = (item.shape[0] * item.shape[1], *item.shape[2:])
        per_expert = len(shapes) // combine.num_experts
        if shapes != shapes[:per_expert] * combine.num_experts:
            raise ParameterMismatch(_shape_message(item, *dict.fromkeys(shapes)))
        shapes = shapes[:per_expert]
    if shape != wanted or any(other[1:] != shape[1:] for other in shapes):
        raise ParameterMismatch(_shape_message(item, *shapes))


def _shape_message(item: ParamPlan, *shapes: tuple[int, ...]) -> str:
    found = " and ".join(str(list(shape)) for shape in shapes)
    return (
        f"{item.name} must have shape {list(item.shape)}, the checkpoint has {found} "
        f"({_abbreviate(list(item.rule.sources))}); "
        "check that config.json and weights belong together"
    )


def _abbreviate(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _fingerprint(plan: Sequence[ParamPlan], source: WeightSource) -> str:
    """Return a digest of everything the written bytes depend on."""
    files = [(str(path.resolve()), path.stat()) for path in source.files()]
    content = {
        "format": _FORMAT_VERSION,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
        "plan": [
            [item.name, item.rule.sources, [str(spec) for spec in item.outputs]] for item in plan
        ],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
