"""A token's logits are the same to the bit, whatever else its steps hold and however it was cut.

The engine rests on this: it batches requests as they come, and computes again what it preempted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlc_llm.artifact import ChatConfig, TensorSpec, numpy_dtype
from mlc_llm.device import host_cpu, missing_features, parse_cpu
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.schemes import Scheme, get_scheme
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.model import CompiledRunner
from mlc_llm.runtime.parameters import pack_parameters
from mlc_llm.runtime.runner import Step

pytestmark = pytest.mark.cpu

PAGE_SIZE, NUM_PAGES, CHUNK = 16, 200, 1200
# Over the borders of pages, of blocks of 64 keys, and of the parts in which contexts are dealt out.
LONG = 1060
FLOAT = "O2;activations=float32"


@dataclass(frozen=True)
class Model:
    """A tiny model with random weights; sizes are no multiples of what kernels like."""

    quantization: str
    kv_dtype: str = "auto"
    heads: tuple[int, int] = (6, 2)
    head_dim: int = 16
    window: int = -1
    sinks: int = -1
    has_bias: bool = False
    opt: str = "O2"
    device: str = "cpu"
    architecture: str = "LlamaForCausalLM"
    settings: Mapping[str, Any] = field(default_factory=dict)  # further ones of config.json

    def chat_config(self) -> ChatConfig:
        """Return what the compiler is given."""
        settings = {
            "architectures": [self.architecture],
            "hidden_size": 80,
            "intermediate_size": 112,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "head_dim": self.head_dim,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-5,
            "vocab_size": 83,
            "max_position_embeddings": 2048,
            "attention_bias": self.has_bias,
            "tie_word_embeddings": not self.has_bias,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 44,
            "shared_expert_intermediate_size": 60,
            **self.settings,
        }
        family = find_family(settings)
        config = family.config_from_huggingface(settings).with_overrides(
            {
                "kv_cache_dtype": self.kv_dtype,
                "sliding_window_size": self.window,
                "attention_sink_size": self.sinks,
                "prefill_chunk_size": CHUNK,
                "max_batch_size": CHUNK,
            }
        )
        return ChatConfig(
            model_type=family.name,
            quantization=self.quantization,
            model_config=config.to_json(),
            vocab_size=config.vocab_size,
            context_window_size=config.context_window_size,
            prefill_chunk_size=config.prefill_chunk_size,
            conv_template={},
        )


MODELS = {
    "q4f16_1, int8 kv": Model("q4f16_1", "int8", heads=(8, 2)),
    "q4f16_1, float path": Model("q4f16_1", "float32", heads=(4, 4), opt=FLOAT, has_bias=True),
    "q3f16_1": Model("q3f16_1", "float32", heads=(5, 1), head_dim=20, has_bias=True),
    "q8f16_1, window": Model("q8f16_1", heads=(4, 1), window=70, has_bias=True),
    "q0f16, window and sinks": Model("q0f16", heads=(8, 8), window=530, sinks=20),
    "q0bf16": Model("q0bf16", heads=(4, 2), has_bias=True),
    "q0f32": Model("q0f32", heads=(9, 3)),
    "q4f16_1 for AVX2": Model("q4f16_1", "int8", has_bias=True, device="x86-64-v3"),
    "q0f16 for any x86": Model("q0f16", "float32", device="x86-64"),
    "q4f16_1 experts": Model("q4f16_1", architecture="MixtralForCausalLM"),
    "q3f16_1 experts, float path": Model("q3f16_1", opt=FLOAT, architecture="Qwen3MoeForCausalLM"),
    "q0bf16 experts": Model("q0bf16", architecture="Qwen2MoeForCausalLM"),
    "q4f16_1, ALiBi": Model(
        "q4f16_1",
        heads=(6, 6),
        architecture="BaichuanForCausalLM",
        settings={"max_position_embeddings": None, "model_max_length": 2048},
    ),
    "q4f16_1, windows in turn": Model("q4f16_1", window=70, architecture="Gemma3ForCausalLM"),
    "q8f16_1, layer norms of heads": Model(
        "q8f16_1", architecture="CohereForCausalLM", settings={"use_qk_norm": True}
    ),
}


@dataclass
class Sequence:
    """Tokens, the pages they are written to, how many have been run, and their logits alone."""

    tokens: NDArray[np.int32]
    pages: NDArray[np.int32]
    logits: NDArray[np.float32]
    done: int = 0

    @property
    def left(self) -> int:
        """Return the number of tokens still to be run."""
        return len(self.tokens) - self.done


class Bench:
    """A runner, and sequences whose logits were computed alone, in one step each."""

    def __init__(self, model: Model, directory: Path) -> None:
        from mlc_llm.compiler.compile import CompileOptions, compile_model

        self.rng = np.random.default_rng(5)
        options = CompileOptions(model.device, model.opt)
        compile_model(model.chat_config(), options, lambda _: None).save_objects(directory)
        library = load_library(directory)
        scheme = get_scheme(model.quantization)
        arrays = [random_parameter(self.rng, spec, scheme) for spec in library.metadata.params]
        self.runner = CompiledRunner(library, pack_parameters(library, arrays), NUM_PAGES)
        self.vocab_size = library.metadata.vocab_size
        self.free_pages: list[int] = []

    def new_sequences(self, lengths: Iterable[int]) -> list[Sequence]:
        """Return sequences of random tokens, after running each alone; earlier ones are gone."""
        self.free_pages = list(range(NUM_PAGES))
        sequences = []
        for length in lengths:
            tokens = self.rng.integers(0, self.vocab_size, length).astype(np.int32)
            sequence = Sequence(tokens, self.take_pages(length), np.empty(0, np.float32))
            sequence.logits = self.run([(sequence, length)])[0]
            sequences.append(sequence)
        for sequence in sequences:
            self.start_again(sequence)
        return sequences

    def take_pages(self, num_tokens: int) -> NDArray[np.int32]:
        """Take free pages in any order."""
        self.rng.shuffle(self.free_pages)
        count = -(-num_tokens // PAGE_SIZE)
        taken, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        assert len(taken) == count
        return np.asarray(taken, np.int32)

    def start_again(self, sequence: Sequence) -> None:
        """Forget what was run, as after preemption; the pages become other ones."""
        self.free_pages.extend(sequence.pages.tolist())
        sequence.pages, sequence.done = self.take_pages(len(sequence.tokens)), 0

    def run(
        self, work: list[tuple[Sequence, int]], *, only_last: bool = False
    ) -> list[NDArray[np.float32]]:
        """Run one step of `count` more tokens of each sequence; return their logits, or the last
        token's.
        """
        counts = [count for _, count in work]
        query_start = np.cumsum([0, *counts]).astype(np.int32)
        positions = [np.arange(s.done, s.done + count, dtype=np.int32) for s, count in work]
        for sequence, count in work:
            sequence.done += count
        width = max(len(sequence.pages) for sequence, _ in work)
        page_table = np.zeros((len(work), width), np.int32)
        for row, (sequence, _) in enumerate(work):
            page_table[row, : len(sequence.pages)] = sequence.pages
        pairs = list(zip(positions, work, strict=True))
        rows = query_start[1:] - 1 if only_last else np.arange(query_start[-1], dtype=np.int32)
        step = Step(
            token_ids=np.concatenate([s.tokens[places] for places, (s, _) in pairs]),
            positions=np.concatenate(positions),
            slots=np.concatenate(
                [s.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p, (s, _) in pairs]
            ),
            query_start=query_start,
            page_table=page_table,
            context_len=np.asarray([sequence.done for sequence, _ in work], np.int32),
            logit_rows=rows,
        )
        logits = self.runner.forward(step).copy()
        return np.split(logits, np.arange(1, len(work)) if only_last else query_start[1:-1])

    def check(self, work: list[tuple[Sequence, int]]) -> None:
        """Run a step and assert that its logits are those of the sequences alone."""
        found = self.run(work, only_last=self.rng.random() < 0.5)
        for (sequence, _), logits in zip(work, found, strict=True):
            expected = sequence.logits[sequence.done - len(logits) : sequence.done]
            np.testing.assert_array_equal(logits, expected)


def random_parameter(rng: np.random.Generator, spec: TensorSpec, scheme: Scheme) -> NDArray[Any]:
    """Return weights large enough for scores of attention that differ."""
    if spec.dtype == "uint32":
        codes = rng.integers(0, 2 * scheme.max_int + 1, (*spec.shape, scheme.values_per_word))
        shifts = np.arange(scheme.values_per_word) * scheme.bits
        return (codes << shifts).sum(axis=-1).astype(np.uint32)
    if spec.name.endswith("norm.weight"):
        values = rng.uniform(0.5, 1.5, spec.shape)
    elif spec.name.endswith("q_scale"):
        values = rng.uniform(0.5, 1.5, spec.shape) * 0.4 / scheme.max_int
    else:
        values = rng.standard_normal(spec.shape) * 0.2
    return values.astype(numpy_dtype(spec.dtype))


@pytest.fixture(scope="module", params=MODELS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    model = MODELS[request.param]
    cpu = None if model.device == "cpu" else parse_cpu(model.device)
    if cpu is not None and (cpu.arch != host_cpu().arch or missing_features(cpu.isa)):
        pytest.skip(f"this CPU does not run code for {model.device}")
    return Bench(model, tmp_path_factory.mktemp("library"))


def test_how_a_sequence_is_cut_does_not_matter(bench: Bench) -> None:
    [sequence] = bench.new_sequences([LONG])
    # One token at a time over the borders of pages, blocks and parts; then chunks of any size.
    for begin in ([1] * 70, [500, *[1] * 25], [3, 1000, *[1] * 40], []):
        bench.start_again(sequence)
        for size in begin:
            bench.check([(sequence, size)])
        while sequence.left:
            size = int(bench.rng.choice([1, 3, 16, 40, 200]))
            bench.check([(sequence, min(size, sequence.left))])


def test_what_else_is_in_a_step_does_not_matter(bench: Bench) -> None:
    rng = bench.rng
    sequences = bench.new_sequences([LONG, 600, *rng.integers(1, 60, 30).tolist()])
    while unfinished := [sequence for sequence in sequences if sequence.left]:
        size = min(int(rng.choice([1, 2, 3, 4, 5, 8, 9, 16, 17, 32])), len(unfinished))
        batch = [unfinished[index] for index in rng.permutation(len(unfinished))[:size]]
        # Tokens beside one chunk of a prompt, chunks of several prompts, or tokens alone.
        longest = rng.choice([1, 1, 30, 130])
        counts = np.ones(size, np.int64)
        counts[: rng.choice([1, size])] = rng.integers(1, longest + 1)
        work = [
            (sequence, min(int(count), sequence.left))
            for sequence, count in zip(batch, counts, strict=True)
        ]
        bench.check(work)
        if rng.random() < 0.1:
            bench.start_again(batch[0])
