"""A conversation of one user with a model: prompt in, text out, earlier turns kept in KV pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import ChatConfig, LibraryMetadata, read_chat_config
from mlc_llm.device import parse_device
from mlc_llm.engine.metrics import EngineMetrics, RequestStats
from mlc_llm.engine.sampling import SamplingParams, choose_token
from mlc_llm.errors import ContextTooLong, LibraryMismatch, OptionError, RequestError
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.pages import PagedSequence, PagePool
from mlc_llm.runtime.runner import ModelRunner, Step
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.stop import StopFilter
from mlc_llm.text.tokenizer import Tokenizer

__all__ = ["ChatSession", "RequestStats", "SamplingParams", "check_library"]

# Settings that are part of the library; a session only checks them.
_COMPILED = (
    "context_window_size",
    "sliding_window_size",
    "prefill_chunk_size",
    "attention_sink_size",
    "max_batch_size",
)
# Numbers of the model that are part of the library's code.
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "position_embedding_base",
    "rope_scaling",
)


class ChatSession:
    """One user's session: one answer at a time, from one thread at a time."""

    def __init__(
        self,
        config: ChatConfig,
        tokenizer: Tokenizer,
        prompts: PromptBuilder,
        runner: ModelRunner,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.last: RequestStats | None = None
        self._prompts = prompts
        self._runner = runner
        self._metrics = EngineMetrics()
        self._pool = PagePool(runner.num_pages, runner.metadata.kv_cache.page_size)
        self._sequence = PagedSequence(self._pool)
        self._is_generating = False

    @classmethod
    def open(
        cls,
        artifact: Path,
        library: Path,
        *,
        device: str = "auto",
        overrides: Mapping[str, Any] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> ChatSession:
        """Load an artifact and its library.

        `overrides` are the settings the library is expected to have been compiled with. Raises
        the errors of the artifact, the library and the device, and OptionError.
        """
        from mlc_llm.runtime.model import CompiledRunner
        from mlc_llm.runtime.parameters import load_parameters

        parse_device(device)
        config = read_chat_config(artifact)
        tokenizer = Tokenizer.load(artifact)
        prompts = PromptBuilder.load(artifact, config, tokenizer)
        prompts.start()
        loaded = load_library(library)
        metadata = loaded.metadata
        check_library(metadata, config, overrides or {}, str(library))
        num_pages = -(-metadata.context_window_size // metadata.kv_cache.page_size)
        parameters = load_parameters(artifact, loaded, progress)
        runner = CompiledRunner(loaded, parameters, num_pages)
        return cls(config, tokenizer, prompts, runner)

    @property
    def context_window_size(self) -> int:
        """Tokens a conversation may have, answer included."""
        return self._runner.metadata.context_window_size

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams) -> Iterator[str]:
        """Answer a conversation piece by piece; closing the iterator stops the work.

        Raises ContextTooLong, TemplateError or RequestError, before the first piece.
        """
        token_ids = self._prompts.token_ids(messages)
        stream = self.tokenizer.stream()
        stops = StopFilter([*self._prompts.stop_strings, *params.stop])
        tokens = self.generate(token_ids, params)
        try:
            for token in tokens:
                if text := stops.put(stream.put(token)):
                    yield text
                if stops.stopped:
                    if self.last is not None:
                        self.last.finish_reason = "stop"
                    return
            if text := stops.put(stream.finish()) + stops.finish():
                yield text
        finally:
            tokens.close()

    def generate(
        self, token_ids: Sequence[int], params: SamplingParams
    ) -> Generator[int, None, None]:
        """Continue tokens; stop tokens end the iteration and are not part of it.

        Raises ContextTooLong where the prompt leaves no room, RequestError for bad tokens.
        """
        self._check_prompt(token_ids)
        return self._generate(list(token_ids), params)

    def _check_prompt(self, token_ids: Sequence[int]) -> None:
        vocab_size = self._runner.metadata.vocab_size
        if len(token_ids) == 0:
            raise RequestError("the prompt is empty; give at least one token")
        bad = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise RequestError(f"token {bad} is outside the vocabulary of {vocab_size} tokens")
        if len(token_ids) >= self.context_window_size:
            raise ContextTooLong(
                f"the prompt has {len(token_ids):,} tokens, the model allows "
                f"{self.context_window_size:,} with the answer; shorten it, or raise "
                "context_window_size with --overrides"
            )

    def _generate(self, prompt: list[int], params: SamplingParams) -> Generator[int, None, None]:
        if self._is_generating:
            raise RequestError(
                "the session is still answering another request; finish it or close its iterator"
            )
        self._is_generating = True
        stats = self.last = RequestStats(prompt_tokens=len(prompt))
        random = np.random.default_rng(params.seed)
        stop_ids = frozenset() if params.ignore_eos else self._prompts.stop_token_ids
        generated: list[int] = []
        start = time.perf_counter()
        try:
            logits = self._prefill(prompt, stats)
            while True:
                token = choose_token(self._runner, logits, params, prompt, generated, random)
                now = time.perf_counter()
                if not generated:
                    stats.prefill_s, start = now - start, now
                stats.decode_s = now - start if generated else 0.0
                if token in stop_ids:
                    stats.finish_reason = "stop"
                    return
                generated.append(token)
                stats.completion_tokens += 1
                yield token
                if len(generated) == params.max_tokens or self._is_full():
                    stats.finish_reason = "length"
                    return
                logits = self._forward([token])
        finally:
            self._is_generating = False
            self._metrics.add(stats)

    def _prefill(self, prompt: list[int], stats: RequestStats) -> NDArray[np.float32]:
        """Bring the sequence to `prompt`, keeping the part it shares; return the last logits."""
        sequence = self._sequence
        # At least one token is computed anew: its logits choose the next one.
        shared = min(_common_prefix(sequence.token_ids, prompt), len(prompt) - 1)
        sequence.truncate(shared)
        stats.cached_tokens = shared
        chunk = self._runner.metadata.prefill_chunk_size
        for first in range(shared, len(prompt), chunk):
            logits = self._forward(prompt[first : first + chunk])
        return logits

    def _forward(self, tokens: list[int]) -> NDArray[np.float32]:
        sequence = self._sequence
        start = len(sequence.token_ids)
        count = len(tokens)
        try:
            slots = sequence.grow(tokens)
            step = Step(
                token_ids=np.asarray(tokens, np.int32),
                positions=np.arange(start, start + count, dtype=np.int32),
                slots=slots,
                query_start=np.asarray([0, count], np.int32),
                page_table=np.asarray([sequence.pages], np.int32),
                context_len=np.asarray([start + count], np.int32),
                logit_rows=np.asarray([count - 1], np.int32),
            )
            logits: NDArray[np.float32] = self._runner.forward(step)[0]
        except BaseException:
            # Ctrl-C may come at any line: tokens that were not computed must not be reused.
            sequence.truncate(start)
            raise
        # Rows past the tokenizer's vocabulary are padding of the embedding table.
        active = self.config.active_vocab_size
        return logits[:active] if 0 < active < len(logits) else logits

    def _is_full(self) -> bool:
        return len(self._sequence.token_ids) + 1 >= self.context_window_size

    def metrics_text(self) -> str:
        """Return sums over all requests as Prometheus text."""
        return self._metrics.prometheus_text()

    def close(self) -> None:
        """Free the model and end helper processes."""
        self._prompts.close()
        self._runner.close()


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return index
    return min(len(first), len(second))


def check_library(
    metadata: LibraryMetadata, config: ChatConfig, overrides: Mapping[str, Any], where: str
) -> None:
    """Raise LibraryMismatch unless a library was compiled for this model and these settings."""
    for name in ("model_type", "quantization"):
        wanted, found = getattr(config, name), getattr(metadata, name)
        if wanted != found:
            raise LibraryMismatch(
                f"{where} was compiled for {name} {found}, the model has {wanted}; "
                "compile it again with `mlc_llm compile`"
            )
    for name in _SHAPE:
        wanted, found = config.model_config.get(name), metadata.model_config.get(name)
        # Artifacts leave out, or set to zero, what follows from other numbers.
        is_given = name in config.model_config and name in metadata.model_config
        if is_given and wanted != found and (wanted or name == "rope_scaling"):
            raise LibraryMismatch(
                f"{where} was compiled for another model: its {name} is {found}, this model's is "
                f"{wanted}; compile it again with `mlc_llm compile`"
            )
    for name, value in overrides.items():
        if name == "kv_cache_dtype":
            found = metadata.kv_cache.dtype if value != "auto" else value
        elif name in _COMPILED:
            found = getattr(metadata, name)
        else:
            known = ", ".join((*_COMPILED, "kv_cache_dtype"))
            raise OptionError(f"override {name!r} is not known; known: {known}")
        if found != value:
            raise OptionError(
                f"{where} was compiled with {name}={found}, the override says {value}; "
                "compile it again with the same --overrides"
            )
