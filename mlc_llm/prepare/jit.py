"""Finds the compiled library for an artifact, or compiles and caches it.

Knows what a library depends on (its key) and when an entry is whole. Does not know how to compile.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlc_llm.artifact import (
    ChatConfig,
    LibraryMetadata,
    read_chat_config,
    read_json_object,
    write_atomically,
)
from mlc_llm.device import detect_device
from mlc_llm.errors import CompileError, CorruptFile, LibraryError, OptionError, UnsupportedModel
from mlc_llm.prepare.cache import (
    CacheHome,
    CachePolicy,
    hold_lock,
    make_temporary_directory,
    publish,
    readable_name,
    storage_errors,
)
from mlc_llm.prepare.origin import note_user
from mlc_llm.prepare.progress import Progress

METADATA_NAME = "metadata.json"
_MANIFEST_NAME = "manifest.json"
_LAYOUT_VERSION = 1  # of this cache; raised when entries made before cannot be used any more
# The overrides that change compiled code. Others are for the engine, which checks them.
_COMPILE_OVERRIDES = (
    "context_window_size",
    "sliding_window_size",
    "prefill_chunk_size",
    "attention_sink_size",
    "max_batch_size",
    "tensor_parallel_shards",
    "pipeline_parallel_stages",
    "kv_cache_dtype",
    "model_task",
)
_COMPILER_PARTS = ("compiler", "images", "kernels", "models", "nn", "quantization")
_COMPILER_PACKAGES = ("apache-tvm", "apache-tvm-ffi")


def prepare_library(
    artifact: Path,
    *,
    device: str,
    opt: str,
    overrides: Mapping[str, Any],
    home: CacheHome,
    jit_policy: CachePolicy,
    progress: Progress,
) -> Path:
    """Return the directory of a compiled library for an artifact, compiling where there is none.

    device: `auto` takes the CPU where the GPU that was found cannot run the model. A library found
    in the cache costs no import of the compiler. Raises LibraryError where the policy is READONLY
    and there is none, StorageError, and what the compiler raises.
    """
    if device == "auto" and (found := detect_device()).is_gpu:
        try:
            return prepare_library(
                artifact,
                device=str(found),
                opt=opt,
                overrides=overrides,
                home=home,
                jit_policy=jit_policy,
                progress=progress,
            )
        except (UnsupportedModel, OptionError, CompileError) as error:
            progress.message(f"the CPU is used, not {found}: {error}")
            device = "cpu"

    from mlc_llm.compiler.target import describe_any_target

    config = read_chat_config(artifact)
    compile_overrides = {k: overrides[k] for k in _COMPILE_OVERRIDES if k in overrides}
    key = library_key(config, describe_any_target(device, opt), compile_overrides)
    name = readable_name(f"{config.model_type}-{config.quantization}", key)
    target = home.library_directory / name
    if jit_policy.reads and is_whole(target):
        if jit_policy is CachePolicy.ON:
            note_user(target, artifact)
        return target
    if jit_policy is CachePolicy.READONLY:
        raise LibraryError(
            f"there is no compiled library for {artifact} in {home.library_directory}, and the "
            "policy READONLY forbids compiling one; set MLC_JIT_POLICY=ON"
        )
    if jit_policy is CachePolicy.OFF or not _can_write(home.library_directory, progress):
        directory = make_temporary_directory()
        _compile(config, device, opt, compile_overrides, directory, progress)
        return directory
    with hold_lock(target, progress):
        if jit_policy.reads and is_whole(target):  # made by the process we waited for
            note_user(target, artifact)
            return target
        work = target.with_name(name + ".partial")
        with storage_errors(work):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        try:
            _compile(config, device, opt, compile_overrides, work, progress)
            publish(work, target)
            note_user(target, artifact)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _can_write(directory: Path, progress: Progress) -> bool:
    """Return whether libraries can be kept; a cache on a read-only disk only costs time."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError as error:
        progress.message(
            f"the compiled library will not be kept: cannot write {directory} ({error.strerror})"
        )
        return False


def library_key(config: ChatConfig, target: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """Return the hash of everything a compiled library depends on."""
    described = {
        **compiler_release(),
        "model_type": config.model_type,
        "quantization": config.quantization,
        "layer_formats": config.layer_formats,
        "model_task": config.model_task,
        "model_config": config.model_config,
        "limits": [
            config.context_window_size,
            config.sliding_window_size,
            config.attention_sink_size,
            config.prefill_chunk_size,
        ],
        "target": target,
        "overrides": overrides,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def compiler_release() -> dict[str, Any]:
    """Return what compiles here: our own code and TVM's version. It is part of every key."""
    from mlc_llm import __version__

    return {
        "layout": _LAYOUT_VERSION,
        "library_format": LibraryMetadata.format_version,
        "mlc_llm": __version__,
        "code": _compiler_digest(),
        "compiler": {name: importlib.metadata.version(name) for name in _COMPILER_PACKAGES},
    }


def is_current(directory: Path) -> bool:
    """Return whether a cached library could be used by a model: whole, and of this release."""
    manifest = directory / _MANIFEST_NAME
    return is_whole(directory) and read_json_object(manifest).get("release") == compiler_release()


def is_whole(directory: Path) -> bool:
    """Return whether a library's files are all there, in full, and its metadata can be read."""
    manifest_path, metadata_path = directory / _MANIFEST_NAME, directory / METADATA_NAME
    if not manifest_path.is_file() or not metadata_path.is_file():
        return False
    try:
        LibraryMetadata.from_json(metadata_path.read_text(encoding="utf-8"), str(metadata_path))
        files = read_json_object(manifest_path).get("files")
    except (CorruptFile, UnicodeDecodeError):
        return False
    if not isinstance(files, dict) or METADATA_NAME not in files:
        return False
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == size_bytes
        for name, size_bytes in files.items()
    )


def _compiler_digest() -> str:
    """Return the hash of our own code that ends up in libraries; versions change less often."""
    import mlc_llm

    digest = hashlib.sha256()
    package = Path(mlc_llm.__file__).parent
    for part in _COMPILER_PARTS:
        for path in sorted((package / part).rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _compile(
    config: ChatConfig,
    device: str,
    opt: str,
    overrides: Mapping[str, Any],
    directory: Path,
    progress: Progress,
) -> None:
    """Compile into `directory` and list, last, what was written."""
    from mlc_llm.compiler.compile import CompileOptions, compile_model

    progress.start(f"Compiling {config.model_type} {config.quantization}", None, "steps")
    options = CompileOptions(device=device, opt=opt, overrides=overrides)
    compiled = compile_model(config, options, lambda _: progress.advance(1))
    with storage_errors(directory):
        compiled.save_objects(directory)
        files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
        manifest = {"files": files, "release": compiler_release()}
        write_atomically(directory / _MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
    progress.finish()
