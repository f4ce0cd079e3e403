"""`mlc_llm serve` as a process on a free port."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import httpx
from program import Program

MODEL = "demo"
_START_TIMEOUT_S = 240  # with conversion and compilation
_STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class RunningServer:
    """Where a server of the demo model listens, and its process."""

    url: str
    process: subprocess.Popen[bytes]

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's values that have these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"mlc_llm_{name}" and labels.items() <= sample.labels.items()
        )

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Wait until nothing runs, waits or holds pages; fail after a while."""
        deadline = time.monotonic() + seconds
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while any(self.metric(name) for name in names):
            assert time.monotonic() < deadline, "requests still run, wait or hold pages"
            time.sleep(0.05)


@contextmanager
def running_server(program: Program, *options: str | Path) -> Iterator[RunningServer]:
    """Serve the demo model from the program's cache; leaving checks that it ends by itself."""
    with TemporaryFile() as log:
        command = ("serve", "--port", "0", *map(str, options))
        process = program.start(*command, stdout=subprocess.PIPE, stderr=log)
        try:
            url = _wait_for_url(process)
            if url is None:
                log.seek(0)
                raise AssertionError(f"the server did not start: {log.read()[-5000:]!r}")
            yield RunningServer(url, process)
            assert process.poll() is None, "the server ended early"
            process.send_signal(signal.SIGTERM)
            assert process.wait(_STOP_TIMEOUT_S) == 0
        finally:
            process.kill()
            process.communicate()


def _wait_for_url(process: subprocess.Popen[bytes]) -> str | None:
    assert process.stdout is not None
    deadline = time.monotonic() + _START_TIMEOUT_S
    for line in process.stdout:
        words = line.decode().split()
        if words[:2] == ["Listening", "on"]:
            return words[2]
        if time.monotonic() > deadline:
            break
    return None
