"""Limits of thoughts, on the fake runner: the end comes in time, and what follows is as it was."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import FakeRunner, Logits
from small_tokenizers import CHATML_TOKENS, byte_level

from mlc_llm.engine.engine import Engine
from mlc_llm.engine.grammar import GrammarSpec, ThoughtLimit
from mlc_llm.engine.grammar_cache import GrammarCache
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.engine.thinking import CompiledLimit
from mlc_llm.errors import RequestError
from mlc_llm.text.answers import AnswerFormats
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.tokenizer import Tokenizer
from mlc_llm.text.tool_calls.grammar import call_grammar
from mlc_llm.text.tool_calls.registry import get_format
from mlc_llm.text.tool_calls.tools import Tool, ToolUse

HARMONY = get_format("gpt_oss").shape.special
FILLING = tuple(f"<|reserved_{number}|>" for number in range(300))
# With the marks as tokens, and without any for <think>.
WITH_MARKS = (*CHATML_TOKENS, *FILLING, "<think>", "</think>", *HARMONY)
ANSWER = GrammarSpec("json_schema", json.dumps({"enum": ["yes", "no"]}))
FREE = GrammarSpec("text")


def formats(name: str) -> AnswerFormats:
    template = "<|channel|><|message|>" if name == "gpt_oss" else "<think>"
    return AnswerFormats.find(template, "", "auto")


class Model:
    """A tokenizer, its grammars, and a runner that writes what a script says."""

    def __init__(self, special: tuple[str, ...]) -> None:
        self.tokenizer = Tokenizer(byte_level(special), {"eos_token": "<|im_end|>"})
        self.size = self.tokenizer.vocab_size
        end = self.tokenizer.token_to_id("<|im_end|>")
        assert end is not None
        self.end = end
        self.grammars = GrammarCache(lambda: GrammarVocabulary(self.tokenizer, [end], self.size))
        self.logits: Callable[[list[int]], Logits] = self.noise
        self.steps = 0

    def noise(self, tokens: list[int]) -> Logits:
        """Return logits by which capital letters, a token each, come without end."""
        seed = zlib.crc32(np.asarray(tokens, np.int32).tobytes())
        row = np.random.default_rng(seed).normal(size=self.size).astype(np.float32)
        row[[self.tokenizer.encode(letter)[0] for letter in "ABCDEFGH"]] += 30
        return row

    def after(self, *texts: str) -> Callable[[list[int]], Logits]:
        """Return logits that write the texts, each where the one before has just been said."""
        pairs = [(self.tokenizer.encode(a), b) for a, b in itertools.pairwise(texts)]

        def logits_of(tokens: list[int]) -> Logits:
            row = self.noise(tokens)
            for earlier, text in pairs:
                script = self.tokenizer.encode(text)
                for said in range(len(script)):
                    wanted = [*earlier, *script[:said]]
                    if tokens[-len(wanted) :] == wanted:
                        row[script[said]] = 90
            return row

        return logits_of

    def say(self, spec: GrammarSpec | None, prompt: str, **params: Any) -> tuple[str, str | None]:
        """Return what comes after a prompt, with its marks, and why it ended."""
        runner = FakeRunner(
            self.logits,
            num_pages=64,
            vocab_size=self.size,
            context_window_size=512,
            prefill_chunk_size=64,
        )
        engine = Engine(runner, grammars=self.grammars)
        settings = SamplingParams(temperature=0.0, max_tokens=60).with_changes(**params)
        stops = frozenset([self.end])
        tokens = self.tokenizer.encode(prompt)
        engine.add(Request("a", tokens, settings, stop_token_ids=stops, grammar=spec))
        said, reason = [], None
        while engine.has_work:
            for output in engine.step():
                assert output.error is None
                said += [] if output.token_id is None else [output.token_id]
                reason = output.finish_reason
            engine.check_integrity()
        self.steps = len(runner.steps)
        return self.tokenizer.decode(said, skip_special_tokens=False), reason

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))


@pytest.fixture(scope="module", params=["tokens", "letters"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    model = Model(WITH_MARKS if request.param == "tokens" else (*CHATML_TOKENS, *HARMONY))
    yield model
    model.grammars.close()


def limited(
    spec: GrammarSpec, max_tokens: int, name: str = "hermes", is_open: bool = False
) -> GrammarSpec:
    form = formats(name)
    assert form.thought_marks is not None
    starts_after = None if form.reasoning is None or spec is FREE else (form.reasoning.end,)
    limit = ThoughtLimit(max_tokens, form.thought_marks, is_open)
    return replace(spec, thoughts=limit, starts_after=starts_after)


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("max_tokens", [0, 1, 7])
def test_thoughts_that_never_end_are_ended(
    model: Model, max_tokens: int, logprobs: int | None
) -> None:
    for prompt, is_open in (("hello", False), ("hello<think>\n", True)):
        model.logits = model.after("hello", "<think>")
        spec = limited(FREE, max_tokens, is_open=is_open)
        text, reason = model.say(spec, prompt, logprobs=logprobs)
        begun = text if is_open else text.removeprefix("<think>")
        assert is_open or text.startswith("<think>")
        thoughts, mark, answer = begun.partition("\n</think>")
        assert mark and answer and reason == "length"
        assert model.count(thoughts) == max_tokens
        # The same without a limit: nothing but the end is new.
        free, _ = model.say(None, prompt)
        assert free.startswith(text[: len(text) - len(mark) - len(answer)])
        assert "</think>" not in free


def test_what_follows_is_held_to_the_grammar(model: Model) -> None:
    model.logits = model.noise
    for max_tokens in (0, 5):
        text, reason = model.say(limited(ANSWER, max_tokens, is_open=True), "hello<think>")
        answer = text.partition("\n</think>")[2]
        assert answer.strip("\n") in ('"yes"', '"no"') and reason == "stop", text


def test_thoughts_that_end_by_themselves_are_as_without_a_limit(model: Model) -> None:
    model.logits = model.after("<think>", "hell</think>", "\n\nyes<|im_end|>")
    expected = model.say(None, "<think>")
    assert expected == ("hell</think>\n\nyes", "stop")
    assert model.say(limited(FREE, 30, is_open=True), "<think>") == expected
    # Answers that begin with no thoughts have none, whatever comes in them.
    model.logits = model.after("hello", "he<think>")
    expected = model.say(None, "hello")
    assert expected[0].startswith("he<think>")
    assert model.say(limited(FREE, 3), "hello") == expected


def test_ends_that_nothing_spells_are_refused(model: Model) -> None:
    form = formats("hermes")
    assert form.thought_marks is not None
    limit = ThoughtLimit(3, replace(form.thought_marks, closing="\N{SNOWMAN}"))
    vocabulary = GrammarVocabulary(model.tokenizer, [model.end], model.size)
    assert len(CompiledLimit.of(limit, vocabulary).closing) == 3
    # Without single bytes:
    vocabulary._bytes = [b"" if len(word) == 1 else word for word in vocabulary._bytes]
    vars(vocabulary).pop("_ids_by_bytes", None)
    with pytest.raises(RequestError, match="has no tokens for") as caught:
        CompiledLimit.of(limit, vocabulary)
    assert caught.value.param == "thinking_token_budget"


def test_the_end_costs_one_step(model: Model) -> None:
    model.logits = model.noise
    model.say(limited(FREE, 10, is_open=True), "<think>", max_tokens=60)
    closing = model.count("\n</think>")
    assert closing > 1 and model.steps == 60 - closing


def test_cut_in_the_middle_of_the_end(model: Model) -> None:
    model.logits = model.noise
    text, reason = model.say(limited(FREE, 4, is_open=True), "<think>", max_tokens=5)
    assert reason == "length" and "</think>" not in text and model.count(text) <= 5


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
TURN = "<|end|><|start|>assistant"


def test_channels_share_the_limit_and_are_barred_after_it(model: Model) -> None:
    model.logits = model.after("hello", f"{ANALYSIS}hell{TURN}{ANALYSIS}")
    text, _ = model.say(limited(FREE, 9, "gpt_oss"), "hello", max_tokens=80)
    first, second, rest = text.split(ANALYSIS)[1:2] + text.split(ANALYSIS)[2].split(TURN, 1)
    assert first == f"hell{TURN}"
    assert model.count("hell") + model.count(second) <= 10 and second and rest
    # It would think again and again.
    model.logits = model.after("<|start|>assistant", ANALYSIS)
    text, _ = model.say(limited(FREE, 2, "gpt_oss"), "<|start|>assistant", max_tokens=80)
    assert text.count(ANALYSIS) == 1
    assert re.search(rf"{re.escape(TURN)}<\|channel\|>(?!a)", text)


def test_channels_end_where_the_grammar_goes_on(model: Model) -> None:
    shape = get_format("gpt_oss").shape
    ids = {text: model.tokenizer.token_to_id(text) or 0 for text in shape.special}
    use = ToolUse((Tool("find", None, CITY),), "required", parallel=False)
    source = call_grammar(shape, use, ids)
    assert source is not None
    calls = GrammarSpec("lark", source, continues_text=True)
    model.logits = model.after("<|start|>assistant", ANALYSIS)
    wanted = '<|channel|>commentary to=functions.find <|constrain|>json<|message|>{"city": "Rome"}'
    # None at all are barred before they begin.
    for max_tokens, thoughts in ((0, ""), (6, f"{ANALYSIS}[A-H]{{6}}{TURN}")):
        spec = limited(calls, max_tokens, "gpt_oss")
        text, reason = model.say(spec, "<|start|>assistant", max_tokens=200)
        assert text.endswith(wanted) and reason == "stop"
        assert re.fullmatch(thoughts.replace("|", "\\|"), text.removesuffix(wanted)), text
