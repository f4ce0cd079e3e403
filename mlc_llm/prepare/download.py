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
from typing import Any
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
from mlc_llm.prepare.progress import Progress
from mlc_llm.prepare.transfer import (
    CutShort,
    RemoteFile,
    Transfer,
    hub_tools,
    partial_path,
    size_or_zero,
)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE_NAME,
)
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_NUM_CONNECTIONS = 4
_API_TIMEOUT_S = 30.0
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
) -> Path:
    """Return a complete local copy: a directory, or the .gguf file of a GGUF repository.

    A complete copy is used without asking the network. Raises OptionError, ModelNotFound (no such
    repository, or no model in it), UnsupportedModel, DownloadError, StorageError and CorruptFile.
    """
    if policy is CachePolicy.OFF:
        return _download(ref, make_temporary_directory(), False, progress, access)
    directory = home.repository_directory(ref.user, ref.name, ref.revision)
    found = _find_complete(directory, ref) if policy.reads else None
    if found is not None:
        return found
    if policy is CachePolicy.READONLY:
        raise DownloadError(
            f"{ref} is not (completely) in {directory}, and the download cache policy READONLY "
            "forbids fetching it; set MLC_DOWNLOAD_CACHE_POLICY=ON"
        )
    with hold_lock(directory, progress):
        found = _find_complete(directory, ref) if policy.reads else None
        if found is not None:  # fetched by the process we waited for
            return found
        redo = policy is CachePolicy.REDO
        return _download(ref, directory, redo, progress, access)


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
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from mlc_llm import __version__

    caller: dict[str, Any] = {"library_name": "mlc_llm", "library_version": __version__}
    api = HfApi(access.endpoint, token=access.token, **caller)
    if not re.match(r"https?://[^/\s]+", api.endpoint):
        raise OptionError(
            f"HF_ENDPOINT is {api.endpoint!r}; it must be an address such as https://huggingface.co"
        )
    headers = hub_tools().build_hf_headers(token=access.token, **caller)
    try:
        commit, listing = _list_files(api, ref)
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
    except (HfHubHTTPError, hub_tools().httpx.HTTPError, CutShort, ConnectionError) as error:
        raise _explain(error, ref, api.endpoint, directory) from error
    if CHAT_CONFIG_NAME in listing and ref.file is None:
        read_tensor_index(directory).verify_checksums()
    names = {file.name: (directory / file.name).stat().st_size for file in files}
    content = {"repository": ref.repo_id, "revision": ref.revision, "commit": commit}
    with storage_errors(manifest):
        write_atomically(manifest, json.dumps({**content, "files": names}, indent=2) + "\n")
    return _model_path(directory, names)


def _list_files(api: Any, ref: RepoRef) -> tuple[str, dict[str, RemoteFile]]:
    """Ask the hub for the commit a revision stands for, and the files there."""
    from huggingface_hub import hf_hub_url

    try:
        info = api.model_info(
            ref.repo_id,
            revision=ref.revision or "main",
            files_metadata=True,
            timeout=_API_TIMEOUT_S,
        )
        commit = str(info.sha)
        files = {}
        for sibling in info.siblings or []:
            name = sibling.rfilename
            url = hf_hub_url(ref.repo_id, name, revision=commit, endpoint=api.endpoint)
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            digest = f"sha256:{sha256}" if sha256 else f"git:{sibling.blob_id or ''}"
            files[name] = RemoteFile(name, url, sibling.size, digest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadError(
            f"{api.endpoint} does not answer like a Hugging Face Hub ({error}); check HF_ENDPOINT, "
            "and whether a proxy or login page stands in between"
        ) from error
    return commit, files


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
        configs = ("config.json", "generation_config.json", *_INDEX_FILES)
        return _matching(top, configs + _TOKENIZER_FILES) + weights
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


def _explain(
    error: BaseException, ref: RepoRef, endpoint: str, directory: Path
) -> DownloadError | ModelNotFound:
    """Return the error that tells a user what to do about a failure of the hub or the network."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"HF://{ref.repo_id} is gated: accept its terms at {endpoint}/{ref.repo_id}, then set "
            "HF_TOKEN to an access token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(
            f"HF://{ref.repo_id} does not exist at {endpoint}, or is private; check the spelling, "
            "or set HF_TOKEN to an access token that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(
            f"HF://{ref.repo_id} has no revision {ref.revision or 'main'!r}; "
            f"see its branches and tags at {endpoint}/{ref.repo_id}"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hint = "set HF_TOKEN to a valid access token" if status in (401, 403) else "try again later"
        return DownloadError(f"{endpoint} answered {ref} with HTTP status {status}; {hint}")
    started = any(directory.glob("**/*.partial"))
    return DownloadError(
        f"cannot fetch {ref} from {endpoint} ({str(error) or type(error).__name__}), and there is "
        f"no complete copy in {directory}; check the network connection, proxy and HF_ENDPOINT"
        + (", then run again: what arrived is kept" if started else "")
    )
