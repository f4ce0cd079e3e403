"""How memory is divided: exact bytes, the rules of the modes, and what is said when it is short."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fakes import make_metadata

from mlc_llm.artifact import KVCacheLayout, TensorSpec
from mlc_llm.engine.capacity import MemoryPlan, plan_memory
from mlc_llm.engine.config import EngineConfig
from mlc_llm.errors import DeviceError, OptionError

MIB, GIB = 1 << 20, 1 << 30
LAYOUT = KVCacheLayout(
    num_layers=4, num_key_value_heads=2, head_dim=64, page_size=16, dtype="float16"
)
TOKEN_BYTES = 4 * 2 * 2 * 64 * 2
PAGE_BYTES = 16 * TOKEN_BYTES
WEIGHTS = 100 * MIB
WORKSPACE = 7 * MIB


def plan(free_bytes: int = 8 * GIB, *, library: dict[str, Any] | None = None, **settings: Any):
    """Plan for a library of 2,048 tokens and 32 sequences, in mode local unless told otherwise."""
    values = {
        "context_window_size": 2048,
        "prefill_chunk_size": 512,
        "max_batch_size": 32,
        "vocab_size": 1000,
        "kv_cache": LAYOUT,
        "memory_usage": {"forward": WORKSPACE, "pack_params": 64 * GIB},
        **(library or {}),
    }
    return plan_memory(make_metadata(**values), EngineConfig(**settings), WEIGHTS, free_bytes)


def limits(found: MemoryPlan) -> tuple[int, int, int, int]:
    return (
        found.max_num_sequence,
        found.max_single_sequence_length,
        found.max_total_sequence_length,
        found.prefill_chunk_size,
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (4, 2048, 2048, 512)),
        ({"mode": "local"}, (4, 2048, 2048, 512)),
        ({"mode": "interactive"}, (1, 2048, 2048, 512)),
        ({"mode": "server"}, (32, 2048, 32 * 2048, 512)),
        ({"max_num_sequence": 7}, (7, 2048, 2048, 512)),
        ({"max_total_sequence_length": 5000}, (4, 2048, 5008, 512)),
        ({"mode": "server", "max_total_sequence_length": 300}, (32, 304, 304, 512)),
        ({"max_single_sequence_length": 100}, (4, 100, 112, 100)),
        ({"mode": "server", "max_single_sequence_length": 100}, (32, 100, 3200, 512)),
        ({"prefill_chunk_size": 64}, (4, 2048, 2048, 64)),
        ({"prefill_chunk_size": 512, "max_single_sequence_length": 100}, (4, 100, 112, 512)),
    ],
)
def test_modes_and_settings(settings, expected) -> None:
    assert limits(plan(**settings)) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": "local"}, (4, 8192, 8192, 512)),
        ({"mode": "local", "max_single_sequence_length": 16384}, (4, 16384, 16384, 512)),
        ({"mode": "interactive"}, (1, 32768, 32768, 512)),
    ],
)
def test_local_is_modest_unless_asked(settings, expected) -> None:
    assert limits(plan(library={"context_window_size": 32768}, **settings)) == expected


def test_every_byte_is_counted() -> None:
    found = plan()
    assert found.num_pages == 128 and found.kv_bytes == 128 * PAGE_BYTES
    assert found.weights_bytes == WEIGHTS
    # 4 sequences, 1,000 logits, 12 bytes each; packing is over before the first step.
    assert found.workspace_bytes == WORKSPACE + 4 * 1000 * 12
    assert found.total_bytes == WEIGHTS + found.workspace_bytes + found.kv_bytes
    assert found.usable_bytes == int(8 * GIB * 0.85) and found.free_bytes == 8 * GIB


def test_int8_pages_hold_more_tokens() -> None:
    layout = KVCacheLayout(4, 2, 64, 16, "int8")
    free = 200 * MIB
    plain, packed = (
        plan(free, mode="server"),
        plan(free, library={"kv_cache": layout}, mode="server"),
    )
    assert plain.kv_bytes // plain.max_total_sequence_length == TOKEN_BYTES
    assert packed.kv_bytes // packed.max_total_sequence_length == 4 * 2 * 2 * 68
    assert 1.8 < packed.num_pages / plain.num_pages < 1.9


@pytest.mark.parametrize("share", [0.5, 0.85, 1.0])
def test_a_server_fills_its_share_to_the_page(share) -> None:
    found = plan(220 * MIB, mode="server", gpu_memory_utilization=share)
    left = int(220 * MIB * share) - found.total_bytes
    assert 0 <= left < PAGE_BYTES
    assert found.max_total_sequence_length < 32 * 2048


def test_pages_that_a_gpu_can_count() -> None:
    """Items of a layer are numbered in 31 bits, however much memory there is."""
    library = {"context_window_size": 1 << 20, "max_batch_size": 64, "target": {"kind": "cuda"}}
    found = plan(80 * GIB, library=library, mode="server")
    assert found.num_pages == ((1 << 31) - 1) // (2 * 2 * 16 * 64)
    on_cpu = plan(80 * GIB, library={**library, "target": {"kind": "llvm"}}, mode="server")
    assert on_cpu.num_pages > found.num_pages
    with pytest.raises(OptionError, match=r"max_total_seq_length=9000000 .*use at most 8388592"):
        plan(80 * GIB, library=library, max_total_sequence_length=9_000_000)


def test_what_others_use_makes_the_cache_smaller() -> None:
    """It is free memory that counts: a library that no longer fits whole is cut, not refused."""
    small = plan(130 * MIB, mode="local")
    assert 256 <= small.max_total_sequence_length < 2048
    assert small.max_single_sequence_length == small.max_total_sequence_length
    assert small.prefill_chunk_size <= small.max_single_sequence_length
    assert small.total_bytes <= small.usable_bytes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_single_sequence_length": 2049}, "context_window_size=2048"),
        ({"prefill_chunk_size": 513}, "prefill_chunk_size=512"),
        ({"max_num_sequence": 33}, "max_batch_size=32"),
    ],
)
def test_the_library_sets_limits(settings, words) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        plan(**settings)
    (name, value), message = next(iter(settings.items())), str(caught.value)
    assert message.startswith(f"{name}={value} is more than the library was compiled for")
    assert f'={value}"' in message


def test_one_sequence_must_fit_into_the_cache() -> None:
    with pytest.raises(OptionError, match="one sequence must fit"):
        EngineConfig(max_total_sequence_length=100, max_single_sequence_length=101)


@pytest.mark.parametrize("free", [0, 50 * MIB, 110 * MIB, 126 * MIB])
@pytest.mark.parametrize("mode", ["local", "interactive", "server"])
def test_too_little_memory(free, mode) -> None:
    with pytest.raises(DeviceError) as caught:
        plan(free, mode=mode)
    message = str(caught.value)
    assert "256 tokens" in message and "100 MiB" in message
    assert re.search(
        r"\(1\) free [\d.]+ MiB more .*\(2\) .*max_num_sequence=1.*\(3\) take", message
    )


def test_advice_is_true() -> None:
    """Whoever follows one of the ways out gets a plan."""
    free, wanted = 180 * MIB, {"mode": "server", "max_total_sequence_length": 30_000}
    with pytest.raises(DeviceError) as caught:
        plan(free, **wanted)
    message = str(caught.value)
    more = re.search(r"free ([\d.]+) MiB more", message)
    assert (
        plan(free + int((float(more[1]) + 1) * MIB), **wanted).max_total_sequence_length >= 30_000
    )
    share = float(re.search(r"gpu_memory_utilization=([\d.]+)", message)[1])
    assert plan(free, **wanted, gpu_memory_utilization=share).max_total_sequence_length >= 30_000
    tokens = int(re.search(r"max_total_seq_length=(\d+)", message)[1])
    wanted["max_total_sequence_length"] = tokens
    assert plan(free, **wanted).max_total_sequence_length == tokens
    assert "kv_cache_dtype=int8" in message


def test_a_length_that_was_asked_for_is_not_cut() -> None:
    free = 130 * MIB
    assert plan(free).max_single_sequence_length < 2000
    with pytest.raises(DeviceError, match="a KV cache of 2,000 tokens"):
        plan(free, max_single_sequence_length=2000)


@pytest.mark.parametrize(
    ("count", "expected"), [(None, 128), (-1, 128), (0, 0), (1, 63), (2, 126), (3, 128)]
)
def test_pages_kept_for_later_prompts(count, expected) -> None:
    settings = {"max_total_sequence_length": 2048, "max_single_sequence_length": 1000}
    found = plan(prefix_cache_max_num_recycling_seqs=count, **settings)
    assert found.max_idle_pages == expected


def test_the_plan_is_a_short_table() -> None:
    assert str(plan(mode="server", max_num_sequence=4)).splitlines() == [
        "memory plan (server):",
        "  weights     100 MiB",
        "  workspace   7.0 MiB",
        "  KV cache     16 MiB  8,192 tokens of 2,048 bytes (float16)",
        "  together    123 MiB  may use 6.8 GiB, 85% of the 8.0 GiB that are free",
        "  at once           4  sequences of up to 2,048 tokens; up to 512 prompt tokens a step",
    ]


# One slot of recurrent state is 1 MiB.
STATES = [TensorSpec("a", (3, 1 << 16), "float32"), TensorSpec("b", (1 << 16,), "float32")]
HYBRID = {"states": STATES}
RECURRENT = {"states": STATES, "kv_cache": KVCacheLayout(0, 1, 64, 16, "float16")}


@pytest.mark.parametrize("library", [HYBRID, RECURRENT])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (4, 16)),
        ({"mode": "interactive"}, (1, 4)),
        ({"mode": "server"}, (32, 128)),
        ({"max_num_sequence": 3, "max_history_size": 7}, (3, 7)),
        ({"max_history_size": 0}, (4, 0)),
        ({"prefix_cache_max_num_recycling_seqs": 0}, (4, 8)),
        ({"prefix_cache_mode": "disable"}, (4, 0)),
    ],
)
def test_states_of_sequences_and_snapshots(library, settings, expected) -> None:
    found = plan(library=library, **settings)
    num_sequences, num_snapshots = expected
    assert found.max_num_sequence == num_sequences
    assert found.num_state_slots == num_sequences + num_snapshots
    assert found.state_bytes == found.num_state_slots * MIB
    assert found.total_bytes == WEIGHTS + found.workspace_bytes + found.state_bytes + found.kv_bytes
    assert found.total_bytes <= found.usable_bytes


def test_a_server_has_as_many_states_as_memory_bears() -> None:
    found = plan(180 * MIB, library=HYBRID, mode="server")
    assert 20 <= found.max_num_sequence < 32 and found.num_state_slots > found.max_num_sequence
    assert found.max_total_sequence_length >= 256
    assert found.total_bytes <= found.usable_bytes


def test_states_that_a_gpu_can_count() -> None:
    """Here 10,922: a slot of the larger tensor has 196,608 items."""
    library = {**RECURRENT, "target": {"kind": "cuda"}}
    many = {"mode": "server", "prefix_cache_max_num_recycling_seqs": -1}
    found = plan(80 * GIB, library=library, **many)
    assert found.num_state_slots == 32 + (10_922 - 32) // 4
    assert plan(80 * GIB, library=RECURRENT, **many).num_state_slots > found.num_state_slots
    with pytest.raises(OptionError, match=r"32 sequences and 10900 snapshots .* the 10922 that"):
        plan(80 * GIB, library=library, mode="server", max_history_size=10_900)


def test_tokens_of_models_without_a_cache_are_free() -> None:
    found = plan(library=RECURRENT, mode="server")
    assert found.kv_bytes == 0
    assert found.max_single_sequence_length == 2048
    assert found.max_total_sequence_length == 2 * 32 * 2048
    long = plan(library={**RECURRENT, "context_window_size": 1 << 22})
    assert long.max_single_sequence_length == long.max_total_sequence_length == 1 << 22


def test_the_plan_of_a_recurrent_model() -> None:
    assert str(plan(library=RECURRENT)).splitlines() == [
        "memory plan (local):",
        "  weights     100 MiB",
        "  workspace   7.0 MiB",
        "  state        20 MiB  4 sequences and 16 snapshots",
        "  together    127 MiB  may use 6.8 GiB, 85% of the 8.0 GiB that are free",
        "  at once           4  sequences of up to 2,048 tokens; up to 512 prompt tokens a step",
    ]


def test_too_little_memory_for_states() -> None:
    with pytest.raises(DeviceError, match="12 recurrent states 12 MiB") as caught:
        plan(126 * MIB, library=RECURRENT, max_num_sequence=4, max_history_size=8)
    assert "max_num_sequence=1, max_history_size=0" in str(caught.value)
    assert "KV cache" not in str(caught.value)


def test_snapshots_are_for_recurrent_models() -> None:
    with pytest.raises(OptionError, match=r"max_history_size=8 .* llama has none"):
        plan(max_history_size=8)
    assert plan(max_history_size=0).num_state_slots == 0


def test_images_take_memory_too() -> None:
    usage = {"forward": WORKSPACE, "embed_image": 3 * MIB, "pack_params": 64 * GIB}
    images = {"token_id": 1, "size": 336, "num_rows": 576, "width": 1024}
    seeing = plan(library={"memory_usage": usage, "images": images})
    # Rows of two images are kept and of one more made; a step joins rows, and aligns them.
    rows, joined = 3 * 576 * 1024 * 4, 2 * 512 * 1024 * 4
    assert seeing.workspace_bytes - plan().workspace_bytes == 3 * MIB + rows + joined
