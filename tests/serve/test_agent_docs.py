"""The examples of docs/agent_apis.md, run as they stand against a model that acts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from acting import NAME, served_actor
from test_agent_apis import ANSWER, script

PAGE = Path(__file__).resolve().parents[2] / "docs" / "agent_apis.md"


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    printed = []
    names: dict[str, Any] = {}
    with served_actor(script) as live:
        for block in blocks:
            source = block.replace("http://127.0.0.1:8000", live.url).replace('"demo"', repr(NAME))
            assert source != block
            exec(compile(source, str(PAGE), "exec"), names)
            printed.append(capsys.readouterr().out.strip())
        for client in ("client", "anthropic"):
            names[client].close()
    *first, counted = printed
    assert first == [ANSWER, "Hello.", "Rome", ANSWER]
    assert re.fullmatch(r"Hello\.\d{3,4}", counted)
