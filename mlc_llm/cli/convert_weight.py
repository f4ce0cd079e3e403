"""`mlc_llm convert_weight`: quantize a model's weights into an artifact directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlc_llm.cli.options import (
    ConfigArgument,
    LoraAdapterOption,
    ModelTypeOption,
    OutputOption,
    QuantizationOption,
)
from mlc_llm.cli.progress import format_size, show_progress
from mlc_llm.cli.terminal import say
from mlc_llm.errors import OptionError


def convert_weight(
    config: ConfigArgument,
    quantization: QuantizationOption,
    output: OutputOption,
    model_type: ModelTypeOption = "auto",
    source: Annotated[
        str, typer.Option(metavar="PATH", help="Where the weights are; auto: beside CONFIG.")
    ] = "auto",
    source_format: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto, huggingface-safetensor, huggingface-torch, awq or gguf."
        ),
    ] = "auto",
    lora_adapter: LoraAdapterOption = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="auto or cpu: weights are converted on the CPU.")
    ] = "auto",
) -> None:
    """Convert and quantize the weights of a model."""
    if device not in ("auto", "cpu", "cpu:0"):
        raise OptionError(f"--device {device}: weights are converted on the CPU; use auto or cpu")
    from mlc_llm.prepare.resolve import convert_weights

    with show_progress() as progress:
        summary = convert_weights(
            config,
            output,
            quantization=quantization,
            model_type=model_type,
            source=None if source == "auto" else Path(source),
            source_format=source_format,
            lora_adapter=lora_adapter,
            progress=progress,
        )
    say(
        f"wrote {summary.num_tensors} tensors to {output}: {format_size(summary.size_bytes)}, "
        f"{summary.bits_per_parameter:.2f} bits a parameter"
    )
