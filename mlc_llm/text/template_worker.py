"""Child process that renders chat templates, so that a hostile one can be stopped from outside.

Run by path with `python -I -S`, never imported. Speaks frames (4 bytes of length, then JSON) on
stdin and stdout. Knows Jinja as chat templates use it, and nothing of models or of mlc_llm.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

MAX_MESSAGE_CHARS = 2000

# Isolated mode leaves out user directories and PYTHONPATH; the parent says where its Jinja is.
sys.path.extend(sys.argv[2:])

import jinja2  # noqa: E402
from jinja2 import nodes  # noqa: E402
from jinja2.exceptions import SecurityError, TemplateError  # noqa: E402
from jinja2.ext import Extension, loopcontrols  # noqa: E402
from jinja2.parser import Parser  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402


class Refusal(TemplateError):
    """The template itself refuses the messages, by `raise_exception`."""


class TooMuchText(Exception):
    """The template writes more than it may."""


class GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's text for training: its content stays."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what is inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class StrictSandbox(ImmutableSandboxedEnvironment):
    """The sandbox, but touching a forbidden attribute is an error, not an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse the access."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} is not for it")


def make_environment() -> jinja2.Environment:
    """Return the environment chat templates are written for."""
    environment = StrictSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as the model saw it in training: Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: Any) -> NoReturn:
    """Refuse the messages, in the template's words."""
    raise Refusal(str(message))


def strftime_now(form: str) -> str:
    """Return the local time in the given form."""
    return datetime.now().strftime(form)


def render(environment: jinja2.Environment, request: dict[str, Any]) -> dict[str, str]:
    """Return {"text": ...}, {"refusal": ...} or {"error": ...}."""
    try:
        template = compile_template(environment, request["source"])
        pieces = template.generate(request["variables"])
        return {"text": join_up_to(pieces, request["max_output_chars"])}
    except Refusal as error:
        return {"refusal": str(error)[:MAX_MESSAGE_CHARS]}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"[:MAX_MESSAGE_CHARS]}
    except TooMuchText:
        return {"error": f"it writes more than {request['max_output_chars']:,} characters"}
    except MemoryError:
        return {"error": "it needs more memory than a template may use"}
    except RecursionError:
        return {"error": "it nests or calls itself without end"}
    # All a template's expressions can raise; anything else ends this process, which the parent
    # reports just as well.
    except (
        TemplateError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        return {"error": f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS]}


@functools.lru_cache(maxsize=1)
def compile_template(environment: jinja2.Environment, source: str) -> jinja2.Template:
    """Compile the template, once as long as it stays the same."""
    return environment.from_string(source)


def join_up_to(pieces: Iterable[str], max_chars: int) -> str:
    """Join the pieces. Raises TooMuchText as soon as they are more than `max_chars` long."""
    taken, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > max_chars:
            raise TooMuchText
        taken.append(piece)
    return "".join(taken)


def limit_process(memory_limit_bytes: int) -> None:
    """Bound memory where the system can; let the process write no file and leave no core dump."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; time and output stay bounded there
        return
    for kind, limit in (
        (resource.RLIMIT_AS, memory_limit_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # macOS refuses some
            continue


def set_alarm(seconds: float) -> None:
    """Let the system end this process after a time, should the parent be gone; 0 for never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """Return the next request, or None when the parent closed the pipe."""
    head = stream.read(4)
    body = stream.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
    request: dict[str, Any] | None = json.loads(body) if body else None
    return request


def write_frame(stream: BinaryIO, reply: dict[str, str]) -> None:
    """Send a reply."""
    body = json.dumps(reply).encode()
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.environ.clear()  # access tokens are none of a template's business
    environment = make_environment()
    limit_process(int(sys.argv[1]))
    write_frame(sys.stdout.buffer, {"ready": jinja2.__version__})
    while (request := read_frame(sys.stdin.buffer)) is not None:
        set_alarm(request["timeout_s"] + 1)
        reply = render(environment, request)
        write_frame(sys.stdout.buffer, reply)
        set_alarm(0)


if __name__ == "__main__":
    main()
