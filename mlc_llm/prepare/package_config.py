"""`mlc-package-config.json`: which models an app has. Reads and checks it, and does nothing else.

In the format of MLC LLM, with devices for browsers and the key `quantization` besides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlc_llm.errors import OptionError
from mlc_llm.prepare.download import is_repo

PACKAGE_CONFIG_NAME = "mlc-package-config.json"
# Device -> the suffix of its libraries.
PACKAGE_DEVICES = {"webgpu": ".wasm", "android": ".tar", "iphone": ".tar"}
_OVERRIDES = (
    "context_window_size",
    "sliding_window_size",
    "attention_sink_size",
    "prefill_chunk_size",
    "max_batch_size",
)
_SINGLE = ("tensor_parallel_shards", "pipeline_parallel_stages")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KINDS: Mapping[type, str] = {
    str: "text",
    int: "a whole number above 0",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


@dataclass(frozen=True)
class PackagedModel:
    """One entry of `model_list`.

    model: what `prepare_artifact` takes. library: the name that its library is to have.
    """

    model: str
    model_id: str
    where: str
    is_bundled: bool = False
    estimated_vram_bytes: int | None = None
    quantization: str | None = None
    library: str | None = None
    overrides: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PackageConfig:
    """The whole file. libraries: those that are compiled already, by name."""

    device: str
    models: list[PackagedModel]
    libraries: Mapping[str, Path]


def read_package_config(path: Path) -> PackageConfig:
    """Read and check the file. Paths in it are relative to its directory. Raises OptionError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(
            f"--package-config {path} does not exist; write one (docs/devices.md shows how)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"--package-config {path} cannot be read as JSON ({error})") from None
    entry = _Entry(data, str(path))
    device = entry.take("device", str)
    if device not in PACKAGE_DEVICES:
        known = f"{entry.where}: device is {device!r}; known: {', '.join(PACKAGE_DEVICES)}"
        if device == "macabi":
            known += ". For Mac Catalyst no code is made; `compile --device metal` is for macOS"
        raise OptionError(known)
    items = entry.take("model_list", list)
    if not items:
        raise OptionError(f"{entry.where}: model_list is empty; name a model")
    models = [
        _read_model(_Entry(item, f"{entry.where}: model_list[{index}]"), path.parent)
        for index, item in enumerate(items)
    ]
    given = entry.find("model_lib_path_for_prepare_libs", dict) or {}
    libraries = {
        _checked_name(name, f"{entry.where}: model_lib_path_for_prepare_libs"): _library_path(
            name, value, path, PACKAGE_DEVICES[device]
        )
        for name, value in given.items()
    }
    entry.finish()
    _check_together(models, libraries)
    return PackageConfig(device, models, libraries)


class _Entry:
    """An object of the file, from which known keys are taken. Raises OptionError."""

    def __init__(self, data: Any, where: str) -> None:
        self.where = where
        if not isinstance(data, dict):
            raise OptionError(f"{where} must be an object, it is {data!r:.60}")
        self._left = dict(data)
        self._taken: list[str] = []

    def find(self, key: str, kind: type) -> Any:
        """Return the value of a key, None where it is absent."""
        self._taken.append(key)
        value = self._left.pop(key, None)
        if value is None:
            return None
        is_kind = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not is_kind or (kind is int and value < 1) or (kind is str and not value.strip()):
            raise OptionError(f"{self.where}: {key} must be {_KINDS[kind]}, it is {value!r:.60}")
        return value

    def take(self, key: str, kind: type) -> Any:
        """Return the value of a key that must be there."""
        value = self.find(key, kind)
        if value is None:
            raise OptionError(f"{self.where}: {key!r} is missing; it is {_KINDS[kind]}")
        return value

    def finish(self) -> None:
        """Raise for keys that nobody has taken."""
        if self._left:
            raise OptionError(
                f"{self.where}: unknown key {next(iter(self._left))!r}; known: "
                + ", ".join(self._taken)
            )


def _read_model(entry: _Entry, directory: Path) -> PackagedModel:
    model, model_id = entry.take("model", str), entry.take("model_id", str)
    _checked_name(model_id, f"{entry.where}: model_id")
    is_bundled = bool(entry.find("bundle_weight", bool))
    if not is_repo(model):
        model = str(directory / Path(model).expanduser())
        if not is_bundled:
            raise OptionError(
                f"{entry.where}: bundle_weight must be true for {model}: an app finds weights in "
                "its own files or in a repository, HF://user/repo"
            )
    library = entry.find("model_lib", str)
    if library is not None:
        _checked_name(library, f"{entry.where}: model_lib")
    found = PackagedModel(
        model=model,
        model_id=model_id,
        where=entry.where,
        is_bundled=is_bundled,
        estimated_vram_bytes=entry.find("estimated_vram_bytes", int),
        quantization=entry.find("quantization", str),
        library=library,
        overrides=_read_overrides(entry),
    )
    entry.finish()
    if model.lower().endswith(".gguf") and found.quantization is None:
        raise OptionError(
            f"{entry.where}: 'quantization' is missing, which {model} is converted to: q4f16_1, or "
            "q4f32_1 for GPUs without float16"
        )
    return found


def _read_overrides(entry: _Entry) -> dict[str, int]:
    given = _Entry(entry.find("overrides", dict) or {}, f"{entry.where}: overrides")
    values = {key: given.find(key, int) for key in (*_OVERRIDES, *_SINGLE)}
    given.finish()
    for key in _SINGLE:
        if values.pop(key) not in (None, 1):
            raise OptionError(f"{given.where}: {key} must be 1: a model runs on one device")
    return {key: value for key, value in values.items() if value is not None}


def _checked_name(name: str, where: str) -> str:
    """Return what becomes the name of a file; raise OptionError where it cannot."""
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"{where}: {name!r} becomes the name of a file; use letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return name


def _library_path(name: str, value: Any, path: Path, suffix: str) -> Path:
    where = f"{path}: model_lib_path_for_prepare_libs[{name!r}]"
    if not isinstance(value, str):
        raise OptionError(f"{where} must be the path of a library, it is {value!r:.60}")
    found = path.parent / Path(value).expanduser()
    if found.suffix != suffix or not found.is_file():
        raise OptionError(f"{where} must name a {suffix} file that is there, it is {value!r}")
    return found


def _check_together(models: list[PackagedModel], libraries: Mapping[str, Path]) -> None:
    seen: dict[str, str] = {}
    for item in models:
        # File systems of phones and of many machines do not tell case apart.
        key = item.model_id.lower()
        if key in seen:
            raise OptionError(
                f"{item.where}: model_id {item.model_id!r} is that of {seen[key]} too"
            )
        seen[key] = item.where.rpartition(": ")[2]
    unused = sorted(set(libraries) - {item.library for item in models})
    if unused:
        raise OptionError(
            f"model_lib_path_for_prepare_libs names {unused[0]!r}, which no model_lib does; write "
            "it in model_list"
        )
