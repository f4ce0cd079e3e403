"""Says whether values fit a JSON Schema: the package jsonschema, and the formats it leaves open.

Knows nothing of how answers are made.
"""

from __future__ import annotations

import re
from datetime import date, time
from typing import Any

import jsonschema

_NAME = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# RFC 1123, RFC 3339 (appendix A for durations) and RFC 3986.
_HOSTNAME = re.compile(rf"(?=.{{1,253}}$){_NAME}(\.{_NAME})*")
_TIME = re.compile(r"(\d\d:\d\d):(\d\d)(\.\d+)?(z|[+-](\d\d:\d\d))", re.IGNORECASE)
_DAY_PARTS = r"(\d+Y(\d+M(\d+D)?)?|\d+M(\d+D)?|\d+D)"
_TIME_PARTS = r"T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S)"
_DURATION = re.compile(rf"P({_DAY_PARTS}({_TIME_PARTS})?|{_TIME_PARTS}|\d+W)")
_URI_CHAR = r"[A-Za-z0-9._~!$&'()*+,;=:@%/?\[\]-]"
_URI = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*:{_URI_CHAR}*(#[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?")

CHECKER = jsonschema.FormatChecker()
CHECKER.checkers = dict(jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers)


def _checks(pattern: re.Pattern[str]) -> Any:
    return lambda value: not isinstance(value, str) or pattern.fullmatch(value) is not None


def _is_time(value: Any) -> bool:
    if not isinstance(value, str):
        return True
    found = _TIME.fullmatch(value)
    if found is None or int(found[2]) > 60:
        return False
    time.fromisoformat(found[1])
    return found[5] is None or time.fromisoformat(found[5]) is not None


def _is_date_time(value: Any) -> bool:
    if not isinstance(value, str):
        return True
    date.fromisoformat(value[:10])
    return value[10:11] in ("T", "t", " ") and _is_time(value[11:])


for name, check in (
    ("hostname", _checks(_HOSTNAME)),
    ("duration", _checks(_DURATION)),
    ("uri", _checks(_URI)),
    ("time", _is_time),
    ("date-time", _is_date_time),
):
    CHECKER.checkers[name] = (check, ValueError)


def find_error(schema: Any, value: Any) -> str | None:
    """Return why a value does not fit a schema, None where it does."""
    judge = jsonschema.Draft202012Validator(schema, format_checker=CHECKER)
    error = next(judge.iter_errors(value), None)
    return None if error is None else error.message
