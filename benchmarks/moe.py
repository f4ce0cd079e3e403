"""What routing costs: a token of a model with experts beside one of a dense model.

Shapes of Mixtral-8x7B and Qwen3-30B-A3B with fewer layers and a small vocabulary, random weights,
beside a dense model of the same family whose feed-forward layer is as wide as a token's experts
together. Both run in one process and take turns, a few tokens each. Prints the median and the best
time of a token, the ratio of the two models, and how many experts there are for each that a token
has, which is what reading all of them would cost.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlc_llm.runtime.runner import ModelRunner, Step

_COMMON = {"vocab_size": 1024, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
_MIXTRAL = {
    **_COMMON,
    "hidden_size": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_QWEN3 = {
    **_COMMON,
    "hidden_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


@dataclass(frozen=True)
class Pair:
    """A model with experts, the dense one of a token's width, and how many experts there are for
    each that a token has.
    """

    experts: Mapping[str, Any]
    dense: Mapping[str, Any]
    surplus: float


PAIRS = {
    "mixtral_8x7b": Pair(
        {
            **_MIXTRAL,
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {**_MIXTRAL, "architectures": ["MistralForCausalLM"], "intermediate_size": 2 * 14336},
        8 / 2,
    ),
    "qwen3_30b_a3b": Pair(
        {
            **_QWEN3,
            "architectures": ["Qwen3MoeForCausalLM"],
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        {**_QWEN3, "architectures": ["Qwen3ForCausalLM"], "intermediate_size": 8 * 768},
        128 / 8,
    ),
}


def main() -> None:
    """Print a table for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--pair", choices=PAIRS, nargs="+", default=list(PAIRS))
    parser.add_argument("--quantization", default="q4f16_1", metavar="NAME")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="SEQUENCES")
    parser.add_argument("--tokens", type=int, default=16, help="tokens in a turn")
    parser.add_argument("--turns", type=int, default=12)
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.turns, *arguments.batch) < 1 or arguments.tokens > 256:
        parser.error("--batch, --tokens and --turns must be at least 1, --tokens at most 256")
    for name in arguments.pair:
        compare(name, arguments)


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Measure one pair and print its figures."""
    from mlc_llm.bench.workloads import Workload, make_steps

    pair, largest = PAIRS[name], max(arguments.batch)
    runners = {
        kind: load(config, arguments.quantization, largest, arguments.tokens)
        for kind, config in (("experts", pair.experts), ("dense", pair.dense))
    }
    for batch in arguments.batch:
        workload = Workload("decode", arguments.tokens, batch)
        times: dict[str, list[float]] = {kind: [] for kind in runners}
        for turn in range(-1, arguments.turns):
            for kind, runner in runners.items():
                found = step_times(runner, make_steps(workload, runner.metadata, turn + 1))
                if turn >= 0:
                    times[kind] += found
        print(f"{name}, {arguments.quantization}, batch {batch}:")
        for kind, seconds in times.items():
            print(f"  {kind:8} {median(seconds) * 1e3:8.2f} ms, best {min(seconds) * 1e3:8.2f} ms")
        experts, dense = times["experts"], times["dense"]
        print(
            f"  ratio    {median(experts) / median(dense):8.2f}   , best "
            f"{min(experts) / min(dense):8.2f}   ({pair.surplus:.0f} x the experts a token has)",
            flush=True,
        )


def load(config: Mapping[str, Any], quantization: str, batch: int, tokens: int) -> ModelRunner:
    """Compile a model for this machine and fill it with random weights."""
    from mlc_llm.artifact import ChatConfig
    from mlc_llm.bench.random_weights import random_parameters
    from mlc_llm.compiler.compile import CompileOptions, compile_model
    from mlc_llm.models.registry import find_family
    from mlc_llm.quantization.schemes import get_scheme
    from mlc_llm.runtime.library import load_library
    from mlc_llm.runtime.model import CompiledRunner

    family = find_family(config)
    model_config = family.config_from_huggingface(config)
    chat = ChatConfig(
        model_type=family.name,
        quantization=quantization,
        model_config=model_config.to_json(),
        vocab_size=model_config.vocab_size,
        context_window_size=model_config.context_window_size,
        prefill_chunk_size=model_config.prefill_chunk_size,
        conv_template={},
    )
    with tempfile.TemporaryDirectory(prefix="mlc_llm-") as work:
        compile_model(chat, CompileOptions(), lambda _: None).save_objects(Path(work))
        library = load_library(Path(work))
        parameters = random_parameters(library, get_scheme(quantization).bits, seed=5)
    pages = -(-tokens // library.metadata.kv_cache.page_size)
    runner = CompiledRunner(library, parameters, batch * pages)
    runner.touch_pages()
    return runner


def step_times(runner: ModelRunner, steps: list[Step]) -> list[float]:
    """Return the seconds of each step."""
    seconds = []
    for step in steps:
        start = time.perf_counter()
        runner.forward(step)
        seconds.append(time.perf_counter() - start)
    return seconds


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the description's lines."""


if __name__ == "__main__":
    main()
