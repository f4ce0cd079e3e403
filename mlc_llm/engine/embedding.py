"""An embedding model on its own thread: token ids in, vectors out.

Knows what an artifact says of its vectors, and who waits. Does not know requests of the protocol.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import ChatConfig, read_chat_config
from mlc_llm.device import parse_device
from mlc_llm.engine.encoder import Encoder, pages_for_encoding, read_pooling
from mlc_llm.errors import (
    ContextTooLong,
    EngineStopped,
    QueueFull,
    RequestError,
    StepFailed,
)
from mlc_llm.text.tokenizer import Tokenizer

_MAX_QUEUED = 128
# Models that make vectors of texts and nothing else; older configurations do not say so.
_EMBEDDING_TYPES = ("bert", "bert-bge", "qwen3-embedding")


def is_embedding_model(config: ChatConfig) -> bool:
    """Return whether an artifact is for embeddings alone."""
    return config.model_task == "embedding" or config.model_type in _EMBEDDING_TYPES


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
        is_normalized: bool = True,
        max_queued_requests: int = _MAX_QUEUED,
    ) -> None:
        """Take the parts; owns `encoder`. is_normalized: whether vectors get the length 1."""
        self.name = name
        self.created = int(time.time())  # Unix time
        self.num_dimensions = int(config.model_config["hidden_size"])
        self.max_input_len = encoder.max_input_len
        self.vocab_size = encoder.vocab_size
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._is_normalized = is_normalized
        self._end_ids = _end_ids(config, encoder)
        self._max_queued = max_queued_requests
        self._places = threading.Semaphore(max_queued_requests)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlc_llm-embedding")
        self._is_closed = threading.Event()

    def token_ids(self, text: str, max_len: int | None = None) -> list[int]:
        """Return the ids of a text, with the special tokens that its tokenizer adds.

        A model that pools by the last token gets an end-of-text token there in any case. A text
        that makes more than `max_len` ids loses its end; the special tokens after it stay.
        """
        ids, num_added = self._tokenizer.encode_whole(text)
        if self._end_ids and (not ids or ids[-1] not in self._end_ids):
            ids, num_added = [*ids, self._end_ids[0]], num_added + 1
        if max_len is not None and len(ids) > max_len:
            num_added = min(num_added, max_len)
            ids = [*ids[: max_len - num_added], *ids[len(ids) - num_added :]]
        return ids

    async def embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return one vector an input, (len(inputs), hidden) float32.

        A cancelled call stops before its next step. Raises RequestError and ContextTooLong for
        inputs it cannot take, QueueFull, EngineStopped or StepFailed.
        """
        self.check_open()
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
            self.check_open()
            if is_cancelled.is_set():
                raise RequestError("the request was cancelled")

        try:
            return self._encoder.encode(inputs, check)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise StepFailed(
                f"the step that computed the embeddings failed ({error}); other requests go on"
            ) from error

    def check_open(self) -> None:
        """Raise EngineStopped after `close`."""
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
                    f"{self.max_input_len:,}; split it, or send truncate_prompt_tokens=-1 to leave "
                    "out its end",
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


def _end_ids(config: ChatConfig, encoder: Encoder) -> list[int]:
    """Return the ids of which one must end a text: those of a model made to pool by the last."""
    if not is_embedding_model(config) or encoder.pooling != "last":
        return []
    ids = config.eos_token_id
    return list(ids) if isinstance(ids, list) else [ids]


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
    compiled with. What the artifact's `embedding_metadata` leaves open is the library's default.
    Raises the errors of the artifact, the library and the device.
    """
    from mlc_llm.engine.open import check_library
    from mlc_llm.runtime.library import load_library
    from mlc_llm.runtime.model import CompiledRunner
    from mlc_llm.runtime.parameters import load_parameters

    if device != "auto":
        parse_device(device)  # what is no device of this machine is said before anything is read
    config = read_chat_config(artifact)
    tokenizer = Tokenizer.load(artifact)
    loaded = load_library(library, device, progress)
    metadata = loaded.metadata
    expected = {key: value for key, value in (overrides or {}).items() if key != "model_task"}
    check_library(metadata, config, expected, str(library), "embedding")
    settings = {**(metadata.embedding_metadata or {}), **(config.embedding_metadata or {})}
    pooling = read_pooling(settings.get("pooling_strategy", "last"))
    parameters = load_parameters(artifact, loaded, progress)
    runner = CompiledRunner(loaded, parameters, pages_for_encoding(metadata))
    is_causal = settings.get("model_type", "decoder") != "encoder"
    return EmbeddingModel(
        name,
        config,
        tokenizer,
        Encoder(runner, pooling=pooling, is_causal=is_causal),
        is_normalized=bool(settings.get("normalize", True)),
        max_queued_requests=max_queued_requests,
    )
