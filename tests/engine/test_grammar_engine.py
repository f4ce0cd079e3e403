"""Sequences held to grammars, on the fake runner: what they say, in which steps, beside which."""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fakes import NO_KV, STATES, FakeRunner, Logits
from small_tokenizers import byte_level

from mlc_llm.engine.engine import Engine
from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.engine.grammar_cache import GrammarCache
from mlc_llm.engine.request import Output, Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.errors import RequestError
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})
VOCAB_SIZE = TOKENIZER.vocab_size
EOS = TOKENIZER.token_to_id("<|im_end|>")
assert EOS is not None
STOPS = frozenset([EOS])
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "hello": {"type": "integer", "minimum": -500, "maximum": 500},
        "kind": {"enum": ["tall one", "small one"]},
    },
    "required": ["name", "hello", "kind"],
    "additionalProperties": False,
}
SCHEMA = GrammarSpec("json_schema", json.dumps(PERSON))
DRAWN = SamplingParams(temperature=1.0, max_tokens=120, seed=3)


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCache]:
    cache = GrammarCache(lambda: GrammarVocabulary(TOKENIZER, STOPS, VOCAB_SIZE))
    yield cache
    cache.close()


def noise(tokens: list[int]) -> Logits:
    """Return logits that are a pure function of the tokens, and like no text."""
    seed = zlib.crc32(np.asarray(tokens, np.int32).tobytes())
    logits = np.random.default_rng(seed).normal(size=VOCAB_SIZE).astype(np.float32)
    logits[EOS] += 1
    return logits


def make_engine(grammars: GrammarCache | None, num_pages: int = 64, **changes: Any) -> Engine:
    values: dict[str, Any] = {
        "context_window_size": 512,
        "prefill_chunk_size": 64,
        "max_batch_size": 8,
        "vocab_size": VOCAB_SIZE,
    }
    mixes_prompts = changes.pop("mixes_prompts", True)
    runner = FakeRunner(noise, num_pages=num_pages, **{**values, **changes})
    engine = Engine(runner, mixes_prompts=mixes_prompts)
    engine.grammars = grammars
    return engine


class Answers:
    """What the sequences of some requests said."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[str, int], list[Output]] = defaultdict(list)

    def tokens(self, name: str, index: int = 0) -> list[int]:
        outputs = self.outputs[name, index]
        return [output.token_id for output in outputs if output.token_id is not None]

    def text(self, name: str, index: int = 0) -> str:
        return TOKENIZER.decode(self.tokens(name, index))

    def end(self, name: str, index: int = 0) -> str | None:
        return self.outputs[name, index][-1].finish_reason


def run(engine: Engine, *requests: Request) -> Answers:
    for request in requests:
        engine.add(request)
    answers = Answers()
    while engine.has_work:
        for output in engine.step():
            answers.outputs[output.request_id, output.index].append(output)
        engine.check_integrity()
    return answers


def ask(name: str, spec: GrammarSpec | None, prompt: str = "hello", **changes: Any) -> Request:
    fields = {key: changes.pop(key) for key in ("n", "stop_token_ids") if key in changes}
    params = DRAWN.with_changes(**changes)
    fields.setdefault("stop_token_ids", STOPS)
    return Request(name, TOKENIZER.encode(prompt), params, grammar=spec, **fields)


def is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "hello", "kind"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and -500 <= value["hello"] <= 500
        and value["kind"] in ("tall one", "small one")
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_match_and_end_by_themselves(grammars: GrammarCache, temperature: float) -> None:
    answers = run(make_engine(grammars), ask("a", SCHEMA, n=4, temperature=temperature))
    for index in range(4):
        assert is_person(answers.text("a", index)), answers.text("a", index)
        assert answers.end("a", index) == "stop"
    num_texts = len({answers.text("a", index) for index in range(4)})
    assert num_texts == (1 if temperature == 0 else 4)


def test_forced_tokens_ride_along_and_change_nothing(grammars: GrammarCache) -> None:
    fast, slow = make_engine(grammars), make_engine(grammars)
    with_them = run(fast, ask("a", SCHEMA, n=3))
    # Where probabilities are wanted, each token has a step of its own.
    without = run(slow, ask("a", SCHEMA, n=3, logprobs=2))
    for index in range(3):
        assert with_them.tokens("a", index) == without.tokens("a", index)
        assert all(output.logprobs for output in without.outputs["a", index])
    assert len(fast._runner.steps) < 0.7 * len(slow._runner.steps)  # type: ignore[attr-defined]


def test_rows_without_grammar_are_as_alone(grammars: GrammarCache) -> None:
    free = [ask(f"free{i}", None, "he" * i + "llo", seed=i, max_tokens=40) for i in range(3)]
    held = [ask(f"held{i}", SCHEMA, "hell" * i + "o", seed=i) for i in range(3)]
    together = run(make_engine(grammars), *free, *held)
    for request in (*free, *held):
        alone = run(make_engine(grammars), request)
        assert together.tokens(request.request_id) == alone.tokens(request.request_id)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_pages": 12},
        {"num_pages": 12, "prefill_chunk_size": 4},
        {"mixes_prompts": False},
        {"states": STATES, "num_state_slots": 16},
        {"states": STATES, "num_state_slots": 16, "kv_cache": NO_KV},
    ],
)
def test_neither_preemption_nor_schedule_changes_answers(
    grammars: GrammarCache, changes: dict[str, Any]
) -> None:
    requests = [ask(f"r{i}", SCHEMA, "hello" * 3 * i + "!", seed=i, n=2) for i in range(4)]
    reference = run(make_engine(grammars), *requests)
    engine = make_engine(grammars, **changes)
    answers = run(engine, *requests)
    for request in requests:
        for index in range(2):
            name = request.request_id
            assert answers.tokens(name, index) == reference.tokens(name, index)
            assert is_person(answers.text(name, index))
    if "num_pages" in changes:
        num_preempted = [
            answers.outputs[request.request_id, 0][-1].stats.num_preemptions for request in requests
        ]
        assert sum(num_preempted) > 0


def test_nothing_lifts_what_is_forbidden(grammars: GrammarCache) -> None:
    spec = GrammarSpec("choice", json.dumps(["yes", "no"]))
    favoured = TOKENIZER.encode("z")[0]
    bias = {favoured: 100, EOS: 100, **{TOKENIZER.encode(c)[0]: -100 for c in "yesno"}}
    for seed in range(20):
        request = ask("a", spec, logit_bias=bias, temperature=3.0, seed=seed)
        assert run(make_engine(grammars), request).text("a") in ("yes", "no")


def test_a_cut_answer_says_so(grammars: GrammarCache) -> None:
    answers = run(make_engine(grammars), ask("a", SCHEMA, max_tokens=9))
    assert answers.end("a") == "length" and len(answers.tokens("a")) == 9
    assert answers.text("a").startswith('{"name"')


def test_end_is_chosen_where_the_grammar_may_go_on(grammars: GrammarCache) -> None:
    digits = GrammarSpec("regex", "[0-9]+")
    answers = run(make_engine(grammars), ask("a", digits, n=8))
    assert {answers.end("a", index) for index in range(8)} == {"stop"}
    assert all(answers.text("a", index).isdigit() for index in range(8))
    assert len({len(answers.text("a", index)) for index in range(8)}) > 1

    held_back = run(make_engine(grammars), ask("a", digits, n=8, min_tokens=7, max_tokens=30))
    assert all(len(held_back.text("a", index)) >= 7 for index in range(8))

    # Without a token that ends it, only the limit does.
    endless = run(make_engine(grammars), ask("a", digits, stop_token_ids=frozenset()))
    assert endless.end("a") == "length" and len(endless.text("a")) == 120


def test_a_complete_text_ends_though_more_was_asked_for(grammars: GrammarCache) -> None:
    spec = GrammarSpec("choice", json.dumps(["yes"]))
    for changes in ({"min_tokens": 50}, {"stop_token_ids": frozenset()}):
        answers = run(make_engine(grammars), ask("a", spec, **changes))
        assert (answers.text("a"), answers.end("a")) == ("yes", "stop")


def test_own_stop_tokens_are_no_part_of_a_text(grammars: GrammarCache) -> None:
    stop = TOKENIZER.encode("4")[0]
    request = ask("a", GrammarSpec("regex", "[0-9]{8}"), stop_token_ids=STOPS | {stop}, n=8)
    answers = run(make_engine(grammars), request)
    for index in range(8):
        assert len(answers.text("a", index)) == 8 and "4" not in answers.text("a", index)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stop_token_that_the_grammar_names_ends_the_text(
    grammars: GrammarCache, logprobs: int | None
) -> None:
    spec = GrammarSpec("lark", f'start: /[ab]{{3}}/ ("!" | "hello") <[{EOS}]> "never said"')
    answers = run(make_engine(grammars), ask("a", spec, n=6, logprobs=logprobs))
    for index in range(6):
        assert answers.text("a", index)[3:] in ("!", "hello"), answers.text("a", index)
        assert answers.end("a", index) == "stop"


def test_grammar_waits_for_the_end_of_reasoning(grammars: GrammarCache) -> None:
    def logits(tokens: list[int]) -> Logits:
        said = TOKENIZER.decode(tokens)
        row = noise(tokens)
        if "</think>" not in said and len(tokens) > 20:
            mark = "</think>"
            done = max(n for n in range(len(mark)) if said.endswith(mark[:n]))
            row[TOKENIZER.encode(mark[done])[0]] = 90
        row[EOS] += 20  # it would rather stop than think
        return row

    engine = make_engine(grammars)
    engine._runner.logits_of = logits  # type: ignore[attr-defined]
    spec = GrammarSpec("json_schema", json.dumps(PERSON), starts_after=("</think>", "<done>"))
    answers = run(engine, ask("a", spec, n=2))
    for index in range(2):
        thoughts, mark, answer = answers.text("a", index).partition("</think>")
        assert mark and len(thoughts) > 5
        assert is_person(answer) and answers.end("a", index) == "stop"


def test_a_grammar_that_becomes_too_much_ends_its_request_only(grammars: GrammarCache) -> None:
    # Reading it is quick; three letters in, there are more ways on than may be.
    ways = range(6000)
    rules = [f"x: {' | '.join(f'y{n}' for n in ways)}", *(f'y{n}: /b+/ "{n}"' for n in ways)]
    spec = GrammarSpec("lark", "\n".join(['start: "a"{3} x', *rules]))
    engine = make_engine(grammars)
    answers = run(engine, ask("bad", spec), ask("good", SCHEMA))
    assert is_person(answers.text("good"))
    assert answers.end("bad") == "error"
    error = answers.outputs["bad", 0][-1].error
    assert isinstance(error, RequestError) and "too much work" in str(error)


def test_engine_without_grammars_refuses_them() -> None:
    with pytest.raises(RequestError, match="without grammars") as caught:
        make_engine(None).add(ask("a", SCHEMA))
    assert caught.value.param == "response_format"


def test_bad_grammar_is_refused_when_added(grammars: GrammarCache) -> None:
    engine = make_engine(grammars)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(RequestError, match=r"schema\.not is a keyword that is not supported"):
            engine.add(ask("a", GrammarSpec("json_schema", '{"not": {}}')))
    assert not engine.has_work
