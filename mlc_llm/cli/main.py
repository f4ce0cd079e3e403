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
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mlc_llm
from mlc_llm.errors import MlcError, OptionError

# Typer carries click under a changing name; this is its "bad command line" class in all of them.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_DEBUG_VARIABLE = "MLC_LLM_DEBUG"

# Command -> its module in this package and the function there, in the order of --help.
_COMMANDS: Mapping[str, tuple[str, str]] = {
    "chat": ("chat", "chat"),
    "serve": ("serve", "serve"),
    "bench": ("bench", "bench"),
    "bench serve": ("bench_serve", "bench_serve"),
    "gen_config": ("gen_config", "gen_config"),
    "convert_weight": ("convert_weight", "convert_weight"),
    "compile": ("compile", "compile_library"),
    "package": ("package", "package"),
    "pull": ("pull", "pull"),
    "list": ("list_models", "list_models"),
    "show": ("show", "show"),
    "rm": ("rm", "rm"),
    "ps": ("ps", "ps"),
    "demo-model": ("demo_model", "demo_model"),
    "doctor": ("doctor", "doctor"),
}


class _Commands(TyperGroup):
    """Finds commands whose names are two words, such as `bench serve` beside `bench`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two_words = " ".join(args[:2])
        if two_words in self.commands:
            args = [two_words, *args[2:]]
        return super().resolve_command(ctx, args)


def build_app(words: Sequence[str] = ()) -> typer.Typer:
    """Return the command line with the command that `words` begin with, or with all commands.

    Making a command of a function takes milliseconds, and its module may import others: `chat`
    does not wait for what only `serve` needs.
    """
    app = typer.Typer(
        name="mlc_llm",
        cls=_Commands,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    rest = words[1:] if words[:1] == ["--debug"] else words
    # One word, or two that belong together; a misspelt one is compared with all.
    named = {" ".join(rest[:count]) for count in (1, 2)} & _COMMANDS.keys()
    for name in named or _COMMANDS:
        module, function = _COMMANDS[name]
        command = getattr(importlib.import_module(f"mlc_llm.cli.{module}"), function)
        app.command(name)(_return_error(command))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: `sys.argv`) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in words[:1] or os.environ.get(_DEBUG_VARIABLE, "0") not in ("", "0")
    _replace_unprintable()
    try:
        error = build_app(words)(args=words, prog_name="mlc_llm", standalone_mode=False)
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
