"""`mlc_llm compile`: turn a model's configuration into a library for one device."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlc_llm.cli.options import (
    COMPILE_OVERRIDES,
    OPT_HELP,
    ModelTypeOption,
    parse_overrides,
)
from mlc_llm.cli.terminal import say
from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.artifact import ChatConfig


def compile_library(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="Directory with mlc-chat-config.json, or that file; or a Hugging Face directory "
            "or its config.json, with --quantization.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Library to write: .so, for macOS .dylib, for Windows .dll, for the browser "
            ".wasm; .tar for object files.",
            show_default=False,
        ),
    ],
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Quantization, where not the one of mlc-chat-config.json."
        ),
    ] = None,
    model_type: ModelTypeOption = "auto",
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Device to make code for: auto, cpu, or a CPU by its level or LLVM's name, with "
            "features after plus signs: x86-64-v3, znver4, aarch64+dotprod, wasm32; webgpu, metal, "
            "opencl, android, iphone, or cuda with an architecture: cuda:sm_90.",
        ),
    ] = "auto",
    host: Annotated[
        str,
        typer.Option(
            metavar="TRIPLE",
            help="System that the library is for, as an LLVM triple such as aarch64-linux-android; "
            "auto for what the device implies.",
        ),
    ] = "auto",
    opt: Annotated[str, typer.Option(metavar="O0..O3", help=OPT_HELP)] = "O2",
    overrides: Annotated[
        str,
        typer.Option(
            metavar="K=V;K=V",
            help=f"Change the model's limits: {', '.join(COMPILE_OVERRIDES)}.",
            show_default=False,
        ),
    ] = "",
    system_lib_prefix: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What names of functions begin with where several models are linked into one "
            "program; auto: MODEL_QUANTIZATION_ for a .tar for android or iphone, else none.",
        ),
    ] = "auto",
    debug_dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the code of each stage there.")
    ] = None,
) -> None:
    """Compile a model's library; print the memory it needs."""
    values = parse_overrides(overrides, COMPILE_OVERRIDES)
    # What cannot be written is said before anything is read or compiled.
    from mlc_llm.compiler.browser.emscripten import require_emscripten
    from mlc_llm.compiler.system_library import find_system_prefix
    from mlc_llm.compiler.target import check_form, describe_any_target

    check_form(output, describe_any_target(device, opt, host)["target"])
    if output.suffix == ".wasm":
        require_emscripten(output)
    config = _read_config(model, quantization, model_type)
    prefix = find_system_prefix(
        system_lib_prefix, device, output, config.model_type, config.quantization
    )

    from mlc_llm.compiler.compile import CompileOptions, compile_model
    from mlc_llm.prepare.cache import CacheHome, storage_errors

    options = CompileOptions(device, opt, values, debug_dump, host, prefix)
    compiled = compile_model(config, options, lambda stage: say(f"compiling: {stage}"))
    cache = CacheHome.from_environment(os.environ).root / "wasm_runtime"
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        compiled.save(output, cache, say)
    print(compiled.memory_plan())
    say(f"wrote {output}")


def _read_config(model: Path, quantization: str | None, model_type: str) -> ChatConfig:
    """Read the configuration of an artifact, or derive one from a Hugging Face model's."""
    from mlc_llm.artifact import CHAT_CONFIG_NAME, ChatConfig, read_json_object
    from mlc_llm.prepare.original import read_compile_config

    path = model / CHAT_CONFIG_NAME if model.is_dir() else model
    if path.name == CHAT_CONFIG_NAME and path.is_file():
        config = ChatConfig.from_json(read_json_object(path), str(path))
        if quantization is not None:
            config = dataclasses.replace(config, quantization=quantization)
        if model_type != "auto":
            config = dataclasses.replace(config, model_type=model_type)
        return config
    if quantization is None:
        raise OptionError(f"{model} is not converted yet, so --quantization NAME must be given")
    return read_compile_config(model, quantization=quantization, model_type=model_type)
