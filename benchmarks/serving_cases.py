"""What is measured of one running server: loads, a long prompt among streams, a second turn.

Knows the load generator of mlc_llm; does not know who serves.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import statistics
import urllib.request
from collections.abc import Sequence

from engine import EngineFailed

from mlc_llm.bench.load.ask import Asker, Endpoint, Record, Sample
from mlc_llm.bench.load.drive import Bounds, Load
from mlc_llm.bench.load.http import Server
from mlc_llm.bench.load.measure import Questions, Target, make_asker, measure
from mlc_llm.bench.load.prompts import Lengths, made_up, make_ruler
from mlc_llm.bench.load.results import Result

_FIRST_TOKENS = 32  # that a stream has given before the long prompt comes
_STEP_SUMS = ("step_time_seconds_sum", "step_time_outside_library_seconds_sum")


def measure_load(url: str, clients: int, lengths: Lengths, requests: int, seed: int) -> Result:
    """Let clients ask until `requests` were answered. Raises EngineFailed if one was not."""
    load = Load(clients, None, Bounds(requests, None), warmup=clients)
    [result] = asyncio.run(
        measure(_target(url, "completions"), Questions(lengths, seed=seed), [load], _say_nothing)
    )
    if result.errors:
        raise EngineFailed("; ".join(result.notes))
    return result


def outside_share(url: str, clients: int, lengths: Lengths, requests: int, seed: int) -> float:
    """Return the share of steps, in percent, that was not spent in compiled code under a load."""
    before = _step_sums(url)
    measure_load(url, clients, lengths, requests, seed)
    step_s, outside_s = (
        later - earlier for later, earlier in zip(_step_sums(url), before, strict=True)
    )
    return 100 * outside_s / step_s


def _step_sums(url: str) -> list[float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    sums = []
    for name in _STEP_SUMS:
        found = re.search(rf"^\w+_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        if found is None:
            raise EngineFailed(f"{url}/metrics has no {name}")
        sums.append(float(found[1]))
    return sums


def measure_stall(
    url: str, streams: int, prompt_len: int, stream_len: int, seed: int
) -> tuple[float, float]:
    """Send a long prompt while streams run.

    Returns the longest gap of any stream from then to the prompt's first token, as a multiple of
    that stream's median gap, and the time to that token. Raises EngineFailed if a stream ended
    before, for then nothing was shown.
    """
    return asyncio.run(_measure_stall(url, streams, prompt_len, stream_len, seed))


async def _measure_stall(
    url: str, streams: int, prompt_len: int, stream_len: int, seed: int
) -> tuple[float, float]:
    asker = await make_asker(_target(url, "completions"))
    ruler = await make_ruler(asker, seed)
    questions = itertools.islice(made_up(Lengths(32, stream_len), ruler, seed), streams)
    records = [Record(0.0) for _ in range(streams)]
    tasks = [
        asyncio.create_task(asker.ask(question, record))
        for question, record in zip(questions, records, strict=True)
    ]
    while min(len(record.text_times) for record in records) < _FIRST_TOKENS:
        if any(task.done() for task in tasks):
            raise EngineFailed("a stream ended at once; " + _first_error(records))
        await asyncio.sleep(0.01)
    [question] = itertools.islice(made_up(Lengths(prompt_len, 4), ruler, seed + 1), 1)
    long = await asker.ask(question)
    await asyncio.gather(*tasks)
    if long.error or not long.text_times or any(record.error for record in records):
        raise EngineFailed(_first_error([long, *records]))
    if min(record.text_times[-1] for record in records) < long.text_times[0]:
        raise EngineFailed("a stream ended before the long prompt was answered; make it longer")
    worst = max(longest_gap(record, long.sent_s, long.text_times[0]) for record in records)
    return worst, long.text_times[0] - long.sent_s


def longest_gap(record: Record, start_s: float, end_s: float) -> float:
    """Return the longest gap that lies partly in a span of time, over the median of all gaps."""
    inside = [
        later - earlier
        for earlier, later in itertools.pairwise(record.text_times)
        if later > start_s and earlier < end_s
    ]
    return max(inside) / statistics.median(record.gaps_s)


def measure_second_turn(url: str, prompt_len: int, repeats: int, seed: int) -> float:
    """Return the median time to the first token of the second turn of chats."""
    return statistics.median(
        asyncio.run(_measure_second_turn(url, prompt_len, seed + number))
        for number in range(repeats)
    )


async def _measure_second_turn(url: str, prompt_len: int, seed: int) -> float:
    asker = await make_asker(_target(url, "chat"))
    ruler = await make_ruler(asker, seed)
    [first] = itertools.islice(made_up(Lengths(prompt_len, 16), ruler, seed), 1)
    answer = await _ask(asker, first)
    words = random.Random(seed).choices(ruler.words, k=8)
    second = Sample(" " + " ".join(words), 8, (first.prompt, answer.text))
    ttft_s = (await _ask(asker, second)).ttft_s
    if ttft_s is None:
        raise EngineFailed("the second turn got no text")
    return ttft_s


async def _ask(asker: Asker, sample: Sample) -> Record:
    record = await asker.ask(sample)
    if record.error is not None:
        raise EngineFailed(_first_error([record]))
    return record


def _first_error(records: Sequence[Record]) -> str:
    return next((f"{r.error}: {r.detail}" for r in records if r.error is not None), "no text")


def _target(url: str, endpoint: Endpoint) -> Target:
    return Target(Server.parse(url), endpoint)


def _say_nothing(text: str) -> None:
    del text
