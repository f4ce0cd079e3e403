"""The artifact: the directory where the compiler half and the engine half meet.

Knows the files `mlc-chat-config.json`, `tensor-cache.json` (older name `ndarray-cache.json`),
`params_shard_N.bin`, `chat_template.jinja` and the library metadata, in MLC LLM's formats.
Does not know models, quantization or TVM.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, ModelNotFound, ParameterMismatch, UnsupportedModel

CHAT_CONFIG_NAME = "mlc-chat-config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
TENSOR_INDEX_NAMES = ("tensor-cache.json", "ndarray-cache.json")
SHARD_LIMIT_BYTES = 32 << 20
CONFIG_VERSION = "0.1.0"

_NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "uint32": np.uint32,
    "int32": np.int32,
    "uint8": np.uint8,
    "int8": np.int8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name used in tensor indices. Raises UnsupportedModel."""
    if name not in _NUMPY_DTYPES:
        raise UnsupportedModel(
            f"tensor dtype {name!r} is not supported; known: {', '.join(_NUMPY_DTYPES)}"
        )
    dtype: np.dtype[Any] = np.dtype(_NUMPY_DTYPES[name])
    return dtype


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one parameter, as an artifact stores and a library expects it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes the tensor takes in memory."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


# Declared types of configuration fields that are checked when read.
_CHECKED: dict[Any, type] = {"str": str, "int": int, "list[str]": list}
_CHECKED |= {"dict[str, Any]": dict, "dict[str, str]": dict}


@dataclass(frozen=True)
class ChatConfig:
    """`mlc-chat-config.json`: everything the engine must know beside weights and library."""

    model_type: str
    quantization: str
    model_config: dict[str, Any]
    vocab_size: int
    context_window_size: int
    prefill_chunk_size: int
    conv_template: dict[str, Any]
    sliding_window_size: int = -1
    attention_sink_size: int = -1
    tensor_parallel_shards: int = 1
    pipeline_parallel_stages: int = 1
    active_vocab_size: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    tokenizer_files: list[str] = field(default_factory=list)
    tokenizer_info: dict[str, Any] = field(default_factory=dict)
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int | list[int] = 2
    model_task: str = "chat"
    embedding_metadata: dict[str, Any] | None = None
    # Module path -> format, where layers of one quantization differ; our own, MLC LLM has none.
    layer_formats: dict[str, str] = field(default_factory=dict)
    version: str = CONFIG_VERSION

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str) -> ChatConfig:
        """Build from parsed JSON; unknown keys are left out, `where` names the file in errors."""
        known = {f.name for f in dataclasses.fields(ChatConfig)}
        values = {key: value for key, value in data.items() if key in known}
        version = str(values.get("version", CONFIG_VERSION))
        if version.split(".")[0] != "0":
            raise UnsupportedModel(
                f"{where} has version {version}; this release reads 0.x, please update mlc_llm"
            )
        # Old repositories hold the name of a registered template, and apart what differs from it.
        template = values.setdefault("conv_template", {})
        if isinstance(template, str):
            values["conv_template"] = template = {"name": template}
        if isinstance(template, dict) and data.get("conv_config"):
            values["conv_template"] = {**template, "conv_config": data["conv_config"]}
        if isinstance(method := data.get("token_table_postproc_method"), str):
            values.setdefault("tokenizer_info", {"token_postproc_method": method.replace("-", "_")})
        for name in ("model_type", "quantization", "model_config", "vocab_size"):
            if name not in values:
                raise CorruptFile(f"{where} lacks {name!r}; run gen_config again")
        if isinstance(model_config := values["model_config"], dict):
            for name in ("context_window_size", "prefill_chunk_size"):
                values.setdefault(name, model_config.get(name, -1))
        for item in dataclasses.fields(ChatConfig):
            kind = _CHECKED.get(item.type, object)
            value = values.get(item.name)
            if value is None and item.default is not dataclasses.MISSING:
                values.pop(item.name, None)  # null stands for the default
            elif item.name in values and (not isinstance(value, kind) or value is True):
                raise CorruptFile(
                    f"{where}: {item.name} must be of type {kind.__name__}, it is {value!r:.80}; "
                    "correct it, or run gen_config again"
                )
        return ChatConfig(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `from_json` reads."""
        return dataclasses.asdict(self)


def read_chat_config(directory: Path) -> ChatConfig:
    """Read `mlc-chat-config.json`. Raises ModelNotFound, CorruptFile or UnsupportedModel."""
    path = directory / CHAT_CONFIG_NAME
    return ChatConfig.from_json(read_json_object(path), str(path))


def write_chat_config(directory: Path, config: ChatConfig) -> None:
    """Write `mlc-chat-config.json` into `directory`, whole or not at all."""
    write_atomically(directory / CHAT_CONFIG_NAME, json.dumps(config.to_json(), indent=2) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelNotFound where there is no file, CorruptFile on bad text."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelNotFound(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise CorruptFile(f"{path} is not UTF-8 text; download or convert it again") from None
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorruptFile(f"{path} is not valid JSON ({error}); fetch or make it again") from None
    if not isinstance(data, dict):
        raise CorruptFile(f"{path} must hold a JSON object, it holds a {type(data).__name__}")
    return data


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that nobody sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: `offset` bytes into the file `path`, and how it is encoded."""

    spec: TensorSpec
    path: Path
    offset: int
    size_bytes: int
    is_f32_as_bf16: bool


@dataclass(frozen=True)
class TensorIndex:
    """All tensors of an artifact by name, in file order."""

    records: dict[str, TensorRecord]
    shard_md5: dict[Path, str]

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor: a private view of the mapped file, or a copy where bytes differ."""
        record = self.records[name]
        stored = ml_dtypes.bfloat16 if record.is_f32_as_bf16 else numpy_dtype(record.spec.dtype)
        if record.size_bytes == 0:
            return np.zeros(record.spec.shape, stored)
        raw = np.memmap(record.path, np.uint8, "c", record.offset, (record.size_bytes,))
        array = raw.view(stored).reshape(record.spec.shape)
        return array.astype(np.float32) if record.is_f32_as_bf16 else array

    def check(self, expected: list[TensorSpec], where: str) -> None:
        """Raise ParameterMismatch unless the index holds exactly the expected tensors."""
        wanted = {spec.name: spec for spec in expected}
        missing = [name for name in wanted if name not in self.records]
        surplus = [name for name in self.records if name not in wanted]
        if missing or surplus:
            raise ParameterMismatch(
                f"weights in {where} do not fit the model:"
                + (f" missing {_abbreviate(missing)};" if missing else "")
                + (f" surplus {_abbreviate(surplus)};" if surplus else "")
                + " convert the weights again with the same configuration"
            )
        for name, spec in wanted.items():
            found = self.records[name].spec
            if found != spec:
                raise ParameterMismatch(
                    f"weights in {where} do not fit the model: it wants {spec}, found {found}; "
                    "convert the weights again with the same configuration"
                )

    def verify_checksums(self) -> None:
        """Raise CorruptFile if a shard's MD5 differs from the index. Reads every byte."""
        for path, expected in self.shard_md5.items():
            if (found := _md5_of(path)) != expected:
                raise CorruptFile(
                    f"{path} is damaged (MD5 {found}, expected {expected}); fetch it again"
                )


def _md5_of(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _abbreviate(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def find_tensor_index(directory: Path) -> Path | None:
    """Return the path of the tensor index, under either name, or None."""
    paths = (directory / name for name in TENSOR_INDEX_NAMES)
    return next((path for path in paths if path.is_file()), None)


def read_tensor_index(directory: Path) -> TensorIndex:
    """Read and check the tensor index (sizes of shards included, checksums not).

    Raises ModelNotFound where there is none, CorruptFile where index or shards are damaged.
    """
    path = find_tensor_index(directory)
    if path is None:
        raise ModelNotFound(
            f"{directory} has no weights ({' or '.join(TENSOR_INDEX_NAMES)}); "
            "run `mlc_llm convert_weight` first"
        )
    data = read_json_object(path)
    records: dict[str, TensorRecord] = {}
    checksums: dict[Path, str] = {}
    try:
        for shard in data["records"]:
            shard_path = directory / _safe_name(shard["dataPath"])
            _check_shard(shard_path, int(shard["nbytes"]))
            if shard.get("md5sum"):
                checksums[shard_path] = str(shard["md5sum"])
            for record in _read_records(shard, shard_path):
                records[record.spec.name] = record
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{path} is not a tensor index ({error!r}); fetch it again") from None
    return TensorIndex(records, checksums)


def _safe_name(name: str) -> str:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"shard name {name!r} leaves the directory")
    return name


def _check_shard(path: Path, size_bytes: int) -> None:
    if not path.is_file():
        raise CorruptFile(f"{path} is missing; download or convert the weights again")
    found = path.stat().st_size
    if found != size_bytes:
        raise CorruptFile(
            f"{path} has {found:,} bytes, the index says {size_bytes:,}; fetch the file again"
        )


def _read_records(shard: Mapping[str, Any], path: Path) -> Iterator[TensorRecord]:
    for item in shard["records"]:
        shape = tuple(int(extent) for extent in item["shape"])
        spec = TensorSpec(str(item["name"]), shape, str(item["dtype"]))
        size, offset = int(item["nbytes"]), int(item["byteOffset"])
        # TVM's rule: the format only has effect on float32, whose bytes are then bfloat16.
        as_bf16 = spec.dtype == "float32" and item.get("format") == "f32-to-bf16"
        expected = spec.size_bytes // 2 if as_bf16 else spec.size_bytes
        if min(shape, default=0) < 0 or offset < 0 or size != expected:
            raise ValueError(f"bad record {spec}: {size} bytes at {offset}")
        if offset + size > int(shard["nbytes"]):
            raise ValueError(f"record {spec} ends beyond its shard")
        yield TensorRecord(spec, path, offset, size, as_bf16)


@dataclass(frozen=True)
class KVCacheLayout:
    """Shape of the KV pages a library works on; one tensor per layer.

    Each is (num_pages, 2, num_key_value_heads, page_size * token_items) of `dtype`; index 0 is K.
    The order inside a head's part of a page is the library's own. int8 pages hold a float32 scale
    for each token beside its codes.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    page_size: int
    dtype: str

    @property
    def token_items(self) -> int:
        """Items of `dtype` that K or V of one token takes in one head."""
        return self.head_dim + 4 if self.dtype == "int8" else self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """KV bytes one token takes in all layers."""
        item = numpy_dtype(self.dtype).itemsize
        return self.num_layers * 2 * self.num_key_value_heads * self.token_items * item

    def page_shape(self, num_pages: int) -> tuple[int, ...]:
        """Return the shape of one layer's tensor."""
        return (num_pages, 2, self.num_key_value_heads, self.page_size * self.token_items)


@dataclass(frozen=True)
class LibraryMetadata:
    """What a compiled library says of itself (its `_metadata` function, JSON)."""

    model_type: str
    quantization: str
    context_window_size: int
    sliding_window_size: int
    attention_sink_size: int
    prefill_chunk_size: int
    max_batch_size: int
    vocab_size: int
    params: list[TensorSpec]
    kv_cache: KVCacheLayout
    memory_usage: dict[str, int]
    target: dict[str, Any]
    isa: list[str]
    compiler_version: str
    format_version: int = 1
    tensor_parallel_shards: int = 1
    pipeline_parallel_stages: int = 1
    model_task: str = "chat"
    model_config: dict[str, Any] = field(default_factory=dict)
    embedding_metadata: dict[str, Any] | None = None
    states: list[TensorSpec] = field(default_factory=list)  # recurrent state: tensors of one slot
    images: dict[str, Any] | None = None  # what images the library takes, see `images.inputs`
    unused_modules: list[str] = field(default_factory=list)  # ends of paths, see Family
    lookup_tables: list[str] = field(default_factory=list)  # paths of modules read row by row

    def to_json(self) -> str:
        """Return the JSON text stored in the library."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str, where: str) -> LibraryMetadata:
        """Parse the JSON text; `where` names the library in errors. Raises CorruptFile."""
        try:
            data = json.loads(text)
            for name in {"params", "states"} & data.keys():
                data[name] = [TensorSpec(**{**p, "shape": tuple(p["shape"])}) for p in data[name]]
            return LibraryMetadata(**{**data, "kv_cache": KVCacheLayout(**data["kv_cache"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(
                f"{where} was not made by this release of mlc_llm ({error!r}); compile it again"
            ) from None
