"""The demo model from its GGUF file to an answer: the right words, in time, in little memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from demo_model import place_demo_model
from program import Program

pytestmark = [pytest.mark.cpu, pytest.mark.weights]

QUESTION = "What is the capital of France?"
# fmt: off
PROMPT_IDS = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407,
    19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531,
    198,
]
# fmt: on
ANSWER_IDS = [504, 3575, 282, 4649, 314, 7042, 30, 2]

# A small process between: on Linux the memory of whoever starts a process counts as its own.
_MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(done.returncode, peak // (1 << 20 if sys.platform == "darwin" else 1 << 10))
"""


def peak_mib(program: Program, *arguments: str | Path) -> int:
    """Run one command line and return the MiB it held at most."""
    command = [sys.executable, "-m", "mlc_llm", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command],
        env=program.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    code, peak = done.stdout.split()
    assert code == "0", done.stderr
    return int(peak)


def test_the_demo_answers_and_is_fast_the_second_time(program: Program, demo_gguf: Path) -> None:
    place_demo_model(program, demo_gguf)
    assert "Paris" in program.must_run("chat", "--prompt", QUESTION)
    start = time.perf_counter()
    process = program.start(
        "chat",
        "--prompt",
        QUESTION,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        first = process.stdout.read(1)
        waited_s = time.perf_counter() - start
        answer = first + process.stdout.read()
        assert process.stderr.read() == b""  # nothing had to be made
    assert process.returncode == 0
    assert b"Paris" in answer
    assert waited_s < 3


def test_greedy_ids_in_float32(program: Program, demo_gguf: Path) -> None:
    from mlc_llm.engine.session import ChatSession, SamplingParams
    from mlc_llm.prepare.cache import CacheHome, CachePolicy
    from mlc_llm.prepare.jit import prepare_library
    from mlc_llm.prepare.progress import NullProgress
    from mlc_llm.prepare.resolve import prepare_artifact
    from mlc_llm.text.prompt import PromptBuilder

    command = ["chat", demo_gguf, "--quantization", "q0f32", "--temperature", "0"]
    text = program.must_run(*command, "--prompt", QUESTION)
    assert text == "The capital of France is Paris.\n"

    # The same files again, for the ids behind the text.
    home, policy = CacheHome(program.home), CachePolicy.READONLY
    artifact = prepare_artifact(
        str(demo_gguf),
        quantization="q0f32",
        home=home,
        download_policy=policy,
        jit_policy=policy,
        progress=NullProgress(),
    )
    library = prepare_library(
        artifact,
        device="auto",
        opt="O2",
        overrides={},
        home=home,
        jit_policy=policy,
        progress=NullProgress(),
    )
    session = ChatSession.open(artifact, library)
    builder = PromptBuilder.load(artifact, session.config, session.tokenizer)
    try:
        prompt_ids = builder.token_ids([{"role": "user", "content": QUESTION}])
        greedy = SamplingParams(temperature=0, max_tokens=len(ANSWER_IDS), ignore_eos=True)
        answer_ids = list(session.generate(prompt_ids, greedy))
    finally:
        builder.close()
        session.close()
    assert prompt_ids == PROMPT_IDS
    assert answer_ids == ANSWER_IDS


def test_chat_stays_below_600_mb(program: Program, demo_gguf: Path) -> None:
    command = ("chat", demo_gguf, "--quantization", "q4f16_1", "--prompt", QUESTION)
    limited = (*command, "--max-tokens", "64")
    assert peak_mib(program, *limited) < 600  # with conversion and compilation
    assert peak_mib(program, *limited) < 600


def test_conversion_holds_two_tensors_and_a_bit(
    program: Program, demo_gguf: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = ("convert_weight", demo_gguf, "--quantization", "q0f16", "-o", output)
    embedding_mib = 49152 * 576 * 4 >> 20
    assert peak_mib(program, *command) < 2 * embedding_mib + 500


def test_a_truncated_file_is_refused(program: Program, demo_gguf: Path, tmp_path: Path) -> None:
    with demo_gguf.open("rb") as stream:
        (tmp_path / "model.gguf").write_bytes(stream.read(20 << 20))
    program.refuse(
        "chat", tmp_path / "model.gguf", "--prompt", "hi", words="model.gguf is truncated"
    )
