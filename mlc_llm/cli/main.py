"""The `mlc_llm` program: its commands, and the one place where errors become exit codes.

Knows the commands by name only; what a command needs is imported when it runs.

    0    done
    1    any MlcError (a model, device, download or request that does not work), OSError
    2    OptionError, and command lines that do not parse
    70   an error inside mlc_llm itself
    130  Ctrl-C
    141  the reader of the output has gone (as for any program ended by SIGPIPE)
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import mlc_llm
from mlc_llm.cli import bench, chat, compile, convert_weight, demo_model, doctor, gen_config
from mlc_llm.errors import MlcError, OptionError

# Typer carries click under a changing name; this is its "bad command line" class in all of them.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_DEBUG_VARIABLE = "MLC_LLM_DEBUG"


def build_app() -> typer.Typer:
    """Return the command line with all its commands."""
    app = typer.Typer(
        name="mlc_llm",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    app.command("chat")(_return_error(chat.chat))
    app.command("bench")(_return_error(bench.bench))
    app.command("gen_config")(_return_error(gen_config.gen_config))
    app.command("convert_weight")(_return_error(convert_weight.convert_weight))
    app.command("compile")(_return_error(compile.compile_library))
    app.command("demo-model")(_return_error(demo_model.demo_model))
    app.command("doctor")(_return_error(doctor.doctor))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: `sys.argv`) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in words[:1] or os.environ.get(_DEBUG_VARIABLE, "0") not in ("", "0")
    _replace_unprintable()
    try:
        error = build_app()(args=words, prog_name="mlc_llm", standalone_mode=False)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as raised:
        error = raised
    return _report(error, is_debug) if isinstance(error, BaseException) else 0


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False,
) -> None:
    """Compile open language models for this machine and talk to them."""
    if version:
        typer.echo(f"mlc_llm {mlc_llm.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _return_error(command: Callable[..., None]) -> Callable[..., BaseException | None]:
    """Make a command return the exception that ended it: typer would turn some into exits."""

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> BaseException | None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except BaseException as error:
            return error
        return None

    return call


def _report(error: BaseException, is_debug: bool) -> int:
    """Print what the user must know of an error and return the exit code."""
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return 141
    if is_debug:
        traceback.print_exception(error)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        _print_error("interrupted")
        return 130
    if isinstance(error, _UsageError):
        _print_error(_usage_message(error))
        return 2
    if isinstance(error, MlcError):
        _print_error(f"error: {error}")
        return 2 if isinstance(error, OptionError) else 1
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        _print_error(f"error: {error.strerror or error}{where}")
        return 1
    _print_error(
        f"internal error: {type(error).__name__}: {error}\n"
        f"This is a fault in mlc_llm. Set {_DEBUG_VARIABLE}=1 and run it again for the traceback."
    )
    return 70


def _usage_message(error: Any) -> str:
    command = "mlc_llm" if error.ctx is None else error.ctx.command_path
    return f"error: {' '.join(error.format_message().split())} (see `{command} --help`)"


def _print_error(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        return


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, or the interpreter complains about it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _replace_unprintable() -> None:
    """Let a terminal that is not UTF-8 show `?` instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
