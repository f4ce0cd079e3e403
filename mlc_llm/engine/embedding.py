"""An embedding model on its own thread: token ids in, vectors of length 1 out.

Knows how inputs are pooled and who waits. Does not know requests of the protocol.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import ChatConfig, read_chat_config
from mlc_llm.device import parse_device
from mlc_llm.engine.encoder import Encoder, pages_for_encoding
from mlc_llm.errors import (
    ContextTooLong,
    EngineStopped,
    QueueFull,
    RequestError,
    StepFailed,
    UnsupportedModel,
)
from mlc_llm.text.tokenizer import Tokenizer

_MAX_QUEUED = 128


class EmbeddingModel:
    """Embeds inputs of token ids; made by `open_embedding_model`, closed by `close`.

    Requests wait for each other; at most `max_queued_requests` do.
    """

    def __init__(
        self,
        name: str,
        config: ChatConfig,
        tokenizer: Tokenizer,
        encoder: Encoder,
        *,
        max_queued_requests: int = _MAX_QUEUED,
    ) -> None:
        """Take the parts; owns `encoder`. Raises UnsupportedModel for another way of pooling."""
        settings = config.embedding_metadata or {}
        pooling = settings.get("pooling_strategy", "last")
        if pooling != "last":
            raise UnsupportedModel(
                f"{name} pools its tokens by {pooling!r:.80}; this release pools by 'last' only"
            )
        self.name = name
        self.num_dimensions = int(config.model_config["hidden_size"])
        self.max_input_len = encoder.max_input_len
        self.vocab_size = encoder.vocab_size
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._is_normalized = bool(settings.get("normalize", True))
        self._max_queued = max_queued_requests
        self._places = threading.Semaphore(max_queued_requests)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlc_llm-embedding")
        self._is_closed = threading.Event()

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of a text, with the special tokens that its tokenizer adds."""
        return self._tokenizer.encode(text, add_special_tokens=True)

    async def embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return one vector an input, (len(inputs), hidden) float32, of length 1.

        A cancelled call stops before its next step. Raises RequestError and ContextTooLong for
        inputs it cannot take, QueueFull, EngineStopped or StepFailed.
        """
        self._check_open()
        self._check(inputs)
        if not self._places.acquire(blocking=False):
            raise QueueFull(
                f"{self._max_queued} requests for embeddings wait already; try again later"
            )
        is_cancelled = threading.Event()
        try:
            states = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._encode, inputs, is_cancelled
            )
        except asyncio.CancelledError:
            is_cancelled.set()
            raise
        finally:
            self._places.release()
        return normalize(states) if self._is_normalized else states

    def _encode(
        self, inputs: Sequence[Sequence[int]], is_cancelled: threading.Event
    ) -> NDArray[np.float32]:
        def check() -> None:
            self._check_open()
            if is_cancelled.is_set():
                raise RequestError("the request was cancelled")

        try:
            return self._encoder.encode(inputs, check)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise StepFailed(
                f"the step that computed the embeddings failed ({error}); other requests go on"
            ) from error

    def _check_open(self) -> None:
        if self._is_closed.is_set():
            raise EngineStopped(f"the embedding model {self.name} has been closed")

    def _check(self, inputs: Sequence[Sequence[int]]) -> None:
        if not inputs:
            raise RequestError("there is no input; send at least one text", "input")
        for number, tokens in enumerate(inputs):
            if not tokens:
                raise RequestError(f"input {number} is empty; give it some text", "input")
            if len(tokens) > self.max_input_len:
                raise ContextTooLong(
                    f"input {number} has {len(tokens):,} tokens, the model {self.name} takes "
                    f"{self.max_input_len:,}; split it",
                    "input",
                )
            if min(tokens) < 0 or max(tokens) >= self.vocab_size:
                wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
                raise RequestError(
                    f"input {number} has token id {wrong}, the model {self.name} has ids from 0 "
                    f"to {self.vocab_size - 1}",
                    "input",
                )

    def close(self) -> None:
        """End the work under way and free the model; calling it again does nothing."""
        if not self._is_closed.is_set():
            self._is_closed.set()
            self._thread.shutdown(wait=True)
            self._encoder.close()


def normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors (n, size) scaled to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled


def open_embedding_model(
    artifact: Path,
    library: Path,
    *,
    name: str,
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    max_queued_requests: int = _MAX_QUEUED,
    progress: Callable[[str], None] = lambda _: None,
) -> EmbeddingModel:
    """Load an artifact and a library that was compiled with the override `model_task=embedding`.

    name: what requests call it. `overrides` are the settings the library is expected to have been
    compiled with. Raises the errors of the artifact, the library and the device.
    """
    from mlc_llm.engine.open import check_library
    from mlc_llm.runtime.library import load_library
    from mlc_llm.runtime.model import CompiledRunner
    from mlc_llm.runtime.parameters import load_parameters

    parse_device(device)
    config = read_chat_config(artifact)
    tokenizer = Tokenizer.load(artifact)
    loaded = load_library(library)
    metadata = loaded.metadata
    expected = {key: value for key, value in (overrides or {}).items() if key != "model_task"}
    check_library(metadata, config, expected, str(library), "embedding")
    parameters = load_parameters(artifact, loaded, progress)
    runner = CompiledRunner(loaded, parameters, pages_for_encoding(metadata))
    encoder = Encoder(runner)
    return EmbeddingModel(name, config, tokenizer, encoder, max_queued_requests=max_queued_requests)
