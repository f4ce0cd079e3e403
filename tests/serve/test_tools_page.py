"""docs/tools.md: its examples run as they stand, its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from agents import TOOLS, agent_server

from mlc_llm.text.reasoning import reasoning_names
from mlc_llm.text.tool_calls.registry import detect_format, format_names, get_format
from mlc_llm.text.tool_calls.tools import Tool, WrittenCall
from mlc_llm.text.tool_prompt import ToolPrompts

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    call = get_format("hermes").shape.write([WrittenCall("get_weather", '{"city": "Paris"}')])
    with agent_server("hermes", [call, "It is sunny."]) as (client, _):
        scope: dict[str, Any] = {}
        url = str(client.base_url).rstrip("/")
        examples = blocks("python")
        assert len(examples) == 4
        for example in examples:
            exec(example.replace("http://127.0.0.1:8000/v1", url), scope)
    scope["client"].close()
    assert capsys.readouterr().out.splitlines() == [
        "It is sunny.",
        "get_weather",
        """{0: '{"city": "Paris"}'}""",
        "None",
    ]
    assert scope["messages"][-2]["content"] == "sunny in Paris"


def test_every_format_is_in_the_table() -> None:
    table = PAGE.split("## Formats")[1].split("\n\n")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(format_names())
    assert all(f"(`{name}`)" in PAGE for name in reasoning_names())


def test_quoted_prompt_is_what_a_model_without_tools_is_told() -> None:
    function = dict(TOOLS[0]["function"], description="Tells the weather of a city.")
    prompts = ToolPrompts(detect_format("{{ messages }}", ""), None, None)
    fitted = prompts.fit([], [Tool("get_weather", function["description"], function["parameters"])])
    [block] = blocks("text")
    told = re.sub(
        r'("parameters": ).*\}\}$', r"\1{...}}", fitted.messages[0]["content"], flags=re.M
    )
    assert told == block.strip()
