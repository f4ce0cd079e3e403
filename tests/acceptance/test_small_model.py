"""The stories model: the known text of a known model, and the documented sequence of commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from mlc_packer import pack_artifact
from program import Program
from reference_cases import get_case

pytestmark = pytest.mark.cpu

OPENING = "Once upon a time"


def test_200_greedy_tokens_from_bos(program: Program, stories260k: Path, tmp_path: Path) -> None:
    from mlc_llm.engine.grammar import GrammarSpec, ThoughtLimit
    from mlc_llm.engine.session import ChatSession, SamplingParams
    from mlc_llm.text.reasoning import find_reasoning

    artifact, library = tmp_path / "stories", tmp_path / "stories" / "lib.so"
    options = ("--quantization", "q0f32", "-o", artifact)
    program.must_run("gen_config", stories260k, *options)
    program.must_run("convert_weight", stories260k, *options)
    program.must_run("compile", artifact, "-o", library)
    session = ChatSession.open(artifact, library)
    try:
        greedy = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        tokens = list(session.generate([1], greedy))
        text = session.tokenizer.decode(tokens)
        # As if it were thinking: it is made to end, and to answer.
        form = find_reasoning("think", None)
        assert form is not None
        limit = ThoughtLimit(20, form.marks, is_open=True)
        answer = GrammarSpec("regex", "[ab]{3}", (form.end,), thoughts=limit)
        thoughts = list(session.generate([1], greedy, grammar=answer))
    finally:
        session.close()
    assert len(tokens) == 200
    assert text.encode() == (stories260k / "expected.txt").read_bytes()
    assert thoughts[:20] == tokens[:20]
    told = session.tokenizer.decode(thoughts[20:])
    assert re.fullmatch(r" ?\n</think>\n{0,2}[ab]{3}", told), told


def test_the_documented_sequence(program: Program, stories260k: Path, tmp_path: Path) -> None:
    """Relative paths, as in the README; compiled ahead or on the fly, the answer is the same."""
    for step in ("gen_config", "convert_weight"):
        options = ("--quantization", "q4f16_1", "-o", "stories")
        program.must_run(step, stories260k, *options, cwd=tmp_path)
    plan = program.must_run("compile", "stories", "-o", "lib.so", cwd=tmp_path)
    assert "KV cache" in plan
    answer = ("--prompt", OPENING, "--temperature", "0", "--max-tokens", "40")
    ahead = program.must_run("chat", "stories", "--model-lib", "lib.so", *answer, cwd=tmp_path)
    assert len(ahead.split()) > 10
    assert program.must_run("chat", "stories", *answer, cwd=tmp_path) == ahead
    assert program.must_run("chat", stories260k, *answer, cwd=tmp_path) == ahead


def test_artifacts_of_another_writer(program: Program, tmp_path: Path) -> None:
    """Weights are compared bit by bit in tests/weights/test_convert_models.py."""
    source = get_case("llama_gqa_f16").directory
    for step in ("gen_config", "convert_weight"):
        program.must_run(step, source, "--quantization", "q4f16_1", "-o", tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "mlc-chat-config.json").read_text())
    # Artifacts of MLC LLM carry no Jinja template, so ours must do without it here.
    (tmp_path / "ours" / "chat_template.jinja").unlink()
    answers = {}
    for name in ("ours", "tensor-cache.json", "ndarray-cache.json"):
        artifact = tmp_path / name
        if name != "ours":
            pack_artifact(
                source,
                artifact,
                "q4f16_1",
                index_name=name,
                conv_template=config["conv_template"],
            )
            settings = artifact / "tokenizer_config.json"
            without = json.loads(settings.read_text())
            without.pop("chat_template", None)
            settings.write_text(json.dumps(without))
        command = ("chat", artifact, "--prompt", "ab", "--temperature", "0", "--max-tokens", "20")
        answers[name] = program.must_run(*command)
    assert len(set(answers.values())) == 1
    assert len(answers["ours"]) > 5
