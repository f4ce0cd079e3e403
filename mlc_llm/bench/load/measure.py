"""A serving benchmark from beginning to end: learn the server, make prompts, run every load."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlc_llm.bench.load.ask import Asker, Endpoint, Sample, call
from mlc_llm.bench.load.drive import Load, run_load
from mlc_llm.bench.load.http import RequestFailed, Server
from mlc_llm.bench.load.prompts import (
    Exchange,
    Lengths,
    choose_exchanges,
    made_up,
    make_ruler,
    settle_ignore_eos,
)
from mlc_llm.bench.load.results import Result
from mlc_llm.errors import RequestError

# Of a file without a fixed number of requests, so many dialogues are used in turn.
_DIALOGUES = 1000


@dataclass(frozen=True)
class Target:
    """Which server is asked, and how. model None: the first one that it lists."""

    server: Server
    endpoint: Endpoint = "chat"
    model: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Questions:
    """What is asked: made-up prompts (lengths), or dialogues of a file (exchanges).

    output_len: tokens of the answers to dialogues; None for as many as in the file.
    """

    lengths: Lengths | None = None
    exchanges: Sequence[Exchange] = ()
    output_len: int | None = None
    max_total_len: int = 2048
    seed: int = 0


async def measure(
    target: Target,
    questions: Questions,
    loads: Sequence[Load],
    announce: Callable[[str], None],
) -> list[Result]:
    """Run every load on a server; `announce` is told what happens.

    Raises RequestError if the server cannot be used at all; single failures are in the results.
    """
    try:
        asker = await make_asker(target)
        if target.ignore_eos and "ignore_eos" not in asker.extra:
            announce("the server has no ignore_eos; answers may be shorter than asked for")
        samples = await _make_samples(asker, questions, loads)
    except RequestFailed as failure:
        raise RequestError(f"{target.server.url} cannot be measured: {failure}") from None
    results = []
    for load in loads:
        announce(f"measuring {load.label} ...")
        results.append(Result(load, await run_load(asker, samples, load, questions.seed)))
    return results


async def make_asker(target: Target) -> Asker:
    """Return how requests to a target are made. Raises RequestFailed if it cannot be asked."""
    model = target.model
    if model is None:
        listed = await call(target.server, f"{target.server.prefix}/models")
        try:
            model = str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise RequestFailed("no models", "name one with --model") from None
    extra = {"temperature": target.temperature}
    asker = Asker(target.server, target.endpoint, model, target.timeout_s, extra)
    return await settle_ignore_eos(asker) if target.ignore_eos else asker


async def _make_samples(
    asker: Asker, questions: Questions, loads: Sequence[Load]
) -> Iterator[Sample]:
    if questions.lengths is not None:
        ruler = await make_ruler(asker, questions.seed)
        return made_up(questions.lengths, ruler, questions.seed)
    counts = [load.bounds.requests for load in loads]
    known = [count for count in counts if count is not None]
    is_counted = len(known) == len(counts)
    samples = await choose_exchanges(
        asker,
        questions.exchanges,
        count=sum(known) + sum(load.warmup for load in loads) if is_counted else _DIALOGUES,
        seed=questions.seed,
        output_len=questions.output_len,
        max_total_len=questions.max_total_len,
    )
    return itertools.cycle(samples)


def run_measure(
    target: Target,
    questions: Questions,
    loads: Sequence[Load],
    announce: Callable[[str], None],
) -> list[Result]:
    """Do what `measure` does, from code that is not asynchronous.

    Raises RequestError as well if no request of any load was answered.
    """
    results = asyncio.run(measure(target, questions, loads, announce))
    if not any(result.num_answered for result in results):
        notes = [note for result in results for note in result.notes]
        raise RequestError(f"{target.server.url} answered no request; {'; '.join(notes)}")
    return results
