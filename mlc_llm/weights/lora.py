"""A PEFT LoRA adapter merged into a checkpoint while it is read: W + scaling * B A.

Hu et al. 2021, section 4.1; rank-stabilized scaling: Kalajdzievski 2023. Every tensor of the
adapter must find its weight; what cannot be merged into one weight is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import read_json_object
from mlc_llm.errors import CorruptFile, ModelNotFound, ParameterMismatch, UnsupportedModel
from mlc_llm.weights.safetensors_file import read_safetensors
from mlc_llm.weights.source import WeightSource
from mlc_llm.weights.stored import StoredTensor
from mlc_llm.weights.torch_file import read_torch_file

ADAPTER_CONFIG_NAME = "adapter_config.json"
_WEIGHTS: dict[str, Callable[[Path], Mapping[str, StoredTensor]]] = {
    "adapter_model.safetensors": read_safetensors,
    "adapter_model.bin": read_torch_file,
}
_PREFIX = "base_model.model."
_READABLE = ("float64", "float32", "float16", "bfloat16")
# Settings that change what an adapter computes, and that we do not have.
_REFUSED = (
    *("use_dora", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("megatron_config", "use_qalora", "lora_bias", "alora_invocation_tokens", "arrow_config"),
)
# Endings of tensor names. Embeddings multiply in the other order.
_ENDINGS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
_SAVED = ".modules_to_save"
_TIED = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: its configuration and tensors."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    weights_path: Path


@dataclass(frozen=True)
class _Update:
    """What happens to one weight: B A is added, or another tensor takes its place."""

    down: StoredTensor
    up: StoredTensor | None = None
    scaling: float = 1.0
    is_transposed: bool = False


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter's configuration and headers.

    Raises ModelNotFound, CorruptFile, and UnsupportedModel naming a setting that is not supported.
    """
    path = directory / ADAPTER_CONFIG_NAME
    if not path.is_file():
        raise ModelNotFound(
            f"{directory} is no LoRA adapter: it has no {ADAPTER_CONFIG_NAME}; give the directory "
            "that PEFT saved"
        )
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(
            f"{path}: adapters of type {config.get('peft_type')!r:.40} cannot be merged, LORA can"
        )
    for name in _REFUSED:
        if config.get(name):
            raise UnsupportedModel(f"{path}: {name} is not supported; merge the adapter with PEFT")
    if config.get("bias", "none") != "none":
        raise UnsupportedModel(
            f"{path}: bias {config['bias']!r:.40} is not supported; merge the adapter with PEFT"
        )
    for name, read in _WEIGHTS.items():
        if (directory / name).is_file():
            return Adapter(directory, config, read(directory / name), directory / name)
    raise ModelNotFound(f"{directory} has no {' or '.join(_WEIGHTS)}")


class LoraSource:
    """A checkpoint with an adapter merged into it; satisfies WeightSource, owns what it wraps."""

    def __init__(self, base: WeightSource, adapter: Adapter) -> None:
        """Find the weight of every tensor of the adapter.

        Raises ParameterMismatch naming tensors that find none or do not fit, UnsupportedModel.
        """
        self.config = base.config
        self._base, self._adapter = base, adapter
        self._updates = _find_updates(adapter, base)
        for name, update in self._updates.items():
            _check_update(name, update, base.shape(name), adapter)
        if base.config.get("tie_word_embeddings"):
            tied = [name for name in _TIED if name in self._updates]
            if tied:
                raise UnsupportedModel(
                    f"{adapter.directory} changes {', '.join(tied)}, which the model uses for "
                    "input and output at once; merge the adapter with PEFT and untie them"
                )

    def names(self) -> list[str]:
        """Return the names of all tensors of the checkpoint."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises ParameterMismatch if unknown."""
        return self._base.shape(name)

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor, float32 where the adapter changes it."""
        update = self._updates.get(name)
        if update is None:
            return self._base.read(name)
        down = update.down.read().astype(np.float32)
        if update.up is None:
            return down
        up = update.up.read().astype(np.float32)
        # A damaged adapter may hold NaN; quantizing finds it.
        with np.errstate(all="ignore"):
            weight = self._base.read(name).astype(np.float32)
            change = up @ down * np.float32(update.scaling)
            weight += change.T if update.is_transposed else change
        return weight

    def files(self) -> list[Path]:
        """Return the files of checkpoint and adapter."""
        adapter = self._adapter
        return [*self._base.files(), adapter.directory / ADAPTER_CONFIG_NAME, adapter.weights_path]

    def close(self) -> None:
        """Close the checkpoint."""
        self._updates = {}
        self._base.close()


def _find_updates(adapter: Adapter, base: WeightSource) -> dict[str, _Update]:
    known = set(base.names())
    pairs: dict[str, dict[str, StoredTensor]] = {}
    kinds: dict[str, tuple[str, bool]] = {}
    updates: dict[str, _Update] = {}
    lost = []
    for name, tensor in adapter.tensors.items():
        if tensor.dtype not in _READABLE:
            raise UnsupportedModel(
                f"{name} in {tensor.path} is {tensor.dtype}, not one of {', '.join(_READABLE)}"
            )
        ending = next((e for e in _ENDINGS if name.endswith(e)), None)
        if ending is not None:
            module = name.removesuffix(ending)
            side, is_embedding = _ENDINGS[ending]
            weight = _find_weight(f"{module}.weight", known)
        else:
            weight = _find_weight(name.replace(_SAVED + ".default", "").replace(_SAVED, ""), known)
        if weight is None or (ending is None and not _is_saved(weight, adapter)):
            lost.append(name)
        elif ending is None:
            updates[weight] = _Update(tensor)
        else:
            pairs.setdefault(weight, {})[side] = tensor
            kinds[weight] = module, is_embedding
    lost += [next(iter(p.values())).path.name + ":" + w for w, p in pairs.items() if len(p) < 2]
    if lost:
        raise ParameterMismatch(
            f"{adapter.weights_path} has tensors that fit no weight of the model: "
            f"{', '.join(lost[:5])}{f' and {len(lost) - 5} more' if len(lost) > 5 else ''}; "
            "is it an adapter of this model?"
        )
    if both := sorted(set(updates) & set(pairs)):
        raise ParameterMismatch(f"{adapter.weights_path} changes {both[0]} in two ways")
    for weight, pair in pairs.items():
        module, is_embedding = kinds[weight]
        transposed = is_embedding or _flag(adapter, "fan_in_fan_out")
        scaling = _scaling(adapter, module, pair["A"].shape[0] if pair["A"].shape else 0)
        updates[weight] = _Update(pair["A"], pair["B"], scaling, transposed)
    if not updates:
        raise CorruptFile(f"{adapter.weights_path} has no tensors; fetch it again")
    return updates


def _find_weight(name: str, known: set[str]) -> str | None:
    """Return the checkpoint's name of a weight: some leave out what all names begin with."""
    plain = name.removeprefix(_PREFIX)
    for candidate in (plain, plain.partition(".")[2], f"model.{plain}", f"transformer.{plain}"):
        if candidate in known:
            return candidate
    return None


def _is_saved(weight: str, adapter: Adapter) -> bool:
    """Return whether `modules_to_save` names the module of a weight or one around it."""
    saved = adapter.config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise CorruptFile(f"{adapter.directory}: modules_to_save is {saved!r:.60}, not a list")
    parts = weight.split(".")
    return any(isinstance(name, str) and _runs_in(name.split("."), parts) for name in saved)


def _runs_in(part: list[str], whole: list[str]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def _flag(adapter: Adapter, name: str) -> bool:
    value = adapter.config.get(name, False)
    if not isinstance(value, bool | None):
        raise CorruptFile(f"{adapter.directory}: {name} is {value!r:.40}, not true or false")
    return bool(value)


def _scaling(adapter: Adapter, module: str, rank: int) -> float:
    """Return what B A is multiplied with: alpha / r, or alpha / sqrt(r)."""
    expected = _of_module(adapter, "r", "rank_pattern", module, 8)
    alpha = _of_module(adapter, "lora_alpha", "alpha_pattern", module, 8)
    if rank != expected:
        raise ParameterMismatch(
            f"{adapter.weights_path}: {module} has rank {rank}, {ADAPTER_CONFIG_NAME} says "
            f"{expected:g}; do the two belong together?"
        )
    return alpha / math.sqrt(rank) if _flag(adapter, "use_rslora") else alpha / rank


def _of_module(adapter: Adapter, name: str, pattern: str, module: str, default: int) -> float:
    """Return a number of the configuration, or the one that a pattern has for a module.

    Patterns are names of modules, or their ends; regular expressions are refused.
    """
    value: Any = adapter.config.get(name, default)
    patterns = adapter.config.get(pattern) or {}
    where = adapter.directory / ADAPTER_CONFIG_NAME
    if not isinstance(patterns, dict):
        raise CorruptFile(f"{where}: {pattern} is {patterns!r:.60}, not an object")
    for key, special in patterns.items():
        if not key.replace(".", "").replace("_", "").isalnum():
            raise UnsupportedModel(f"{where}: {pattern} {key!r:.60} is no name of a module")
        if f".{module}".endswith(f".{key}"):
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise CorruptFile(f"{where}: {name} is {value!r:.40}, not a positive number")
    return float(value)


def _check_update(name: str, update: _Update, shape: tuple[int, ...], adapter: Adapter) -> None:
    if update.up is None:
        found = update.down.shape
    else:
        down, up = update.down.shape, update.up.shape
        if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
            raise ParameterMismatch(
                f"{adapter.weights_path}: A {list(down)} and B {list(up)} of {name} do not fit"
            )
        found = (down[1], up[0]) if update.is_transposed else (up[0], down[1])
    if found != shape:
        raise ParameterMismatch(
            f"{adapter.weights_path} changes {name} as if it had shape {list(found)}, it has "
            f"{list(shape)}; is it an adapter of this model?"
        )
