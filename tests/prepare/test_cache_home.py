"""The cache directory: where it is, what is in it, who may write."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from recorder import RecordedProgress

from mlc_llm.errors import OptionError, StorageError
from mlc_llm.prepare.cache import (
    CacheHome,
    CachePolicy,
    drop_lock,
    hold_lock,
    lock_at_once,
    lock_path_of,
    make_temporary_directory,
    publish,
    storage_errors,
)


@pytest.mark.parametrize(
    ("environ", "windows", "expected"),
    [
        ({"MLC_LLM_HOME": "/chosen", "XDG_CACHE_HOME": "/xdg"}, False, "/chosen"),
        ({"XDG_CACHE_HOME": "/xdg"}, False, "/xdg/mlc_llm"),
        ({"XDG_CACHE_HOME": "relative"}, False, "~/.cache/mlc_llm"),
        ({"MLC_LLM_HOME": ""}, False, "~/.cache/mlc_llm"),
        ({"LOCALAPPDATA": "/appdata", "XDG_CACHE_HOME": "/xdg"}, True, "/appdata/mlc_llm"),
        ({"MLC_LLM_HOME": "~/models"}, False, "~/models"),
    ],
)
def test_home_follows_the_environment(
    environ: dict[str, str], windows: bool, expected: str
) -> None:
    home = CacheHome.from_environment(environ, windows=windows)
    assert home.root == Path(expected).expanduser()


def test_relative_home_becomes_absolute() -> None:
    assert CacheHome.from_environment({"MLC_LLM_HOME": "here"}).root == Path.cwd() / "here"


def test_revisions_lie_beside_the_default_one(home: CacheHome) -> None:
    default = home.repository_directory("user", "model", None)
    assert default == home.root / "model_weights" / "hf" / "user" / "model"
    assert home.repository_directory("user", "model", "refs/pr/1").name == "model@refs%2Fpr%2F1"


@pytest.mark.parametrize(("text", "policy"), [("ON", "ON"), (" redo ", "REDO"), ("", "ON")])
def test_policy_is_read_in_any_case(text: str, policy: str) -> None:
    assert CachePolicy.parse("MLC_JIT_POLICY", {"MLC_JIT_POLICY": text}).name == policy


def test_policy_is_on_where_nothing_is_set() -> None:
    assert CachePolicy.parse("MLC_JIT_POLICY", {}) is CachePolicy.ON


def test_unknown_policy_is_named() -> None:
    with pytest.raises(OptionError, match=r"MLC_JIT_POLICY is 'maybe'; use one of ON, OFF, REDO"):
        CachePolicy.parse("MLC_JIT_POLICY", {"MLC_JIT_POLICY": "maybe"})


def test_entries_tell_kind_name_and_size(home: CacheHome) -> None:
    assert home.entries() == []
    assert home.size_bytes() == 0
    for name, size in {
        "model_weights/hf/user/model/a.bin": 3,
        "model_weights/hf/user/model/sub/b.bin": 4,
        "model_weights/local/key/params_shard_0.bin": 5,
        "model_weights/local/.key.lock": 0,
        "model_weights/demo/demo.gguf": 6,
        "model_lib/other/lib.o": 7,
    }.items():
        path = home.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    found = [(entry.kind, entry.name, entry.size_bytes) for entry in home.entries()]
    assert found == [
        ("repository", "user/model", 7),
        ("converted", "key", 5),
        ("demo", "demo.gguf", 6),
        ("library", "other", 7),
    ]
    assert home.size_bytes() == 25


@pytest.mark.parametrize(
    ("code", "hint"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "check its permissions")]
)
def test_storage_errors_tell_what_to_do(code: int, hint: str) -> None:
    with pytest.raises(StorageError, match=rf"the_file.*{hint}.*MLC_LLM_HOME"):
        with storage_errors(Path("the_file")):
            raise OSError(code, "it failed")


def test_other_errors_pass_storage_errors() -> None:
    with pytest.raises(FileNotFoundError), storage_errors(Path("x")):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def test_second_holder_of_a_lock_waits_and_says_so(home: CacheHome) -> None:
    order: list[str] = []
    waiting = threading.Event()

    class Told(RecordedProgress):
        def message(self, text: str) -> None:
            super().message(text)
            waiting.set()

    second_progress = Told()

    def second() -> None:
        with hold_lock(home.root / "thing", second_progress):
            order.append("second")

    first_progress = RecordedProgress()
    with hold_lock(home.root / "thing", first_progress):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert first_progress.messages == []
    assert "waiting for another process" in second_progress.messages[0]


def test_who_waits_for_a_lock_that_is_removed_takes_a_new_one(home: CacheHome) -> None:
    target = home.root / "thing"
    waiting, has_it, may_end = threading.Event(), threading.Event(), threading.Event()

    class Told(RecordedProgress):
        def message(self, text: str) -> None:
            super().message(text)
            waiting.set()

    def second() -> None:
        with hold_lock(target, Told()):
            has_it.set()
            may_end.wait(60)

    thread = threading.Thread(target=second)
    with hold_lock(target, RecordedProgress()):
        thread.start()
        assert waiting.wait(60)
        drop_lock(target)
        assert not lock_path_of(target).exists()
    assert has_it.wait(60)
    # What it holds is the lock that others find.
    with pytest.raises(StorageError, match="is being prepared by another process"):
        with lock_at_once(target):
            pass
    may_end.set()
    thread.join(60)


def test_lock_in_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StorageError, match="cannot write"):
        with hold_lock(tmp_path / "file" / "home" / "thing", RecordedProgress()):
            pass


def test_publish_replaces_the_directory(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for content in ("old", "new"):
        work = tmp_path / "work"
        work.mkdir()
        (work / content).touch()
        publish(work, target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_temporary_directory_goes_with_the_process() -> None:
    code = (
        "from mlc_llm.prepare.cache import make_temporary_directory as make\n"
        "path = make(); (path / 'file').touch(); print(path)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip()
    assert not Path(run.stdout.strip()).exists()
    assert make_temporary_directory().is_dir()
