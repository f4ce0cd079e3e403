"""Models for browsers, and what libraries for CPUs answer with the same weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlc_llm.prepare.cache import CacheHome


def compile_for(model: Path, device: str, opt: str = "O2") -> Any:
    """Compile the model of an artifact and return the library in memory."""
    from mlc_llm.artifact import read_chat_config
    from mlc_llm.compiler.compile import CompileOptions, compile_model

    options = CompileOptions(device=device, opt=opt)
    return compile_model(read_chat_config(model), options, lambda _: None)


def runtime_cache() -> Path:
    """Return where the runtime is kept; it takes minutes to build, so it is where users' is."""
    return CacheHome.from_environment(dict(os.environ)).root / "wasm_runtime"


def make_web_model(
    source: Path, directory: Path, quantization: str, device: str = "webgpu"
) -> None:
    """Convert a model into a directory, with its library as WebAssembly, `model.wasm`."""
    from mlc_llm.prepare.progress import NullProgress
    from mlc_llm.prepare.resolve import convert_weights, write_chat_config_for

    limits = {"context_window_size": 512}
    write_chat_config_for(source, directory, quantization=quantization, overrides=limits)
    convert_weights(source, directory, quantization=quantization, progress=NullProgress())
    compiled = compile_for(directory, device)
    compiled.save(directory / "model.wasm", runtime_cache(), lambda _: None)


def link_in_seconds(model: Path, path: Path) -> float:
    """Link a model again, whose runtime is built, and return the seconds that it computed.

    These are of a processor: others may use the machine meanwhile.
    """
    compiled = compile_for(model, "webgpu")
    before = os.times()
    compiled.save(path, runtime_cache(), lambda _: None)
    after = os.times()
    assert path.read_bytes()[:4] == b"\0asm"
    return sum(after[:4]) - sum(before[:4])


def open_on_the_cpu(model: Path, library: Path, opt: str = "O2;activations=float32") -> Any:
    """Return a session with an artifact on this CPU; activations are exact, as on GPUs."""
    from mlc_llm.engine.session import ChatSession

    compile_for(model, "cpu", opt).save_objects(library)
    return ChatSession.open(model, library)


def greedy_text_on_the_cpu(model: Path, library: Path, opening: str, max_tokens: int) -> str:
    """Return an opening and what is likeliest to follow."""
    from mlc_llm.engine.session import SamplingParams

    session = open_on_the_cpu(model, library)
    try:
        prompt = [1, *session.tokenizer.encode(opening)]
        greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
        return str(session.tokenizer.decode([*prompt, *session.generate(prompt, greedy)]))
    finally:
        session.close()
