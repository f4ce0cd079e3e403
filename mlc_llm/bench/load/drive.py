"""When requests are sent: by clients that wait for their answers, or at random times."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from mlc_llm.bench.load.ask import Asker, Record, Sample


@dataclass(frozen=True)
class Bounds:
    """When a run sends nothing more: after so many requests or seconds, whichever comes first."""

    requests: int | None
    duration_s: float | None


@dataclass(frozen=True)
class Load:
    """How hard a server is asked: by so many clients at once, or at a rate, requests a second.

    Exactly one of `clients` and `rate` is not None. warmup: requests before it that do not count.
    """

    clients: int | None
    rate: float | None
    bounds: Bounds
    warmup: int = 0

    @property
    def label(self) -> str:
        """Return the load in words."""
        if self.clients is None:
            return f"{self.rate:g} requests/s"
        return f"{self.clients} client{'s' if self.clients > 1 else ''}"


@dataclass(frozen=True)
class Run:
    """All requests of one load, the seconds it took, and the share of a core the client used."""

    records: list[Record]
    wall_s: float
    client_cpu: float


async def run_load(asker: Asker, samples: Iterator[Sample], load: Load, seed: int) -> Run:
    """Warm the server up and put a load on it; `seed` is for the times of arrivals."""
    if load.warmup:
        clients = min(load.clients or load.warmup, load.warmup)
        await run_clients(asker, samples, clients, Bounds(load.warmup, None))
    if load.clients is not None:
        return await run_clients(asker, samples, load.clients, load.bounds)
    if load.rate is not None:
        return await run_arrivals(asker, samples, load.rate, load.bounds, seed)
    raise ValueError("a load has clients or a rate")


async def run_clients(
    asker: Asker, samples: Iterator[Sample], concurrency: int, bounds: Bounds
) -> Run:
    """Let a number of clients ask one request after another."""
    watch = _Watch(bounds)

    async def client() -> None:
        while watch.may_send() and (sample := next(samples, None)) is not None:
            watch.records.append(await asker.ask(sample))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return watch.finish()


async def run_arrivals(
    asker: Asker, samples: Iterator[Sample], rate: float, bounds: Bounds, seed: int
) -> Run:
    """Send requests with random exponential gaps, `rate` a second on average (a Poisson process).

    Nobody waits for answers before sending; the run ends with the last answer.
    """
    generator = random.Random(seed)
    watch = _Watch(bounds)
    tasks: list[asyncio.Task[Record]] = []
    due = time.perf_counter()
    while watch.may_send(due) and (sample := next(samples, None)) is not None:
        await asyncio.sleep(due - time.perf_counter())
        tasks.append(asyncio.create_task(asker.ask(sample)))
        due += generator.expovariate(rate)
    watch.records = list(await asyncio.gather(*tasks))
    return watch.finish()


class _Watch:
    """Counts what was sent and what it cost."""

    def __init__(self, bounds: Bounds) -> None:
        self.records: list[Record] = []
        self._bounds = bounds
        self._num_sent = 0
        self._start = time.perf_counter()
        self._cpu_start = time.process_time()

    def may_send(self, at: float | None = None) -> bool:
        """Return whether another request may be sent now or at a time; it counts as sent."""
        requests, duration_s = self._bounds.requests, self._bounds.duration_s
        elapsed = (time.perf_counter() if at is None else at) - self._start
        if requests is not None and self._num_sent >= requests:
            return False
        if duration_s is not None and elapsed >= duration_s:
            return False
        self._num_sent += 1
        return True

    def finish(self) -> Run:
        """Return the run, which ends now."""
        wall_s = time.perf_counter() - self._start
        return Run(self.records, wall_s, (time.process_time() - self._cpu_start) / wall_s)
