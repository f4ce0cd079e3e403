"""`mlc_llm chat`: prepare a model and talk to it, once or in a dialogue.

Knows the order of the steps. What is missing (download, conversion, compilation) is made by
`prepare`; where nothing is missing, no compiler is imported.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlc_llm.cli.options import (
    CHAT_OVERRIDES,
    DeviceOption,
    parse_overrides,
    read_caches,
    require_text,
)
from mlc_llm.cli.progress import show_progress
from mlc_llm.errors import ModelNotFound, OptionError

if TYPE_CHECKING:
    from mlc_llm.engine.session import ChatSession

# So small a model, quantized twice, is at a loss without being told what to do: its first word is
# nearly a draw between languages. It also rambles when sampled freely, and may repeat itself.
_DEMO_SYSTEM = "You answer questions in English, briefly and correctly."
_DEMO_SAMPLING = {"temperature": 0.0, "frequency_penalty": 0.3, "max_tokens": 512}


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Artifact or Hugging Face directory, .gguf file, or HF://user/repo[@revision]; "
            "the demo model if left out.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    model_lib: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Library made by `compile`, used instead of compiling on the fly."
        ),
    ] = None,
    overrides: Annotated[
        str,
        typer.Option(
            metavar="K=V;K=V",
            help=f"Change the model's limits: {', '.join(CHAT_OVERRIDES)}.",
            show_default=False,
        ),
    ] = "",
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantization for a model that is not converted yet "
            "(q4f16_1 if left out, q8f16_1 for the demo model).",
        ),
    ] = None,
    opt: Annotated[
        str | None, typer.Option(metavar="O0..O3", help="Optimization level (O2 if left out).")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Answer this once and leave. Piped input does the same."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message in place of the model's own.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Longest answer, in tokens.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 always takes the likeliest word.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Share of probability to sample from.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The same seed gives the same answer.")
    ] = None,
) -> None:
    """Talk to a model, made ready first where needed."""
    values = parse_overrides(overrides, CHAT_OVERRIDES)
    level = _optimization_level(opt, values.pop("opt", None), model_lib)
    question = _read_question(prompt)
    if system is not None:
        require_text("--system", system)
    elif model is None:
        system = _DEMO_SYSTEM
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    sampling = {} if model is not None else dict(_DEMO_SAMPLING)
    sampling.update({key: value for key, value in given.items() if value is not None})
    if model_lib is not None and not model_lib.exists():
        raise ModelNotFound(f"--model-lib {model_lib} does not exist; make it with mlc_llm compile")
    with closing(
        _open_session(
            model, quantization, device=device, library=model_lib, opt=level, overrides=values
        )
    ) as session:
        _talk(session, question, system, sampling)


def _optimization_level(flag: str | None, override: str | None, library: Path | None) -> str:
    if flag is not None and override is not None:
        raise OptionError("the optimization level is given by --opt and by --overrides; use one")
    level = flag or override
    if level is not None and library is not None:
        raise OptionError("--opt has no effect on the finished library of --model-lib; use one")
    return level or "O2"


def _read_question(prompt: str | None) -> str | None:
    """Return the one question to answer, or None for a dialogue on a terminal."""
    if prompt is not None:
        return require_text("--prompt", prompt)
    if sys.stdin is None:
        raise OptionError("there is no input to read; use --prompt TEXT")
    if sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise OptionError("the piped input is not UTF-8 text") from None
    return require_text("the piped input", text)


def _open_session(
    model: str | None,
    quantization: str | None,
    *,
    device: str,
    library: Path | None,
    opt: str,
    overrides: dict[str, Any],
) -> ChatSession:
    """Make what the model lacks and load it."""
    from mlc_llm.prepare.jit import prepare_library
    from mlc_llm.prepare.resolve import prepare_artifact

    caches = read_caches()
    with show_progress() as progress:
        artifact = prepare_artifact(
            model,
            quantization=quantization,
            home=caches.home,
            download_policy=caches.download_policy,
            jit_policy=caches.jit_policy,
            progress=progress,
            access=caches.hub,
        )
        if library is None:
            library = prepare_library(
                artifact,
                device=device,
                opt=opt,
                overrides=overrides,
                home=caches.home,
                jit_policy=caches.jit_policy,
                progress=progress,
            )
        from mlc_llm.engine.session import ChatSession

        return ChatSession.open(
            artifact, library, device=device, overrides=overrides, progress=progress.message
        )


def _talk(
    session: ChatSession, question: str | None, system: str | None, sampling: dict[str, Any]
) -> None:
    from mlc_llm.cli.dialogue import Dialogue
    from mlc_llm.cli.terminal import print_answer, prompt_reader, run_interactive, say
    from mlc_llm.engine.session import SamplingParams

    params = dataclasses.replace(SamplingParams.from_config(session.config), **sampling)
    dialogue = Dialogue(session, params, system)
    if question is not None:
        print_answer(dialogue, question)
        return
    config = session.config
    say(f"{config.model_type} in {config.quantization} is ready; /help lists the commands")
    run_interactive(dialogue, prompt_reader())
