"""Downloading from a hub on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub import LocalHub, commit_of
from recorder import RecordedProgress

from mlc_llm.errors import (
    CorruptFile,
    DownloadError,
    ModelNotFound,
    OptionError,
    StorageError,
)
from mlc_llm.prepare.cache import CacheHome, CachePolicy
from mlc_llm.prepare.download import (
    HubAccess,
    RepoRef,
    fetch,
    parse_repo,
)

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
RAW_MODEL = {
    "README.md": b"not needed",
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "original/consolidated.pth": b"not needed",
}
NEEDED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
REF = RepoRef("user", "model")


class Fetcher:
    """Fetches with the settings all tests share."""

    def __init__(self, home: CacheHome, hub: LocalHub, progress: RecordedProgress) -> None:
        self.home, self.progress = home, progress
        self.access = HubAccess(hub.endpoint, retry_delay_s=0.001)

    def __call__(
        self, ref: RepoRef = REF, policy: CachePolicy = CachePolicy.ON, token: str | None = None
    ) -> Path:
        access = HubAccess(self.access.endpoint, token, self.access.retry_delay_s)
        return fetch(ref, home=self.home, policy=policy, progress=self.progress, access=access)


@pytest.fixture
def get(home: CacheHome, hub: LocalHub, progress: RecordedProgress) -> Fetcher:
    hub.add("user/model", RAW_MODEL)
    return Fetcher(home, hub, progress)


def visible_files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def test_first_download_brings_needed_files_with_progress(
    get: Fetcher, home: CacheHome, progress: RecordedProgress
) -> None:
    directory = get()
    assert directory == home.repository_directory("user", "model", None)
    assert visible_files(directory) == NEEDED
    for name in NEEDED:
        assert (directory / name).read_bytes() == RAW_MODEL[name]
    (stage,) = progress.stages
    size = sum(len(RAW_MODEL[name]) for name in NEEDED)
    assert (stage.name, stage.unit) == ("Downloading HF://user/model", "bytes")
    assert (stage.total, stage.done, stage.is_finished) == (size, size, True)
    assert stage.steps >= len(NEEDED)


def test_second_run_needs_no_network(
    get: Fetcher, hub: LocalHub, progress: RecordedProgress
) -> None:
    directory = get()
    hub.stop()
    assert get() == directory
    assert get(policy=CachePolicy.READONLY) == directory
    assert len(progress.stages) == 1


def test_broken_connection_resumes_where_it_broke(
    get: Fetcher, hub: LocalHub, progress: RecordedProgress
) -> None:
    hub.cut_after["model.safetensors"] = [600_000, 100_000]
    directory = get()
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    asked = [request.range for request in hub.downloads("model.safetensors")]
    assert len(asked) == 3
    starts = [int(text.removeprefix("bytes=").rstrip("-")) for text in asked[1:] if text]
    assert 0 < starts[0] <= 600_000
    assert starts[0] < starts[1] <= starts[0] + 100_000
    assert progress.stages[0].done == progress.stages[0].total
    assert any("going on at byte" in text for text in progress.messages)


def test_resumes_in_a_later_process(
    get: Fetcher, hub: LocalHub, progress: RecordedProgress
) -> None:
    hub.cut_after["model.safetensors"] = [600_000] + [0] * 5
    with pytest.raises(DownloadError, match="run again: what arrived is kept"):
        get()
    with pytest.raises(DownloadError, match="READONLY"):
        get(policy=CachePolicy.READONLY)  # half a copy is no copy
    hub.requests.clear()
    directory = get()
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    (request,) = hub.downloads("model.safetensors")
    assert request.range is not None and request.range != "bytes=0-"
    assert hub.downloads("tokenizer.json") == []  # was whole already
    assert progress.stages[-1].done == progress.stages[-1].total


def test_interrupt_keeps_what_arrived(
    hub: LocalHub, home: CacheHome, progress: RecordedProgress
) -> None:
    class Interrupted(RecordedProgress):
        def advance(self, n: int) -> None:
            super().advance(n)
            if self.stages[-1].done > 400_000:
                raise KeyboardInterrupt

    hub.add("user/model", RAW_MODEL)
    with pytest.raises(KeyboardInterrupt):
        Fetcher(home, hub, Interrupted())()
    hub.requests.clear()
    assert (Fetcher(home, hub, progress)() / "model.safetensors").read_bytes() == WEIGHTS
    (request,) = hub.downloads("model.safetensors")
    assert request.range is not None


def test_server_that_ignores_ranges_sends_all_again(
    get: Fetcher, hub: LocalHub, progress: RecordedProgress
) -> None:
    hub.ignores_ranges = True
    hub.cut_after["model.safetensors"] = [600_000]
    directory = get()
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert progress.stages[0].done == progress.stages[0].total


def test_busy_server_is_asked_again(get: Fetcher, hub: LocalHub) -> None:
    hub.failing_status["model.safetensors"] = [503, 429, 416]
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS


def test_server_error_that_stays(get: Fetcher, hub: LocalHub) -> None:
    hub.failing_status["model.safetensors"] = [500] * 20
    with pytest.raises(DownloadError, match="HTTP status 500; try again later"):
        get()


def test_damaged_file_is_refused(get: Fetcher, hub: LocalHub, home: CacheHome) -> None:
    hub.damaged.add("model.safetensors")
    with pytest.raises(DownloadError, match=r"model\.safetensors .* arrived damaged"):
        get()
    assert not (home.repository_directory("user", "model", None) / "model.safetensors").exists()
    hub.damaged.clear()
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS


def test_revisions_are_kept_apart(get: Fetcher, hub: LocalHub) -> None:
    files = {**RAW_MODEL, "config.json": b'{"model_type": "qwen2"}'}
    hub.add("user/model", files, "v2/beta")
    main = get()
    other = get(parse_repo("HF://user/model@v2/beta"))
    assert (main / "config.json").read_bytes() == RAW_MODEL["config.json"]
    assert (other / "config.json").read_bytes() == files["config.json"]
    by_commit = get(RepoRef("user", "model", revision=commit_of(files)))
    assert (by_commit / "config.json").read_bytes() == files["config.json"]


def test_missing_repository(get: Fetcher) -> None:
    with pytest.raises(ModelNotFound, match=r"HF://user/nothing does not exist .* HF_TOKEN"):
        get(RepoRef("user", "nothing"))


def test_missing_revision(get: Fetcher) -> None:
    with pytest.raises(DownloadError, match="HF://user/model has no revision 'v9'"):
        get(RepoRef("user", "model", revision="v9"))


def test_gated_repository(get: Fetcher, hub: LocalHub) -> None:
    hub.repositories["user/model"].token = "secret"
    with pytest.raises(DownloadError, match=r"is gated: accept its terms .* HF_TOKEN"):
        get(token="wrong")
    assert (get(token="secret") / "model.safetensors").read_bytes() == WEIGHTS


def test_no_network(get: Fetcher, hub: LocalHub) -> None:
    hub.stop()
    with pytest.raises(
        DownloadError, match=r"cannot fetch HF://user/model .* no complete copy .* HF_ENDPOINT"
    ):
        get()


def test_endpoint_that_is_no_hub(get: Fetcher, hub: LocalHub) -> None:
    access = HubAccess(hub.endpoint + "/user/model/resolve/main/chat_template.jinja?")
    with pytest.raises(DownloadError, match="does not answer like a Hugging Face Hub"):
        fetch(REF, home=get.home, policy=CachePolicy.ON, progress=get.progress, access=access)


def test_policy_off_leaves_the_cache_alone(get: Fetcher, hub: LocalHub, home: CacheHome) -> None:
    directory = get(policy=CachePolicy.OFF)
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert not home.root.exists()
    assert get(policy=CachePolicy.OFF) != directory
    assert len(hub.downloads("model.safetensors")) == 2


def test_policy_redo_fetches_again(get: Fetcher, hub: LocalHub) -> None:
    directory = get()
    hub.add("user/model", {**RAW_MODEL, "config.json": b'{"new": true}'})
    assert get() == directory
    assert (directory / "config.json").read_bytes() == RAW_MODEL["config.json"]
    get(policy=CachePolicy.REDO)
    assert (directory / "config.json").read_bytes() == b'{"new": true}'
    assert len(hub.downloads("model.safetensors")) == 2


def test_policy_redo_without_network_keeps_the_copy(get: Fetcher, hub: LocalHub) -> None:
    directory = get()
    hub.stop()
    with pytest.raises(DownloadError):
        get(policy=CachePolicy.REDO)
    assert get() == directory


def test_policy_readonly_wants_a_copy(get: Fetcher, hub: LocalHub) -> None:
    with pytest.raises(DownloadError, match="READONLY forbids fetching"):
        get(policy=CachePolicy.READONLY)
    assert hub.requests == []


@pytest.mark.parametrize("damage", ["truncated", "removed", "manifest"])
def test_damaged_copy_is_mended(get: Fetcher, hub: LocalHub, damage: str) -> None:
    directory = get()
    if damage == "truncated":
        (directory / "model.safetensors").write_bytes(WEIGHTS[:-1])
    elif damage == "removed":
        (directory / "model.safetensors").unlink()
    else:
        (directory / ".download.json").write_text('{"files"')
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS
    expected = 1 if damage == "manifest" else 2
    assert len(hub.downloads("model.safetensors")) == expected


def test_disk_too_small(get: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(StorageError, match=r"needs 0\.00 GB.*MLC_LLM_HOME"):
        get()


def test_disk_that_fills_up(get: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    class FullFile:
        def __enter__(self) -> FullFile:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".partial" and path.name.startswith("model.safetensors"):
            return FullFile()
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(StorageError, match="no space left"):
        get()
    monkeypatch.undo()
    assert get(policy=CachePolicy.ON).is_dir()


def test_home_that_cannot_be_written(
    hub: LocalHub, progress: RecordedProgress, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    hub.add("user/model", RAW_MODEL)
    with pytest.raises(StorageError, match="cannot write"):
        Fetcher(CacheHome(tmp_path / "file"), hub, progress)()


def converted_repository(shard: bytes, index_name: str, md5: str) -> dict[str, bytes]:
    tensor = {"name": "w", "shape": [len(shard)], "dtype": "uint8", "format": "raw"}
    shard_record = {
        "dataPath": "params_shard_0.bin",
        "format": "raw-shard",
        "nbytes": len(shard),
        "md5sum": md5,
        "records": [{**tensor, "nbytes": len(shard), "byteOffset": 0}],
    }
    return {
        "mlc-chat-config.json": b"{}",
        index_name: json.dumps({"metadata": {}, "records": [shard_record]}).encode(),
        "params_shard_0.bin": shard,
        "tokenizer.json": b"{}",
        "logs.txt": b"not needed",
    }


@pytest.mark.parametrize("index_name", ["tensor-cache.json", "ndarray-cache.json"])
def test_converted_repository(get: Fetcher, hub: LocalHub, index_name: str) -> None:
    files = converted_repository(b"abc", index_name, hashlib.md5(b"abc").hexdigest())
    hub.add("user/converted", files)
    directory = get(RepoRef("user", "converted"))
    assert visible_files(directory) == set(files) - {"logs.txt"}


def test_converted_repository_with_a_wrong_shard(get: Fetcher, hub: LocalHub) -> None:
    md5 = hashlib.md5(b"other").hexdigest()
    hub.add("user/converted", converted_repository(b"abc", "tensor-cache.json", md5))
    for _ in range(2):  # never taken as complete
        with pytest.raises(CorruptFile, match=r"params_shard_0\.bin is damaged"):
            get(RepoRef("user", "converted"))


def test_gguf_repository_gives_the_file(get: Fetcher, hub: LocalHub) -> None:
    hub.add("user/one", {"config.json": b"{}", "model-q4.gguf": b"GGUF", "README.md": b""})
    path = get(RepoRef("user", "one"))
    assert path.name == "model-q4.gguf"
    assert path.read_bytes() == b"GGUF"
    hub.stop()
    assert get(RepoRef("user", "one")) == path


def test_several_gguf_files_want_a_choice(get: Fetcher, hub: LocalHub) -> None:
    hub.add("user/many", {"a.gguf": b"A", "sub/b.gguf": b"B"})
    with pytest.raises(OptionError, match=r"2 GGUF files; .*HF://user/many/FILE: a.gguf, sub/b"):
        get(RepoRef("user", "many"))
    first, second = (get(RepoRef("user", "many", name)) for name in ("a.gguf", "sub/b.gguf"))
    assert (first.read_bytes(), second.read_bytes()) == (b"A", b"B")
    hub.stop()
    assert get(RepoRef("user", "many", "a.gguf")) == first
    assert get(RepoRef("user", "many", "sub/b.gguf")) == second


def test_missing_gguf_file(get: Fetcher, hub: LocalHub) -> None:
    hub.add("user/many", {"a.gguf": b"A"})
    with pytest.raises(ModelNotFound, match=r"no file 'c\.gguf'; its GGUF files are: a\.gguf"):
        get(RepoRef("user", "many", "c.gguf"))
