"""SmolLM2 in stock web-llm, in headless Chromium: `make browser` runs it.

WebGPU that computes on the CPU takes 12 seconds for each of its tokens, so it is kept out of
`make test`, answers are of a few tokens, and what needs more is tried on a smaller model in
`test_web_llm.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from in_chromium import Browser
from web_models import link_in_seconds, make_web_model, open_on_the_cpu

pytestmark = [pytest.mark.weights, pytest.mark.cpu, pytest.mark.timeout(3600)]

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def chat(**options: Any) -> dict[str, Any]:
    return {"method": "chat", "body": {"messages": MESSAGES, "temperature": 0, **options}}


@pytest.fixture(scope="module")
def model(browser: Browser, demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smol")
    make_web_model(demo_gguf, directory, "q4f32_1")
    return directory


def test_answers_are_those_of_the_cpu(browser: Browser, model: Path, tmp_path: Path) -> None:
    from mlc_llm.engine.session import SamplingParams

    session = open_on_the_cpu(model, tmp_path / "library")
    try:
        greedy = SamplingParams(temperature=0, max_tokens=2)
        expected = "".join(piece.text for piece in session.chat(MESSAGES, greedy))
    finally:
        session.close()
    form = {"type": "json_object", "schema": json.dumps({"enum": [1, 2]})}
    plain, streamed, in_json = browser.ask(
        model,
        [
            chat(max_tokens=2),
            chat(max_tokens=4, stream=True, stop=[" capital"]),
            chat(max_tokens=4, response_format=form),
        ],
        timeout_s=3000,
    )
    assert expected == plain["text"] == "The capital"
    assert (plain["reason"], plain["usage"]["completion_tokens"]) == ("length", 2)
    assert (streamed["text"], streamed["reason"]) == ("The", "stop")
    assert json.loads(in_json["text"]) in (1, 2)


def test_it_links_in_seconds(browser: Browser, model: Path, tmp_path: Path) -> None:
    assert link_in_seconds(model, tmp_path / "model.wasm") < 15
