"""What lies in the cache: models as downloaded or converted, libraries, and what was left behind.

Only looks. Sizes are bytes on disk, times seconds since 1970.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from mlc_llm.artifact import CHAT_CONFIG_NAME, read_json_object
from mlc_llm.errors import MlcError
from mlc_llm.prepare.cache import OLD_MARK, CacheHome, size_of
from mlc_llm.prepare.demo import DEMO_FILE
from mlc_llm.prepare.jit import is_current
from mlc_llm.prepare.origin import read_origin, read_users

DEMO_NAME = "demo"
_GGUF_TYPE = re.compile(
    r"[-._]((?:I?Q\d\w*|[BF]?F(?:16|32)|MXFP4\w*))(?:-\d{5}-of-\d{5})?\.gguf$", re.I
)

Kind = Literal["raw", "converted", "GGUF"]
State = Literal["ready", "incomplete", "stale"]


@dataclass(frozen=True)
class CachedModel:
    """A model, or a copy of it in another form.

    name: what commands take for it; copies converted here have the name of their source. path: the
    directory, or the .gguf file. files: what belongs to it, where it shares the directory.
    lock_target: what is locked while it is made. source: what it was converted from.
    state: incomplete downloads are continued by `pull`; stale copies are not used any more.
    """

    name: str
    kind: Kind
    quantization: str
    path: Path
    size_bytes: int
    state: State
    lock_target: Path
    files: tuple[Path, ...] = ()
    source: str | None = None
    last_used: float | None = None
    libraries: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Path, ...]:
        """What is removed with it."""
        return self.files or (self.path,)


@dataclass(frozen=True)
class CachedLibrary:
    """A compiled library. users: the artifacts that ran on it and are still there."""

    name: str
    path: Path
    size_bytes: int
    is_current: bool
    users: tuple[str, ...]
    last_used: float | None


@dataclass(frozen=True)
class Leftover:
    """What a conversion, compilation or removal that broke off left behind, or is working on."""

    path: Path
    size_bytes: int
    lock_target: Path
    source: str | None


@dataclass(frozen=True)
class Inventory:
    """All of the cache."""

    home: CacheHome
    models: list[CachedModel] = field(default_factory=list)
    libraries: list[CachedLibrary] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)


def take_inventory(home: CacheHome) -> Inventory:
    """Look through the cache."""
    uses = {path: read_users(path) for path in _directories(home.library_directory)}
    libraries = [_library(path, users) for path, users in uses.items()]
    downloaded = [*_repositories(home), *_demo(home)]
    converted = list(_converted(home, downloaded))
    models = [_with_uses(model, uses) for model in (*downloaded, *converted)]
    models = [_with_copies(model, models) for model in models]
    models.sort(key=lambda model: (model.name.lower(), model.source is not None, model.path))
    return Inventory(home, models, libraries, list(_leftovers(home)))


def _directories(base: Path) -> list[Path]:
    """Return the finished directories in one of the cache's."""
    return [
        path
        for path in sorted(base.glob("*"))
        if path.is_dir() and not path.name.startswith(".") and path.suffix != ".partial"
    ]


def _library(path: Path, users: Mapping[str, float]) -> CachedLibrary:
    alive = tuple(name for name in users if Path(name).exists())
    last_used = max(users.values(), default=None)
    return CachedLibrary(path.name, path, size_of(path), is_current(path), alive, last_used)


def _repositories(home: CacheHome) -> Iterator[CachedModel]:
    for directory in sorted(home.hub_directory.glob("*/*")):
        if not directory.is_dir() or directory.name.startswith("."):
            continue
        repo, mark, revision = directory.name.partition("@")
        name = f"HF://{directory.parent.name}/{repo}"
        suffix = f"@{unquote(revision)}" if mark else ""
        manifests = sorted(directory.glob(".download*.json"))
        if not manifests:
            size = size_of(directory)
            yield CachedModel(name + suffix, "raw", "", directory, size, "incomplete", directory)
        for path in manifests:
            file = unquote(path.name.removeprefix(".download").removesuffix(".json")[1:])
            shown = f"{name}/{file}{suffix}" if file else name + suffix
            yield _download(shown, directory, path, is_alone=len(manifests) == 1)


def _download(name: str, directory: Path, manifest: Path, *, is_alone: bool) -> CachedModel:
    content = _read(manifest).get("files")
    sizes = content if isinstance(content, dict) else {}
    files = [directory / name for name in sizes if ".." not in Path(name).parts]
    is_whole = bool(files) and all(
        file.is_file() and file.stat().st_size == sizes.get(file.relative_to(directory).as_posix())
        for file in files
    )
    path = directory
    if len(files) == 1 and files[0].suffix.lower() == ".gguf":
        path = files[0]
    size = size_of(directory) if is_alone else sum(size_of(file) for file in files)
    kind: Kind = "GGUF" if path.is_file() else "raw"
    if CHAT_CONFIG_NAME in sizes:
        kind = "converted"
    quantization = _quantization_of(path)
    state: State = "ready" if is_whole else "incomplete"
    parts = () if is_alone else (manifest, *files)
    lock_target = directory
    if is_alone and path != directory:
        parts = (directory,)
    return CachedModel(name, kind, quantization, path, size, state, lock_target, parts)


def _demo(home: CacheHome) -> Iterator[CachedModel]:
    path = home.demo_directory / DEMO_FILE
    if path.is_file():
        size = path.stat().st_size
        yield CachedModel(DEMO_NAME, "GGUF", _quantization_of(path), path, size, "ready", path)


def _converted(home: CacheHome, downloaded: list[CachedModel]) -> Iterator[CachedModel]:
    names = {str(model.path.resolve()): model.name for model in downloaded}
    for path in _directories(home.local_directory):
        origin = read_origin(path)
        quantization, size = _quantization_of(path), size_of(path)
        if origin is None:
            # Made by a release that kept no records, whose copies are made anew.
            yield CachedModel(path.name, "converted", quantization, path, size, "stale", path)
            continue
        state: State = "ready" if origin.is_current() else "stale"
        name = names.get(origin.source, origin.source)
        source = origin.source
        yield CachedModel(name, "converted", quantization, path, size, state, path, (), source)


def _with_uses(model: CachedModel, uses: Mapping[Path, Mapping[str, float]]) -> CachedModel:
    """Add the libraries that a model ran on, and when last."""
    key = str(model.path.resolve())
    found = {path.name: users[key] for path, users in uses.items() if key in users}
    return replace(model, libraries=tuple(found), last_used=max(found.values(), default=None))


def _with_copies(model: CachedModel, models: list[CachedModel]) -> CachedModel:
    """Let a download count as used when a copy converted from it was."""
    key = str(model.path.resolve())
    times = [copy.last_used for copy in models if copy.source == key]
    times.append(model.last_used)
    return replace(model, last_used=max((t for t in times if t is not None), default=None))


def _leftovers(home: CacheHome) -> Iterator[Leftover]:
    bases = (home.local_directory, home.library_directory, *home.hub_directory.glob("*"))
    for base in bases:
        for path in sorted(base.glob("*.partial")):
            origin = read_origin(path)
            target = path.with_name(path.name.removesuffix(".partial"))
            yield Leftover(path, size_of(path), target, None if origin is None else origin.source)
        for path in sorted(base.glob(f".*{OLD_MARK}*")):
            target = path.with_name(path.name[1:].partition(OLD_MARK)[0])
            yield Leftover(path, size_of(path), target, None)


def _quantization_of(path: Path) -> str:
    """Return how a model's weights are stored, "" where its files do not say at a glance."""
    if path.is_file():
        match = _GGUF_TYPE.search(path.name)
        return match[1].upper() if match else ""
    if (path / CHAT_CONFIG_NAME).is_file():
        return str(_read(path / CHAT_CONFIG_NAME).get("quantization") or "")
    config = _read(path / "config.json")
    method = config.get("quantization_config")
    if isinstance(method, dict) and method.get("quant_method"):
        return str(method["quant_method"])
    return str(config.get("dtype") or config.get("torch_dtype") or "")


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where there is none: a damaged file is shown, not refused."""
    try:
        return read_json_object(path)
    except (MlcError, OSError):
        return {}
