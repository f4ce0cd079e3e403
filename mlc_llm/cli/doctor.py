"""`mlc_llm doctor`: print what this machine and installation are, and what is wrong with them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from mlc_llm.errors import MlcError

if TYPE_CHECKING:
    from mlc_llm.cli.diagnosis import Finding


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what is here, what is wrong and how to mend it."""
    import dataclasses
    import json

    from mlc_llm.cli.diagnosis import examine

    findings = list(examine(os.environ))
    problems = [finding for finding in findings if finding.problem is not None]
    if as_json:
        report = {"ok": not problems, "findings": [dataclasses.asdict(f) for f in findings]}
        print(json.dumps(report, indent=2))
    else:
        _print_report(findings)
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise MlcError(f"{len(problems)} {noun} found: see above how to mend what is wrong")


def _print_report(findings: list[Finding]) -> None:
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            print(section)
        print(f"  {finding.name}: {finding.value}")
        if finding.problem is not None:
            print(f"    PROBLEM: {finding.problem}")
