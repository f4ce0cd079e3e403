"""`mlc_llm ps`: the processes of this machine that use models, or one server anywhere."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from mlc_llm.cli.options import read_caches
from mlc_llm.cli.progress import format_size
from mlc_llm.cli.terminal import say
from mlc_llm.errors import DownloadError, OptionError

_KEY_VARIABLE = "MLC_LLM_API_KEY"
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ProcessRow:
    """What is told of a process; None where that is not known.

    state: running; or for a server: starting, silent (does not answer) or locked (wants a key).
    """

    model: str
    command: str
    pid: int | None
    url: str | None
    uptime_s: float | None
    memory_bytes: int | None
    num_running: int | None
    num_waiting: int | None
    state: str


def ps(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="URL",
            help="Ask this server, such as http://127.0.0.1:8000, instead of looking on this "
            "machine.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help=f"Key of the servers; or set {_KEY_VARIABLE}."),
    ] = None,
) -> None:
    """Show running servers and other processes that use models of the cache."""
    key = api_key or os.environ.get(_KEY_VARIABLE) or None
    rows = _local_rows(key) if url is None else _remote_rows(url, key)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif rows:
        _print_rows(rows)
    else:
        say("no model is in use; `mlc_llm serve` or `mlc_llm chat` starts one")


def _print_rows(rows: list[ProcessRow]) -> None:
    from mlc_llm.cli.table import format_duration, print_table

    def shown(value: Any) -> str:
        return "-" if value is None else str(value)

    print_table(
        ["MODEL", "PID", "ADDRESS", "UP", "MEMORY", "RUN", "WAIT", "STATE"],
        [
            [
                row.model,
                shown(row.pid),
                row.url or row.command,
                "-" if row.uptime_s is None else format_duration(row.uptime_s),
                "-" if row.memory_bytes is None else format_size(row.memory_bytes),
                shown(row.num_running),
                shown(row.num_waiting),
                row.state,
            ]
            for row in rows
        ],
        right=("PID", "UP", "MEMORY", "RUN", "WAIT"),
    )


def _local_rows(key: str | None) -> list[ProcessRow]:
    from mlc_llm.prepare.processes import list_processes

    rows = []
    for record in list_processes(read_caches().home):
        state, running, waiting = "running", None, None
        if record.command == "serve":
            state = "starting"
            if record.url:
                state, running, waiting = _load_or_reason(record.url, key)
        rows.append(
            ProcessRow(
                model=record.model,
                command=record.command,
                pid=record.pid,
                url=record.url or None,
                uptime_s=round(time.time() - record.started, 1),
                memory_bytes=_memory_of(record.pid),
                num_running=running,
                num_waiting=waiting,
                state=state,
            )
        )
    return rows


def _load_or_reason(url: str, key: str | None) -> tuple[str, int | None, int | None]:
    """Return a server's state and how many requests run and wait."""
    try:
        running, waiting = _load_of(_get(url, "metrics", key))
    except PermissionError:
        return "locked", None, None
    except OSError:
        return "silent", None, None
    return "running", running, waiting


def _remote_rows(url: str, key: str | None) -> list[ProcessRow]:
    """Ask a server what it serves. Raises OptionError, DownloadError."""
    base = url.rstrip("/").removesuffix("/v1")
    if not re.match(r"https?://[^/\s]+", base):
        raise OptionError(f"{url!r} is not an address; write it as http://127.0.0.1:8000")
    try:
        cards = json.loads(_get(base, "v1/models", key))["data"]
        models = [str(card["id"]) for card in cards]
        metrics = _get(base, "metrics", key)
    except PermissionError:
        raise DownloadError(
            f"{base} wants another key; give it by --api-key or {_KEY_VARIABLE}"
        ) from None
    except OSError as error:
        raise DownloadError(
            f"{base} does not answer ({error}); check the address, and that the server runs"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DownloadError(f"{base} does not answer like an OpenAI server") from None
    running, waiting = _load_of(metrics)
    return [
        ProcessRow(
            model=model,
            command="serve",
            pid=None,
            url=base,
            uptime_s=None,
            memory_bytes=None,
            # The figures are the server's, and belong to the model for chats, its first.
            num_running=running if index == 0 else None,
            num_waiting=waiting if index == 0 else None,
            state="running",
        )
        for index, model in enumerate(models)
    ]


def _get(url: str, path: str, key: str | None) -> str:
    """Return what a server answers. Raises PermissionError where it wants a key, OSError."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/{path}", headers=headers)
    # A proxy knows nothing of the addresses of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (401, 403):
                raise PermissionError(error.code, "the server wants a key") from None
            raise OSError(f"HTTP status {error.code}") from None
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None


def _load_of(metrics: str) -> tuple[int | None, int | None]:
    """Return how many requests run and wait, from Prometheus text of ours or of vLLM's kind."""
    found: dict[str, int] = {}
    for name, value in re.findall(
        r"^\w+[_:](num_requests_(?:running|waiting))(?:\{[^}]*\})? (\S+)$", metrics, re.MULTILINE
    ):
        number = float(value)
        if math.isfinite(number):
            found[name] = found.get(name, 0) + int(number)
    return found.get("num_requests_running"), found.get("num_requests_waiting")


def _memory_of(pid: int) -> int | None:
    """Return the memory a process of this machine holds, in bytes, None where it cannot be seen."""
    if sys.platform == "win32":
        return None
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as stream:
            match = re.search(r"^VmRSS:\s*(\d+) kB", stream.read(), re.MULTILINE)
        return int(match[1]) << 10 if match else None
    except OSError:
        pass
    try:
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
        return int(done.stdout) << 10
    except (OSError, ValueError):
        return None
