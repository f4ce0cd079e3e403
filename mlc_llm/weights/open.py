"""Find out what a path holds and open it as a checkpoint. Does not read tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlc_llm.artifact import CHAT_CONFIG_NAME, read_json_object
from mlc_llm.errors import CorruptFile, ModelNotFound, OptionError, UnsupportedModel
from mlc_llm.weights import huggingface
from mlc_llm.weights.source import WeightSource

SOURCE_FORMATS = ("auto", "huggingface-torch", "huggingface-safetensor", "gguf", "awq")

_FORMATS_IN_WORDS = "a Hugging Face directory with safetensors or PyTorch files, or a .gguf file"
_CONTAINERS = {
    "huggingface-safetensor": huggingface.SAFETENSORS,
    "huggingface-torch": huggingface.TORCH,
}


def open_source(
    path: Path, source_format: str = "auto", lora_adapter: Path | None = None
) -> WeightSource:
    """Open a Hugging Face directory, a `.gguf` file, or a directory that holds one model in GGUF.

    Quantized Hugging Face checkpoints look like plain ones, and are decoded tensor by tensor.
    lora_adapter: the directory of an adapter that is merged into the weights as they are read.
    Raises OptionError for an unknown format, ModelNotFound where there is no model,
    UnsupportedModel for formats we do not read, CorruptFile for damaged files.
    """
    if source_format not in SOURCE_FORMATS:
        raise OptionError(
            f"--source-format {source_format!r} is not known; "
            f"choose one of {', '.join(SOURCE_FORMATS)}"
        )
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist; give {_FORMATS_IN_WORDS}")
    try:
        source = _open(path, source_format)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error}") from error
    if lora_adapter is None:
        return source
    from mlc_llm.weights.lora import LoraSource, read_adapter

    return LoraSource(source, read_adapter(lora_adapter))


def _open(path: Path, source_format: str) -> WeightSource:
    if path.name == huggingface.CONFIG_NAME and path.is_file():
        path = path.parent
    if source_format == "auto":
        source_format = _detect_format(path)
    if source_format == "gguf":
        # Imported late: a Hugging Face conversion does not need the gguf package.
        from mlc_llm.weights.gguf import GGUFSource

        return GGUFSource(_find_gguf(path))
    _check_directory(path)
    container = _CONTAINERS[_detect_format(path) if source_format == "awq" else source_format]
    source = huggingface.HuggingFaceSource(path, container)
    settings = _quantization_settings(path, source.config)
    if source_format == "awq" and settings.get("quant_method") != "awq":
        raise UnsupportedModel(
            f"{path} is no AWQ checkpoint: its quantization_config names "
            f"{settings.get('quant_method')!r:.60}; use --source-format auto"
        )
    if not settings:
        return source
    from mlc_llm.weights.dequantized import DequantizedSource
    from mlc_llm.weights.packed_formats import find_packed_format

    packed = find_packed_format(settings, str(path / huggingface.CONFIG_NAME))
    return DequantizedSource(source, packed)


def _quantization_settings(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return `quantization_config`, which older checkpoints keep in a file of its own."""
    settings = config.get("quantization_config")
    if settings is None:
        for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
            if (directory / name).is_file():
                return {"quant_method": method, **read_json_object(directory / name)}
        return {}
    if not isinstance(settings, dict):
        raise CorruptFile(f"{directory}: quantization_config is {settings!r:.60}, not an object")
    return settings


def _detect_format(path: Path) -> str:
    if path.is_file():
        return "gguf" if path.suffix == ".gguf" else _detect_by_content(path)
    for source_format, container in _CONTAINERS.items():
        if container.is_in(path):
            return source_format
    return "gguf" if _gguf_files(path) else "huggingface-safetensor"


def _detect_by_content(path: Path) -> str:
    with path.open("rb") as stream:
        if stream.read(4) == b"GGUF":
            return "gguf"
    if path.suffix == ".safetensors":
        raise UnsupportedModel(f"{path} is one file of a model; give its directory {path.parent}")
    raise UnsupportedModel(f"{path} is not a model; give {_FORMATS_IN_WORDS}")


def _gguf_files(directory: Path) -> list[Path]:
    """Return the GGUF files to choose from; of a split model only the first part."""
    files = sorted(path for path in directory.glob("*.gguf") if path.is_file())
    firsts = [path for path in files if "-00001-of-" in path.name]
    return firsts + [path for path in files if "-of-" not in path.name]


def _find_gguf(path: Path) -> Path:
    if path.is_file():
        return path
    files = _gguf_files(path)
    if not files:
        raise ModelNotFound(f"{path} holds no .gguf file")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise ModelNotFound(f"{path} holds {len(files)} GGUF models ({names}); name one of them")
    return files[0]


def _check_directory(path: Path) -> None:
    """Say what is wrong with a directory that is no Hugging Face model with safetensors."""
    if not path.is_dir():
        raise UnsupportedModel(f"{path} is not a directory; give {_FORMATS_IN_WORDS}")
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        raise ModelNotFound(f"{path} is empty; give {_FORMATS_IN_WORDS}")
    if CHAT_CONFIG_NAME in names:
        raise UnsupportedModel(f"{path} is converted already ({CHAT_CONFIG_NAME}); use it directly")
    if huggingface.CONFIG_NAME not in names:
        raise ModelNotFound(
            f"{path} has no {huggingface.CONFIG_NAME}, so it is not a model; "
            f"give {_FORMATS_IN_WORDS}"
        )
    if not any(container.is_in(path) for container in _CONTAINERS.values()):
        names_wanted = [
            name for c in _CONTAINERS.values() for name in (c.single_name, c.index_name)
        ]
        raise ModelNotFound(
            f"{path} has a {huggingface.CONFIG_NAME} but no weights ({', '.join(names_wanted)})"
        )
