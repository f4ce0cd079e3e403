"""The documented lines, run on a real small model from its files to its answers."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save_file

from mlc_llm import AsyncMLCEngine, MLCEngine
from mlc_llm.callback import StreamToStdout
from mlc_llm.chat_module import ChatModule, GenerationConfig
from mlc_llm.errors import EngineStopped, ModelNotFound, RequestError
from mlc_llm.serve import EngineConfig, PopenServer

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "python"
CHECKPOINT = "model.safetensors"
OPENING = "Once upon a time"
MESSAGES: list[Any] = [{"role": "user", "content": OPENING}]
GREEDY = {"temperature": 0, "max_tokens": 20}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, so that the model is converted and compiled once, here."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("home")
        patch.setenv("MLC_LLM_HOME", str(path))
        for name in ("MLC_JIT_POLICY", "MLC_DOWNLOAD_CACHE_POLICY"):
            patch.delenv(name, raising=False)
        yield path


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def engine(home: Path, stories260k: Path, told: list[str]) -> Iterator[MLCEngine]:
    with MLCEngine(
        str(stories260k),
        quantization="q0f32",
        embedding_model=stories260k,
        progress=told.append,
        engine_config=EngineConfig(max_num_sequence=8),
    ) as engine:
        yield engine


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_known_model_tells_its_known_story(engine: MLCEngine, stories260k: Path) -> None:
    expected = (stories260k / "expected.txt").read_text()
    answer = engine.completions.create(
        prompt=[1], temperature=0, max_tokens=200, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == expected
    assert answer.usage.completion_tokens == 200


def test_what_was_made_is_told(engine: MLCEngine, told: list[str]) -> None:
    assert any("Compiling" in line for line in told)
    assert any("KV" in line for line in told), "the memory plan"


def test_chat_whole_and_streamed(engine: MLCEngine) -> None:
    create = engine.chat.completions.create
    whole = create(messages=MESSAGES, **GREEDY).choices[0]
    assert whole.message.content and whole.finish_reason in ("length", "stop")
    assert text_of(create(messages=MESSAGES, stream=True, **GREEDY)) == whole.message.content


def test_n_and_seed(engine: MLCEngine) -> None:
    create = engine.chat.completions.create
    fields = {"messages": MESSAGES, "n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 16}
    texts = [choice.message.content for choice in create(**fields).choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in create(**fields).choices] == texts


def test_stop_strings(engine: MLCEngine) -> None:
    create = engine.completions.create
    text = create(prompt=OPENING, **GREEDY).choices[0].text
    stop = text.split()[3]
    choice = create(prompt=OPENING, stop=stop, **GREEDY).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == text[: text.index(stop)]


def test_many_at_once_equal_one_alone(engine: MLCEngine) -> None:
    prompts = [OPENING, "Lily", "The big dog", "One day"]
    alone = [
        engine.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in prompts
    ]
    together = engine.completions.create(prompt=prompts, **GREEDY)
    assert [choice.text for choice in together.choices] == alone


def test_leaving_a_stream_and_aborting(engine: MLCEngine) -> None:
    create = engine.completions.create
    endless = {"prompt": OPENING, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    for _ in create(**endless, stream=True):
        break
    stream = create(**endless, stream=True, request_id="mine")
    next(stream)
    engine.abort("mine")
    assert sum(1 for _ in stream) < 390
    assert create(prompt=OPENING, **GREEDY).choices[0].text


def test_embeddings(engine: MLCEngine) -> None:
    answer = engine.embeddings.create(input=["a big dog", "a big dog", "the end"])
    first, again, other = (np.asarray(item.embedding) for item in answer.data)
    np.testing.assert_array_equal(first, again)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert first @ other < 0.999


def test_metrics(engine: MLCEngine) -> None:
    engine.completions.create(prompt=OPENING, **GREEDY)
    metrics = engine.metrics()
    assert metrics["completion_tokens_sum"] >= 20
    assert "# TYPE mlc_llm_" in metrics.prometheus_text()


def test_the_asynchronous_engine(home: Path, engine: MLCEngine, stories260k: Path) -> None:
    expected = engine.chat.completions.create(messages=MESSAGES, **GREEDY)

    async def ask() -> None:
        config = EngineConfig(verbose=False)
        async with AsyncMLCEngine(
            stories260k, quantization="q0f32", mode="server", engine_config=config
        ) as other:
            create = other.chat.completions.create
            answers = await asyncio.gather(*(create(messages=MESSAGES, **GREEDY) for _ in range(3)))
            assert {answer.choices[0].message.content for answer in answers} == {
                expected.choices[0].message.content
            }
            stream = await create(messages=MESSAGES, stream=True, **GREEDY)
            assert (
                text_of([chunk async for chunk in stream]) == answers[0].choices[0].message.content
            )
        with pytest.raises(EngineStopped):
            await create(messages=MESSAGES)

    asyncio.run(ask())


def test_an_adapter_is_merged(
    home: Path, engine: MLCEngine, stories260k: Path, tmp_path: Path
) -> None:
    module, tensors = "model.layers.0.self_attn.o_proj", load_file(stories260k / CHECKPOINT)
    weight = tensors[f"{module}.weight"].astype(np.float32)
    rng = np.random.default_rng(5)
    down = rng.standard_normal((2, weight.shape[1])).astype(np.float32)
    up = rng.standard_normal((len(weight), 2)).astype(np.float32)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    parts = {
        f"base_model.model.{module}.lora_{part}.weight": a
        for part, a in zip("AB", (down, up), strict=True)
    }
    save_file(parts, adapter / "adapter_model.safetensors")
    shutil.copytree(stories260k, merged)
    save_file({**tensors, f"{module}.weight": weight + up @ down}, merged / CHECKPOINT)

    def answer(model: Path, **options: Any) -> str:
        options |= {"quantization": "q0f32", "progress": lambda _: None}
        with MLCEngine(model, **options) as other:
            return str(other.completions.create(prompt=OPENING, **GREEDY).choices[0].text)

    expected = answer(merged)
    assert expected != engine.completions.create(prompt=OPENING, **GREEDY).choices[0].text
    assert answer(stories260k, lora_adapter=adapter) == expected
    assert answer(stories260k, lora_adapter=str(adapter)) == expected
    with pytest.raises(ModelNotFound, match=r"adapter_config\.json"):
        MLCEngine(stories260k, lora_adapter=tmp_path)


def test_chat_module(
    home: Path, stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlc_llm.cli.main import main

    library = tmp_path / "lib.so"
    flags = ["--quantization", "q0f32", "-o", str(tmp_path / "dist")]
    assert main(["gen_config", str(stories260k), *flags]) == 0
    assert main(["convert_weight", str(stories260k), *flags]) == 0
    assert main(["compile", str(tmp_path / "dist"), "-o", str(library)]) == 0
    capsys.readouterr()
    module = ChatModule(model=str(tmp_path / "dist"), model_lib_path=library)
    try:
        settings = GenerationConfig(temperature=0, max_gen_len=20)
        answer = module.generate(OPENING, settings, StreamToStdout(callback_interval=2))
        assert capsys.readouterr().out == answer + "\n"
        assert "tok/s" in module.stats()
        module.reset_chat()
        assert module.generate(OPENING, settings) == answer
    finally:
        module.close()


@pytest.mark.parametrize("name", ["chat", "many_requests", "embeddings"])
def test_examples_run(
    home: Path,
    stories260k: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(stories260k)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_mistakes_are_told_in_our_words(home: Path, stories260k: Path) -> None:
    with pytest.raises(ModelNotFound):
        MLCEngine("no/such/model/here")
    with pytest.raises(ModelNotFound, match=r"lib\.so does not exist"):
        MLCEngine(stories260k, model_lib="lib.so")


def test_an_engine_without_embeddings_says_so(home: Path, stories260k: Path) -> None:
    with MLCEngine(stories260k, quantization="q0f32", progress=lambda _: None) as engine:
        with pytest.raises(RequestError, match="embedding"):
            engine.embeddings.create(input="hello")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def readme_programs() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_client_of_the_readme(home: Path, stories260k: Path) -> None:
    (program,) = (text for text in readme_programs() if "OpenAI(" in text)
    port = free_port()
    arguments = ["--quantization", "q0f32", "--model-id", "demo"]
    with PopenServer(str(stories260k), port=port, arguments=arguments):
        names: dict[str, Any] = {}
        exec(program.replace(":8000/", f":{port}/"), names)
        names["client"].close()
    assert names["answer"].choices[0].message.content


def test_the_engine_of_the_readme(
    home: Path, stories260k: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = (text for text in readme_programs() if "MLCEngine(" in text)
    changed = re.sub(r'MLCEngine\("[^"]+"\)', f"MLCEngine({str(stories260k)!r})", program)
    assert changed != program
    exec(changed, {})
    assert capsys.readouterr().out.strip()


def test_a_server_as_a_child_process(home: Path, stories260k: Path) -> None:
    port = free_port()
    arguments = ["--quantization", "q0f32", "--embedding-model", str(stories260k)]
    with PopenServer(str(stories260k), port=port, arguments=arguments) as server:
        with openai.OpenAI(base_url=server.openai_v1_base_url, api_key="none") as client:
            answer = client.chat.completions.create(
                model=str(stories260k), messages=MESSAGES, **GREEDY
            )
            assert answer.choices[0].message.content
            # The client asks for base64 and decodes it.
            vectors = client.embeddings.create(model=str(stories260k), input=["a dog", "a cat"])
            assert np.linalg.norm(vectors.data[1].embedding) == pytest.approx(1, abs=1e-5)
            assert vectors.usage.total_tokens > 2
