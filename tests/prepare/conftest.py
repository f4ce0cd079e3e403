"""What every test of prepare wants: no proxy, no token of the person who runs it, a cache home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import LocalHub
from recorder import RecordedProgress

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
