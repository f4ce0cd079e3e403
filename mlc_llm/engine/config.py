"""What a user may set of an engine: MLC LLM's `EngineConfig`, checked, and `--overrides` on it.

Knows names, types and what this engine cannot do. Whether a value fits a model or the memory is
decided in `capacity.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.artifact import ChatConfig

Mode = Literal["local", "interactive", "server"]

MODES = ("local", "interactive", "server")
AUTO = "auto"
DEFAULT_MEMORY_UTILIZATION = 0.85
PAGE_SIZE = 16

_CHOICES = {
    "mode": MODES,
    "speculative_mode": ("disable", "small_draft", "eagle", "medusa"),
    "prefix_cache_mode": ("disable", "radix"),
    "prefill_mode": ("hybrid", "chunked"),
    "model_task": (AUTO, "chat", "rerank"),
}
# Least value of each whole number.
_COUNTS = {
    "tensor_parallel_shards": 1,
    "pipeline_parallel_stages": 1,
    "kv_cache_page_size": 1,
    "max_num_sequence": 1,
    "max_total_sequence_length": 1,
    "max_single_sequence_length": 2,
    "prefill_chunk_size": 1,
    "max_history_size": 0,
    "sliding_window_size": -1,
    "attention_sink_size": -1,
    "spec_draft_length": 0,
    "spec_tree_width": 1,
    "prefix_cache_max_num_recycling_seqs": -1,
    "max_queued_requests": 0,
}
_MAY_BE_NONE = {
    "mode",
    "tensor_parallel_shards",
    "pipeline_parallel_stages",
    "max_num_sequence",
    "max_total_sequence_length",
    "max_single_sequence_length",
    "prefill_chunk_size",
    "max_history_size",
    "sliding_window_size",
    "attention_sink_size",
    "prefix_cache_max_num_recycling_seqs",
}
# Fields of the original that this engine cannot honour: the values that mean nothing, and why.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model": ((None,), "the model is named by the engine's first argument or the command line"),
    "model_lib": ((None,), "the library is named by model_lib of the engine, or --model-lib"),
    "additional_models": (([], ()), "draft models and speculation are not supported"),
    "tensor_parallel_shards": ((None, 1), "a model runs on one device only"),
    "pipeline_parallel_stages": ((None, 1), "a model runs on one device only"),
    "kv_cache_page_size": ((PAGE_SIZE,), f"libraries are compiled for pages of {PAGE_SIZE} tokens"),
    "kv_state_kind": ((None,), "it follows from the model"),
    "speculative_mode": (("disable",), "speculation is not supported"),
    "spec_draft_length": ((0,), "speculation is not supported"),
    "spec_tree_width": ((1,), "speculation is not supported"),
}


@dataclass(frozen=True)
class EngineConfig:
    """Capacity and behaviour of an engine; checked when made. Raises OptionError.

    What is None follows from mode, model and free memory:

    mode: local (a few users, at most 8,192 tokens in the cache), interactive (one sequence) or
    server (all the memory may bear); None stands for local. gpu_memory_utilization: share of the
    *free* memory that may be used, 0.85 if None. max_num_sequence: sequences computed at once.
    max_single_sequence_length: tokens of a sequence, answer included; max_total_sequence_length:
    tokens in the KV cache. prefill_chunk_size: tokens of a step.

    Part of the library, so that a value may mean compiling anew, see `compile_overrides`:
    sliding_window_size, attention_sink_size, kv_cache_dtype ("float16", "int8", ...) and opt
    ("O0" to "O3").

    prefix_cache_mode: radix keeps pages of earlier prompts and answers for later requests; disable
    shares nothing. prefix_cache_max_num_recycling_seqs: how much is kept of sequences that have
    ended, counted in sequences of the greatest length; 0 keeps nothing (running sequences still
    share pages), -1 sets no limit, None stands for max_num_sequence. max_history_size: how many
    snapshots of recurrent state are kept for later prompts, in models that have such state; None
    for two a sequence, running or ended, as memory allows. prefill_mode: hybrid lets
    tokens of generating sequences ride in the same step as a piece of a prompt; with chunked, a
    step with prompt tokens has no others, and such steps alternate with generation.

    max_queued_requests: how many requests may wait before further ones are refused.
    request_timeout_s: seconds after which a request ends with an error; None for no limit.
    tool_parser, reasoning_parser: how the model writes calls of tools and marks its thoughts, auto
    for what its chat template shows (docs/tools.md names them). verbose: whether the memory plan is
    shown.

    The other fields are known from MLC LLM and refused unless they say what is so anyway.
    """

    model: str | None = None
    model_lib: str | None = None
    additional_models: list[str | tuple[str, str]] = field(default_factory=list)
    mode: Mode | None = None
    tensor_parallel_shards: int | None = None
    pipeline_parallel_stages: int | None = None
    opt: str | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_page_size: int = PAGE_SIZE
    max_num_sequence: int | None = None
    max_total_sequence_length: int | None = None
    max_single_sequence_length: int | None = None
    prefill_chunk_size: int | None = None
    sliding_window_size: int | None = None
    attention_sink_size: int | None = None
    max_history_size: int | None = None
    kv_state_kind: str | None = None
    speculative_mode: str = "disable"
    spec_draft_length: int = 0
    spec_tree_width: int = 1
    prefix_cache_mode: str = "radix"
    prefix_cache_max_num_recycling_seqs: int | None = None
    prefill_mode: str = "hybrid"
    verbose: bool = True
    kv_cache_dtype: str | None = None
    max_queued_requests: int = 512
    request_timeout_s: float | None = None
    tool_parser: str = AUTO
    reasoning_parser: str = AUTO
    model_task: str = AUTO

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
            self._require(name, is_count, f"a whole number of at least {least}")
        share, timeout = self.gpu_memory_utilization, self.request_timeout_s
        if share is not None:
            is_share = _is_number(share) and 0 < share <= 1
            self._require("gpu_memory_utilization", is_share, "above 0 and at most 1")
        if timeout is not None:
            is_time = _is_number(timeout) and timeout > 0
            self._require("request_timeout_s", is_time, "a number of seconds above 0")
        for name in ("opt", "kv_cache_dtype"):
            value = getattr(self, name)
            self._require(name, value is None or (isinstance(value, str) and value != ""), "text")
        if (self.tool_parser, self.reasoning_parser) != (AUTO, AUTO):
            check_parsers(self.tool_parser, self.reasoning_parser)
        self._require("verbose", isinstance(self.verbose, bool), "true or false")
        single, total = self.max_single_sequence_length, self.max_total_sequence_length
        if single is not None and total is not None and single > total:
            raise OptionError(
                f"max_single_sequence_length={single} is more than max_total_sequence_length="
                f"{total}, but one sequence must fit into the cache; change one of them"
            )
        for name, (harmless, reason) in _REFUSED.items():
            value = getattr(self, name)
            if value not in harmless:
                raise OptionError(f"{name}={value!r} is refused: {reason}; leave it out")

    def check_embeds(self, model: str) -> None:
        """Raise OptionError where a model for embeddings is asked for another task."""
        if self.model_task != AUTO:
            raise OptionError(
                f"model_task is {self.model_task!r}, but {model} is a model for embeddings, and "
                "puts documents in order by these; leave it out"
            )

    def _require(self, name: str, is_valid: bool, wanted: str) -> None:
        value = getattr(self, name)
        if not is_valid and not (value is None and name in _MAY_BE_NONE):
            raise OptionError(f"{name} must be {wanted}, it is {value!r}")

    def with_changes(self, **changes: Any) -> EngineConfig:
        """Return a copy with some fields replaced. Raises OptionError."""
        return dataclasses.replace(self, **changes)


def check_parsers(tool_parser: str, reasoning_parser: str) -> None:
    """Raise OptionError unless there are formats of answers of these names."""
    from mlc_llm.text.answers import AnswerFormats

    AnswerFormats.find(None, "", tool_parser, reasoning_parser)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


# Keys of --overrides of `serve`: the type of each, and its field where that has another name.
SERVE_OVERRIDES: Mapping[str, type] = {
    "max_num_sequence": int,
    "max_total_seq_length": int,
    "context_window_size": int,
    "prefill_chunk_size": int,
    "sliding_window_size": int,
    "attention_sink_size": int,
    "kv_cache_dtype": str,
    "opt": str,
    "gpu_memory_utilization": float,
    "prefix_cache_mode": str,
    "prefix_cache_max_num_recycling_seqs": int,
    "prefill_mode": str,
    "max_queued_requests": int,
    "request_timeout_s": float,
    "tensor_parallel_shards": int,
    "pipeline_parallel_stages": int,
    "max_history_size": int,
    "spec_draft_length": int,
    "spec_tree_width": int,
}
_FIELD_OF_OVERRIDE = {
    "max_total_seq_length": "max_total_sequence_length",
    "context_window_size": "max_single_sequence_length",
}


def apply_overrides(config: EngineConfig, overrides: Mapping[str, Any]) -> EngineConfig:
    """Return `config` with the settings of `--overrides`, which go before its own.

    Raises OptionError for unknown keys and for what `EngineConfig` refuses.
    """
    changes = {}
    for key, value in overrides.items():
        if key not in SERVE_OVERRIDES:
            known = ", ".join(SERVE_OVERRIDES)
            raise OptionError(f"--overrides: unknown key {key!r}; known: {known}")
        changes[_FIELD_OF_OVERRIDE.get(key, key)] = value
    try:
        return config.with_changes(**changes)
    except OptionError as error:
        message = str(error)
        for key, name in _FIELD_OF_OVERRIDE.items():
            message = message.replace(name, key)
        raise OptionError(f"--overrides: {message}") from None


def compile_overrides(config: EngineConfig, model: ChatConfig) -> dict[str, Any]:
    """Return what a library for `model` must be compiled with to bear `config`.

    Limits below those it has anyway are kept by the engine, without compiling. The optimization
    level is not among them.
    """
    wanted = {
        "context_window_size": (config.max_single_sequence_length, model.context_window_size),
        "prefill_chunk_size": (config.prefill_chunk_size, model.prefill_chunk_size),
        "max_batch_size": (config.max_num_sequence, model.model_config.get("max_batch_size", 0)),
    }
    overrides: dict[str, Any] = {
        name: value
        for name, (value, limit) in wanted.items()
        if value is not None and value > limit
    }
    for name in ("sliding_window_size", "attention_sink_size", "kv_cache_dtype"):
        if (value := getattr(config, name)) is not None:
            overrides[name] = value
    return overrides
