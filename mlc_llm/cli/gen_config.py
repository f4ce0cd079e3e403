"""`mlc_llm gen_config`: write the chat configuration and the tokenizer of an artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from mlc_llm.cli.options import (
    ConfigArgument,
    ModelTypeOption,
    OutputOption,
    QuantizationOption,
    require_single,
)
from mlc_llm.cli.terminal import say


def gen_config(
    config: ConfigArgument,
    quantization: QuantizationOption,
    output: OutputOption,
    model_type: ModelTypeOption = "auto",
    conv_template: Annotated[
        str,
        typer.Option(metavar="NAME", help="Conversation template; auto takes the model's own."),
    ] = "auto",
    context_window_size: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Longest conversation.")
    ] = None,
    sliding_window_size: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Window of sliding attention.")
    ] = None,
    prefill_chunk_size: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Longest piece of a prompt computed at once."),
    ] = None,
    attention_sink_size: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="First tokens that a window always keeps.")
    ] = None,
    tensor_parallel_shards: Annotated[
        int | None, typer.Option(metavar="N", help="Devices that share each layer; only 1 for now.")
    ] = None,
    pipeline_parallel_stages: Annotated[
        int | None, typer.Option(metavar="N", help="Devices in a row; only 1 for now.")
    ] = None,
    max_batch_size: Annotated[
        int, typer.Option(metavar="N", help="Most conversations answered at once.")
    ] = 128,
) -> None:
    """Write mlc-chat-config.json and the tokenizer files."""
    require_single("--tensor-parallel-shards", tensor_parallel_shards)
    require_single("--pipeline-parallel-stages", pipeline_parallel_stages)
    limits = {
        "context_window_size": context_window_size,
        "sliding_window_size": sliding_window_size,
        "prefill_chunk_size": prefill_chunk_size,
        "attention_sink_size": attention_sink_size,
        "max_batch_size": max_batch_size,
    }
    from mlc_llm.artifact import CHAT_CONFIG_NAME
    from mlc_llm.prepare.resolve import write_chat_config_for

    write_chat_config_for(
        config,
        output,
        quantization=quantization,
        model_type=model_type,
        conv_template=conv_template,
        overrides={key: value for key, value in limits.items() if value is not None},
    )
    say(f"wrote {output / CHAT_CONFIG_NAME}")
