"""One request to an OpenAI-compatible server, and when each part of its answer came.

Knows the bodies of requests and events. Does not know when requests are sent.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlc_llm.bench.load.http import Answer, RequestFailed, Server, send

Endpoint = Literal["chat", "completions"]
_PATHS: Mapping[Endpoint, str] = {"chat": "/chat/completions", "completions": "/completions"}
_CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Sample:
    """What one request asks: a prompt, and how many tokens the answer may have.

    earlier: the turns of a chat before the prompt, the user's first; none for completions.
    """

    prompt: str
    max_tokens: int
    earlier: tuple[str, ...] = ()


@dataclass
class Record:
    """What became of one request; times are seconds of one clock.

    text_times: when each event with text came. output_tokens is what the server counted; where it
    does not count (is_counted is False), the number of events with text. error: a kind to count by.
    """

    sent_s: float
    end_s: float = 0.0
    text_times: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    is_counted: bool = False
    error: str | None = None
    detail: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Return the time to the first text; None where there was none."""
        return self.text_times[0] - self.sent_s if self.text_times else None

    @property
    def tpot_s(self) -> float | None:
        """Return the time of each token after the first one; None for less than two."""
        if not self.text_times or self.output_tokens < 2:
            return None
        return (self.end_s - self.text_times[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Return the times between events with text."""
        return [later - earlier for earlier, later in itertools.pairwise(self.text_times)]

    @property
    def latency_s(self) -> float:
        """Return the time to the end of the answer."""
        return self.end_s - self.sent_s


@dataclass(frozen=True)
class Asker:
    """How requests of a run are made; `extra` are fields that each of them has."""

    server: Server
    endpoint: Endpoint
    model: str
    timeout_s: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    async def ask(self, sample: Sample, record: Record | None = None) -> Record:
        """Send a request and read its answer to the end; failures are in the record.

        A record that is given is filled while the answer arrives, so that it can be watched.
        """
        body = self._body(sample)
        record = record or Record(0.0)
        record.sent_s = time.perf_counter()
        try:
            await asyncio.wait_for(self._stream(body, record), self.timeout_s)
        except asyncio.TimeoutError:
            record.error = "timeout"
            record.detail = f"no end after {self.timeout_s:g} s"
        except RequestFailed as failure:
            record.error, record.detail = failure.kind, failure.detail
        if record.error is not None or not record.end_s:
            record.end_s = time.perf_counter()
        if not record.is_counted:
            record.output_tokens = len(record.text_times)
        return record

    def _body(self, sample: Sample) -> bytes:
        body = {
            "model": self.model,
            **self._question(sample),
            "max_tokens": sample.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        return json.dumps(body).encode()

    def _question(self, sample: Sample) -> dict[str, Any]:
        if self.endpoint == "chat":
            turns = zip(itertools.cycle(("user", "assistant")), (*sample.earlier, sample.prompt))
            return {"messages": [{"role": role, "content": text} for role, text in turns]}
        if sample.earlier:
            raise ValueError("completions have no earlier turns")
        return {"prompt": sample.prompt}

    async def _stream(self, body: bytes, record: Record) -> None:
        path = self.server.prefix + _PATHS[self.endpoint]
        async with send(self.server, "POST", path, body) as answer:
            if answer.status != 200:
                raise RequestFailed(f"HTTP {answer.status}", error_message(await answer.read()))
            async for event in _events(answer):
                now = time.perf_counter()
                _note(record, event, now)
                record.end_s = now


async def _events(answer: Answer) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a stream. Raises RequestFailed if it has no proper end."""
    rest = b""
    async for piece in answer.pieces():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError:
                raise RequestFailed("bad answer", "an event is no JSON") from None
            if not isinstance(event, dict):
                raise RequestFailed("bad answer", "an event is no object")
            yield event
    raise RequestFailed("connection lost", "the stream ended without [DONE]")


def _note(record: Record, event: dict[str, Any], now: float) -> None:
    """Add what an event says to the record. Raises RequestFailed for an error event."""
    if event.get("error"):
        raise RequestFailed("error in stream", error_message(json.dumps(event).encode()))
    usage = event.get("usage")
    if usage:
        record.is_counted = True
        record.prompt_tokens = usage.get("prompt_tokens") or 0
        record.output_tokens = usage.get("completion_tokens") or 0
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice
        text = delta.get("content") or delta.get("text") or delta.get("reasoning_content") or ""
        if text or delta.get("tool_calls"):
            record.text_times.append(now)
            record.text += text


def error_message(body: bytes) -> str:
    """Return the message of an OpenAI error body, or the start of what came instead."""
    try:
        error = json.loads(body)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode("utf-8", "replace")
    return str(message)


async def call(server: Server, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return the JSON that a route answers to a GET, or a POST of `body`. Raises RequestFailed."""
    try:
        return await asyncio.wait_for(_call(server, path, body), _CALL_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise RequestFailed("timeout", f"{path} took over {_CALL_TIMEOUT_S:.0f} s") from None


async def _call(server: Server, path: str, body: Mapping[str, Any] | None) -> Any:
    sent = None if body is None else json.dumps(body).encode()
    async with send(server, "GET" if body is None else "POST", path, sent) as answer:
        content = await answer.read()
        if answer.status != 200:
            raise RequestFailed(f"HTTP {answer.status}", error_message(content))
    try:
        return json.loads(content)
    except ValueError:
        raise RequestFailed("bad answer", f"{path} answered no JSON") from None
