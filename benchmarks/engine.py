"""What the comparison knows of an engine: shapes, measures, and one measured process.

Does not know any engine by name; `rivals/` does. Standard library only, because a child's peak
memory starts at its parent's: the process that starts the engines must stay small.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

DEFAULT_HOME = Path(
    os.environ.get("MLC_LLM_RIVALS", Path.home() / ".cache" / "mlc_llm_rivals")
).expanduser()


class EngineFailed(Exception):
    """An engine could not be run or gave no figure; the message ends with what it printed."""


@dataclass(frozen=True)
class Shape:
    """A model's dimensions, and where its forms for all engines lie under `home`."""

    name: str
    config: Mapping[str, Any]
    home: Path

    @staticmethod
    def load(name: str, home: Path) -> Shape:
        """Read `shapes/<name>.json`."""
        path = Path(__file__).parent / "shapes" / f"{name}.json"
        return Shape(name, json.loads(path.read_text(encoding="utf-8")), home)

    @property
    def directory(self) -> Path:
        """Return the directory of all forms of this model."""
        return self.home / "models" / self.name

    @property
    def checkpoint(self) -> Path:
        """Return the Hugging Face directory that all other forms are made from."""
        return self.directory / "huggingface"

    @property
    def prompt(self) -> str:
        """Return the text of exactly 32 tokens that `make_models.py` wrote."""
        return (self.directory / "prompt_32.txt").read_text(encoding="utf-8")


def shape_names() -> list[str]:
    """Return the names of all shapes, the small one first."""
    paths = (Path(__file__).parent / "shapes").glob("*.json")
    return [path.stem for path in sorted(paths, key=lambda path: path.stem, reverse=True)]


_UNITS = {
    "first_token": "s",
    "compile": "s",
    "memory": "MB",
    "latency": "s",
    "times": "x",
    "share": "%",
}


@dataclass(frozen=True)
class Measure:
    """One thing to measure.

    kind: "prefill" (tokens of one prompt), "decode" (tokens for each of `batch` sequences after
    `context` tokens), "first_token" (from process start), "memory" (peak of a decode), "compile".
    Of servers: "output" (tokens of all clients), "latency" (seconds), "times" and "share".
    """

    name: str
    kind: str
    tokens: int = 0
    batch: int = 1
    context: int = 0
    repeats: int = 1

    @property
    def unit(self) -> str:
        """Return the unit of the figures."""
        return _UNITS.get(self.kind, "tok/s")

    @property
    def is_more_better(self) -> bool:
        """Whether the larger figure wins."""
        return self.unit == "tok/s"


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("decode", "decode", tokens=96, context=32, repeats=3),
        Measure("prefill_512", "prefill", tokens=512, repeats=5),
        Measure("decode_4", "decode", tokens=64, batch=4, context=32, repeats=3),
        Measure("decode_16", "decode", tokens=64, batch=16, context=32, repeats=2),
        Measure("decode_deep", "decode", tokens=48, context=4096, repeats=2),
        Measure("prefill_4096", "prefill", tokens=4096, repeats=2),
        Measure("first_token", "first_token", tokens=32, repeats=3),
        Measure("memory", "memory", tokens=32, context=512),
        Measure("compile", "compile"),
    )
}


class Engine(Protocol):
    """One engine under comparison; every call of `measure` is at least one process of its own."""

    name: str

    def measures(self) -> frozenset[str]:
        """Return the kinds of measures it has."""

    def version(self) -> str:
        """Return the weights' format and what is installed. Raises EngineFailed if nothing is."""

    def make_model(self, shape: Shape) -> None:
        """Make this engine's form of the checkpoint unless it is there."""

    def weight_bytes(self, shape: Shape) -> int:
        """Return the bytes of its form of the weights, which decoding reads once a step."""

    def measure(self, shape: Shape, measure: Measure, threads: int) -> list[float]:
        """Return the figures of all repeats, in the measure's unit. Raises EngineFailed."""


@dataclass(frozen=True)
class Serving:
    """What a server is started for: how many sequences at once, of how many tokens each."""

    threads: int
    sequences: int
    context: int
    has_prefix_cache: bool = True


@dataclass(frozen=True)
class ServerCommand:
    """How a server is started, and the environment that it gets beside ours."""

    words: Sequence[str]
    environment: Mapping[str, str]


class ServingEngine(Engine, Protocol):
    """An engine that also has an OpenAI server."""

    def server(self, shape: Shape, serving: Serving, port: int) -> ServerCommand:
        """Return the command that serves a shape on 127.0.0.1."""


class Disturbance:
    """Counts the processor time that others take from now on, here or on the host of a guest.

    Always zero where the system does not tell.
    """

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float:
        """Return it as a share of all processor time since then."""
        elapsed, busy, own = (
            now - then for now, then in zip(self._read(), self._start, strict=True)
        )
        all_s = elapsed * (os.cpu_count() or 1)
        return max(0.0, busy - own) / all_s if busy else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        statistics = Path("/proc/stat")
        if not statistics.exists():
            return times.elapsed, 0.0, own
        user, nice, system, _, _, irq, softirq, steal = (
            int(word) for word in statistics.read_text().split(maxsplit=9)[1:9]
        )
        ticks = user + nice + system + irq + softirq + steal
        return times.elapsed, ticks / os.sysconf("SC_CLK_TCK"), own


@dataclass(frozen=True)
class Finished:
    """What is left of one process."""

    output: str
    seconds: float
    first_output_s: float  # until the first byte on stdout, or the end if there was none
    peak_rss_bytes: int


def run_process(
    command: Sequence[str | Path],
    *,
    timeout_s: float = 1800,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Finished:
    """Run a command alone and measure it. Raises EngineFailed unless it ends with 0 in time."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                cwd=directory,
            )
        except OSError as error:
            raise EngineFailed(f"{words[0]} cannot be started: {error}") from None
        assert process.stdout is not None
        alarm = threading.Timer(timeout_s, process.kill)
        alarm.start()
        pieces = []
        first_output_s = None
        with process.stdout as stream:
            while piece := os.read(stream.fileno(), 1 << 16):
                if first_output_s is None:
                    first_output_s = time.perf_counter() - start
                pieces.append(piece)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        alarm.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output = b"".join(pieces).decode("utf-8", "replace")
        if process.returncode != 0:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
            tail = errors.read().decode("utf-8", "replace")
            raise EngineFailed(
                f"{' '.join(words)} ended with {process.returncode} after {seconds:.0f} s:\n"
                f"{output[-1000:]}{tail}"
            )
    return Finished(output, seconds, first_output_s or seconds, usage.ru_maxrss * 1024)


@contextmanager
def running_server(
    engine: ServingEngine, shape: Shape, serving: Serving, *, timeout_s: float = 1800
) -> Iterator[str]:
    """Give the URL of a server that is healthy, and end it afterwards. Raises EngineFailed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = engine.server(shape, serving, port)
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command.words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **command.environment},
        )
        try:
            deadline = time.monotonic() + timeout_s
            while not _is_healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
                    tail = log.read().decode("utf-8", "replace")
                    raise EngineFailed(f"{' '.join(command.words)} does not serve:\n{tail}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def last_json_line(output: str) -> Any:
    """Return the JSON value of the last line that holds an object. Raises EngineFailed."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise EngineFailed(f"no figures in the output:\n{output[-1000:]}")


def run_driver(
    python: Path, script: Path, model: Path, measure: Measure, threads: int
) -> list[float]:
    """Run an adapter file as a script in its engine's environment; return the figures it prints.

    For "memory" that is the peak of the process, in MB. Raises EngineFailed.
    """
    request = {**dataclasses.asdict(measure), "model": str(model), "threads": threads}
    finished = run_process([python, script, json.dumps(request)])
    if measure.kind == "memory":
        return [finished.peak_rss_bytes / 1e6]
    return [float(figure) for figure in last_json_line(finished.output)["figures"]]


def installed_version(python: Path, package: str) -> str:
    """Return the package and its version in another environment. Raises EngineFailed."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return f"{package} {run_process([python, '-c', code]).output.strip()}"
