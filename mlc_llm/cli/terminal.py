"""The chat on a terminal: reads lines, prints answers, survives Ctrl-C.

stdout gets the answers and nothing else; prompts, thoughts, notes and errors go to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from mlc_llm.cli.chat_commands import Leave, run_command
from mlc_llm.cli.dialogue import Dialogue
from mlc_llm.cli.options import require_text
from mlc_llm.cli.printing import AnswerPrinter
from mlc_llm.errors import MlcError

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output


def say(text: str) -> None:
    """Print a line that is not part of an answer."""
    print(text, file=sys.stderr, flush=True)


def print_answer(dialogue: Dialogue, text: str) -> None:
    """Print the answer to `text` while it is made, ended by a line break.

    Raises what the session raises; after Ctrl-C or an error the printed part stays in `dialogue`.
    """
    printer = AnswerPrinter(dialogue.shows_thoughts)
    try:
        with closing(dialogue.answer(text, lambda note: say(f"[{note}]"))) as pieces:
            for piece in pieces:
                printer.put(piece)
    finally:
        printer.finish()
    note = dialogue.note_on_ending()
    if note is not None:
        say(f"[{note}]")


def run_interactive(dialogue: Dialogue, read_line: Callable[[], str]) -> None:
    """Answer lines and run commands until `read_line` raises EOFError or `/exit` is given."""
    while True:
        try:
            line = read_line()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                run_command(line, dialogue, say)
            else:
                print_answer(dialogue, require_text("the message", line).strip())
        except Leave:
            return
        except KeyboardInterrupt:
            say("[stopped]")
        except MlcError as error:
            say(f"error: {error}")


def prompt_reader(
    terminal_input: Input | None = None, terminal_output: Output | None = None
) -> Callable[[], str]:
    """Return a function that asks for one line: Enter sends, Esc+Enter begins a new line.

    It raises KeyboardInterrupt on Ctrl-C and EOFError on Ctrl-D. Defaults: the terminal of this
    process, drawn through stderr.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.filters import is_searching
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    bindings = KeyBindings()

    @bindings.add("enter", filter=~is_searching)
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=~is_searching)
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        ">>> ",
        multiline=True,
        prompt_continuation="... ",
        key_bindings=bindings,
        input=terminal_input,
        output=terminal_output or create_output(stdout=sys.stderr),
    )
    return session.prompt
