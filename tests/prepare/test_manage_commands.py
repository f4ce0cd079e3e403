"""`pull`, `list`, `rm` and `ps` as a user types them, with a local hub and small models."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from hub import LocalHub
from manage import Run, directories, files_of
from tiny import write_artifact, write_llama

from mlc_llm.prepare.cache import CacheHome, lock_at_once
from mlc_llm.prepare.processes import RunFile

# pull


@pytest.mark.parametrize(
    "name",
    ["HF://user/tiny", "user/tiny", "hf://user/tiny", "https://huggingface.co/user/tiny"],
)
def test_a_pull_brings_what_makes_the_model(
    run: Run, home: CacheHome, hub: LocalHub, published: str, name: str
) -> None:
    done = run("pull", name)
    directory = home.hub_directory / "user" / "tiny"
    assert (done.code, done.out) == (0, f"{directory}\n")
    assert directories(directory) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "Downloading HF://user/tiny" in done.err
    assert directories(home.local_directory) == []


def test_pulling_again_fetches_what_has_changed(
    run: Run, hub: LocalHub, published: str, llama: Path
) -> None:
    assert run("pull", published).code == 0
    before = len(hub.downloads("model.safetensors"))
    again = run("pull", published)
    assert again.code == 0 and "HF://user/tiny is up to date" in again.err
    changed = json.loads((llama / "config.json").read_text())
    changed["max_position_embeddings"] = 64
    (llama / "config.json").write_text(json.dumps(changed))
    hub.add("user/tiny", files_of(llama))
    path = Path(run("pull", published).out.strip())
    assert json.loads((path / "config.json").read_text()) == changed
    assert len(hub.downloads("model.safetensors")) == before
    hub.stop()
    offline = run("pull", published)
    assert offline.code == 1 and "is complete and stays as it is" in offline.err
    assert (path / "config.json").is_file()


def test_an_interrupted_pull_is_continued(run: Run, hub: LocalHub, published: str) -> None:
    hub.cut_after["model.safetensors"] = [1000]
    done = run("pull", published)
    assert done.code == 0
    assert "going on at byte" in done.err
    ranges = [request.range for request in hub.downloads("model.safetensors")]
    assert ranges[0] is None and ranges[1] is not None


def test_revisions(run: Run, home: CacheHome, hub: LocalHub, published: str, llama: Path) -> None:
    hub.add("user/tiny", files_of(llama), revision="v2")
    by_option = run("pull", "user/tiny", "--revision", "v2")
    assert by_option.out == f"{home.hub_directory / 'user' / 'tiny@v2'}\n"
    assert run("pull", "user/tiny@v2").out == by_option.out
    assert run("pull", "user/tiny@v2", "--revision", "v2").out == by_option.out
    assert run("pull", "https://hf.co/user/tiny/tree/v2").out == by_option.out
    assert run("pull", "user/tiny@v2", "--revision", "v3").code == 2
    missing = run("pull", "user/tiny", "--revision", "v9")
    assert missing.code == 1 and "no revision 'v9'" in missing.err


@pytest.mark.cpu
def test_pull_makes_ready_what_a_chat_needs(
    run: Run, home: CacheHome, hub: LocalHub, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("pull", published, "--compile", "--quantization", "q0f16")
    assert done.code == 0, done.err
    artifact = Path(done.out.strip())
    assert artifact.parent == home.local_directory
    (library,) = [path for path in home.library_directory.iterdir() if path.is_dir()]
    assert len(list(library.glob("packed-*.bin"))) == 1
    listed = run("list", "--json").json
    raw, converted = listed["models"]
    assert [raw["name"], converted["name"]] == [published, published]
    assert (raw["kind"], converted["kind"]) == ("raw", "converted")
    assert converted["quantization"] == "q0f16"
    assert converted["libraries"] == [library.name]
    assert raw["last_used"] == converted["last_used"] == pytest.approx(time.time(), abs=120)
    assert listed["libraries"][0]["users"] == [str(artifact)]
    assert listed["libraries"][0]["is_current"] is True
    # Nothing is missing: a chat needs neither the hub nor a place to write.
    hub.stop()
    monkeypatch.setenv("MLC_JIT_POLICY", "READONLY")
    monkeypatch.setenv("MLC_DOWNLOAD_CACHE_POLICY", "READONLY")
    again = run("chat", published, "--quantization", "q0f16", "--prompt", "hi", "--max-tokens", "2")
    assert again.code == 0, again.err
    assert "pack" not in again.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("nothing-here", 2, "neither a repository, such as user/repo"),
        ("user/unknown", 1, "does not exist"),
        ("HF://user", 2, "does not name a repository"),
        ("user/tiny --quantization q9", 2, "q9"),
        ("user/tiny --device cpu", 2, "are for --compile"),
        ("user/tiny --opt O2", 2, "are for --compile"),
        ("user/tiny --compile --device rocm", 1, "no runtime for AMD"),
        ("demo --revision v1", 2, "--revision is for repositories"),
        ("{llama}", 2, "is on this machine"),
    ],
)
def test_mistakes_of_a_pull(
    run: Run, published: str, llama: Path, words: str, code: int, message: str
) -> None:
    done = run("pull", *words.format(llama=llama).split())
    assert (done.code, done.out) == (code, "")
    assert message in done.err and "Traceback" not in done.err


def test_a_cache_that_keeps_nothing_is_refused(
    run: Run, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLC_DOWNLOAD_CACHE_POLICY", "OFF")
    done = run("pull", published)
    assert done.code == 2 and "nothing would be kept" in done.err


# list


def test_an_empty_cache(run: Run, home: CacheHome) -> None:
    done = run("list")
    assert (done.code, done.out) == (0, "")
    assert "no models" in done.err
    assert run("list", "--json").json == {
        "directory": str(home.root),
        "models": [],
        "libraries": [],
        "unfinished": [],
    }
    assert not home.root.exists()


def test_all_kinds_are_listed(run: Run, home: CacheHome, hub: LocalHub, published: str) -> None:
    artifact = files_of(write_artifact(home.root.parent / "artifact"))
    hub.add("user/ready-MLC", artifact)
    hub.add("user/small-GGUF", {"a.Q4_K_M.gguf": b"one", "b.IQ3_XS.gguf": b"three"})
    hub.add("user/one-GGUF", {"only-Q8_0.gguf": b"1234567"})
    names = ["user/ready-MLC", "user/small-GGUF/a.Q4_K_M.gguf", "user/small-GGUF/b.IQ3_XS.gguf"]
    for name in (published, *names, "user/one-GGUF"):
        assert run("pull", name).code == 0
    (home.hub_directory / "other" / "broken").mkdir(parents=True)
    (home.hub_directory / "other" / "broken" / "model.safetensors.ab.partial").write_bytes(b"x")
    rows = {
        model["name"]: (model["kind"], model["quantization"], model["state"])
        for model in run("list", "--json").json["models"]
    }
    assert rows == {
        published: ("raw", None, "ready"),
        "HF://user/ready-MLC": ("converted", "q4f16_1", "ready"),
        "HF://user/small-GGUF/a.Q4_K_M.gguf": ("GGUF", "Q4_K_M", "ready"),
        "HF://user/small-GGUF/b.IQ3_XS.gguf": ("GGUF", "IQ3_XS", "ready"),
        "HF://user/one-GGUF": ("GGUF", "Q8_0", "ready"),
        "HF://other/broken": ("raw", None, "incomplete"),
    }
    table = run("list").out.splitlines()
    assert table[0].split() == ["NAME", "KIND", "QUANT", "SIZE", "USED", "LIBS", "STATE"]
    assert len(table) == 1 + len(rows)
    assert all(len(line.split("  ")[0]) for line in table)


# rm


def converted(run: Run, model: str | Path, quantization: str = "q0f16") -> Path:
    done = run("pull", str(model), "--quantization", quantization)
    assert done.code == 0, done.err
    return Path(done.out.strip())


def test_a_model_goes_with_all_that_was_made_of_it(
    run: Run, home: CacheHome, hub: LocalHub, published: str, llama: Path
) -> None:
    artifact = converted(run, published)
    converted(run, published, "q0f32")
    kept = converted(run, llama)
    done = run("rm", "user/tiny", "--yes")
    assert done.code == 0, done.err
    assert done.out.startswith("freed ")
    assert done.err.count(published) == 3
    assert not artifact.exists() and kept.is_dir()
    assert list((home.hub_directory / "user").iterdir()) == [], "no lock file is left"
    assert directories(home.local_directory) == [kept.name]
    assert [path.name for path in home.local_directory.glob(".*.lock")] == [f".{kept.name}.lock"]
    assert [model["name"] for model in run("list", "--json").json["models"]] == [str(llama)]


def test_removing_copies_of_a_local_model_leaves_the_model(
    run: Run, home: CacheHome, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(llama)
    first, second = converted(run, llama), converted(run, llama, "q0f32")
    done = run("rm", str(llama), "--quantization", "q0f32", "-y")
    assert done.code == 0 and first.is_dir() and not second.exists()
    monkeypatch.chdir(llama.parent)
    assert run("rm", "./tiny-llama", "-y").code == 0
    assert not first.exists()
    assert files_of(llama) == before


def test_one_file_of_a_repository_goes_alone(run: Run, home: CacheHome, hub: LocalHub) -> None:
    hub.add("user/g", {"a.Q4_0.gguf": b"one", "b.Q8_0.gguf": b"three"})
    for name in "a.Q4_0.gguf", "b.Q8_0.gguf":
        assert run("pull", f"user/g/{name}").code == 0
    assert run("rm", "user/g/a.Q4_0.gguf", "-y").code == 0
    directory = home.hub_directory / "user" / "g"
    assert directories(directory) == ["b.Q8_0.gguf"]
    assert run("rm", "HF://user/g", "-y").code == 0
    assert not directory.exists()


def make_library(home: CacheHome, name: str, *users: Path) -> Path:
    """A directory that stands for a library of this release."""
    from mlc_llm.prepare.jit import compiler_release

    directory = home.library_directory / name
    directory.mkdir(parents=True)
    metadata: dict[str, Any] = {
        **dict.fromkeys(("model_type", "quantization", "compiler_version"), "x"),
        **dict.fromkeys(("context_window_size", "sliding_window_size", "attention_sink_size"), 1),
        **dict.fromkeys(("prefill_chunk_size", "max_batch_size", "vocab_size"), 1),
        "params": [],
        "kv_cache": dict.fromkeys(("num_layers", "num_key_value_heads", "head_dim"), 1)
        | {"page_size": 16, "dtype": "float16"},
        **{"memory_usage": {}, "target": {}, "isa": []},
    }
    (directory / "metadata.json").write_text(json.dumps(metadata))
    sizes = {"metadata.json": (directory / "metadata.json").stat().st_size}
    manifest = {"files": sizes, "release": compiler_release()}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "users.json").write_text(json.dumps({str(user): 1.0 for user in users}))
    return directory


def pack(library: Path, artifact: Path) -> Path:
    path = library / f"packed-{artifact.name}.bin"
    path.write_bytes(json.dumps({"artifact": str(artifact)}).encode().ljust(1 << 20))
    return path


def test_libraries_go_with_their_last_user(
    run: Run, home: CacheHome, llama: Path, tmp_path: Path
) -> None:
    other = write_llama(tmp_path / "models" / "other-llama", seed=1)
    first, second = converted(run, llama), converted(run, other)
    outside = write_artifact(tmp_path / "outside")
    alone = make_library(home, "alone", first)
    shared = make_library(home, "shared", first, second)
    with_outside = make_library(home, "with-outside", first, outside)
    packed, kept = pack(shared, first), pack(shared, second)
    assert run("rm", str(llama), "-y").code == 0
    assert not alone.exists() and not packed.exists()
    assert shared.is_dir() and with_outside.is_dir() and kept.is_file()
    assert run("rm", str(other), "-y").code == 0
    assert not shared.exists() and with_outside.is_dir() and outside.is_dir()
    locks = {path.name for path in home.library_directory.glob(".*.lock")}
    assert locks <= {".with-outside.lock"} and not list(home.local_directory.glob(".*.lock"))


def test_stale_copies_are_told_and_removed(
    run: Run, home: CacheHome, llama: Path, published: str, tmp_path: Path
) -> None:
    changed, current = converted(run, llama), converted(run, published)
    used = make_library(home, "used", current)
    unused = make_library(home, "unused", tmp_path / "gone")
    old = make_library(home, "old", current)
    (old / "manifest.json").write_text(json.dumps({"files": {}}))
    foreign = pack(used, tmp_path / "gone")
    partial = home.local_directory / "half-q4f16_1-0123.partial"
    partial.mkdir()
    assert run("rm", "--stale", "-y").code == 0
    assert changed.is_dir() and not any(path.exists() for path in (unused, old, foreign, partial))
    os.utime(llama / "model.safetensors", (1, 1))
    listed = run("list")
    assert "stale" in listed.out and "`mlc_llm rm --stale` frees them" in listed.err
    states = {m["path"]: m["state"] for m in run("list", "--json").json["models"]}
    assert (states[str(changed)], states[str(current)]) == ("stale", "ready")
    assert run("rm", "--stale", "--yes").code == 0
    assert not changed.exists() and current.is_dir() and used.is_dir()
    nothing = run("rm", "--stale")
    assert nothing.code == 0 and "nothing to remove" in nothing.err


def test_a_model_in_use_stays(run: Run, home: CacheHome, llama: Path) -> None:
    artifact = converted(run, llama)
    running = RunFile(home, "serve", str(llama), [artifact])
    running.listen("http://127.0.0.1:1")
    done = run("rm", str(llama), "-y")
    assert done.code == 1
    assert f"in use by `mlc_llm serve` (process {os.getpid()} at http://127.0.0.1:1)" in done.err
    os.utime(llama / "config.json", (1, 1))
    stale = run("rm", "--stale", "-y")
    assert stale.code == 0 and "kept: " in stale.err and artifact.is_dir()
    running.close()
    assert run("rm", str(llama), "-y").code == 0
    assert not artifact.exists()


def test_a_model_being_made_stays(run: Run, home: CacheHome, published: str) -> None:
    artifact = converted(run, published)
    with lock_at_once(artifact):
        done = run("rm", published, "-y")
    assert done.code == 1 and "is being prepared by another process" in done.err
    # A second conversion of it is under way.
    partial = home.local_directory / "tiny-q0f32-0123.partial"
    partial.mkdir()
    (partial / ".origin.json").write_text((artifact / ".origin.json").read_text())
    with lock_at_once(home.local_directory / "tiny-q0f32-0123"):
        done = run("rm", published, "-y")
    assert done.code == 1 and "tiny-q0f32-0123 is being prepared" in done.err
    assert artifact.is_dir() and partial.is_dir()
    assert run("rm", published, "-y").code == 0
    assert directories(home.local_directory) == []


def test_removing_asks_first(
    run: Run, home: CacheHome, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = converted(run, llama)
    done = run("rm", str(llama))
    assert done.code == 2 and "add --yes" in done.err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter([False, True])
    monkeypatch.setattr("typer.confirm", lambda *_, **__: next(answers))
    declined = run("rm", str(llama))
    assert declined.code == 0 and "nothing was removed" in declined.err and artifact.is_dir()
    assert run("rm", str(llama)).code == 0
    assert not artifact.exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("user/tinny", 1, "'user/tinny' is not in the cache; did you mean HF://user/tiny?"),
        ("tiny", 1, "did you mean HF://user/tiny?"),
        ("zzz", 1, "`mlc_llm list` shows"),
        ("..", 1, "is not in the cache"),
        ("/", 1, "is not in the cache"),
        ("user/tiny --quantization q4f16_1", 1, "only as unknown"),
        ("", 2, "name the models to remove"),
        ("user/tiny --stale", 2, "name the models to remove"),
        ("--stale --quantization q4f16_1", 2, "goes with names"),
    ],
)
def test_mistakes_of_a_removal(
    run: Run, home: CacheHome, published: str, words: str, code: int, message: str
) -> None:
    assert run("pull", published).code == 0
    done = run("rm", *words.split(), "--yes")
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert directories(home.hub_directory / "user") == ["tiny"]


def test_links_in_the_cache_are_not_followed(run: Run, home: CacheHome, llama: Path) -> None:
    (home.hub_directory / "user").mkdir(parents=True)
    (home.hub_directory / "user" / "linked").symlink_to(llama)
    before = files_of(llama)
    assert run("rm", "user/linked", "-y").code == 0
    assert directories(home.hub_directory / "user") == []
    assert files_of(llama) == before


@pytest.mark.cpu
def test_the_commands_of_the_readme(run: Run, home: CacheHome, hub: LocalHub, llama: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^### Models\n+```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    commands = [shlex.split(line) for line in block[1].splitlines()]
    assert [words[1] for words in commands] == ["pull", "show", "list", "ps", "rm", "rm"]
    hub.add(commands[0][2].removeprefix("HF://"), files_of(llama))
    for words in commands:
        done = run(*words[1:])
        assert done.code == 0, (words, done.err)
    assert directories(home.local_directory) == directories(home.library_directory) == []
