"""Libraries for WebAssembly's CPU, where there is no GPU, run by node without a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_chromium import Browser
from web_models import make_web_model, open_on_the_cpu

from mlc_llm.errors import LibraryError
from mlc_llm.runtime.library import load_library

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(900)]

PROMPT = [1, 403, 407, 261, 378]
NUM_TOKENS = 24


@pytest.mark.parametrize("quantization", ["q0f32", "q4f16_1"])
def test_greedy_tokens_equal_the_cpu(
    browser: Browser, stories260k: Path, tmp_path: Path, quantization: str
) -> None:
    from mlc_llm.engine.session import SamplingParams

    model = tmp_path / "model"
    make_web_model(stories260k, model, quantization, device="wasm32")
    request = {"model": str(model), "prompt": PROMPT, "num_tokens": NUM_TOKENS}
    ran = browser.run("run_in_node.mjs", request, 600)
    session = open_on_the_cpu(model, tmp_path / "library", "O2")
    try:
        greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        expected = list(session.generate(PROMPT, greedy))
    finally:
        session.close()
    assert ran["isa"] == ["wasm32", "wasm", "simd128"]
    assert len(expected) == NUM_TOKENS
    if quantization == "q0f32":
        assert ran["tokens"] == expected
    else:
        # Sums of int8 products are exact, but those of groups are in another order.
        assert ran["tokens"][:8] == expected[:8]
    with pytest.raises(LibraryError, match=r"model\.wasm cannot be loaded"):
        load_library(model / "model.wasm")
