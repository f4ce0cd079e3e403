"""What commands that run a model share: the options that name it, and the steps to its files.

What is missing (download, conversion, compilation) is made by `prepare`; where nothing is missing,
no compiler is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlc_llm.cli.options import CHAT_OVERRIDES, OPT_HELP
from mlc_llm.errors import ModelNotFound, OptionError

if TYPE_CHECKING:
    from mlc_llm.prepare.caches import Caches
    from mlc_llm.prepare.processes import RunFile
    from mlc_llm.prepare.progress import Progress

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Artifact or Hugging Face directory, .gguf file, or HF://user/repo[@revision]; "
        "the demo model if left out.",
        show_default=False,
    ),
]
SourceQuantizationOption = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        metavar="NAME",
        help="Quantization for a model that is not converted yet "
        "(if left out, gguf for GGUF files, q0f16 for BERT, else q4f16_1).",
    ),
]
ModelLibOption = Annotated[
    Path | None,
    typer.Option(
        "--model-lib",
        metavar="FILE",
        help="Library made by `compile`, used instead of compiling on the fly.",
    ),
]
OverridesOption = Annotated[
    str,
    typer.Option(
        "--overrides",
        metavar="K=V;K=V",
        help=f"Change the model's limits: {', '.join(CHAT_OVERRIDES)}.",
        show_default=False,
    ),
]
OptOption = Annotated[
    str | None,
    typer.Option("--opt", metavar="O0..O3", help=f"{OPT_HELP} O2 if left out."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", help="Threads to compute with; one per core if left out."
    ),
]


def optimization_level(flag: str | None, override: str | None, library: Path | None) -> str:
    """Return the level that --opt or --overrides name, or the default. Raises OptionError."""
    if flag is not None and override is not None:
        raise OptionError("the optimization level is given by --opt and by --overrides; use one")
    level = flag or override
    if level is not None and library is not None:
        raise OptionError("--opt has no effect on the finished library of --model-lib; use one")
    return level or "O2"


def require_library(library: Path | None) -> None:
    """Raise ModelNotFound if --model-lib is given and not there."""
    if library is not None and not library.exists():
        raise ModelNotFound(f"--model-lib {library} does not exist; make it with mlc_llm compile")


def use_threads(count: int | None) -> None:
    """Set the number of threads of this process, before the runtime is loaded."""
    from mlc_llm.device import export_num_threads

    if count is not None:
        export_num_threads(count)


def find_artifact(
    model: str | None,
    quantization: str | None,
    caches: Caches,
    progress: Progress,
    lora_adapter: Path | None = None,
) -> Path:
    """Return the artifact of a model, made first where there is none."""
    from mlc_llm.prepare.resolve import prepare_artifact

    return prepare_artifact(
        model,
        quantization=quantization,
        home=caches.home,
        download_policy=caches.download_policy,
        jit_policy=caches.jit_policy,
        progress=progress,
        access=caches.hub,
        lora_adapter=lora_adapter,
    )


def find_library(
    artifact: Path,
    *,
    device: str,
    opt: str,
    overrides: Mapping[str, Any],
    caches: Caches,
    progress: Progress,
) -> Path:
    """Return the compiled library for an artifact, made first where there is none."""
    from mlc_llm.prepare.jit import prepare_library

    return prepare_library(
        artifact,
        device=device,
        opt=opt,
        overrides=overrides,
        home=caches.home,
        jit_policy=caches.jit_policy,
        progress=progress,
    )


DEMO_NAME = "demo"


def note_process(command: str, model: str | None, caches: Caches, paths: Sequence[Path]) -> RunFile:
    """Let `ps` and `rm` know that this process uses a model, until the result is closed."""
    from mlc_llm.prepare.processes import RunFile

    return RunFile(caches.home, command, DEMO_NAME if model is None else model, paths)
