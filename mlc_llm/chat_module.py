"""`ChatModule`: one conversation with one model, as programs for older releases wrote it.

Knows the old names; `MLCEngine` does the work.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.api import MLCEngine
from mlc_llm.callback import DeltaCallback
from mlc_llm.errors import RequestError


@dataclass(frozen=True)
class GenerationConfig:
    """How an answer is made; what is None is up to the model."""

    temperature: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_p: float | None = None
    max_gen_len: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    def to_request(self) -> dict[str, Any]:
        """Return the fields of a chat request."""
        fields = {**vars(self), "max_tokens": self.max_gen_len}
        del fields["max_gen_len"]
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class ChatMessage:
    """A message of a conversation: role "system", "user" or "assistant"."""

    role: str
    content: str


class ChatModule:
    """A conversation with a model, which remembers its turns until `reset_chat`."""

    def __init__(
        self,
        model: str,
        device: str = "auto",
        model_lib_path: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Open a model; `options` are keywords of `MLCEngine`."""
        options.setdefault("mode", "interactive")
        self._engine = MLCEngine(model, device, model_lib=model_lib_path, **options)
        self._messages: list[dict[str, Any]] = []
        self._rates: tuple[float | None, float | None] = (None, None)

    @classmethod
    def from_engine(cls, engine: MLCEngine) -> ChatModule:
        """Return a conversation on an engine, which it owns."""
        module = cls.__new__(cls)
        module._engine, module._messages, module._rates = engine, [], (None, None)
        return module

    def generate(
        self,
        prompt: str | Sequence[ChatMessage | Mapping[str, Any]],
        generation_config: GenerationConfig | None = None,
        progress_callback: DeltaCallback | None = None,
        stateless: bool = False,
    ) -> str:
        """Return the answer to a prompt, or to the messages of a conversation.

        stateless: earlier turns are not seen and this one is not remembered. The callback gets
        text as it comes. An answer that is cut off by an exception is not remembered.
        """
        new = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _as_dicts(prompt)
        )
        messages = new if stateless else [*self._messages, *new]
        fields = {} if generation_config is None else generation_config.to_request()
        answer = self._answer(messages, fields, progress_callback)
        if not stateless:
            self._messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _answer(
        self,
        messages: list[dict[str, Any]],
        fields: Mapping[str, Any],
        callback: DeltaCallback | None,
    ) -> str:
        started = time.perf_counter()
        first_at = started
        pieces: list[str] = []
        held: list[str] = []
        usage: Any = None
        chunks = self._engine.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **fields
        )
        for chunk in chunks:
            usage = chunk.usage or usage
            text = chunk.choices[0].delta.content if chunk.choices else None
            if not text:
                continue
            if not pieces:
                first_at = time.perf_counter()
            pieces.append(text)
            held.append(text)
            if callback is not None and len(held) >= callback.callback_interval:
                callback.delta_callback("".join(held))
                held.clear()
        if callback is not None:
            if held:
                callback.delta_callback("".join(held))
            callback.stopped_callback()
        self._rates = _rates_of(usage, first_at - started, time.perf_counter() - first_at)
        return "".join(pieces)

    def stats(self, verbose: bool = False) -> str:
        """Return the speed of the last answer; `verbose` adds the sums over all of them."""
        names = ("prefill", "decode")
        rates = ", ".join(
            f"{name}: N/A" if rate is None else f"{name}: {rate:.1f} tok/s"
            for name, rate in zip(names, self._rates, strict=True)
        )
        return f"{rates}\n{self._engine.metrics().prometheus_text()}" if verbose else rates

    def reset_chat(self) -> None:
        """Forget the conversation."""
        self._messages = []
        self._rates = (None, None)

    def close(self) -> None:
        """Free the model."""
        self._engine.terminate()


def _as_dicts(messages: Sequence[ChatMessage | Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not messages:
        raise RequestError("the prompt has no messages; give it at least one", "messages")
    return [
        vars(message) if isinstance(message, ChatMessage) else dict(message) for message in messages
    ]


def _rates_of(usage: Any, first_s: float, rest_s: float) -> tuple[float | None, float | None]:
    """Return tokens a second of the prompt and of the answer after its first token."""
    if usage is None:
        return None, None
    details = usage.prompt_tokens_details
    computed = usage.prompt_tokens - (details.cached_tokens if details else 0)
    later = usage.completion_tokens - 1
    prefill = computed / first_s if computed > 0 and first_s > 0 else None
    return prefill, later / rest_s if later > 0 and rest_s > 0 else None
