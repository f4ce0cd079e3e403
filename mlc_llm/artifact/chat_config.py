"""`mlc-chat-config.json`, in MLC LLM's format. Does not know what a model's own fields mean."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlc_llm.artifact.files import read_json_object, write_atomically
from mlc_llm.errors import CorruptFile, UnsupportedModel

CHAT_CONFIG_NAME = "mlc-chat-config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
CONFIG_VERSION = "0.1.0"

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
    # Of rerankers, the tokens of their answers: true_token_id and false_token_id; our own too.
    rerank_metadata: dict[str, Any] | None = None
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
