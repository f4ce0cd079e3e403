#!/usr/bin/env python3
"""Write docs/cli.md from the program itself; tests/cli/test_docs.py checks that it was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer.main

from mlc_llm.cli.chat_commands import HELP
from mlc_llm.cli.main import build_app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"

_HEAD = """\
# Command line

This page is made by `scripts/cli_docs.py` from the program; do not edit it.
`python -m mlc_llm` is the same as `mlc_llm`.

Exit codes: 0 done, 1 something does not work (model, device, download, request), 2 a wrong option
or value, 70 a fault in mlc_llm itself, 130 Ctrl-C, 141 the reader of the output has gone. An error
is one message on stderr; `MLC_LLM_DEBUG=1` adds the traceback.
"""


def render_page() -> str:
    """Return the whole page."""
    group: Any = typer.main.get_command(build_app())
    sections = [_section(name, command) for name, command in group.commands.items()]
    commands = f"## Inside a chat\n\n```text\n{HELP}\n```\n"
    return "\n".join([_HEAD, *sections, commands])


def _section(name: str, command: Any) -> str:
    shown = [p for p in command.params if not p.hidden and p.name != "help"]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    usage = ["mlc_llm", name]
    usage += [p.metavar if p.required else f"[{p.metavar}]" for p in arguments]
    usage += [f"{p.opts[0]} {p.metavar}" for p in options if p.required]
    usage += ["[OPTIONS]"] if any(not p.required for p in options) else []
    lines = [f"## {name}", "", command.help, "", f"Usage: `{' '.join(usage)}`", ""]
    if shown:
        lines += ["| | | default |", "|---|---|---|"]
        lines += [f"| `{_name_of(p)}` | {_cell(p.help)} | {_default_of(p)} |" for p in shown]
        lines.append("")
    return "\n".join(lines)


def _name_of(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return f"{names} {parameter.metavar}" if parameter.metavar else names


def _default_of(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, "", False) else f"`{parameter.default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
