"""Prompts: their lengths as the server counts them, and dialogues of ShareGPT files."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mlc_llm.bench.load import prompts
from mlc_llm.bench.load.ask import Asker
from mlc_llm.bench.load.http import RequestFailed, Server
from mlc_llm.bench.load.prompts import (
    Exchange,
    Lengths,
    Ruler,
    choose_exchanges,
    count_tokens,
    made_up,
    make_ruler,
    read_sharegpt,
    settle_ignore_eos,
)
from mlc_llm.errors import OptionError

from .fake_openai import OVERHEAD, FakeOpenAI

T = TypeVar("T")


def asker_of(fake: FakeOpenAI) -> Asker:
    return Asker(Server.parse(fake.url), "chat", "fake", 10.0)


def run(awaitable: Awaitable[T]) -> T:
    async def wait() -> T:
        return await awaitable

    return asyncio.run(wait())


@pytest.mark.parametrize("tokens_per_word", [1, 3])
def test_prompts_have_the_wanted_length(tokens_per_word: int) -> None:
    with FakeOpenAI(tokens_per_word=tokens_per_word) as fake:
        ruler = run(make_ruler(asker_of(fake), 0))
        samples = list(itertools.islice(made_up(Lengths(100, 7), ruler, 0), 5))
    assert ruler.overhead == OVERHEAD
    for sample in samples:
        assert sample.max_tokens == 7
        assert abs(fake.count(sample.prompt) + OVERHEAD - 100) <= tokens_per_word / 2


@pytest.mark.parametrize("field", ["prompt", "content"])
def test_words_of_odd_length_are_left_out_where_tokens_can_be_counted(field: str) -> None:
    long_words = set(prompts._WORDS[::3])
    with FakeOpenAI(tokenize=field, long_words=long_words) as fake:
        ruler = run(make_ruler(asker_of(fake), 0))
        [sample] = itertools.islice(made_up(Lengths(100, 7), ruler, 0), 1)
    assert not long_words & set(ruler.words)
    assert fake.count(sample.prompt) + OVERHEAD == 100


def test_a_server_without_usage_is_taken_to_count_words() -> None:
    with FakeOpenAI(has_usage=False) as fake:
        assert run(make_ruler(asker_of(fake), 0)) == Ruler()


def test_a_server_that_refuses_cannot_be_learned() -> None:
    with FakeOpenAI(status=404) as fake, pytest.raises(RequestFailed, match="HTTP 404: refused"):
        run(make_ruler(asker_of(fake), 0))


def test_lengths_are_spread_around_their_mean() -> None:
    generator = random.Random(0)
    drawn = [Lengths(100, 10, 0.5).draw(generator) for _ in range(300)]
    for values, mean in zip(zip(*drawn, strict=True), (100, 10), strict=True):
        assert min(values) >= mean / 2 and max(values) <= mean * 1.5
        assert abs(sum(values) / len(values) - mean) < mean / 20
        assert max(values) - min(values) > mean * 0.8


def test_a_seed_fixes_prompts_and_another_changes_their_beginning() -> None:
    def first(seed: int) -> list[str]:
        return [s.prompt for s in itertools.islice(made_up(Lengths(50, 1), Ruler(), seed), 3)]

    assert first(1) == first(1)
    beginnings = {prompt[:40] for prompt in first(1) + first(2)}
    assert len(beginnings) == 6


def test_ignore_eos_is_used_where_it_is_known() -> None:
    with FakeOpenAI() as fake:
        assert run(settle_ignore_eos(asker_of(fake))).extra == {"ignore_eos": True}
    with FakeOpenAI(knows_ignore_eos=False) as fake:
        assert run(settle_ignore_eos(asker_of(fake))).extra == {}
    with FakeOpenAI(status=500) as fake, pytest.raises(RequestFailed, match="HTTP 500"):
        run(settle_ignore_eos(asker_of(fake)))
    with FakeOpenAI(status=400) as fake, pytest.raises(RequestFailed, match="HTTP 400"):
        run(settle_ignore_eos(asker_of(fake)))


def test_tokens_cannot_be_counted_everywhere() -> None:
    with FakeOpenAI() as fake:
        assert run(count_tokens(asker_of(fake), "one two")) is None


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in pairs]}


def test_first_exchanges_are_read(tmp_path: Path) -> None:
    path = tmp_path / "dialogues.json"
    dialogues = [
        turns(("human", "Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2")),
        turns(("system", "S"), ("user", "Q3"), ("assistant", "A3")),
        turns(("gpt", "A"), ("human", "Q")),
        turns(("human", "Q")),
        turns(("human", "Q"), ("gpt", "")),
        turns(("human", 5), ("gpt", "A")),
        {"conversations": None},
        "text",
    ]
    path.write_text(json.dumps(dialogues))
    assert read_sharegpt(path) == [Exchange("Q1", "A1"), Exchange("Q3", "A3")]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("[", "is not JSON"), ("{}", "not a list"), ("[{}]", "no dialogue")],
)
def test_bad_files_are_explained(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "dialogues.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=words):
        read_sharegpt(path)


def choose(fake: FakeOpenAI, exchanges: list[Exchange], **changes: Any) -> list[tuple[str, int]]:
    options = {"count": 9, "seed": 0, "output_len": None, "max_total_len": 20, **changes}
    samples = run(choose_exchanges(asker_of(fake), exchanges, **options))
    return sorted((sample.prompt, sample.max_tokens) for sample in samples)


def test_dialogues_are_chosen_by_their_length() -> None:
    exchanges = [Exchange("q " * 5, "a " * 15), Exchange("q " * 6, "a " * 15), Exchange("q", "a")]
    with FakeOpenAI(tokenize="prompt") as fake:
        assert choose(fake, exchanges) == [("q", 1), ("q " * 5, 15)]
        assert choose(fake, exchanges, output_len=4, max_total_len=5) == [("q", 4)]
        assert len(choose(fake, exchanges, count=1)) == 1
        with pytest.raises(OptionError, match="raise --max-total-len"):
            choose(fake, exchanges, max_total_len=1)


def test_four_characters_are_a_token_where_nobody_counts() -> None:
    with FakeOpenAI() as fake:
        assert choose(fake, [Exchange("12345678", "123456789")]) == [("12345678", 3)]
