"""Options that several commands share, and the parsing of `key=value;key=value` strings.

Knows the names and types of options. Whether a value fits a model is decided where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.prepare.caches import Caches

DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="NAME[:ID]",
        help="Device to run on: auto, cpu, or a GPU: cuda, cuda:1, metal, opencl.",
    ),
]
OPT_HELP = (
    "Optimization level, and settings after semicolons: 'O2;activations=float32' keeps activations "
    "exact on CPUs, 'O2;cudagraph=1' records steps of one token as CUDA graphs."
)
QuantizationOption = Annotated[
    str, typer.Option(metavar="NAME", help="Quantization of the weights, such as q4f16_1.")
]
ConfigArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="Hugging Face directory or its config.json, or a .gguf file.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Directory to write.", show_default=False),
]
ModelTypeOption = Annotated[
    str, typer.Option(metavar="NAME", help="Model family; auto reads it from the configuration.")
]
LoraAdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--lora-adapter",
        metavar="DIR",
        help="Merge a LoRA adapter, as PEFT saves it, into a model that is not converted yet.",
    ),
]

CHAT_OVERRIDES: Mapping[str, type] = {
    "context_window_size": int,
    "sliding_window_size": int,
    "prefill_chunk_size": int,
    "attention_sink_size": int,
    "tensor_parallel_shards": int,
    "pipeline_parallel_stages": int,
    "kv_cache_dtype": str,
    "opt": str,
}
COMPILE_OVERRIDES: Mapping[str, type] = {
    "context_window_size": int,
    "sliding_window_size": int,
    "prefill_chunk_size": int,
    "attention_sink_size": int,
    "max_batch_size": int,
    "tensor_parallel_shards": int,
    "pipeline_parallel_stages": int,
    "kv_cache_dtype": str,
    "model_task": str,
    "disaggregation": bool,
}

_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def parse_settings(
    text: str, kinds: Mapping[str, type], where: str, can_be_none: Collection[str] = ()
) -> dict[str, Any]:
    """Parse `key=value;key=value` into typed values; `where` names the option in errors.

    Spaces around keys and values do not count, spaces inside values do. The value `none` of a key
    in `can_be_none` becomes None. Raises OptionError.
    """
    settings: dict[str, Any] = {}
    for part in text.split(";"):
        if not part.strip():
            continue
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise OptionError(f"{where}: {part.strip()!r} is not of the form key=value")
        if key not in kinds:
            raise OptionError(f"{where}: unknown key {key!r}; known: {', '.join(kinds)}")
        if key in settings:
            raise OptionError(f"{where}: {key} is given twice")
        is_none = key in can_be_none and value.lower() == "none"
        settings[key] = None if is_none else _convert(key, value, kinds[key], where)
    return settings


def _convert(key: str, value: str, kind: type, where: str) -> Any:
    try:
        return _TRUTH[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise OptionError(f"{where}: {key} must be {_KIND_NAMES[kind]}, not {value!r}") from None


def parse_overrides(text: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Parse `--overrides`. Values that only name what there is anyway are checked and left out."""
    overrides = parse_settings(text, kinds, "--overrides")
    for key in ("tensor_parallel_shards", "pipeline_parallel_stages"):
        require_single(f"--overrides: {key}", overrides.pop(key, None))
    if overrides.pop("disaggregation", False):
        raise OptionError(
            "--overrides: disaggregation=true is not supported; leave it out or set it to false"
        )
    return overrides


def require_single(name: str, value: int | None) -> None:
    """Raise OptionError unless a number of shards or stages is absent or 1."""
    if value not in (None, 1):
        raise OptionError(
            f"{name} is {value}, but a model runs on one device only; leave it out or set it to 1"
        )


def require_text(name: str, text: str) -> str:
    """Return `text`. Raises OptionError if it is blank or holds bytes that are not UTF-8."""
    if not text.strip():
        raise OptionError(f"{name} is empty; give it some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise OptionError(f"{name} is not valid UTF-8 text") from None
    return text


def read_caches(environment: Mapping[str, str] = os.environ) -> Caches:
    """Read the MLC_ and HF_ variables of the environment. Raises OptionError."""
    from mlc_llm.prepare.caches import Caches

    return Caches.from_environment(environment)
