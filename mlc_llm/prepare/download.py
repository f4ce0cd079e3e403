"""Brings a repository from the Hugging Face Hub into the cache, once.

Knows which files of a repository make a model, and when a copy is complete. Does not convert.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mlc_llm.artifact import (
    CHAT_CONFIG_NAME,
    CHAT_TEMPLATE_NAME,
    TENSOR_INDEX_NAMES,
    read_json_object,
    read_tensor_index,
    write_atomically,
)
from mlc_llm.errors import (
    CorruptFile,
    DownloadError,
    ModelNotFound,
    OptionError,
    StorageError,
    UnsupportedModel,
)
from mlc_llm.prepare.cache import (
    CacheHome,
    CachePolicy,
    hold_lock,
    make_temporary_directory,
    storage_errors,
)
from mlc_llm.prepare.hub import connect, explained, list_files
from mlc_llm.prepare.progress import Progress
from mlc_llm.prepare.sentence_transformers import LIMITS_NAME, MODULES_NAME
from mlc_llm.prepare.transfer import (
    RemoteFile,
    Transfer,
    partial_path,
    size_or_zero,
)
from mlc_llm.text.chat_template import PROCESSOR_TEMPLATE_NAME
from mlc_llm.text.formats import FILE_PATTERNS

_TOKENIZER_FILES = (
    *FILE_PATTERNS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    CHAT_TEMPLATE_NAME,
)
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SENTENCE_FILES = (MODULES_NAME, LIMITS_NAME)
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json", PROCESSOR_TEMPLATE_NAME)
_SENTENCE_MODULE = re.compile(r"[0-9]_[A-Za-z]+/config\.json")
_NUM_CONNECTIONS = 4
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPO = re.compile(rf"(?P<user>{_NAME})/(?P<name>{_NAME})(/(?P<file>[^@]+))?(@(?P<revision>.+))?")


@dataclass(frozen=True)
class RepoRef:
    """A model on the hub: `HF://user/name[/file.gguf][@revision]`."""

    user: str
    name: str
    file: str | None = None
    revision: str | None = None

    @property
    def repo_id(self) -> str:
        """The name the hub knows it by."""
        return f"{self.user}/{self.name}"

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"HF://{self.repo_id}{file}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class HubAccess:
    """Which hub to ask, and as whom; None leaves it to huggingface_hub (its settings and login).

    retry_delay_s: the wait after a broken connection, doubled each time.
    """

    endpoint: str | None = None
    token: str | None = None
    retry_delay_s: float = 1.0

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> HubAccess:
        """Read HF_ENDPOINT and HF_TOKEN."""
        return HubAccess(environ.get("HF_ENDPOINT") or None, environ.get("HF_TOKEN") or None)


def is_repo(text: str) -> bool:
    """Return whether the text is meant to name a repository."""
    return text[:5].upper() == "HF://"


def parse_repo(text: str) -> RepoRef:
    """Read `HF://user/name[/file.gguf][@revision]`. Raises OptionError."""
    match = _REPO.fullmatch(text[5:].rstrip("/")) if is_repo(text) else None
    if match is None or ".." in text or "\\" in text:
        raise OptionError(
            f"{text!r} does not name a repository; write HF://user/name, HF://user/name@revision "
            "or HF://user/name/file.gguf"
        )
    file, revision = match["file"], match["revision"]
    if file is not None and not file.lower().endswith(".gguf"):
        raise OptionError(
            f"{text!r}: after user/name only a .gguf file can be named, not {file!r}; "
            "write a branch, tag or commit as HF://user/name@revision"
        )
    return RepoRef(match["user"], match["name"], file, revision)


def fetch(
    ref: RepoRef,
    *,
    home: CacheHome,
    policy: CachePolicy,
    progress: Progress,
    access: HubAccess,
    is_update: bool = False,
) -> Path:
    """Return a complete local copy: a directory, or the .gguf file of a GGUF repository.

    A complete copy is used without asking the network, but for an update, which fetches the files
    that have changed since. Raises OptionError, ModelNotFound (no such
    repository, or no model in it), UnsupportedModel, DownloadError, StorageError and CorruptFile.
    """
    if policy is CachePolicy.OFF:
        return _download(ref, make_temporary_directory(), False, progress, access)
    directory = home.repository_directory(ref.user, ref.name, ref.revision)
    must_ask = is_update and policy is CachePolicy.ON
    found = _find_complete(directory, ref) if policy.reads and not must_ask else None
    if found is not None:
        return found
    if policy is CachePolicy.READONLY:
        raise DownloadError(
            f"{ref} is not (completely) in {directory}, and the download cache policy READONLY "
            "forbids fetching it; set MLC_DOWNLOAD_CACHE_POLICY=ON"
        )
    with hold_lock(directory, progress):
        found = _find_complete(directory, ref) if policy.reads and not must_ask else None
        if found is not None:  # fetched by the process we waited for
            return found
        redo = policy is CachePolicy.REDO
        return _download(ref, directory, redo, progress, access)


def find_download(ref: RepoRef, home: CacheHome) -> Path | None:
    """Return the complete copy of a repository in the cache, without asking the network."""
    return _find_complete(home.repository_directory(ref.user, ref.name, ref.revision), ref)


def find_licence(ref: RepoRef, home: CacheHome) -> str | None:
    """Return the licence the hub named when a repository was downloaded, if it did."""
    path = _manifest_path(home.repository_directory(ref.user, ref.name, ref.revision), ref)
    licence = read_json_object(path).get("licence") if path.is_file() else None
    return licence if isinstance(licence, str) else None


def _manifest_path(directory: Path, ref: RepoRef) -> Path:
    mark = "" if ref.file is None else "." + quote(ref.file, safe="")
    return directory / f".download{mark}.json"


def _find_complete(directory: Path, ref: RepoRef) -> Path | None:
    """Return the model if its manifest, written last, lists files that are all there."""
    path = _manifest_path(directory, ref)
    try:
        manifest = read_json_object(path) if path.is_file() else {}
    except CorruptFile:
        return None
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return None
    for name, size_bytes in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size_bytes:
            return None
    return _model_path(directory, files)


def _model_path(directory: Path, files: Collection[str]) -> Path:
    only = next(iter(files)) if len(files) == 1 else ""
    return directory / only if only.lower().endswith(".gguf") else directory


def _download(
    ref: RepoRef, directory: Path, redo: bool, progress: Progress, access: HubAccess
) -> Path:
    api, headers = connect(access)
    with explained(
        ref, api.endpoint, directory, lambda: _find_complete(directory, ref) is not None
    ):
        commit, licence, listing = list_files(api, ref)
        found = None if redo else _find_complete(directory, ref)
        if (
            found is not None
            and read_json_object(_manifest_path(directory, ref))["commit"] == commit
        ):
            progress.message(f"{ref} is up to date")
            return found
        files = [listing[name] for name in select_files(listing, ref)]
        manifest = _manifest_path(directory, ref)
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            _forget(directory, manifest, files if redo else [])
        _check_space(directory, files)
        sizes = [file.size_bytes for file in files]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        progress.start(f"Downloading {ref}", total, "bytes")
        _fetch_all(Transfer(directory, headers, progress, access.retry_delay_s), files)
        progress.finish()
    if CHAT_CONFIG_NAME in listing and ref.file is None:
        read_tensor_index(directory).verify_checksums()
    names = {file.name: (directory / file.name).stat().st_size for file in files}
    content = {"repository": ref.repo_id, "revision": ref.revision, "commit": commit}
    content["licence"] = licence
    with storage_errors(manifest):
        write_atomically(manifest, json.dumps({**content, "files": names}, indent=2) + "\n")
    return _model_path(directory, names)


def select_files(names: Collection[str], ref: RepoRef) -> list[str]:
    """Return the files of a repository that make its model.

    Converted for MLC LLM, safetensors, PyTorch files, or one GGUF file, in this order. Raises
    ModelNotFound, OptionError (several GGUF files to choose from) and UnsupportedModel.
    """
    top = sorted(name for name in names if "/" not in name and "\\" not in name)
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if ref.file is not None:
        if ref.file not in ggufs:
            raise ModelNotFound(
                f"HF://{ref.repo_id} has no file {ref.file!r}"
                + (f"; its GGUF files are: {', '.join(ggufs)}" if ggufs else " and no GGUF file")
            )
        return [ref.file]
    if CHAT_CONFIG_NAME in top:
        names_of_artifact = (CHAT_CONFIG_NAME, *TENSOR_INDEX_NAMES, "params_shard_*.bin")
        return _matching(top, names_of_artifact + _TOKENIZER_FILES)
    weights = _matching(top, ("model*.safetensors",)) or _matching(top, ("pytorch_model*.bin",))
    if "config.json" in top and weights:
        configs: tuple[str, ...] = ("config.json", "generation_config.json", *_INDEX_FILES)
        configs += (*_SENTENCE_FILES, *_IMAGE_FILES)
        pooling = sorted(name for name in names if _SENTENCE_MODULE.fullmatch(name))
        return _matching(top, configs + _TOKENIZER_FILES) + pooling + weights
    if len(ggufs) == 1 and ggufs[0] in top:
        return ggufs
    if ggufs:
        raise OptionError(
            f"{ref} holds {len(ggufs)} GGUF files; name one of them as "
            f"HF://{ref.repo_id}/FILE: {', '.join(ggufs)}"
        )
    if "config.json" in top and _matching(top, ("*.pth", "*.pt")):
        raise UnsupportedModel(
            f"{ref} holds no weights in a format of Hugging Face (model.safetensors or "
            "pytorch_model.bin); look for a copy of the model in one of these, or in GGUF"
        )
    shown = ", ".join(top[:8]) or "nothing"
    raise ModelNotFound(
        f"{ref} is not a model that can be used here: it has neither {CHAT_CONFIG_NAME}, nor "
        "config.json with model.safetensors or pytorch_model.bin, nor a GGUF file; it holds "
        + shown
    )


def _matching(names: Collection[str], patterns: Collection[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _forget(directory: Path, manifest: Path, files: Collection[RemoteFile]) -> None:
    """Make the copy count as incomplete, and remove `files` so that they are fetched again."""
    manifest.unlink(missing_ok=True)
    for file in files:
        (directory / file.name).unlink(missing_ok=True)
        partial_path(directory, file).unlink(missing_ok=True)


def _check_space(directory: Path, files: Collection[RemoteFile]) -> None:
    """Raise StorageError where what is still to come does not fit on the disk."""
    missing = 0
    for file in files:
        there = max(
            size_or_zero(directory / file.name), size_or_zero(partial_path(directory, file))
        )
        missing += max((file.size_bytes or 0) - there, 0)
    free = shutil.disk_usage(directory).free
    if missing > free:
        raise StorageError(
            f"the download needs {missing / 1e9:.2f} GB, but {directory} has only "
            f"{free / 1e9:.2f} GB left; free some space, or let MLC_LLM_HOME point to a directory "
            "on another disk"
        )


def _fetch_all(transfer: Transfer, files: Collection[RemoteFile]) -> None:
    """Fetch over several connections; the first failure, or an interrupt, stops all of them."""
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        futures = [pool.submit(transfer.fetch, file) for file in files]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            transfer.stop()
            for future in futures:
                future.cancel()
