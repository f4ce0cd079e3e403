"""`mlc_llm package`: models, their libraries and a list of them, laid out for an app.

Knows where files go and what is done already. Does not download, convert or compile by itself.

    OUT/bundle/mlc-app-config.json           the list that the app reads
    OUT/bundle/<model_id>/                   weights and tokenizer of a bundled model; for browsers
                                             in resolve/main/ there, where web-llm looks
    OUT/bundle/lib/<model_lib>.wasm          libraries for browsers
    OUT/lib/<model_lib>.tar                  object files for phones, and all in one archive,
    OUT/lib/libmodel_<device>.a              where a program that makes such is there
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.artifact import (
    CHAT_CONFIG_NAME,
    ChatConfig,
    read_chat_config,
    read_json_object,
    read_tensor_index,
    write_atomically,
)
from mlc_llm.errors import CorruptFile, LinkerNotFound, ModelNotFound, OptionError
from mlc_llm.prepare.cache import hold_lock, storage_errors
from mlc_llm.prepare.caches import Caches
from mlc_llm.prepare.download import is_repo, parse_repo
from mlc_llm.prepare.package_config import PACKAGE_DEVICES, PackageConfig, PackagedModel
from mlc_llm.prepare.progress import Progress

APP_CONFIG_NAME = "mlc-app-config.json"
_STATE_NAME = ".package-state.json"
_HUB = "https://huggingface.co"
_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class _Found:
    """A model of the list, found. artifact: its files, or the configuration alone."""

    item: PackagedModel
    artifact: Path
    config: ChatConfig
    library: str
    key: str


def package_models(config: PackageConfig, output: Path, caches: Caches, progress: Progress) -> Path:
    """Write everything that an app needs of its models; what is there and right stays.

    Returns the path of `mlc-app-config.json`, written last. Raises what preparing and compiling a
    model raises, and OptionError for what does not go together.
    """
    if config.device == "webgpu" and any(not _given(config, item) for item in config.models):
        from mlc_llm.compiler.browser.emscripten import require_emscripten

        require_emscripten(output / "bundle" / "lib")
    with storage_errors(output):
        (output / "bundle").mkdir(parents=True, exist_ok=True)
    with (
        hold_lock(output, progress, lock_path=output / ".package.lock"),
        tempfile.TemporaryDirectory(prefix="mlc-llm-package-") as scratch,
    ):
        found = [
            _find(config, item, Path(scratch) / str(number), caches, progress)
            for number, item in enumerate(config.models)
        ]
        _check_libraries(found)
        packager = _Packager(config, output, caches, progress)
        records = [packager.add(model) for model in found]
        packager.finish(found)
        path = output / "bundle" / APP_CONFIG_NAME
        with storage_errors(path):
            write_atomically(path, json.dumps({"model_list": records}, indent=2) + "\n")
    return path


def _given(config: PackageConfig, item: PackagedModel) -> Path | None:
    return None if item.library is None else config.libraries.get(item.library)


def _find(
    config: PackageConfig, item: PackagedModel, scratch: Path, caches: Caches, progress: Progress
) -> _Found:
    from mlc_llm.compiler.target import describe_any_target
    from mlc_llm.prepare.jit import library_key
    from mlc_llm.prepare.resolve import prepare_artifact

    progress.message(f"{item.model_id}: {item.model}")
    if item.is_bundled:
        artifact = prepare_artifact(
            item.model,
            quantization=item.quantization,
            home=caches.home,
            download_policy=caches.download_policy,
            jit_policy=caches.jit_policy,
            progress=progress,
            access=caches.hub,
        )
    else:
        artifact = _find_configuration(item, scratch, caches)
    model = read_chat_config(artifact)
    described = describe_any_target(config.device, "O2")
    key = library_key(model, described, item.overrides)
    library = item.library or f"{model.model_type}-{model.quantization}-{key[:8]}"
    return _Found(item, artifact, model, library, key)


def _find_configuration(item: PackagedModel, scratch: Path, caches: Caches) -> Path:
    """Fetch the configuration of a repository whose weights the app loads by itself."""
    from mlc_llm.prepare.preview import preview_repository

    ref = parse_repo(item.model)
    if ref.revision is not None:
        raise OptionError(
            f"{item.where}: {item.model} names a revision, but apps load the main one; leave it "
            "out, or set bundle_weight to true"
        )
    scratch.mkdir()
    preview_repository(ref, scratch, caches.hub)
    if not (scratch / CHAT_CONFIG_NAME).is_file():
        raise ModelNotFound(
            f"{item.where}: {item.model} is not converted (it has no {CHAT_CONFIG_NAME}), and an "
            "app cannot convert it; set bundle_weight to true"
        )
    if item.quantization not in (None, read_chat_config(scratch).quantization):
        raise OptionError(
            f"{item.where}: {item.model} is converted already, not with {item.quantization}; leave "
            "quantization out"
        )
    return scratch


def _check_libraries(found: list[_Found]) -> None:
    """Raise OptionError where two models would have one library and need two."""
    first: dict[str, _Found] = {}
    for model in found:
        other = first.setdefault(model.library, model)
        if other.key != model.key:
            raise OptionError(
                f"{model.item.where}: model_lib {model.library!r} is that of "
                f"{other.item.model_id} too, which needs another library; give them two names"
            )


class _Packager:
    """Writes files below a directory, and remembers of what the libraries there were made."""

    def __init__(
        self, config: PackageConfig, output: Path, caches: Caches, progress: Progress
    ) -> None:
        self._config, self._output = config, output
        self._caches, self._progress = caches, progress
        self._is_web = config.device == "webgpu"
        self._bundle = output / "bundle"
        self._libraries = self._bundle / "lib" if self._is_web else output / "lib"
        self._state: dict[str, Any] = {}
        with suppress(ModelNotFound, CorruptFile):  # then nothing is known of what is there
            self._state = read_json_object(output / _STATE_NAME)

    def add(self, model: _Found) -> dict[str, Any]:
        """Write a model and its library; return what the app's list says of it."""
        item = model.item
        library = self._add_library(model)
        if item.is_bundled:
            folder = self._bundle / item.model_id
            self._copy_model(model, folder / "resolve" / "main" if self._is_web else folder)
        memory = item.estimated_vram_bytes or int(self._state[library.name]["memory_bytes"])
        if self._is_web:
            return self._web_record(model, library, memory)
        place = {"model_path": item.model_id} if item.is_bundled else {"model_url": _url_of(item)}
        record = {"model_id": item.model_id, "model_lib": model.library, **place}
        return {**record, "estimated_vram_bytes": memory}

    def finish(self, models: list[_Found]) -> None:
        """Make one archive of the object files for phones, or say what is missing for it."""
        if self._is_web:
            return
        from mlc_llm.compiler.archives import write_static_archive

        path = self._libraries / f"libmodel_{self._config.device}.a"
        names = dict.fromkeys(model.library for model in models)
        with storage_errors(path):
            try:
                tars = [self._libraries / f"{name}.tar" for name in names]
                write_static_archive(tars, path, self._config.device)
            except LinkerNotFound as error:
                self._progress.message(str(error))

    def _web_record(self, model: _Found, library: Path, memory: int) -> dict[str, Any]:
        """Return a record of web-llm's `model_list`; its addresses are relative to the list's."""
        from mlc_llm.quantization.schemes import get_scheme

        item = model.item
        record: dict[str, Any] = {
            "model_id": item.model_id,
            "model": f"{item.model_id}/" if item.is_bundled else _url_of(item),
            "model_lib": f"lib/{library.name}",
            "vram_required_MB": math.ceil(memory / (1 << 20)),
        }
        if get_scheme(model.config.quantization).dtype == "float16":
            record["required_features"] = ["shader-f16"]
        limits = _chat_overrides(item)
        return {**record, "overrides": limits} if limits else record

    def _add_library(self, model: _Found) -> Path:
        path = self._libraries / f"{model.library}{PACKAGE_DEVICES[self._config.device]}"
        given = _given(self._config, model.item)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if given is not None:
                self._copy_given(given, path, model)
                return path
            noted = self._state.get(path.name)
            if isinstance(noted, dict) and noted == {**noted, **_mark_of(path, model.key)}:
                self._progress.message(f"{path} is there already")
                return path
            memory = self._compile(model, path)
            self._note(path, {**_mark_of(path, model.key), "memory_bytes": memory})
        return path

    def _copy_given(self, given: Path, path: Path, model: _Found) -> None:
        if model.item.estimated_vram_bytes is None:
            raise OptionError(
                f"{model.item.where}: 'estimated_vram_bytes' is missing, which cannot be computed "
                f"for the finished library {given}"
            )
        _copy_file(given, path, self._progress)

    def _compile(self, model: _Found, path: Path) -> int:
        """Compile a library and return the bytes of memory that it and its model need."""
        from mlc_llm.compiler.compile import CompileOptions, compile_model
        from mlc_llm.compiler.system_library import prefix_of

        self._progress.start(f"Compiling {path.name}", None, "steps")
        prefix = None if self._is_web else prefix_of(model.library)
        options = CompileOptions(
            self._config.device, overrides=model.item.overrides, system_prefix=prefix
        )
        compiled = compile_model(model.config, options, lambda _: self._progress.advance(1))
        self._progress.finish()
        runtime = self._caches.home.root / "wasm_runtime"
        compiled.save(path, runtime, self._progress.message)
        return compiled.memory_bytes()

    def _copy_model(self, model: _Found, folder: Path) -> None:
        """Copy an artifact, with the limits that its library has; what is the same stays."""
        shards = read_tensor_index(model.artifact).shard_md5
        names = {path.name for path in shards} | set(model.config.tokenizer_files)
        files = [
            path
            for path in sorted(model.artifact.iterdir())
            if path.is_file()
            and (path.name in names or path.suffix in (".json", ".jinja", ".bin", ".model"))
            and path.name != CHAT_CONFIG_NAME
            and not path.name.startswith(".")
        ]
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._progress.start(
                f"Copying {model.item.model_id}", sum(f.stat().st_size for f in files), "bytes"
            )
            for path in files:
                _copy_file(path, folder / path.name, self._progress)
            self._progress.finish()
            data = {**read_json_object(model.artifact / CHAT_CONFIG_NAME)}
            data |= _chat_overrides(model.item)
            _write_if_other(folder / CHAT_CONFIG_NAME, json.dumps(data, indent=2) + "\n")

    def _note(self, path: Path, mark: dict[str, Any]) -> None:
        self._state[path.name] = mark
        write_atomically(self._output / _STATE_NAME, json.dumps(self._state, indent=2) + "\n")


def _chat_overrides(item: PackagedModel) -> Mapping[str, int]:
    """Return the overrides that are settings of a chat too; others are the library's alone."""
    return {key: value for key, value in item.overrides.items() if key != "max_batch_size"}


def _url_of(item: PackagedModel) -> str:
    assert is_repo(item.model)
    return f"{_HUB}/{parse_repo(item.model).repo_id}"


def _mark_of(path: Path, key: str) -> dict[str, Any]:
    """Return what tells a library that is there from others: what it was made of, its bytes."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {"key": key, "sha256": digest}


def _copy_file(source: Path, path: Path, progress: Progress) -> None:
    """Copy a file, whole or not at all; one of the same size and time stays."""
    there, wanted = path.stat() if path.is_file() else None, source.stat()
    if there and (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
        progress.advance(wanted.st_size)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with source.open("rb") as stream, temporary.open("wb") as out:
            while block := stream.read(_COPY_BYTES):
                out.write(block)
                progress.advance(len(block))
        shutil.copystat(source, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_if_other(path: Path, text: str) -> None:
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomically(path, text)
