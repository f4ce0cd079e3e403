"""What every test of prepare wants: no proxy, no token of the person who runs it, a cache home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import LocalHub
from manage import Result, Run, files_of
from recorder import RecordedProgress
from tiny import write_llama

from mlc_llm.cli.main import main
from mlc_llm.prepare.cache import CacheHome


@pytest.fixture(autouse=True)
def _plain_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield
    from huggingface_hub.utils import close_session

    close_session()


@pytest.fixture
def home(tmp_path: Path) -> CacheHome:
    return CacheHome(tmp_path / "home")


@pytest.fixture
def progress() -> RecordedProgress:
    return RecordedProgress()


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as running:
        yield running


@pytest.fixture
def run(
    home: CacheHome,
    hub: LocalHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run a command line with a cache of its own."""
    monkeypatch.setenv("MLC_LLM_HOME", str(home.root))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    for name in ("MLC_JIT_POLICY", "MLC_DOWNLOAD_CACHE_POLICY", "MLC_LLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str) -> Result:
        code = main(list(words))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "models" / "tiny-llama")


@pytest.fixture
def published(hub: LocalHub, llama: Path) -> str:
    """The name of a repository with the tiny Llama, and files that no model needs."""
    hub.add("user/tiny", {**files_of(llama), "README.md": b"# Tiny", "training.log": b"1\n" * 99})
    return "HF://user/tiny"
