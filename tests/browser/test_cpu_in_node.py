"""Libraries for WebAssembly's CPU, where there is no GPU, run by node without a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_chromium import Browser
from web_models import make_web_model, open_on_the_cpu

from mlc_llm.errors import LibraryError
from mlc_llm.runtime.library import load_library
from mlc_llm.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(900)]

NUM_TOKENS = 24


def tokens_in_node(browser: Browser, model: Path, prompt: list[int]) -> list[int]:
    """Return what is likeliest to follow a prompt."""
    request = {"model": str(model), "prompt": prompt, "num_tokens": NUM_TOKENS}
    ran = browser.run("run_in_node.mjs", request, 600)
    assert ran["isa"] == ["wasm32", "wasm", "simd128"]
    tokens: list[int] = ran["tokens"]
    assert len(tokens) == NUM_TOKENS
    return tokens


def test_greedy_text_equals_the_cpu(browser: Browser, stories260k: Path, tmp_path: Path) -> None:
    """The text is the one that libraries for CPUs are held to in acceptance/test_small_model.py."""
    make_web_model(stories260k, tmp_path, "q0f32", device="wasm32")
    text = Tokenizer.load(tmp_path).decode(tokens_in_node(browser, tmp_path, [1]))
    assert len(text) > 40
    assert (stories260k / "expected.txt").read_text(encoding="utf-8").startswith(text)
    with pytest.raises(LibraryError, match=r"model\.wasm cannot be loaded"):
        load_library(tmp_path / "model.wasm")


def test_quantized_tokens_equal_the_cpu(
    browser: Browser, stories260k: Path, tmp_path: Path
) -> None:
    from mlc_llm.engine.session import SamplingParams

    model, prompt = tmp_path / "model", [1, 403, 407, 261, 378]
    make_web_model(stories260k, model, "q4f16_1", device="wasm32")
    tokens = tokens_in_node(browser, model, prompt)
    session = open_on_the_cpu(model, tmp_path / "library", "O2")
    try:
        greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        expected = list(session.generate(prompt, greedy))
    finally:
        session.close()
    # Sums of int8 products are exact, but those of groups are in another order.
    assert tokens[:8] == expected
