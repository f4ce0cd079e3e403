"""Model configurations: what every decoder has, read from Hugging Face or from an artifact.

Knows field names of both and the derivations they share; families add their own fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from mlc_llm.errors import CorruptFile, OptionError, UnsupportedModel
from mlc_llm.models.checking import check_fields
from mlc_llm.nn.activations import ACTIVATIONS
from mlc_llm.nn.rope import SUPPORTED_SCALINGS, RopeConfig, scaling_kind

Config = TypeVar("Config", bound="DecoderConfig")

# Larger chunks gain nothing on any device we know and cost temporary memory.
DEFAULT_PREFILL_CHUNK = 2048
# Where a sliding-window model names no context window.
DEFAULT_CONTEXT = 32768
# Far above any model; a damaged file may claim anything, and layers are built one by one.
_LARGEST = {
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 26,
    "vocab_size": 1 << 26,
}
KV_DTYPES = ("auto", "float16", "float32", "int8")
_OVERRIDES = (
    "context_window_size",
    "sliding_window_size",
    "prefill_chunk_size",
    "attention_sink_size",
    "max_batch_size",
    "kv_cache_dtype",
)


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and limits of a decoder; the fields of MLC LLM's `model_config` and a few of ours.

    ALIASES: other names that `config.json` or MLC LLM's `model_config` of the family give a field;
    the first of them is written to `model_config` as well. DEFAULTS: what holds where neither says
    anything, under names of either. partial_rotary_factor: the share of `head_dim` that is rotated.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    rms_norm_eps: float
    vocab_size: int
    num_key_value_heads: int
    head_dim: int
    position_embedding_base: float
    context_window_size: int
    prefill_chunk_size: int
    sliding_window_size: int = -1
    attention_sink_size: int = -1
    tie_word_embeddings: bool = False
    rope_scaling: dict[str, Any] | None = None
    hidden_act: str = "silu"
    partial_rotary_factor: float = 1.0
    tensor_parallel_shards: int = 1
    pipeline_parallel_stages: int = 1
    max_batch_size: int = 128
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_hidden_layers",
            "vocab_size",
            "num_key_value_heads",
            "head_dim",
            "context_window_size",
            "prefill_chunk_size",
            "max_batch_size",
        ):
            value, largest = getattr(self, name), _LARGEST.get(name, 1 << 31)
            if not 1 <= value <= largest:
                raise CorruptFile(
                    f"model configuration: {name} must be from 1 to {largest:,}, is {value!r:.40}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModel(
                f"{self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly"
            )
        if not 0 <= self.partial_rotary_factor <= 1:
            raise CorruptFile(
                f"model configuration: partial_rotary_factor is {self.partial_rotary_factor!r}"
            )
        if any(rope.rotary_dim % 2 for rope in self.ropes):
            raise UnsupportedModel(
                f"an even number of dimensions must be rotated, not {self.rotary_dim} of a head "
                f"of {self.head_dim}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UnsupportedModel(
                f"activation {self.hidden_act!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, dict):
            raise CorruptFile(f"model configuration: rope_scaling is {self.rope_scaling!r:.80}")
        if scaling_kind(self.rope_scaling) not in SUPPORTED_SCALINGS:
            raise UnsupportedModel(
                f"RoPE scaling {scaling_kind(self.rope_scaling)!r} is not supported; "
                f"supported: {', '.join(SUPPORTED_SCALINGS)}"
            )
        for rope in self.ropes:
            rope.inverse_frequencies()  # raises where a value is missing
        for name in ("tensor_parallel_shards", "pipeline_parallel_stages"):
            if getattr(self, name) != 1:
                raise OptionError(
                    f"{name}={getattr(self, name)} is not supported on this device; use 1"
                )
        if self.kv_cache_dtype not in KV_DTYPES:
            raise OptionError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is not one of {', '.join(KV_DTYPES)}"
            )

    @property
    def rotary_dim(self) -> int:
        """Return how many dimensions of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the rotary embeddings of the model, none where positions enter otherwise."""
        base, context = self.position_embedding_base, self.context_window_size
        return (RopeConfig(base, self.rotary_dim, self.rope_scaling, context),)

    def rope_of(self, layer: int) -> int | None:
        """Return which of `ropes` a layer uses, None for none."""
        del layer
        return 0 if self.ropes else None

    @property
    def qkv_features(self) -> int:
        """Return the width of the fused q, k and v."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    def window_of(self, layer: int) -> int:
        """Return how many tokens a query of `layer` sees, itself included; -1 for all."""
        del layer
        return self.sliding_window_size if self.sliding_window_size > 0 else -1

    def kv_dtype(self, model_dtype: str) -> str:
        """Return the dtype of KV pages: float16, or float32 in float32 models, unless set."""
        if self.kv_cache_dtype != "auto":
            return self.kv_cache_dtype
        return "float32" if model_dtype == "float32" else "float16"

    def to_json(self) -> dict[str, Any]:
        """Return `model_config` as an artifact stores it."""
        values = dataclasses.asdict(self)
        return {**values, **{names[0]: values[name] for name, names in self.ALIASES.items()}}

    def with_overrides(self: Config, overrides: Mapping[str, Any]) -> Config:
        """Return a copy with compile-time settings replaced. Raises OptionError."""
        for name, value in overrides.items():
            if name not in _OVERRIDES:
                raise OptionError(
                    f"override {name!r} is not known; known: {', '.join(sorted(_OVERRIDES))}"
                )
            allows_off = name in ("sliding_window_size", "attention_sink_size")
            if name != "kv_cache_dtype" and (
                not isinstance(value, int)
                or isinstance(value, bool)
                or value < (-1 if allows_off else 1)
            ):
                raise OptionError(f"override {name}={value!r} must be a positive whole number")
        merged = {**overrides}
        context = merged.get("context_window_size", self.context_window_size)
        if "prefill_chunk_size" not in merged:
            merged["prefill_chunk_size"] = min(self.prefill_chunk_size, context)
        return dataclasses.replace(self, **merged)

    @classmethod
    def from_huggingface(cls: type[Config], config: Mapping[str, Any]) -> Config:
        """Build from the content of `config.json`. Raises CorruptFile or UnsupportedModel."""
        return cls(**cls.huggingface_fields(cls._with_own_names(config)))

    @classmethod
    def _with_own_names(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields, those under other names also under ours, and defaults."""
        values = dict(config)
        for name, names in cls.ALIASES.items():
            found = [values[other] for other in names if values.get(other) is not None]
            if values.get(name) is None and found:
                values[name] = found[0]
        for name, value in cls.DEFAULTS.items():
            if values.get(name) is None:
                values[name] = value
        return values

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments; families extend this."""
        heads = take_int(config, "num_attention_heads")
        hidden_size = take_int(config, "hidden_size")
        context = take_int(config, "max_position_embeddings", "max_sequence_length")
        rope = read_rope(config, context)
        return {
            "hidden_size": hidden_size,
            "intermediate_size": take_int(config, "intermediate_size"),
            "num_attention_heads": heads,
            "num_hidden_layers": take_int(config, "num_hidden_layers"),
            "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-6),
            "vocab_size": take_int(config, "vocab_size"),
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or hidden_size // max(heads, 1),
            "position_embedding_base": rope.base,
            "rope_scaling": rope.scaling,
            "partial_rotary_factor": rope.partial_factor,
            "context_window_size": context,
            "prefill_chunk_size": min(context, DEFAULT_PREFILL_CHUNK),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "hidden_act": config.get("hidden_act") or "silu",
        }

    @classmethod
    def from_json(cls: type[Config], model_config: Mapping[str, Any]) -> Config:
        """Build from an artifact's `model_config`, ours or MLC LLM's. Raises CorruptFile."""
        model_config = cls._with_own_names(model_config)
        known = {f.name for f in dataclasses.fields(cls)}
        values = {name: value for name, value in model_config.items() if name in known}
        heads = take_int(model_config, "num_attention_heads")
        values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
        hidden_size = take_int(model_config, "hidden_size")
        values["head_dim"] = values.get("head_dim") or hidden_size // max(heads, 1)
        values["position_embedding_base"] = float(
            values.get("position_embedding_base") or model_config.get("rope_theta") or 10000.0
        )
        if (values.get("context_window_size") or -1) < 1:
            values["context_window_size"] = DEFAULT_CONTEXT
        chunk = values.get("prefill_chunk_size") or -1
        context = values["context_window_size"]
        values["prefill_chunk_size"] = min(chunk if chunk > 0 else DEFAULT_PREFILL_CHUNK, context)
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            raise CorruptFile(f"model_config lacks {', '.join(missing)}; run gen_config again")
        return cls(**values)


def take_int(config: Mapping[str, Any], *names: str) -> int:
    """Return the first of `names` in `config` as a positive int. Raises CorruptFile."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CorruptFile(f"configuration: {name} must be a positive int, is {value!r}")
            return value
    raise CorruptFile(f"configuration lacks {' or '.join(names)}; is this a language model?")


@dataclass(frozen=True)
class RopeFields:
    """What a `config.json` says of its rotary embedding."""

    base: float
    scaling: dict[str, Any] | None
    partial_factor: float


def join_text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration with the fields of its `text_config`, if it has one, beside its own.

    Models that see images have those of their text part there. What stands beside them counts,
    save null and limits of -1, which MLC LLM writes where they are those of the text part.
    """
    given = {
        name: value
        for name, value in config.items()
        if value is not None and not (value == -1 and name in _OVERRIDES)
    }
    return {**config["text_config"], **given} if config.get("text_config") else config


def read_rope(config: Mapping[str, Any], context: int, base: float = 10000.0) -> RopeFields:
    """Read the rotary embedding; `base` where none is named. Raises CorruptFile."""
    # transformers 5 writes `rope_parameters`, older releases `rope_theta` and `rope_scaling`.
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise CorruptFile(f"configuration: rope_scaling is {found!r:.80}")
    scaling = dict(found)
    try:
        theta = float(scaling.pop("rope_theta", None) or config.get("rope_theta") or base)
        factor = scaling.pop("partial_rotary_factor", None)
        factor = config.get("partial_rotary_factor") if factor is None else factor
        partial_factor = 1.0 if factor is None else float(factor)
    except (TypeError, ValueError) as error:
        raise CorruptFile(f"configuration: rotary embedding: {error}") from None
    if scaling_kind(scaling) == "default":
        return RopeFields(theta, None, partial_factor)
    if scaling.get("original_max_position_embeddings") is None:
        trained = config.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = trained or context
    trained = scaling["original_max_position_embeddings"]
    if scaling_kind(scaling) in ("longrope", "su") and scaling.get("factor") is None and trained:
        scaling["factor"] = context / trained  # of the model, whatever context a library has
    return RopeFields(theta, scaling, partial_factor)
