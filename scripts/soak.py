#!/usr/bin/env python3
"""Load a server of the demo model with everything clients do, and watch that it stays as it was.

    python scripts/soak.py --seconds 3600

Chats, streams left in the middle, slow readers, half requests, broken bodies, bursts beyond the
queue and long prompts come at random. It passes if nothing is answered with 5xx or never, answers
stay the same, memory after the warm-up stays within 5 %, and afterwards the server is idle and
healthy. Needs the `dev` extra; the model comes from the cache that `make demo-model` fills.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import httpx
from soak_clients import MAX_QUEUED, NUM_SEQUENCES, Clients, Misbehaviour

MAX_GROWTH = 0.05
MIN_WINDOWS, MAX_WINDOWS = 3, 10
MIN_WINDOW_LEN = 60  # samples, where there are enough
NUM_CLIENTS = 8
CACHE_TOKENS = 4096
# The server is warm after so many actions at least, however long they take, and when memory has
# not reached a new height in the last third of them; memory that never settles is a failure.
MIN_WARM_UP_ACTIONS, MAX_WARM_UP_ACTIONS = 450, 3000
MAX_WARM_UP_S = 600.0
MAX_SETTLED_GROWTH = 0.01
SERVER = (
    *("serve", "--port", "0", "--mode", "server", "--max-queued-requests", str(MAX_QUEUED)),
    *("--request-timeout", "60", "--overrides"),
    f"max_num_sequence={NUM_SEQUENCES};max_total_seq_length={CACHE_TOKENS}",
)


def memory_mib(process_id: int) -> float:
    """Return the MiB of memory that a process holds."""
    with suppress(OSError):
        for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    done = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(process_id)], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024


def growth(samples: list[float]) -> float:
    """Return by which share the level of evenly spaced samples has risen over that of the first.

    The level is the median over a window, so that a short peak does not count but a leak does.
    """
    num_windows = min(max(len(samples) // MIN_WINDOW_LEN, MIN_WINDOWS), MAX_WINDOWS)
    size = max(len(samples) // num_windows, 1)
    levels = [
        median(samples[start : start + size]) for start in range(0, len(samples) - size + 1, size)
    ]
    return max(levels) / levels[0] - 1


def has_settled(samples: list[float]) -> bool:
    """Return whether evenly spaced samples have no new height in their last third."""
    first = 2 * len(samples) // 3
    return first > 0 and max(samples[first:]) <= (1 + MAX_SETTLED_GROWTH) * max(samples[:first])


async def soak(url: str, process_id: int, seconds: float, seed: int) -> list[str]:
    """Load the server at `url`; return what went wrong."""
    rng = random.Random(seed)
    clients = Clients(url, rng)
    problems: list[str] = []
    try:
        await clients.warm_up()
    except (Misbehaviour, httpx.HTTPError) as error:
        problems.append(f"at the beginning: {error}")
    start = time.monotonic()
    outcomes: Counter[str] = Counter()
    samples: list[float] = []

    async def act_while(goes_on: Callable[[], bool], is_warm: bool) -> None:
        while goes_on():
            try:
                name, outcome = await clients.act(is_warm)
                outcomes[f"{name} {outcome}"] += 1
            except Misbehaviour as error:
                outcomes["misbehaviour"] += 1
                problems.append(f"after {time.monotonic() - start:.0f} s: {error}")
                await asyncio.sleep(0.2)
            await asyncio.sleep(rng.expovariate(1 / 0.05))

    async def act_together(goes_on: Callable[[], bool], is_warm: bool) -> None:
        await asyncio.gather(*(act_while(goes_on, is_warm) for _ in range(NUM_CLIENTS)))

    heights: list[float] = []  # once an action
    deadline = start + MAX_WARM_UP_S

    def is_cold() -> bool:
        heights.append(memory_mib(process_id))
        if outcomes.total() < MIN_WARM_UP_ACTIONS:
            return True
        is_over = outcomes.total() > MAX_WARM_UP_ACTIONS or time.monotonic() > deadline
        return not (is_over or has_settled(heights))

    await act_together(is_cold, is_warm=False)
    warm = time.monotonic()
    print(f"{warm - start:6.0f} s  {memory_mib(process_id):6.0f} MiB  warm", flush=True)
    if not has_settled(heights):
        problems.append(f"memory has not settled after {outcomes.total()} actions")
    end = warm + seconds

    async def watch() -> None:
        shown = warm
        while (now := time.monotonic()) < end:
            used = memory_mib(process_id)
            samples.append(used)
            if now - shown >= max(10.0, seconds / 60):
                shown = now
                print(f"{now - start:6.0f} s  {used:6.0f} MiB  {outcomes.total()} actions")
            await asyncio.sleep(min(1.0, seconds / 200))

    await asyncio.gather(watch(), act_together(lambda: time.monotonic() < end, is_warm=True))
    try:
        await clients.wait_until_idle()
        await clients.look_around()
    except (Misbehaviour, httpx.HTTPError) as error:
        problems.append(f"at the end: {error}")
    await clients.close()
    if (risen := growth(samples)) > MAX_GROWTH:
        problems.append(f"memory rose by {risen:.1%} after the warm-up, to {max(samples):.0f} MiB")
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8}  {outcome}")
    print(f"memory {risen:+.1%} in {seconds:g} s after the warm-up, {max(samples):.0f} MiB at most")
    return problems


def main() -> int:
    """Start a server, load it, end it; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long (3600)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of actions (1)")
    arguments = parser.parse_args()
    if arguments.seconds < 10:
        parser.error("--seconds must be at least 10")
    command = [sys.executable, "-m", "mlc_llm", *SERVER]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = next((line.split()[-1] for line in server.stdout if "Listening" in line), None)
        if url is None:
            print("error: the server did not start", file=sys.stderr)
            return 1
        print(f"{url}: {arguments.seconds:g} s, seed {arguments.seed}")
        problems = asyncio.run(soak(url, server.pid, arguments.seconds, arguments.seed))
        server.send_signal(signal.SIGTERM)
        try:
            if server.wait(60) != 0:
                problems.append(f"the server ended with code {server.returncode}")
        except subprocess.TimeoutExpired:
            problems.append("the server did not end within 60 s of SIGTERM")
    finally:
        server.kill()
        server.wait()
    for problem in problems[:20]:
        print(f"error: {problem}", file=sys.stderr)
    print("failed" if problems else "passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
