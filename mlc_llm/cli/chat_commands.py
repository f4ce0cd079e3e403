"""The commands inside a chat: `/help`, `/set` and so on.

Knows what each does to a dialogue and what it prints. Not how lines are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlc_llm.cli.dialogue import Dialogue, describe_params, describe_stats
from mlc_llm.cli.options import parse_settings
from mlc_llm.errors import OptionError

SETTINGS: Mapping[str, type] = {
    "temperature": float,
    "top_p": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "max_tokens": int,
    "seed": int,
    "stop": str,
}
_FORMAT = "response_format"
_THOUGHTS = "thoughts"
_MAX_THOUGHTS = "thinking_token_budget"
_CAN_BE_UNSET = ("max_tokens", "seed", "stop", _MAX_THOUGHTS)

HELP = """\
/help                print this help
/exit                leave (Ctrl-D does the same)
/image PATH          send an image with the next question, to models that see
/stats               speed and token counts of the last answer
/metrics             all counters of the engine, as Prometheus text
/reset               forget the conversation
/set                 print the settings
/set key=value;...   change settings: temperature, top_p, frequency_penalty, presence_penalty,
                     max_tokens, seed, stop (several with commas), thinking_token_budget (tokens
                     a model may think before it answers); `none` unsets the last four;
                     thoughts (true or false: print what the model thinks before it answers)
/set response_format=FORMAT
                     the form of the next answers: text, json_object, or JSON as in requests,
                     such as {"type": "regex", "regex": "yes|no"}
Commands may be shortened (/st for /stats). Enter sends, Esc+Enter starts a new line, Ctrl-C stops
an answer. A text that begins with / is sent if a space comes first."""


class Leave(Exception):
    """The user asked to leave the chat."""


def run_command(line: str, dialogue: Dialogue, say: Callable[[str], None]) -> None:
    """Run the command `line` begins with, `/` included; `say` prints.

    Raises OptionError on an unknown command or a value it does not take, Leave on `/exit`.
    """
    name, _, argument = line.strip().partition(" ")
    command = _find_command(name)
    if argument.strip() and command not in ("/set", "/image"):
        raise OptionError(f"{command} takes no value, but was given {argument.strip()!r}")
    if command == "/help":
        say(HELP)
    elif command == "/exit":
        raise Leave
    elif command == "/image":
        _add_image(argument.strip(), dialogue)
        say("the image goes with the next question")
    elif command == "/stats":
        say(describe_stats(dialogue.session.last))
    elif command == "/metrics":
        say(dialogue.session.metrics_text().rstrip("\n"))
    elif command == "/reset":
        dialogue.reset()
        say("the conversation is forgotten")
    else:
        _change_settings(argument, dialogue)
        say(_describe_settings(dialogue))


def _describe_settings(dialogue: Dialogue) -> str:
    thoughts = str(dialogue.shows_thoughts).lower()
    budget = "none" if dialogue.max_thoughts is None else dialogue.max_thoughts
    return (
        f"{describe_params(dialogue.params, SETTINGS)}; {_MAX_THOUGHTS}={budget}; "
        f"{_THOUGHTS}={thoughts}; {_FORMAT}={dialogue.format}"
    )


def _find_command(name: str) -> str:
    """Return the command that `name` is or begins. Raises OptionError unless there is one."""
    commands = ("/help", "/exit", "/image", "/stats", "/metrics", "/reset", "/set")
    found = [name] if name in commands else [c for c in commands if c.startswith(name)]
    if not found:
        raise OptionError(f"there is no command {name}; known: {' '.join(commands)}")
    if len(found) > 1:
        raise OptionError(f"{name} may be {' or '.join(found)}; write more of it")
    return found[0]


def _add_image(text: str, dialogue: Dialogue) -> None:
    if not text:
        raise OptionError("/image needs the path of an image, as in /image photo.png")
    try:
        dialogue.add_image(Path(text).expanduser())
    except (ValueError, RuntimeError) as error:  # no such home, null bytes
        raise OptionError(f"/image {text!r} is not a path ({error})") from None


def _change_settings(text: str, dialogue: Dialogue) -> None:
    key, equals, value = text.partition("=")
    if key.strip() == _FORMAT and equals:
        # A setting of its own line: JSON may hold what parts others.
        dialogue.set_format(value.strip())
        return
    kinds = {**SETTINGS, _MAX_THOUGHTS: int, _THOUGHTS: bool}
    changes: dict[str, Any] = parse_settings(text, kinds, "/set", can_be_none=_CAN_BE_UNSET)
    shows_thoughts = changes.pop(_THOUGHTS, dialogue.shows_thoughts)
    max_thoughts = changes.pop(_MAX_THOUGHTS, dialogue.max_thoughts)
    if max_thoughts is not None and max_thoughts < 0:
        raise OptionError(f"/set: {_MAX_THOUGHTS} must be at least 0, not {max_thoughts}")
    if "stop" in changes:
        stop = (part.strip() for part in (changes["stop"] or "").split(","))
        changes["stop"] = tuple(part for part in stop if part)
    params = dataclasses.replace(dialogue.params, **changes)
    dialogue.set_max_thoughts(max_thoughts)
    dialogue.params = params
    dialogue.shows_thoughts = shows_thoughts
