"""The Hugging Face Hub: how it is asked, what a repository holds, what its failures mean to a user.

Knows no files on the disk. huggingface_hub is imported on use.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_llm.errors import DownloadError, ModelNotFound, OptionError
from mlc_llm.prepare.transfer import CutShort, RemoteFile, hub_tools

if TYPE_CHECKING:
    from mlc_llm.prepare.download import HubAccess, RepoRef

_API_TIMEOUT_S = 30.0


def connect(access: HubAccess) -> tuple[Any, dict[str, str]]:
    """Return the hub's interface and the headers of requests to it. Raises OptionError."""
    from huggingface_hub import HfApi

    from mlc_llm import __version__

    caller: dict[str, Any] = {"library_name": "mlc_llm", "library_version": __version__}
    api = HfApi(access.endpoint, token=access.token, **caller)
    if not re.match(r"https?://[^/\s]+", api.endpoint):
        raise OptionError(
            f"HF_ENDPOINT is {api.endpoint!r}; it must be an address such as https://huggingface.co"
        )
    return api, hub_tools().build_hf_headers(token=access.token, **caller)


@contextlib.contextmanager
def explained(
    ref: RepoRef, endpoint: str, directory: Path, has_copy: Callable[[], bool]
) -> Iterator[None]:
    """Turn failures of the hub and the network into errors that tell a user what to do.

    directory: where the files go. has_copy: whether a complete copy is there all the same.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, hub_tools().httpx.HTTPError, CutShort, ConnectionError) as error:
        raise _explain(error, ref, endpoint, directory, has_copy()) from error


def list_files(api: Any, ref: RepoRef) -> tuple[str, str | None, dict[str, RemoteFile]]:
    """Ask the hub for the commit a revision stands for, its licence, and the files there."""
    from huggingface_hub import hf_hub_url

    try:
        info = api.model_info(
            ref.repo_id,
            revision=ref.revision or "main",
            files_metadata=True,
            timeout=_API_TIMEOUT_S,
        )
        commit = str(info.sha)
        tags = [str(tag) for tag in info.tags or []]
        licence = next((t.partition(":")[2] for t in tags if t.startswith("license:")), None)
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
    return commit, licence, files


def _explain(
    error: BaseException, ref: RepoRef, endpoint: str, directory: Path, has_copy: bool
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
    reason = str(error) or type(error).__name__
    if has_copy:
        return DownloadError(
            f"cannot ask {endpoint} for changes of {ref} ({reason}); the copy in {directory} is "
            "complete and stays as it is"
        )
    started = any(directory.glob("**/*.partial"))
    return DownloadError(
        f"cannot fetch {ref} from {endpoint} ({reason}), and there is "
        f"no complete copy in {directory}; check the network connection, proxy and HF_ENDPOINT"
        + (", then run again: what arrived is kept" if started else "")
    )
