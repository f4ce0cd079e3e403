"""What clients of a server do in a soak, well- and ill-behaved. `soak.py` lets them act."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx

MODEL = "demo"
NUM_SEQUENCES = 6
MAX_QUEUED = 8
STUCK_S = 90.0
WARM_UP_PROMPTS = 6  # of at least 800 tokens: more than the cache holds
WORDS = "river stone cloud bright seven under garden quick old letter window north".split()
WITNESS = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Name three animals of the forest."}],
    "temperature": 0,
    "max_tokens": 24,
}
BROKEN: tuple[tuple[str, bytes], ...] = (
    ("/v1/chat/completions", b"{bad"),
    ("/v1/chat/completions", b"[]"),
    ("/v1/chat/completions", b'{"messages": "hello"}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "top_p": NaN}'),
    ("/v1/chat/completions", b"[" * 50_000),
    ("/v1/completions", b'{"prompt": [-1, 99999999]}'),
    ("/v1/completions", b'{"prompt": "x", "max_tokens": -5}'),
    ("/v1/completions", json.dumps({"prompt": "word " * 40_000}).encode()),
    ("/v1/embeddings", b'{"input": "x"}'),
    ("/v1/nothing", b"{}"),
    ("/tokenize", b'{"prompt": 5}'),
)
_CLIENT_ERRORS = frozenset({400, 404, 405, 413, 415, 422})


class Misbehaviour(Exception):
    """The server did what it must not do."""


class Clients:
    """What clients do; every action returns what came of it. Raises Misbehaviour."""

    def __init__(self, url: str, rng: random.Random) -> None:
        self._rng = rng
        self._address = httpx.URL(url)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._http = httpx.AsyncClient(base_url=url, timeout=STUCK_S, limits=limits)
        self._witness: str | None = None
        self.actions: tuple[tuple[int, Callable[[], Awaitable[str]]], ...] = (
            (20, self.chat),
            (20, self.stream),
            (15, self.leave_stream),
            (8, self.hang_up),
            (10, self.complete),
            (12, self.send_broken),
            (4, self.send_half),
            (2, self.read_slowly),
            (3, self.burst),
            (3, self.long_prompt),
            (6, self.ask_witness),
            (4, self.look_around),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def act(self, is_warm: bool) -> tuple[str, str]:
        """Do something at random; return its name and what came of it.

        Until the server is warm, what is rare and large comes as often as anything else.
        """
        weights, actions = zip(*self.actions, strict=True)
        action = self._rng.choices(actions, weights if is_warm else None)[0]
        name = action.__name__
        try:
            return name, await asyncio.wait_for(action(), STUCK_S)
        except asyncio.TimeoutError:
            raise Misbehaviour(f"{name} had no answer after {STUCK_S:g} s") from None
        except httpx.HTTPError as error:
            raise Misbehaviour(f"{name}: {type(error).__name__} {error}") from error

    def _text(self, low: int, high: int) -> str:
        return " ".join(self._rng.choices(WORDS, k=self._rng.randint(low, high)))

    def _chat_body(self, **fields: Any) -> dict[str, Any]:
        rng = self._rng
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": self._text(1, 80)}],
            "max_tokens": rng.randint(1, 48),
            "temperature": rng.choice([0, 0.7, 1.2]),
            "n": rng.choice([1, 1, 1, 2, 3]),
            "cache_salt": rng.choice(["", "", "a", "b"]),
            "priority": rng.choice([0, 0, 1]),
        }
        optional = {
            "seed": rng.randrange(1 << 31),
            "stop": rng.choice(["\n", ["the", "."]]),
            "frequency_penalty": 0.5,
            "logit_bias": {"100": 5, "200": -100},
            "logprobs": True,
        }
        chosen = {name: value for name, value in optional.items() if rng.random() < 0.25}
        return {**body, **chosen, **fields}

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        response = await self._http.post(path, json=body)
        check_status(response, {200, 429})
        return response

    async def chat(self) -> str:
        """Ask for a whole answer."""
        body = self._chat_body()
        response = await self._post("/v1/chat/completions", body)
        if response.status_code == 200 and len(response.json()["choices"]) != body["n"]:
            raise Misbehaviour("a chat has too few choices")
        return str(response.status_code)

    async def stream(self) -> str:
        """Read a stream to its end."""
        return await self._read_stream(self._chat_body(stream=True), None)

    async def leave_stream(self) -> str:
        """Leave a stream in the middle."""
        body = self._chat_body(stream=True, max_tokens=400, ignore_eos=True)
        return await self._read_stream(body, self._rng.randint(0, 40))

    async def _read_stream(
        self, body: dict[str, Any], leave_after: int | None, pause_s: float = 0.0
    ) -> str:
        num_events, last = 0, ""
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            check_status(response, {200, 429})
            if response.status_code == 429:
                return "429"
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    num_events, last = num_events + 1, line
                    await asyncio.sleep(pause_s)
                    if num_events == leave_after:
                        return "left"
        if last != "data: [DONE]":
            raise Misbehaviour(f"a stream ended with {last[:200]!r}")
        return "200"

    async def hang_up(self) -> str:
        """Close the connection while the server works on the whole answer."""
        body = self._chat_body(max_tokens=400, ignore_eos=True)
        post = self._http.post("/v1/chat/completions", json=body)
        with suppress(asyncio.TimeoutError):
            check_status(await asyncio.wait_for(post, self._rng.uniform(0.005, 0.5)), {200, 429})
        return "left"

    async def complete(self) -> str:
        """Continue several texts at once."""
        rng = self._rng
        body = {
            "model": MODEL,
            "prompt": [self._text(1, 40) for _ in range(rng.randint(1, 3))],
            "max_tokens": rng.randint(1, 24),
            "echo": rng.random() < 0.3,
            "logprobs": rng.choice([None, 0, 3]),
        }
        return str((await self._post("/v1/completions", body)).status_code)

    async def send_broken(self) -> str:
        """Send what must be refused."""
        path, data = self._rng.choice(BROKEN)
        headers = {"content-type": "application/json"}
        response = await self._http.post(path, content=data, headers=headers)
        check_status(response, _CLIENT_ERRORS)
        if "message" not in response.json()["error"]:
            raise Misbehaviour(f"an error of {path} has no message")
        return str(response.status_code)

    async def send_half(self) -> str:
        """Send a part of a request and go."""
        reader, writer = await asyncio.open_connection(self._address.host, self._address.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000\r\n"
        writer.write(head[: self._rng.randint(1, len(head))])
        if self._rng.random() < 0.5:
            writer.write(b'\r\n\r\n{"messages": [')
        await writer.drain()
        await asyncio.sleep(self._rng.uniform(0, 0.5))
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        del reader
        return "left"

    async def read_slowly(self) -> str:
        """Read a stream much more slowly than it is made."""
        body = self._chat_body(stream=True, max_tokens=100, ignore_eos=True, n=1)
        return await self._read_stream(body, 15, 0.2)

    async def warm_up(self) -> None:
        """Do everything once, after filling the cache: the server touches its memory only then."""
        for _ in range(WARM_UP_PROMPTS):
            await self.long_prompt()
        for _, action in self.actions:
            await action()

    async def burst(self) -> str:
        """Ask for more at once than may wait."""
        count = 2 * (NUM_SEQUENCES + MAX_QUEUED)
        posts = [
            self._http.post("/v1/chat/completions", json=self._chat_body(n=1)) for _ in range(count)
        ]
        responses = await asyncio.gather(*posts)
        for response in responses:
            check_status(response, {200, 429})
            if response.status_code == 429 and int(response.headers["retry-after"]) < 1:
                raise Misbehaviour("a full queue does not say when to come again")
        return "refused" if any(answer.status_code == 429 for answer in responses) else "200"

    async def long_prompt(self) -> str:
        """Ask with a prompt that fills much of the cache."""
        messages = [{"role": "user", "content": self._text(800, 2400)}]
        body = self._chat_body(messages=messages, n=1, max_tokens=8)
        return str((await self._post("/v1/chat/completions", body)).status_code)

    async def ask_witness(self) -> str:
        """Ask what was asked before: whatever else runs, the answer is the same."""
        response = await self._post("/v1/chat/completions", WITNESS)
        if response.status_code == 429:
            return "429"
        text = response.json()["choices"][0]["message"]["content"]
        if self._witness is None:
            self._witness = text
        if text != self._witness:
            raise Misbehaviour(f"a greedy answer was {self._witness!r} and is {text!r}")
        return "200"

    async def look_around(self) -> str:
        """Ask what monitors ask."""
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/version", "/"):
            check_status(await self._http.get(path), {200})
        return "200"

    async def gauges(self) -> dict[str, float]:
        """Return what the server has in use."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        text = (await self._http.get("/metrics")).text
        values = dict.fromkeys(names, -1.0)
        for line in text.splitlines():
            for name in names:
                if line.startswith(f"mlc_llm_{name}"):
                    values[name] = float(line.split()[-1])
        return values

    async def wait_until_idle(self, timeout_s: float = 20.0) -> None:
        """Wait until nothing is in use. Raises Misbehaviour."""
        deadline = time.monotonic() + timeout_s
        while any((await self.gauges()).values()):
            if time.monotonic() > deadline:
                raise Misbehaviour(f"idle, the server has in use: {await self.gauges()}")
            await asyncio.sleep(0.1)


def check_status(response: httpx.Response, allowed: set[int] | frozenset[int]) -> None:
    """Raise Misbehaviour for a status that is not one of those."""
    if response.status_code not in allowed:
        place = f"{response.request.method} {response.request.url.path}"
        raise Misbehaviour(f"{place} was answered with {response.status_code}")
