"""Accidents in processes of their own: Ctrl-C and a full disk while converting; a terminal."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from program import Program

from mlc_llm.artifact import read_tensor_index
from mlc_llm.errors import ModelNotFound

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def long_work(tmp_path: Path) -> Path:
    """A checkpoint that takes seconds to convert: zeros, stored as holes that take no disk."""
    hidden, middle = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    shapes = {"model.embed_tokens": [512, hidden], "model.norm": [hidden]}
    for layer in range(LLAMA["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part in "qkvo":
            shapes[f"{prefix}self_attn.{part}_proj"] = [hidden, hidden]
        shapes[f"{prefix}mlp.gate_proj"] = shapes[f"{prefix}mlp.up_proj"] = [middle, hidden]
        shapes[f"{prefix}mlp.down_proj"] = [hidden, middle]
        shapes[f"{prefix}input_layernorm"] = [hidden]
        shapes[f"{prefix}post_attention_layernorm"] = [hidden]
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        entries[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + offset)
    return directory


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


def take_interrupts() -> None:
    """Undo what shells do to their background jobs, which ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupted_conversion(program: Program, long_work: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ("convert_weight", long_work, "--quantization", "q4f16_1", "-o", output)
    process = program.start(*command, stderr=subprocess.PIPE, preexec_fn=take_interrupts)
    with process:
        first = output / ".convert" / "params_shard_0.bin"
        wait_for(first, process)
        process.send_signal(signal.SIGINT)
        message = process.stderr.read().decode()
    assert process.returncode == 130
    assert message.splitlines()[-1] == "interrupted"
    assert "Traceback" not in message
    # What is there is not taken for a model,
    with pytest.raises(ModelNotFound, match="has no weights"):
        read_tensor_index(output)
    program.refuse("chat", output, "--prompt", "hi", words="is not a model")
    finished = first.stat()
    # and the next run goes on from it.
    program.must_run(*command)
    assert read_tensor_index(output).records
    kept = (output / "params_shard_0.bin").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)
    assert not first.parent.exists()


def limit_files() -> None:
    """Let no file of this process grow beyond 200 kB, as a disk without room would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def test_full_disk(program: Program, stories260k: Path, tmp_path: Path) -> None:
    environment = {**program.environment, "MLC_LLM_HOME": str(tmp_path / "home")}
    command = ("chat", stories260k, "--quantization", "q0f32", "--prompt", "hi")
    program.refuse(*command, words="cannot write to", env=environment, preexec_fn=limit_files)
    converted = tmp_path / "home" / "model_weights" / "local"
    assert [path.suffix for path in converted.iterdir() if path.is_dir()] == [".partial"]
    assert not list(converted.rglob("*.bin"))
    output = ("convert_weight", stories260k, "--quantization", "q0f32", "-o", converted / "again")
    program.must_run(*output, env=environment)


class Terminal:
    """The other end of a terminal: what a person sees and types."""

    # What the line editor sends when it begins to read a line.
    READY = b"\x1b[?2004h"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._shown = b""

    def wait_for(self, words: bytes) -> None:
        """Read until `words` are shown; what came before them is forgotten."""
        deadline = time.monotonic() + 60
        while words not in self._shown:
            left_s = deadline - time.monotonic()
            ready, _, _ = select.select([self._descriptor], [], [], max(left_s, 0))
            assert ready, f"no {words!r} in {self._shown!r}"
            self._shown += os.read(self._descriptor, 4096)
        self._shown = self._shown.partition(words)[2]

    def enter(self, line: str) -> None:
        """Type a line when it is asked for."""
        self.wait_for(self.READY)
        os.write(self._descriptor, line.encode() + b"\r")


@pytest.mark.cpu
def test_dialogue_on_a_terminal(program: Program, stories260k: Path) -> None:
    descriptor, other_end = pty.openpty()
    command = ("chat", stories260k, "--quantization", "q0f32")
    environment = {**program.environment, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    streams = {"stdin": other_end, "stdout": other_end, "stderr": other_end}
    process = program.start(*command, **streams, env=environment)
    os.close(other_end)
    terminal = Terminal(descriptor)
    try:
        terminal.enter("/set temperature=hot")
        terminal.wait_for(b"error: ")
        terminal.wait_for(b"temperature must be a number, not 'hot'")
        terminal.enter("/set temperature=0;max_tokens=12")
        terminal.enter("Once upon a time")
        terminal.wait_for(b"there was a little girl")
        terminal.enter("/stats")
        terminal.wait_for(b"decode: ")
        terminal.wait_for(b"tok/s")
        terminal.enter("/exit")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(descriptor)
