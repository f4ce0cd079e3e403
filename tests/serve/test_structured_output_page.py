"""docs/structured_output.md: its examples run as they stand, its lists are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from fakes import Logits
from served import TOKENIZER, VOCAB_SIZE, served

from mlc_llm.serve.protocol import response_format
from mlc_llm.text.grammars import limits, schema, source

PAGE = Path(__file__).resolve().parents[2] / "docs" / "structured_output.md"
TEXT = PAGE.read_text(encoding="utf-8")


def terse(tokens: list[int]) -> Logits:
    """Return logits of noise that ends what it may end."""
    rng = np.random.default_rng([len(tokens), *tokens[-3:]])
    logits = rng.normal(size=VOCAB_SIZE).astype(np.float32)
    for text in ('"', "]", "}", ","):
        logits[TOKENIZER.encode(text)[0]] += 6
    return logits


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(examples) == 3
    scope: dict[str, Any] = {"__name__": "page"}
    with served(context=4096, num_pages=512) as server:
        server.runner.logits_of = terse
        for example in examples:
            exec(example.replace("http://127.0.0.1:8000", server.url), scope)
        scope["client"].close()
    assert capsys.readouterr().out.splitlines() == [
        "Traveller",
        "['mood', 'room']",
        "yes",
        "7",
        "(",
    ]


def test_every_format_is_in_the_table() -> None:
    members = get_args(get_args(response_format.ResponseFormat)[0])
    kinds = {get_args(member.model_fields["type"].annotation)[0] for member in members}
    assert set(re.findall(r'^\| `\{"type": "(\w+)"', TEXT, re.MULTILINE)) == kinds


def test_keywords_are_those_of_the_code() -> None:
    section = TEXT.split("## JSON")[1].split("## With")[0]
    table, rest = section.split("\n\n`title`")
    enforced = {
        *schema._SCHEMAS,
        *schema._LISTS_OF_SCHEMAS,
        *schema._MAPS_OF_SCHEMAS,
        *schema._CHECKS,
        *("enum", "const", "$ref", "format"),
    }
    rows = "".join(line for line in table.splitlines(True) if line.startswith("| "))
    assert set(re.findall(r"`([$\w]+)`", rows)) == enforced
    assert all(f"`{name}`" in f"`title`{rest}" for name in schema.ANNOTATIONS)
    assert ", ".join(schema.FORMATS) in table


def test_limits_are_those_of_the_code() -> None:
    section = TEXT.split("## Limits")[1]
    for limit in (
        schema.MAX_SOURCE_CHARS,
        schema.MAX_DEPTH,
        schema.MAX_VALUES,
        schema.MAX_ENUM_VALUES,
        schema.MAX_PROPERTIES,
        source.MAX_CHOICES,
    ):
        assert f"{limit:,}" in section
    assert limits.TIME_LIMIT_S == 1 and "than a second of processor time" in section
