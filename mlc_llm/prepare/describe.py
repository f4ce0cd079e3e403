"""What a model is, from its configuration and headers: the content of `mlc_llm show`.

Reads no weights and compiles nothing. An unsupported model is described as far as its files do.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlc_llm.artifact import (
    CHAT_CONFIG_NAME,
    CHAT_TEMPLATE_NAME,
    ChatConfig,
    find_tensor_index,
    read_chat_config,
    read_json_object,
    read_tensor_index,
)
from mlc_llm.errors import UnsupportedModel
from mlc_llm.prepare.original import find_source, read_compile_config
from mlc_llm.prepare.resolve import DEFAULT_QUANTIZATION, usual_quantization

_LICENCE_NAMES = ("license", "licence", "license.txt", "licence.txt", "license.md", "licence.md")
_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class Description:
    """What a model is. Fields are None where its files do not say.

    kind: raw, converted or GGUF. stored_as: dtypes or encodings of the weights as they lie there.
    config: what the compiler would get, None where `problem` says why that is not possible.
    files: names and sizes in bytes.
    """

    path: Path
    kind: str
    architecture: str | None
    stored_as: str | None
    size_bytes: int
    template: str | None
    licence: str | None
    licence_file: Path | None
    config: ChatConfig | None
    problem: str | None
    num_stored: int | None = None
    context_window_size: int | None = None
    files: list[tuple[str, int]] = field(default_factory=list)


def describe_model(
    path: Path,
    quantization: str | None,
    licence: str | None = None,
    default: str = DEFAULT_QUANTIZATION,
) -> Description:
    """Describe a directory or a .gguf file.

    quantization: what a model that is not converted would be converted to; None stands for what it
    is without a word, and `default` for that of models that are free in it. licence: where another
    source than the files tells it. Raises ModelError, OptionError for an unknown quantization.
    """
    from mlc_llm.quantization.schemes import get_scheme

    if quantization is not None:
        get_scheme(quantization)
    if path.is_dir() and (path / CHAT_CONFIG_NAME).is_file():
        return _describe_artifact(path, licence)
    source = find_source(path)
    try:
        chosen = quantization or usual_quantization(source, default)
        config, problem = read_compile_config(source, quantization=chosen), None
    except UnsupportedModel as error:
        config, problem = None, str(error)
    if source.is_file():
        return _describe_gguf(source, config, problem, licence)
    return _describe_checkpoint(source, config, problem, licence)


def _describe_artifact(path: Path, licence: str | None) -> Description:
    config = read_chat_config(path)
    size = None
    if find_tensor_index(path) is not None:
        size = sum(record.size_bytes for record in read_tensor_index(path).records.values())
    return Description(
        path=path,
        kind="converted",
        architecture=config.model_type,
        stored_as=config.quantization,
        size_bytes=size or 0,
        template=_artifact_template(path, config),
        licence=licence or _licence_of_readme(path),
        licence_file=_licence_file(path),
        config=config,
        problem=None if size is not None else "it has no weights; run `mlc_llm convert_weight`",
        context_window_size=config.context_window_size,
        files=_files(path),
    )


def _artifact_template(path: Path, config: ChatConfig) -> str | None:
    own = path / CHAT_TEMPLATE_NAME
    if own.is_file():
        return _read_text(own)
    if not config.conv_template:
        return None
    return json.dumps(config.conv_template, indent=2, ensure_ascii=False)


def _describe_checkpoint(
    path: Path, config: ChatConfig | None, problem: str | None, licence: str | None
) -> Description:
    from mlc_llm.text.chat_template import find_chat_template

    content = read_json_object(path / "config.json")
    settings = path / "tokenizer_config.json"
    template = find_chat_template(path, read_json_object(settings) if settings.is_file() else {})
    count, dtypes = _safetensors_summary(path)
    weights = [p for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    architectures = [str(name) for name in content.get("architectures") or []]
    stated = content.get("dtype") or content.get("torch_dtype")
    method = content.get("quantization_config")
    if isinstance(method, dict) and method.get("quant_method"):
        stated = method["quant_method"]
    return Description(
        path=path,
        kind="raw",
        architecture=", ".join(architectures) or content.get("model_type"),
        stored_as=str(stated) if stated else dtypes,
        size_bytes=sum(p.stat().st_size for p in weights),
        template=template,
        licence=licence or _licence_of_readme(path),
        licence_file=_licence_file(path),
        config=config,
        problem=problem if weights else "there are no weights in it",
        num_stored=count,
        context_window_size=_context_of(config, content),
        files=_files(path),
    )


def _safetensors_summary(path: Path) -> tuple[int | None, str | None]:
    """Return how many numbers the safetensors files hold, and in which dtypes."""
    from safetensors import SafetensorError, safe_open

    count, dtypes = 0, Counter[str]()
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    size = math.prod(part.get_shape())
                    dtypes[str(part.get_dtype())] += size
                    count += size
        except SafetensorError:
            return None, None  # damaged; converting says how
    if not files:
        return None, None
    return count, ", ".join(name for name, _ in dtypes.most_common())


def _context_of(config: ChatConfig | None, content: dict[str, Any]) -> int | None:
    if config is not None:
        return config.context_window_size
    found = content.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _describe_gguf(
    path: Path, config: ChatConfig | None, problem: str | None, licence: str | None
) -> Description:
    from mlc_llm.weights.gguf_file import GGUFFile

    file = GGUFFile(path)
    types = Counter[str]()
    for tensor in file.tensors.values():
        types[tensor.type.name] += math.prod(tensor.shape)
    name = file.get("general.architecture", str)
    context = file.get(f"{name}.context_length", int)
    return Description(
        path=path,
        kind="GGUF",
        architecture=name,
        stored_as=", ".join(kind for kind, _ in types.most_common()),
        size_bytes=sum(part.stat().st_size for part in file.parts),
        template=file.get("tokenizer.chat_template", str),
        licence=licence or file.get("general.license", str),
        licence_file=None,
        config=config,
        problem=problem,
        num_stored=sum(types.values()),
        context_window_size=config.context_window_size if config is not None else context,
        files=[(part.name, part.stat().st_size) for part in file.parts],
    )


def _files(path: Path) -> list[tuple[str, int]]:
    return [
        (child.relative_to(path).as_posix(), child.stat().st_size)
        for child in sorted(path.rglob("*"))
        if child.is_file() and not child.name.startswith(".")
    ]


def _licence_file(path: Path) -> Path | None:
    names = {child.name.lower(): child for child in path.iterdir() if child.is_file()}
    return next((names[name] for name in _LICENCE_NAMES if name in names), None)


def _licence_of_readme(path: Path) -> str | None:
    """Return the licence that the head of a model card names."""
    card = path / "README.md"
    if not card.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---", _read_text(card), re.DOTALL)
    line = re.search(r"^license:\s*['\"]?([^\s'\"]+)", match[1], re.MULTILINE) if match else None
    return line[1] if line else None


def _read_text(path: Path) -> str:
    with path.open("rb") as stream:
        return stream.read(_MAX_TEXT_BYTES).decode("utf-8", "replace")


def read_licence(description: Description) -> str | None:
    """Return the text of a model's licence, its name where there is no text, or None."""
    if description.licence_file is not None:
        return _read_text(description.licence_file)
    return description.licence
