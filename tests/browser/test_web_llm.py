"""The npm package @mlc-ai/web-llm, unchanged, loads what we compile, in headless Chromium.

WebGPU is SwiftShader's, which computes on the CPU and has no float16.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlc_llm.prepare.cache import CacheHome

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(1500)]

HERE = Path(__file__).parent
OPENING = "Once upon a time"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
Calls = list[dict[str, Any]]


def chat(**options: Any) -> dict[str, Any]:
    """Return a call that goes on with the opening, greedily unless options say otherwise."""
    messages = [{"role": "user", "content": OPENING}]
    return {"method": "chat", "body": {"messages": messages, "temperature": 0, **options}}


class Browser:
    """Asks models in a browser; programs are those it needs."""

    def __init__(self, node: str, chromium: str, modules: Path) -> None:
        self._command = [node, str(HERE / "ask_in_browser.mjs"), str(modules), chromium]

    def ask(self, model: Path, calls: Calls) -> list[dict[str, Any]]:
        """Return the answers of a model, a directory with `model.wasm`, to calls."""
        request = json.dumps({"model": str(model), "calls": calls})
        done = subprocess.run(
            [*self._command, request], capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads(done.stdout.splitlines()[-1])
        assert "error" not in result, f"{result['error']}\n{done.stderr[-2000:]}"
        answers: list[dict[str, Any]] = result["answers"]
        return answers


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    if shutil.which("emcc") is None:
        pytest.skip("Emscripten is not installed; `apt-get install emscripten` gets it")
    chromium = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if chromium is None:
        pytest.skip("no Chromium is installed; `apt-get install chromium` gets one")
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed; `apt-get install npm` gets both")
    modules = HERE / "node_modules"
    if not modules.is_dir():
        place = tmp_path_factory.mktemp("npm")
        shutil.copy(HERE / "package.json", place)
        install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(install, cwd=place, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            pytest.skip(f"npm cannot install the packages of {HERE / 'package.json'}")
        modules = place / "node_modules"
    return Browser(node, chromium, modules)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> Any:
    """Return a function: quantization -> a directory with the stories model for browsers."""
    from mlc_llm.artifact import read_chat_config
    from mlc_llm.compiler.compile import CompileOptions, compile_model
    from mlc_llm.prepare.progress import NullProgress
    from mlc_llm.prepare.resolve import convert_weights, write_chat_config_for

    made: dict[str, Path] = {}

    def make(quantization: str) -> Path:
        if quantization not in made:
            directory = tmp_path_factory.mktemp(quantization)
            write_chat_config_for(stories260k, directory, quantization=quantization)
            convert_weights(
                stories260k, directory, quantization=quantization, progress=NullProgress()
            )
            options = CompileOptions(device="webgpu")
            compiled = compile_model(read_chat_config(directory), options, lambda _: None)
            # The runtime takes minutes to build, so it is kept where users keep theirs.
            cache = CacheHome.from_environment(dict(os.environ)).root / "wasm_runtime"
            compiled.save(directory / "model.wasm", cache, lambda _: None)
            made[quantization] = directory
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
    from mlc_llm.artifact import read_chat_config
    from mlc_llm.compiler.compile import CompileOptions, compile_model
    from mlc_llm.engine.session import ChatSession, SamplingParams

    model, library = make_model("q4f32_1"), tmp_path / "library"
    options = CompileOptions(device="cpu", opt="O2;activations=float32")
    compile_model(read_chat_config(model), options, lambda _: None).save_objects(library)
    session = ChatSession.open(model, library)
    try:
        prompt = [1, *session.tokenizer.encode(OPENING)]
        greedy = SamplingParams(temperature=0, max_tokens=20)
        tokens = list(session.generate(prompt, greedy))
        expected = session.tokenizer.decode([*prompt, *tokens])
    finally:
        session.close()
    (answer,) = browser.ask(model, [chat(max_tokens=20)])
    assert OPENING + answer["text"] == expected
