"""What grammars cost: time of a mask, of compiling, and tokens a second beside free text.

    python benchmarks/structured.py masks MODEL
    python benchmarks/structured.py compile MODEL
    python benchmarks/structured.py throughput MODEL --batch 1 --batch 16 --rounds 5

Masks and compiling need no model: their vocabulary of 128,256 tokens is made of a real tokenizer's
tokens and of pairs of them. Free text and schemas take turns in one engine, so that a busy machine
hurts both; ratios are what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlc_llm.engine.config import EngineConfig, compile_overrides
from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.engine.grammar_cache import GrammarCache
from mlc_llm.engine.grammar_masks import SequenceGrammar
from mlc_llm.engine.open import OpenModel, open_model
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.text.formats.rwkv import RWKVVocabulary
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.tokenizer import Tokenizer

VOCAB_SIZE = 128_256
_SCRIPTS = (0x400, 0x600, 0x900, 0x3041, 0x4E00, 0x5E00, 0x6E00, 0xAC00, 0xBC00)
TEXT = {"type": "string", "minLength": 2000}
PLAIN = {"type": "object", "properties": {"text": TEXT}, "required": ["text"]}
FORM = {
    "type": "object",
    "properties": {
        f"a_long_name_that_the_schema_spells_out_{n}": {"enum": [True, False, None]}
        for n in range(40)
    },
    "additionalProperties": False,
}
FORM["required"] = list(FORM["properties"])  # type: ignore[call-overload]


def large_schema() -> dict[str, Any]:
    """Return a schema of 10 KB: nested objects, references, texts, numbers, choices."""
    item = {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": 0},
            "kind": {"enum": ["first", "second", "third"]},
            "note": {"type": "string", "maxLength": 80, "description": "anything worth saying"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
            "next": {"anyOf": [{"$ref": "#/$defs/item"}, {"type": "null"}]},
        },
        "required": ["id", "kind", "note", "tags"],
        "additionalProperties": False,
    }
    schema: dict[str, Any] = {"$defs": {"item": item}, "type": "object", "properties": {}}
    number = 0
    while len(json.dumps(schema)) < 10_000:
        number += 1
        schema["properties"][f"section_{number}"] = {
            "type": "object",
            "properties": {
                "title": {"type": "string", "pattern": "^[A-Z][a-z ]{2,40}$"},
                "score": {"type": "number", "minimum": 0, "maximum": number},
                "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1},
            },
            "required": ["title", "score", "items"],
            "additionalProperties": False,
        }
    schema["required"] = list(schema["properties"])
    return schema


GRAMMARS = {
    "a text in an object": GrammarSpec("json_schema", json.dumps(PLAIN)),
    "any object": GrammarSpec("json_object"),
    "10 KB schema": GrammarSpec("json_schema", json.dumps(large_schema())),
    "expression": GrammarSpec("regex", r"([A-Z][a-z]+ [0-9]{1,4}(\.[0-9]+)?; )*end"),
}


def large_vocabulary(directory: Path) -> GrammarVocabulary:
    """Return a vocabulary of VOCAB_SIZE tokens: a model's, longer words, and other scripts.

    The shares are about those of Llama 3's: every fourth token is of other scripts.
    """
    small = Tokenizer.load(directory)
    known = dict.fromkeys(filter(None, map(small.bytes_of, range(small.vocab_size))))
    words = [token for token in known if token.strip().isalpha() and 2 < len(token) < 7]
    ends = [token for token in words if token.isalpha() and token.islower()]
    rng = random.Random(1)
    while len(known) < VOCAB_SIZE * 3 // 4:
        known[rng.choice(words) + rng.choice(ends)] = None
    while len(known) < VOCAB_SIZE - 1:
        first = rng.choice(_SCRIPTS) + rng.randrange(2000)
        letters = (chr(first + rng.randrange(100)) for _ in range(rng.randint(1, 4)))
        known["".join(letters).encode()] = None
    vocabulary = RWKVVocabulary(dict(enumerate(known, 1)))
    return GrammarVocabulary(Tokenizer(vocabulary, {}), [0], VOCAB_SIZE)


def measure_masks(directory: Path, num_tokens: int) -> None:
    """Print how long a mask takes, over answers of random words.

    Texts end after 10 words in the mean, as far as their lengths allow; or they never end by
    themselves, so that all reach the lengths that schemas give. The last words of those are the
    slowest: nearly every token is looked at.
    """
    for mean_words in (10, 1000):
        print(f"\ntexts of {mean_words} words in the mean:\n")
        _measure_masks(directory, num_tokens, mean_words)


def _measure_masks(directory: Path, num_tokens: int, mean_words: int) -> None:
    vocabulary = large_vocabulary(directory)
    cache = GrammarCache(lambda: vocabulary)
    logits = np.zeros(VOCAB_SIZE, np.float32)
    words = [t for t in range(1, VOCAB_SIZE) if vocabulary.bytes_of(t).strip().isalpha()]
    is_word = np.zeros(VOCAB_SIZE, bool)
    is_word[words] = True
    ends_text = np.array([vocabulary.bytes_of(t)[:1] == b'"' for t in range(VOCAB_SIZE)])
    print("| grammar | masks | mean | p50 | p99 | most | forbidding, mean |\n" + "|---" * 7 + "|")
    for name, spec in GRAMMARS.items():
        times, applied = [], []
        rng = np.random.default_rng(2)
        while len(times) < num_tokens:
            grammar = SequenceGrammar(cache.compile(spec), [0], np.float32(-1e30))
            for _ in range(200):
                start = time.thread_time()
                grammar.compute_mask()
                times.append(time.thread_time() - start)
                logits[:] = 0
                start = time.thread_time()
                goes_on = grammar.restrict(logits, True)
                applied.append(time.thread_time() - start)
                allowed = logits == 0
                if not goes_on or not allowed.any():
                    break
                likely = allowed & (ends_text if rng.random() < 1 / mean_words else is_word)
                options = likely if likely.any() else allowed
                token = int(rng.choice(np.flatnonzero(options)))
                if token == 0:
                    break
                grammar.append(token)
                while grammar.forced:
                    grammar.append(grammar.forced[0])
                if grammar.is_finished:
                    break
        micro = np.asarray(times) * 1e6
        print(
            f"| {name} | {len(micro)} | {micro.mean():.0f} µs | {np.median(micro):.0f} µs | "
            f"{np.quantile(micro, 0.99):.0f} µs | {micro.max():.0f} µs | "
            f"{np.mean(applied) * 1e6:.0f} µs |"
        )
    cache.close()


def measure_compiling(directory: Path, rounds: int) -> None:
    """Print how long grammars take the first time, and what is made ready before."""
    start = time.perf_counter()
    vocabulary = large_vocabulary(directory)
    inner = time.perf_counter()
    GrammarVocabulary(vocabulary._tokenizer, [0], VOCAB_SIZE)
    print(f"vocabulary of {VOCAB_SIZE:,} tokens: {time.perf_counter() - inner:.2f} s, once")
    print(f"(making it up: {inner - start:.1f} s)")
    cache = GrammarCache(lambda: vocabulary)
    cache._reader.start()
    cache.compile(GrammarSpec("choice", '["a"]'))  # waits for the helper process
    for name, spec in GRAMMARS.items():
        times = []
        for number in range(rounds):
            fresh = GrammarSpec(spec.kind, spec.source + " " * number)
            start = time.perf_counter()
            cache.compile(fresh if spec.kind == "json_schema" else spec)
            times.append(time.perf_counter() - start)
        print(
            f"{name}: first {times[0] * 1e3:.1f} ms, median {statistics.median(times) * 1e3:.1f} ms"
        )
    cache.close()


def answer(
    model: OpenModel, specs: list[GrammarSpec | None], num_tokens: int
) -> tuple[float, float]:
    """Return tokens a second, and a second of processor time, of one answer to each at once."""
    prompt = model.prompts.token_ids([{"role": "user", "content": "Tell me about the sea."}])
    params = SamplingParams(temperature=1.0, max_tokens=num_tokens)
    for number, spec in enumerate(specs):
        # Free text goes on to its limit, as the schemas here do.
        request = Request(str(number), prompt, params.with_changes(seed=number), grammar=spec)
        model.engine.add(request)
    num_made, start, start_cpu = 0, None, 0.0
    while model.engine.has_work:
        outputs = [output for output in model.engine.step() if output.token_id is not None]
        if start is None:
            # The prompts are not counted; what was forced at once is still to be computed.
            if len(outputs) >= len(specs):
                num_made = len(outputs) - len(specs)
                start, start_cpu = time.perf_counter(), time.process_time()
            continue
        num_made += len(outputs)
    assert start is not None
    spent_cpu = time.process_time() - start_cpu
    return num_made / (time.perf_counter() - start), num_made / spent_cpu


def measure_throughput(model: OpenModel, batches: list[int], rounds: int, num_tokens: int) -> None:
    """Print tokens a second with and without schemas, in turns."""
    kinds: dict[str, GrammarSpec | None] = {
        "free": None,
        "text": GrammarSpec("json_schema", json.dumps(PLAIN)),
        "form": GrammarSpec("json_schema", json.dumps(FORM)),
    }
    columns = "batch | free text | a text in a schema | ratio (of processor time) | a form | ratio"
    print(f"| {columns} |\n" + "|---" * 6 + "|")
    for batch in batches:
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for spec in kinds.values():
            answer(model, [spec] * batch, 16)
        turns = random.Random(1)
        for _ in range(rounds):
            for name in turns.sample(list(kinds), len(kinds)):
                runs[name].append(answer(model, [kinds[name]] * batch, num_tokens))

        def middle(name: str, runs: Any = runs) -> str:
            return f"{statistics.median(speed for speed, _ in runs[name]):.0f} tok/s"

        def ratio(name: str, which: int, runs: Any = runs) -> float:
            pairs = zip(runs[name], runs["free"], strict=True)
            return statistics.median(run[which] / free[which] for run, free in pairs)

        print(
            f"| {batch} | {middle('free')} | {middle('text')} | {ratio('text', 0):.3f} "
            f"({ratio('text', 1):.3f}) | {middle('form')} | {ratio('form', 0):.2f} |"
        )


def open_for(directory: Path, library: Path | None, max_batch: int) -> OpenModel:
    """Load an artifact, its library compiled if need be."""
    from mlc_llm.artifact import read_chat_config
    from mlc_llm.prepare.cache import CacheHome, CachePolicy
    from mlc_llm.prepare.caches import Caches
    from mlc_llm.prepare.jit import prepare_library
    from mlc_llm.prepare.progress import NullProgress

    config = EngineConfig(
        mode="server", max_num_sequence=max_batch, max_total_sequence_length=1024 * max_batch
    )
    overrides = compile_overrides(config, read_chat_config(directory))
    if library is None:
        home: CacheHome = Caches.from_environment(os.environ).home
        library = prepare_library(
            directory,
            device="auto",
            opt="O2",
            overrides=overrides,
            home=home,
            jit_policy=CachePolicy.ON,
            progress=NullProgress(),
        )
    return open_model(directory, library, config, overrides=overrides)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["masks", "compile", "throughput"])
    parser.add_argument("model", type=Path, help="a directory with a tokenizer, or an artifact")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int)
    options = parser.parse_args()
    if options.what == "masks":
        measure_masks(options.model, options.tokens or 3000)
    elif options.what == "compile":
        measure_compiling(options.model, options.rounds)
    else:
        batches = options.batch or [1, 16]
        model = open_for(options.model, options.library, max(batches))
        measure_throughput(model, batches, options.rounds, options.tokens or 128)
        model.close()


if __name__ == "__main__":
    main()
