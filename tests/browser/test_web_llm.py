"""The npm package @mlc-ai/web-llm, unchanged, loads what we compile, in headless Chromium.

WebGPU is SwiftShader's, which computes on the CPU and has no float16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from in_chromium import Browser
from web_models import greedy_text_on_the_cpu, link_in_seconds, make_web_model

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(1500)]

OPENING = "Once upon a time"


def chat(**options: Any) -> dict[str, Any]:
    """Return a call that goes on with the opening, greedily unless options say otherwise."""
    messages = [{"role": "user", "content": OPENING}]
    return {"method": "chat", "body": {"messages": messages, "temperature": 0, **options}}


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> Any:
    """Return a function: quantization -> a directory with the stories model for browsers."""
    made: dict[str, Path] = {}

    def make(quantization: str) -> Path:
        if quantization not in made:
            made[quantization] = tmp_path_factory.mktemp(quantization)
            make_web_model(stories260k, made[quantization], quantization)
        return made[quantization]

    return make


def test_greedy_text_equals_the_cpu(browser: Browser, make_model: Any, stories260k: Path) -> None:
    """The text is the one that libraries for CPUs are held to in acceptance/test_small_model.py."""
    expected = (stories260k / "expected.txt").read_text(encoding="utf-8")
    plain, streamed, stopped = browser.ask(
        make_model("q0f32"),
        [chat(max_tokens=32), chat(max_tokens=12, stream=True), chat(max_tokens=32, stop="girl")],
    )
    text = OPENING + plain["text"]
    assert len(text) > 60
    assert expected.startswith(text)
    assert plain["reason"] == "length"
    assert plain["usage"]["completion_tokens"] == 32
    assert streamed["text"] and plain["text"].startswith(streamed["text"])
    assert streamed["pieces"] >= 12
    assert stopped["text"] == plain["text"].partition("girl")[0]
    assert stopped["reason"] == "stop"


def test_settings_of_a_draw(browser: Browser, make_model: Any) -> None:
    form = {"type": "json_object", "schema": json.dumps({"enum": ["cat", "dog"]})}
    warm = {"max_tokens": 6, "temperature": 1, "top_p": 0.9}
    in_json, forced, drawn, again, plain, penalised = browser.ask(
        make_model("q4f32_1"),
        [
            chat(max_tokens=12, response_format=form),
            chat(max_tokens=3, logit_bias={"400": 100}),
            chat(**warm, seed=1),
            chat(**warm, seed=1),
            chat(max_tokens=6),
            chat(max_tokens=6, logit_bias={"400": 100}, frequency_penalty=2, presence_penalty=2),
        ],
    )
    assert json.loads(in_json["text"]) in ("cat", "dog")
    assert len(set(forced["text"].split())) == 1
    assert plain["text"].split()[0] != forced["text"].split()[0]
    assert drawn["text"] == again["text"] != ""
    # A bias of 100 outweighs all penalties.
    assert penalised["text"].startswith(forced["text"])


def test_quantized_text_equals_the_cpu(browser: Browser, make_model: Any, tmp_path: Path) -> None:
    model = make_model("q4f32_1")
    expected = greedy_text_on_the_cpu(model, tmp_path / "library", OPENING, 20)
    (answer,) = browser.ask(model, [chat(max_tokens=20)])
    assert OPENING + answer["text"] == expected


def test_a_model_links_in_seconds(browser: Browser, make_model: Any, tmp_path: Path) -> None:
    """Once the runtime is built. It takes 2 seconds of a processor, benchmarks/LOG.md."""
    assert link_in_seconds(make_model("q4f32_1"), tmp_path / "model.wasm") < 15
