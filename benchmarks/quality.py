"""What int8 activations cost in quality: the same model with and without them, on a stored text.

Prints for each quantization the KL divergence per token of next-token distributions (float32
activations are the truth), how often the likeliest token is the same, and both perplexities.
The demo model is taken where no other is named.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mlc_llm.prepare.cache import CacheHome
    from mlc_llm.runtime.runner import ModelRunner

TEXT_PATH = Path(__file__).with_name("data") / "text.txt"
FLOAT_OPT, INT8_OPT = "O2;activations=float32", "O2"
QUANTIZATIONS = ("q8f16_1", "q4f16_1")
# Rows of logits at once; what a library compiled without overrides takes.
_CHUNK = 64


@dataclass(frozen=True)
class Quality:
    """Distributions over the next token beside those of the float path."""

    num_tokens: int
    mean_kl: float  # nats a token
    max_kl: float
    same_top: float  # share of tokens with the same likeliest next one
    float_perplexity: float
    int8_perplexity: float


def main() -> None:
    """Print the table."""
    from mlc_llm.prepare.cache import CacheHome

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument(
        "model", nargs="?", help="as for `mlc_llm chat`; the demo model if left out"
    )
    parser.add_argument("--quantization", nargs="+", default=list(QUANTIZATIONS), metavar="NAME")
    parser.add_argument("--text", type=Path, default=TEXT_PATH, metavar="FILE")
    arguments = parser.parse_args()
    home = CacheHome.from_environment(os.environ)
    text = arguments.text.read_text(encoding="utf-8")
    print(f"{'':10} tokens   KL mean    KL max  same top  ppl float32  ppl int8")
    for name in arguments.quantization:
        quality = measure(arguments.model, name, text, home)
        print(
            f"{name:10} {quality.num_tokens:6} {quality.mean_kl:9.5f} {quality.max_kl:9.5f} "
            f"{quality.same_top:9.2%} {quality.float_perplexity:12.3f} "
            f"{quality.int8_perplexity:9.3f}",
            flush=True,
        )


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description and shows defaults."""


def measure(model: str | None, quantization: str, text: str, home: CacheHome) -> Quality:
    """Compare both kinds of activations of a model, made ready in `home`, on a text."""
    from mlc_llm.text.tokenizer import Tokenizer

    artifact = prepare_model(model, quantization, home)
    tokens = Tokenizer.load(artifact).encode(text)
    exact, rounded = (
        log_probabilities_of(artifact, opt, home, tokens) for opt in (FLOAT_OPT, INT8_OPT)
    )
    return compare(exact, rounded, tokens)


def prepare_model(model: str | None, quantization: str, home: CacheHome) -> Path:
    """Return the artifact of a model, made where there is none."""
    from mlc_llm.prepare.cache import CachePolicy
    from mlc_llm.prepare.progress import NullProgress
    from mlc_llm.prepare.resolve import prepare_artifact

    return prepare_artifact(
        model,
        quantization=quantization,
        home=home,
        download_policy=CachePolicy.ON,
        jit_policy=CachePolicy.ON,
        progress=NullProgress(),
    )


def prepare_code(artifact: Path, opt: str, home: CacheHome) -> Path:
    """Return the library of an artifact for `--opt`, compiled where there is none."""
    from mlc_llm.prepare.cache import CachePolicy
    from mlc_llm.prepare.jit import prepare_library
    from mlc_llm.prepare.progress import NullProgress

    return prepare_library(
        artifact,
        device="cpu",
        opt=opt,
        overrides={},
        home=home,
        jit_policy=CachePolicy.ON,
        progress=NullProgress(),
    )


def log_probabilities_of(
    artifact: Path, opt: str, home: CacheHome, tokens: Sequence[int]
) -> NDArray[np.float32]:
    """Load a model, with pages for the tokens, and return `log_probabilities`."""
    from mlc_llm.runtime.library import load_library
    from mlc_llm.runtime.model import CompiledRunner
    from mlc_llm.runtime.parameters import load_parameters

    library = load_library(prepare_code(artifact, opt, home))
    parameters = load_parameters(artifact, library, lambda _: None)
    num_pages = -(-len(tokens) // library.metadata.kv_cache.page_size)
    with closing(CompiledRunner(library, parameters, num_pages)) as runner:
        return log_probabilities(runner, tokens)


def log_probabilities(runner: ModelRunner, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return log(p) of every next token (n, vocab) after each token of a sequence."""
    from mlc_llm.runtime.runner import Step

    num_pages = runner.num_pages
    rows = []
    chunk = min(_CHUNK, runner.metadata.max_batch_size, runner.metadata.prefill_chunk_size)
    for first in range(0, len(tokens), chunk):
        part = tokens[first : first + chunk]
        end = first + len(part)
        places = np.arange(first, end, dtype=np.int32)
        step = Step(
            token_ids=np.asarray(part, np.int32),
            positions=places,
            slots=places,  # pages in order
            query_start=np.asarray([0, len(part)], np.int32),
            page_table=np.arange(num_pages, dtype=np.int32)[None],
            context_len=np.asarray([end], np.int32),
            logit_rows=np.arange(len(part), dtype=np.int32),
        )
        logits = runner.forward(step).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rows.append(logits.astype(np.float32))
    return np.concatenate(rows)


def compare(
    expected: NDArray[np.float32], found: NDArray[np.float32], tokens: Sequence[int]
) -> Quality:
    """Compare log-probabilities (n, vocab) after each token: float32 activations, then int8."""
    # Row by row: the whole vocabulary for all tokens in float64 is much memory.
    divergences = np.asarray(
        [
            float(np.exp(p.astype(np.float64)) @ (p.astype(np.float64) - q))
            for p, q in zip(expected, found, strict=True)
        ]
    )
    places = np.arange(len(tokens) - 1), np.asarray(tokens[1:])
    return Quality(
        num_tokens=len(tokens),
        mean_kl=float(divergences.mean()),
        max_kl=float(divergences.max()),
        same_top=float((expected.argmax(axis=1) == found.argmax(axis=1)).mean()),
        float_perplexity=float(np.exp(-expected[places].mean(dtype=np.float64))),
        int8_perplexity=float(np.exp(-found[places].mean(dtype=np.float64))),
    )


if __name__ == "__main__":
    main()
