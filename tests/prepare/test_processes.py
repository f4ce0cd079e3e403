"""Run files: who uses models now, and what killed processes leave behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlc_llm.prepare.cache import CacheHome
from mlc_llm.prepare.processes import RunFile, list_processes

_PROGRAM = """
import sys
from pathlib import Path
from mlc_llm.prepare.cache import CacheHome
from mlc_llm.prepare.processes import RunFile

running = RunFile(CacheHome(Path(sys.argv[1])), "serve", "demo", [Path(sys.argv[1]) / "model"])
running.listen("http://127.0.0.1:8000")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(home: CacheHome) -> Iterator[subprocess.Popen[str]]:
    """Another process, with a run file, that ends when its input does."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(home.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def files(home: CacheHome) -> list[str]:
    return [path.name for path in home.run_directory.iterdir()]


def test_a_process_is_listed_until_it_closes(home: CacheHome) -> None:
    assert list_processes(home) == []
    running = RunFile(home, "chat", "HF://user/model", [home.root / "artifact"])
    (record,) = list_processes(home)
    assert (record.command, record.model, record.pid) == ("chat", "HF://user/model", os.getpid())
    assert record.url == ""
    assert record.uses(home.root / "artifact") and record.uses(home.root)
    assert not record.uses(home.root / "art") and not record.uses(home.root / "artifact" / "x")
    running.listen("http://[::1]:80")
    assert list_processes(home)[0].url == "http://[::1]:80"
    running.close()
    running.close()
    assert list_processes(home) == [] and files(home) == []


def test_a_forgotten_file_goes(home: CacheHome) -> None:
    running = RunFile(home, "python", "m", [])
    assert len(list_processes(home)) == 1
    del running
    gc.collect()
    assert files(home) == []


def test_another_process_is_seen_and_its_end_too(
    home: CacheHome, other: subprocess.Popen[str]
) -> None:
    (record,) = list_processes(home)
    assert record.pid == other.pid
    assert record.url == "http://127.0.0.1:8000"
    assert other.stdin is not None
    other.stdin.close()
    assert other.wait(20) == 0
    assert files(home) == []


def test_what_a_killed_process_left_is_removed(
    home: CacheHome, other: subprocess.Popen[str]
) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait(20)
    assert len(files(home)) == 1
    assert list_processes(home) == []
    assert files(home) == []


def test_damaged_files_are_no_processes(home: CacheHome) -> None:
    home.run_directory.mkdir(parents=True)
    (home.run_directory / "1.json").write_text("{")
    (home.run_directory / "2.json").write_text(json.dumps({"pid": 1}))
    running = RunFile(home, "chat", "m", [])
    assert [record.model for record in list_processes(home)] == ["m"]
    running.close()
    assert files(home) == []


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = CacheHome(tmp_path / "file" / "home")
    running = RunFile(home, "chat", "m", [])
    running.listen("http://localhost")
    running.close()
    assert list_processes(home) == []
