"""Speed does not change answers: the demo model with int8 activations beside the float path."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from program import ROOT, Program

from mlc_llm.artifact import read_chat_config
from mlc_llm.engine.session import ChatSession, SamplingParams
from mlc_llm.prepare.cache import CacheHome
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.cpu, pytest.mark.weights]

MAX_KL = 0.01  # nats a token
MAX_NEAR_TIE = 0.5  # nats between two tokens that int8 may exchange
SYSTEM = {"role": "system", "content": "You answer questions in English, briefly and correctly."}
# Questions as in the demo, which have an answer.
QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "How many days does a week have?",
)
# A small model wavers between many continuations of these.
OPEN_PROMPTS = (
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Name three rivers.",
)


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    """The benchmark of quality, which is a script."""
    path = ROOT / "benchmarks" / "quality.py"
    spec = importlib.util.spec_from_file_location("quality", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("quantization", ["gguf", "q8f16_1", "q4f16_1"])
def test_distributions_stay_close(
    quality: ModuleType, program: Program, demo_gguf: Path, quantization: str
) -> None:
    text = quality.TEXT_PATH.read_text(encoding="utf-8")
    found = quality.measure(str(demo_gguf), quantization, text, CacheHome(program.home))
    assert found.num_tokens > 500
    assert 0 < found.mean_kl < MAX_KL
    assert found.same_top > 0.9
    # Fluent English, and not a bit worse with int8.
    assert found.float_perplexity < 60
    assert abs(found.int8_perplexity / found.float_perplexity - 1) < 0.02


class Answers:
    """Greedy answers of the demo model as token ids, with exact and with int8 activations."""

    def __init__(self, quality: ModuleType, gguf: Path, home: CacheHome) -> None:
        self.artifact = quality.prepare_model(str(gguf), "q8f16_1", home)
        self.tokenizer = Tokenizer.load(self.artifact)
        params = SamplingParams(temperature=0, max_tokens=48)
        prompts = PromptBuilder.load(self.artifact, read_chat_config(self.artifact), self.tokenizer)
        with closing(prompts):
            self.prompt_ids = {
                text: prompts.token_ids([SYSTEM, {"role": "user", "content": text}])
                for text in QUESTIONS + OPEN_PROMPTS
            }
        self.by_opt: dict[str, dict[str, list[int]]] = {}
        for opt in (quality.FLOAT_OPT, quality.INT8_OPT):
            library = quality.prepare_code(self.artifact, opt, home)
            with closing(ChatSession.open(self.artifact, library)) as session:
                self.by_opt[opt] = {
                    text: list(session.generate(ids, params))
                    for text, ids in self.prompt_ids.items()
                }


@pytest.fixture(scope="module")
def answers(quality: ModuleType, program: Program, demo_gguf: Path) -> Answers:
    """Answers to all prompts."""
    return Answers(quality, demo_gguf, CacheHome(program.home))


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_are_the_same(quality: ModuleType, answers: Answers, question: str) -> None:
    exact, rounded = (
        answers.tokenizer.decode(answers.by_opt[opt][question])
        for opt in (quality.FLOAT_OPT, quality.INT8_OPT)
    )
    assert exact == rounded
    assert len(exact) > 10


@pytest.mark.parametrize("prompt", OPEN_PROMPTS)
def test_open_answers_part_at_near_ties_only(
    quality: ModuleType, answers: Answers, program: Program, prompt: str
) -> None:
    exact, rounded = (answers.by_opt[opt][prompt] for opt in (quality.FLOAT_OPT, quality.INT8_OPT))
    assert len(exact) > 10 and len(rounded) > 10
    shared = next(
        (k for k, pair in enumerate(zip(exact, rounded, strict=False)) if pair[0] != pair[1]),
        min(len(exact), len(rounded)),
    )
    if exact == rounded:
        return
    home = CacheHome(program.home)
    tokens = [*answers.prompt_ids[prompt], *exact[:shared]]
    first, second = (
        quality.log_probabilities_of(answers.artifact, opt, home, tokens)[-1]
        for opt in (quality.FLOAT_OPT, quality.INT8_OPT)
    )
    assert first.max() - first[second.argmax()] < MAX_NEAR_TIE


def test_the_measure_sees_a_difference(quality: ModuleType) -> None:
    half = np.log(np.asarray([[0.5, 0.5], [0.5, 0.5]], np.float32))
    skewed = np.log(np.asarray([[0.75, 0.25], [0.5, 0.5]], np.float32))
    found = quality.compare(half, skewed, [0, 1])
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert found.max_kl == pytest.approx(expected) and found.mean_kl == pytest.approx(expected / 2)
    assert found.float_perplexity == pytest.approx(2) and found.int8_perplexity == pytest.approx(4)
    assert quality.compare(half, half, [0, 1]).mean_kl == 0
