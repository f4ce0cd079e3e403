"""The original of a conversion: where it lies, and what it says of itself. Does not convert it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_llm.artifact import CHAT_CONFIG_NAME, ChatConfig, read_json_object, write_atomically
from mlc_llm.errors import ModelNotFound, OptionError
from mlc_llm.images.processing import PROCESSOR_KEY
from mlc_llm.prepare.demo import DEMO_FILE, DEMO_SAMPLING
from mlc_llm.prepare.layer_formats import read_layer_formats
from mlc_llm.prepare.sentence_transformers import read_sentence_settings

# How images are prepared, in repositories of models that take some.
PREPROCESSOR_NAME, PROCESSOR_NAME = "preprocessor_config.json", "processor_config.json"

if TYPE_CHECKING:
    from mlc_llm.models.base import Family
    from mlc_llm.models.config import DecoderConfig


def find_source(path: Path) -> Path:
    """Return the Hugging Face directory or .gguf file a model is read from.

    path: either of them, a `config.json`, or a directory with one .gguf file. Raises ModelNotFound,
    and OptionError where there are several .gguf files to choose from.
    """
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist; check the path")
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        if path.name == "config.json":
            return path.parent
        raise ModelNotFound(
            f"{path} is not a model; give a directory, its config.json, or a .gguf file"
        )
    try:
        names = sorted(child.name for child in path.iterdir())
    except PermissionError as error:
        raise ModelNotFound(f"{path} cannot be read ({error.strerror})") from None
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    has_config = "config.json" in names
    if has_config and (not ggufs or any(name.endswith((".safetensors", ".bin")) for name in names)):
        return path
    if len(ggufs) == 1:
        return path / ggufs[0]
    if ggufs:
        raise OptionError(f"{path} holds several models; name one of: {', '.join(ggufs)}")
    if not names:
        raise ModelNotFound(f"{path} is empty; there is no model in it")
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    raise ModelNotFound(
        f"{path} is not a model: it has neither {CHAT_CONFIG_NAME}, nor config.json, nor a .gguf "
        f"file; it holds {shown}"
    )


@contextlib.contextmanager
def huggingface_form(source: Path) -> Iterator[Path]:
    """Yield a directory with config and tokenizer as Hugging Face has them."""
    if source.is_dir():
        yield source
        return
    from mlc_llm.prepare.gguf_sentences import write_sentence_files
    from mlc_llm.prepare.gguf_tokenizer import write_tokenizer
    from mlc_llm.weights.open import open_source

    with tempfile.TemporaryDirectory(prefix="mlc_llm-") as name:
        directory = Path(name)
        with contextlib.closing(open_source(source)) as weights:
            config = json.dumps(weights.config)
        write_atomically(directory / "config.json", config)
        write_tokenizer(source, directory)
        write_sentence_files(source, directory)
        if source.name == DEMO_FILE:
            path = directory / "generation_config.json"
            write_atomically(path, json.dumps({**read_json_object(path), **DEMO_SAMPLING}))
        yield directory


def is_encoder(source: Path) -> bool:
    """Return whether a Hugging Face directory or .gguf file is a BERT. Raises ModelError."""
    from mlc_llm.weights.open import open_source

    if source.is_dir():
        return read_json_object(source / "config.json").get("model_type") == "bert"
    with contextlib.closing(open_source(source)) as weights:
        return bool(weights.config["model_type"] == "bert")


def read_model(config_path: Path, model_type: str = "auto") -> tuple[Family, DecoderConfig]:
    """Read the family and configuration of a model that is not converted; see `find_source`.

    Raises OptionError and ModelError.
    """
    from mlc_llm.models.registry import find_family
    from mlc_llm.weights.open import open_source

    origin = find_source(config_path)
    settings = None
    if origin.is_dir():
        config = read_json_object(origin / "config.json")
        config.update(_image_settings(origin))
        settings = read_sentence_settings(origin)
    else:
        with contextlib.closing(open_source(origin)) as weights:
            config = weights.config
        from mlc_llm.prepare.gguf_sentences import read_gguf_settings

        settings = read_gguf_settings(origin)
    family = find_family(config, model_type, "chat" if settings is None else "embedding")
    model_config = family.config_from_huggingface(config)
    max_len = None if settings is None else settings.max_len
    if max_len is not None and max_len < model_config.context_window_size:
        model_config = model_config.with_overrides({"context_window_size": max_len})
    return family, model_config


def _image_settings(directory: Path) -> dict[str, Any]:
    """Return how images are prepared for a model, under a key for its configuration, if files say.

    Raises CorruptFile.
    """
    path = directory / PREPROCESSOR_NAME
    if path.is_file():
        return {PROCESSOR_KEY: read_json_object(path)}
    path = directory / PROCESSOR_NAME  # of transformers 5, with settings of other parts
    found = read_json_object(path).get("image_processor") if path.is_file() else None
    return {PROCESSOR_KEY: found} if isinstance(found, dict) else {}


def read_compile_config(
    config_path: Path, *, quantization: str, model_type: str = "auto"
) -> ChatConfig:
    """Return what the compiler must know of a model that is not converted; see `find_source`.

    Raises OptionError and ModelError.
    """
    from mlc_llm.quantization.schemes import get_scheme

    get_scheme(quantization)
    family, config = read_model(config_path, model_type)
    return ChatConfig(
        model_type=family.name,
        quantization=quantization,
        model_config=config.to_json(),
        vocab_size=config.vocab_size,
        context_window_size=config.context_window_size,
        prefill_chunk_size=config.prefill_chunk_size,
        conv_template={},
        layer_formats=read_layer_formats(find_source(config_path), family, config, quantization),
        sliding_window_size=config.sliding_window_size,
        attention_sink_size=config.attention_sink_size,
    )
