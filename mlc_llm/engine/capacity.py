"""How much an engine can take on: pages, sequences and step sizes from mode, model and free memory.

Arithmetic only; it measures and allocates nothing.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from mlc_llm.artifact import KVCacheLayout, LibraryMetadata
from mlc_llm.engine.config import DEFAULT_MEMORY_UTILIZATION, EngineConfig, Mode
from mlc_llm.engine.images import MAX_HELD
from mlc_llm.errors import DeviceError, OptionError
from mlc_llm.images.inputs import ImageInputs

# What `local` is content with, however much memory there is.
_LOCAL_MAX_SEQUENCES = 4
_LOCAL_MAX_TOKENS = 8192
# An engine whose cache holds fewer tokens is of no use, unless more were never asked for.
_MIN_TOKENS = 256
# Tokens of models without a KV cache cost nothing but their numbers; still there is an end.
_MAX_NUMBERED_TOKENS = 1 << 20
# Snapshots a sequence leaves: at the end of its prompt and of its answer.
_SNAPSHOTS_A_SEQUENCE = 2
# A row of logits, float32: what the library returns, its rows in another order, sampling weights.
_BYTES_PER_LOGIT = 12
_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine will have, and where the memory goes; prints as a short table.

    max_idle_pages: pages that may be kept for later prompts while nobody uses them.
    num_state_slots: recurrent states, of sequences at work and snapshots; 0 for models without.
    """

    num_pages: int
    max_num_sequence: int
    max_single_sequence_length: int
    max_total_sequence_length: int
    prefill_chunk_size: int
    max_idle_pages: int
    num_state_slots: int
    weights_bytes: int
    workspace_bytes: int
    state_bytes: int
    kv_bytes: int
    free_bytes: int
    utilization: float
    mode: Mode
    kv_layout: KVCacheLayout

    @property
    def total_bytes(self) -> int:
        """Bytes of everything together."""
        return self.weights_bytes + self.workspace_bytes + self.state_bytes + self.kv_bytes

    @property
    def usable_bytes(self) -> int:
        """Bytes that may be used of those that are free."""
        return int(self.free_bytes * self.utilization)

    def __str__(self) -> str:
        layout = self.kv_layout
        rows = [("weights", self.weights_bytes, ""), ("workspace", self.workspace_bytes, "")]
        if self.num_state_slots:
            num_snapshots = self.num_state_slots - self.max_num_sequence
            note = f"{self.max_num_sequence} sequences and {num_snapshots} snapshots"
            rows.append(("state", self.state_bytes, note))
        if layout.num_layers:
            note = f"{self.max_total_sequence_length:,} tokens of {layout.bytes_per_token:,} bytes"
            rows.append(("KV cache", self.kv_bytes, f"{note} ({layout.dtype})"))
        rows.append(("together", self.total_bytes, f"may use {_size(self.usable_bytes)},"))
        lines = [f"  {name:<9} {_size(value):>9}  {note}".rstrip() for name, value, note in rows]
        return "\n".join(
            [
                f"memory plan ({self.mode}):",
                *lines[:-1],
                f"{lines[-1]} {self.utilization:.0%} of the {_size(self.free_bytes)} that are free",
                f"  at once   {self.max_num_sequence:>9}  sequences of up to "
                f"{self.max_single_sequence_length:,} tokens; up to {self.prefill_chunk_size:,} "
                "prompt tokens a step",
            ]
        )


def plan_memory(
    metadata: LibraryMetadata, config: EngineConfig, weights_bytes: int, free_bytes: int
) -> MemoryPlan:
    """Divide the memory that is free before the weights are loaded.

    What the library was compiled for are upper limits. Raises OptionError where `config` asks for
    more than those, DeviceError where memory does not suffice.
    """
    mode: Mode = config.mode or "local"
    layout = metadata.kv_cache
    max_single = config.max_single_sequence_length or metadata.context_window_size
    chunk = config.prefill_chunk_size or metadata.prefill_chunk_size
    _require("max_single_sequence_length", max_single, "context_window_size", metadata)
    _require("prefill_chunk_size", chunk, "prefill_chunk_size", metadata)

    utilization = config.gpu_memory_utilization or DEFAULT_MEMORY_UTILIZATION
    usable = int(free_bytes * utilization)
    num_sequences, num_slots = _num_sequences(mode, config, metadata), 0
    slot_bytes = sum(spec.size_bytes for spec in metadata.states)
    if slot_bytes:
        room = max(usable - weights_bytes - _workspace_bytes(metadata, num_sequences), 0)
        most = _most_states(metadata)
        num_fitting = min(room // slot_bytes, most)
        num_sequences, num_snapshots = _states(config, num_sequences, num_fitting)
        num_slots = num_sequences + num_snapshots
        if num_slots > most:
            raise OptionError(
                f"recurrent states of {num_sequences} sequences and {num_snapshots} snapshots are "
                f"more than the {most} that kernels of this GPU count; lower max_history_size"
            )
    elif config.max_history_size:
        raise OptionError(
            f"max_history_size={config.max_history_size} counts snapshots of recurrent state; "
            f"{metadata.model_type} has none, its KV cache keeps earlier prompts; leave it out"
        )
    workspace = _workspace_bytes(metadata, num_sequences)
    page_bytes = layout.page_size * layout.bytes_per_token
    if page_bytes:
        left = max(usable - weights_bytes - workspace - num_slots * slot_bytes, 0)
        capacity = min(left // page_bytes, _most_pages(metadata)) * layout.page_size
        total = _total_tokens(mode, config, capacity, max_single, num_sequences)
    else:
        # Running sequences, and as many that have ended.
        most = max(_MAX_NUMBERED_TOKENS, max_single)
        capacity = min(2 * num_sequences * max_single, most)
        total = config.max_total_sequence_length or capacity
    num_pages = -(-total // layout.page_size)
    if num_pages > (most := _most_pages(metadata)):
        raise OptionError(
            f"max_total_seq_length={total} is more than kernels of this GPU count; use at most "
            f"{most * layout.page_size}"
        )
    max_single = min(max_single, num_pages * layout.page_size)
    if config.prefill_chunk_size is None and mode != "server":
        chunk = min(chunk, max_single)
    plan = MemoryPlan(
        num_pages=num_pages,
        max_num_sequence=num_sequences,
        max_single_sequence_length=max_single,
        max_total_sequence_length=num_pages * layout.page_size,
        prefill_chunk_size=chunk,
        max_idle_pages=_idle_pages(config, num_sequences, max_single, num_pages, layout.page_size),
        num_state_slots=num_slots,
        weights_bytes=weights_bytes,
        workspace_bytes=workspace,
        state_bytes=num_slots * slot_bytes,
        kv_bytes=num_pages * page_bytes,
        free_bytes=free_bytes,
        utilization=utilization,
        mode=mode,
        kv_layout=layout,
    )
    if plan.total_bytes > usable:
        raise DeviceError(_explain_shortage(plan, capacity))
    return plan


def _require(name: str, value: int, compiled_name: str, metadata: LibraryMetadata) -> None:
    compiled = getattr(metadata, compiled_name)
    if value > compiled:
        raise OptionError(
            f"{name}={value} is more than the library was compiled for "
            f"({compiled_name}={compiled}); ask for less, or compile it again with "
            f'--overrides "{compiled_name}={value}"'
        )


def _most_pages(metadata: LibraryMetadata) -> int:
    """Return how many pages kernels can count."""
    has_pages = metadata.kv_cache.num_layers > 0
    return _most_items(metadata, math.prod(metadata.kv_cache.page_shape(1)) if has_pages else 1)


def _most_states(metadata: LibraryMetadata) -> int:
    """Return how many recurrent states kernels can count."""
    return _most_items(metadata, max(math.prod(spec.shape) for spec in metadata.states))


def _most_items(metadata: LibraryMetadata, size: int) -> int:
    """Return how many items of `size` numbers a tensor may have: GPUs number them in 31 bits."""
    is_gpu = metadata.target.get("kind", "llvm") != "llvm"
    return ((1 << 31) - 1) // size if is_gpu else sys.maxsize


def _num_sequences(mode: Mode, config: EngineConfig, metadata: LibraryMetadata) -> int:
    if config.max_num_sequence is not None:
        _require("max_num_sequence", config.max_num_sequence, "max_batch_size", metadata)
        return config.max_num_sequence
    if mode == "interactive":
        return 1
    most = metadata.max_batch_size
    return min(_LOCAL_MAX_SEQUENCES, most) if mode == "local" else most


def _states(config: EngineConfig, num_sequences: int, num_fitting: int) -> tuple[int, int]:
    """Return for how many sequences there are states, and how many snapshots are kept.

    num_fitting: states that memory has room for. What was not asked for takes at most half of it
    for sequences, and of the rest a quarter for snapshots.
    """
    if config.max_num_sequence is None:
        num_sequences = max(min(num_sequences, num_fitting // 2), 1)
    if config.prefix_cache_mode == "disable":
        return num_sequences, 0
    if config.max_history_size is not None:
        return num_sequences, config.max_history_size
    num_ended = config.prefix_cache_max_num_recycling_seqs
    if num_ended is None:
        num_ended = num_sequences
    room = max(num_fitting - num_sequences, 0) // 4
    if num_ended == -1:
        return num_sequences, room
    return num_sequences, min(_SNAPSHOTS_A_SEQUENCE * (num_sequences + num_ended), room)


def _workspace_bytes(metadata: LibraryMetadata, num_sequences: int) -> int:
    """Return what a step takes beside weights and pages: temporary tensors, logits, images."""
    # What one entry has taken is kept for its next call while another runs.
    steps = [size for name, size in metadata.memory_usage.items() if name != "pack_params"]
    logits = num_sequences * metadata.vocab_size * _BYTES_PER_LOGIT
    return sum(steps) + logits + _image_bytes(metadata)


def _image_bytes(metadata: LibraryMetadata) -> int:
    """Return what rows of images take: those kept, and those that a step brings, joined."""
    images = ImageInputs.from_json(metadata.images)
    if images is None:
        return 0
    joined = 2 * metadata.prefill_chunk_size * images.width * 4
    return (MAX_HELD + 1) * images.size_bytes + joined


def _total_tokens(
    mode: Mode, config: EngineConfig, capacity: int, max_single: int, num_sequences: int
) -> int:
    """Return how many tokens the cache is to hold; more than `capacity` if less is of no use."""
    if config.max_total_sequence_length is not None:
        return config.max_total_sequence_length
    if mode == "server":
        wanted = num_sequences * max_single
    elif mode == "local" and config.max_single_sequence_length is None:
        wanted = min(max_single, _LOCAL_MAX_TOKENS)
    else:
        wanted = max_single
    return max(min(wanted, capacity), config.max_single_sequence_length or min(wanted, _MIN_TOKENS))


def _idle_pages(
    config: EngineConfig, num_sequences: int, max_single: int, num_pages: int, page_size: int
) -> int:
    """Return how many pages may be kept for later prompts.

    Pages of different sequences are shared, so a number of sequences stands for the pages that so
    many of the greatest length have.
    """
    count = config.prefix_cache_max_num_recycling_seqs
    if count is None:
        count = num_sequences
    return num_pages if count == -1 else min(num_pages, count * -(-max_single // page_size))


def _explain_shortage(plan: MemoryPlan, capacity: int) -> str:
    """Say what is short by how much, and three ways out; `capacity` tokens would fit."""
    lacking = plan.total_bytes - plan.usable_bytes
    to_free = f"free {_size(lacking / plan.utilization)} more by closing other programs"
    if plan.total_bytes < 0.98 * plan.free_bytes:
        needed = -(-100 * plan.total_bytes // plan.free_bytes) / 100
        to_free += f", or allow more of it with gpu_memory_utilization={needed:.2f}"
    has_pages = plan.kv_layout.num_layers > 0
    if capacity >= _MIN_TOKENS and has_pages:
        less = f"ask for a cache of at most {capacity:,} tokens (max_total_seq_length={capacity})"
        less += ", or lower context_window_size to that"
    else:
        less = "ask for less: max_num_sequence=1"
        less += ", a smaller context_window_size" if has_pages else ""
    if has_pages and plan.kv_layout.dtype != "int8":
        less += " or kv_cache_dtype=int8"
    if plan.num_state_slots > plan.max_num_sequence:
        less += ", max_history_size=0"
    weights_limit = plan.weights_bytes - lacking
    smaller = (
        f"take a smaller model or a quantization of fewer bits: weights of {_size(weights_limit)}"
        if weights_limit > plan.weights_bytes / 4
        else "take a smaller model"
    )
    parts = [
        f"weights {_size(plan.weights_bytes)}",
        f"workspace {_size(plan.workspace_bytes)}",
    ]
    if plan.num_state_slots:
        parts.append(f"{plan.num_state_slots} recurrent states {_size(plan.state_bytes)}")
    if has_pages:
        tokens = f"a KV cache of {plan.max_total_sequence_length:,} tokens"
        parts.append(f"{tokens} {_size(plan.kv_bytes)}")
    return (
        f"memory is short by {_size(lacking)}: {', '.join(parts[:-1])} and {parts[-1]} "
        f"need {_size(plan.total_bytes)}, of {_size(plan.free_bytes)}"
        f" free {_size(plan.usable_bytes)} may be used. (1) {to_free}; (2) {less}; (3) {smaller}"
    )


def _size(size_bytes: float) -> str:
    if size_bytes >= _GIB:
        return f"{size_bytes / _GIB:.1f} GiB"
    return (
        f"{size_bytes / _MIB:.1f} MiB" if size_bytes < 10 * _MIB else f"{size_bytes / _MIB:.0f} MiB"
    )
