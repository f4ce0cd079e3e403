"""`mlc_llm chat`: prepare a model and talk to it, once or in a dialogue.

Knows the order of the steps. What is missing (download, conversion, compilation) is made by
`prepare`; where nothing is missing, no compiler is imported.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlc_llm.cli.open_model import (
    ModelArgument,
    ModelLibOption,
    OptOption,
    OverridesOption,
    SourceQuantizationOption,
    ThreadsOption,
    find_artifact,
    find_library,
    note_process,
    optimization_level,
    require_library,
    use_threads,
)
from mlc_llm.cli.options import (
    CHAT_OVERRIDES,
    DeviceOption,
    LoraAdapterOption,
    parse_overrides,
    read_caches,
    require_text,
)
from mlc_llm.cli.progress import show_progress
from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.engine.session import ChatSession

# So small a model, quantized twice, is at a loss without being told what to do: its first word is
# nearly a draw between languages. It also rambles when sampled freely, and may repeat itself.
_DEMO_SYSTEM = "You answer questions in English, briefly and correctly."
_DEMO_SAMPLING = {"temperature": 0.0, "frequency_penalty": 0.3, "max_tokens": 512}


def chat(
    model: ModelArgument = None,
    device: DeviceOption = "auto",
    model_lib: ModelLibOption = None,
    overrides: OverridesOption = "",
    quantization: SourceQuantizationOption = None,
    lora_adapter: LoraAdapterOption = None,
    opt: OptOption = None,
    threads: ThreadsOption = None,
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
    thoughts: Annotated[
        bool | None,
        typer.Option(
            "--thoughts/--no-thoughts",
            help="Print what the model thinks before it answers, to stderr. Left out, that is done "
            "where answers go to a terminal.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Talk to a model, made ready first where needed."""
    values = parse_overrides(overrides, CHAT_OVERRIDES)
    level = optimization_level(opt, values.pop("opt", None), model_lib)
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
    require_library(model_lib)
    _check_early(device, level, sampling)
    use_threads(threads)
    with ExitStack() as cleanup:
        session = _open_session(
            model,
            quantization,
            lora_adapter,
            device=device,
            library=model_lib,
            opt=level,
            overrides=values,
            cleanup=cleanup,
        )
        _talk(session, question, system, sampling, thoughts)


def _check_early(device: str, opt: str, sampling: dict[str, Any]) -> None:
    """Raise for values that would be refused only after a download or a conversion."""
    from mlc_llm.compiler.target import describe_any_target
    from mlc_llm.device import parse_device
    from mlc_llm.engine.sampling import SamplingParams

    parse_device(device)
    describe_any_target(device, opt)
    SamplingParams(**sampling)


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
    lora_adapter: Path | None,
    *,
    device: str,
    library: Path | None,
    opt: str,
    overrides: dict[str, Any],
    cleanup: ExitStack,
) -> ChatSession:
    """Make what the model lacks and load it; `cleanup` closes it."""
    caches = read_caches()
    with show_progress() as progress:
        artifact = find_artifact(model, quantization, caches, progress, lora_adapter)
        if library is None:
            library = find_library(
                artifact,
                device=device,
                opt=opt,
                overrides=overrides,
                caches=caches,
                progress=progress,
            )
        cleanup.callback(note_process("chat", model, caches, [artifact, library]).close)
        from mlc_llm.engine.session import ChatSession

        session = ChatSession.open(
            artifact, library, device=device, overrides=overrides, progress=progress.message
        )
    cleanup.callback(session.close)
    return session


def _talk(
    session: ChatSession,
    question: str | None,
    system: str | None,
    sampling: dict[str, Any],
    thoughts: bool | None,
) -> None:
    from mlc_llm.cli.dialogue import Dialogue
    from mlc_llm.cli.printing import is_terminal
    from mlc_llm.cli.terminal import print_answer, prompt_reader, run_interactive, say
    from mlc_llm.engine.session import SamplingParams

    params = dataclasses.replace(SamplingParams.from_config(session.config), **sampling)
    dialogue = Dialogue(session, params, system, is_terminal() if thoughts is None else thoughts)
    if question is not None:
        print_answer(dialogue, question)
        return
    config = session.config
    say(f"{config.model_type} in {config.quantization} is ready; /help lists the commands")
    run_interactive(dialogue, prompt_reader())
