"""Child process that renders chat templates, so that a hostile one can be stopped from outside.

Run by path with `python -I -S`, never imported; speaks as child.py does. Knows Jinja as chat
templates use it, and nothing of models.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NoReturn

MAX_MESSAGE_CHARS = 2000

# Isolated mode leaves out user directories and PYTHONPATH; the parent says where its packages are.
sys.path.extend(sys.argv[2:])

import jinja2  # noqa: E402
from jinja2 import nodes  # noqa: E402
from jinja2.exceptions import SecurityError, TemplateError  # noqa: E402
from jinja2.ext import Extension, loopcontrols  # noqa: E402
from jinja2.parser import Parser  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402

from mlc_llm.text.child import serve  # noqa: E402


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


if __name__ == "__main__":
    _ENVIRONMENT = make_environment()
    serve(functools.partial(render, _ENVIRONMENT), int(sys.argv[1]), {"ready": jinja2.__version__})
