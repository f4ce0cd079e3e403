"""Completions on the worker, without HTTP: prompts of all shapes, echo, suffix, best_of."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion as TheirAnswer
from openai_shapes import strictly
from pydantic import ValidationError
from random_requests import random_fields
from scripted import END, START, TOKENIZER, VOCAB_SIZE, reciter, run, scripted

from mlc_llm.errors import ContextTooLong, OptionError, QueueFull, RequestError
from mlc_llm.serve.completions import complete, complete_stream
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.protocol.completions import Completion, CompletionRequest
from mlc_llm.text.stream import TextStream
from mlc_llm.text.tokenizer import Tokenizer

MARK = "<|im_start|>"  # where the recited text begins
LION = "\N{LION FACE}"


def ask(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hello" + MARK, **fields})


async def stream(model: ServedModel, **fields: Any) -> list[Completion]:
    chunks = await complete_stream(model, ask(stream=True, **fields), "r")
    return [chunk async for chunk in chunks]


def text_of(chunks: list[Completion], index: int = 0) -> str:
    return "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index)


def log_softmax(tokens: list[int], token: int, *texts: str) -> float:
    """Return the log-probability that the reciter of texts gives a token after others."""
    logits = reciter(*texts)(tokens).tolist()
    return float(logits[token] - math.log(sum(math.exp(logit) for logit in logits)))


def test_answer_has_openais_shape() -> None:
    async def work() -> Completion:
        async with scripted("one two three") as model:
            return await complete(model, ask(max_tokens=50), "abc")

    answer = run(work())
    parsed = strictly(TheirAnswer, answer)
    assert (parsed.id, parsed.object, parsed.model) == ("cmpl-abc", "text_completion", "scripted")
    [choice] = parsed.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("one two three", "stop", None)
    assert parsed.usage.completion_tokens == len(TOKENIZER.encode("one two three"))


def test_sixteen_tokens_are_the_default() -> None:
    async def work() -> Completion:
        async with scripted("a" * 50) as model:
            return await complete(model, ask(), "1")

    answer = run(work())
    assert answer.choices[0].text == "a" * 16
    assert answer.choices[0].finish_reason == "length"


def test_stream_joins_to_the_answer() -> None:
    text = f"one {LION} two"
    fields = {"max_tokens": 50, "echo": True, "suffix": "!", "logprobs": 2}

    async def work() -> tuple[Completion, list[Completion]]:
        async with scripted(text) as model:
            whole = await complete(model, ask(**fields), "1")
            return whole, await stream(model, stream_options={"include_usage": True}, **fields)

    whole, chunks = run(work())
    *pieces, total = chunks
    assert whole.choices[0].text == text_of(pieces) == f"hello{MARK}{text}!"
    assert total.choices == [] and total.usage is not None and whole.usage is not None
    assert total.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.model_dump()["usage"] is None for chunk in pieces)
    assert [c.finish_reason for c in (chunk.choices[0] for chunk in pieces)][-1] == "stop"
    block = whole.choices[0].logprobs
    assert block is not None
    blocks = [chunk.choices[0].logprobs for chunk in pieces]
    for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
        joined = [item for part in blocks if part is not None for item in getattr(part, name)]
        assert joined == getattr(block, name)


def test_prompts_of_all_shapes_in_order() -> None:
    ids = [*TOKENIZER.encode("hello"), START]

    async def work() -> list[Completion]:
        async with scripted("yes") as model:
            prompts: list[Any] = [
                "a" + MARK, ["a" + MARK, "bcd" + MARK], ids, [ids, [START], ids + ids],
            ]  # fmt: skip
            return [await complete(model, ask(prompt=prompt), "1") for prompt in prompts]

    one, two, three, four = run(work())
    assert [c.text for c in one.choices] == [c.text for c in three.choices] == ["yes"]
    assert [(c.index, c.text) for c in two.choices] == [(0, "yes"), (1, "yes")]
    assert [(c.index, c.text) for c in four.choices] == [(0, "yes"), (1, "yes"), (2, "yes")]
    assert two.usage is not None and two.usage.prompt_tokens == 2 + 4
    assert four.usage is not None and four.usage.prompt_tokens == 3 * len(ids) + 1
    assert four.usage.completion_tokens == 3 * 3


def test_streams_of_several_prompts_are_told_apart() -> None:
    async def work() -> tuple[Completion, list[Completion]]:
        async with scripted("red", "blue", "green") as model:
            fields: dict[str, Any] = {
                "prompt": ["a" + MARK, "b" + MARK, "c" + MARK],
                "n": 2, "temperature": 2.0, "top_k": 3, "seed": 3, "echo": True,
            }  # fmt: skip
            return await complete(model, ask(**fields), "1"), await stream(model, **fields)

    whole, chunks = run(work())
    texts = [choice.text for choice in whole.choices]
    assert [text_of(chunks, index) for index in range(6)] == texts
    assert [text[0] for text in texts] == list("aabbcc")
    ends = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(ends) == list(range(6))


def test_echo_without_new_tokens_scores_a_text() -> None:
    text = f"hello {LION}{MARK}ab"
    tokens = TOKENIZER.encode(text)

    async def work() -> tuple[Completion, Completion, list[Completion]]:
        async with scripted("abc") as model:
            fields = {"prompt": text, "echo": True, "max_tokens": 0}
            scored = await complete(model, ask(**fields, logprobs=1), "1")
            plain = await complete(model, ask(**fields), "2")
            return scored, plain, await stream(model, **fields)

    scored, plain, chunks = run(work())
    [choice] = scored.choices
    # The place where the first token has no probability is null, which OpenAI's type leaves out.
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert scored.usage is not None and scored.usage.completion_tokens == 0
    block = choice.logprobs
    assert block is not None and block.top_logprobs is not None
    assert len(block.tokens) == len(tokens) == len(block.token_logprobs)
    assert block.token_logprobs[0] is None and block.top_logprobs[0] is None
    for place in range(1, len(tokens)):
        expected = log_softmax(tokens[:place], tokens[place], "abc")
        assert block.token_logprobs[place] == pytest.approx(expected, abs=1e-4)
        top = block.top_logprobs[place]
        assert top is not None and 1 <= len(top) <= 2 and block.tokens[place] in top
    for token, offset in zip(block.tokens, block.text_offset, strict=True):
        assert token.startswith("bytes:") or token == MARK or text[offset:].startswith(token)
    assert [token for token in block.tokens if token.startswith("bytes:")] == [
        "bytes:\\xf0", "bytes:\\x9f", "bytes:\\xa6", "bytes:\\x81",
    ]  # fmt: skip
    assert plain.choices[0].text == text_of(chunks) == text
    assert plain.choices[0].logprobs is None


def test_echo_of_token_ids_is_their_text() -> None:
    async def work() -> Completion:
        async with scripted("ab") as model:
            ids = [*TOKENIZER.encode(f"x{LION}"), START]
            return await complete(model, ask(prompt=ids, echo=True, logprobs=0), "1")

    [choice] = run(work()).choices
    # The mark is a special token, which has no text.
    assert choice.text == f"x{LION}ab"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens[-3:] == [MARK, "a", "b"]
    assert choice.logprobs.text_offset == [0, 1, 1, 1, 1, 2, 2, 3]
    assert choice.logprobs.top_logprobs is None


def test_logprobs_have_the_chosen_token_even_if_unlikely() -> None:
    async def work() -> Completion:
        async with scripted("a", "b", "c", "d") as model:
            bias = {str(TOKENIZER.encode("d")[0]): 100}
            return await complete(model, ask(logprobs=2, logit_bias=bias, max_tokens=1), "1")

    [choice] = run(work()).choices
    assert choice.text == "d" and choice.logprobs is not None
    [top] = choice.logprobs.top_logprobs or []
    assert top is not None and list(top) == ["a", "b", "d"]
    assert choice.logprobs.text_offset == [0]
    assert (
        top["d"]
        == choice.logprobs.token_logprobs[0]
        == pytest.approx(
            log_softmax([START], TOKENIZER.encode("d")[0], "a", "b", "c", "d"), abs=1e-4
        )
    )


@pytest.mark.parametrize("num_logprobs", [None, 1])
def test_best_of_gives_the_likeliest(num_logprobs: int | None) -> None:
    async def work() -> Completion:
        async with scripted("red", "blue", "green") as model:
            fields = {"temperature": 2.0, "top_k": 3, "seed": 3, "logprobs": num_logprobs}
            return await complete(model, ask(best_of=12, n=2, **fields), "1")

    answer = run(work())
    assert [(c.index, c.text) for c in answer.choices] == [(0, "red"), (1, "red")]
    assert all((c.logprobs is None) == (num_logprobs is None) for c in answer.choices)
    assert answer.usage is not None
    # All twelve were made.
    assert answer.usage.completion_tokens >= 12


def test_stop_string_cuts_text_and_logprobs() -> None:
    async def work() -> Completion:
        async with scripted("one two three") as model:
            return await complete(model, ask(stop="two", logprobs=1, suffix=" end"), "1")

    [choice] = run(work()).choices
    assert (choice.text, choice.finish_reason) == ("one  end", "stop")
    assert choice.logprobs is not None and "".join(choice.logprobs.tokens) == "one "


def test_text_goes_on_with_the_space_of_its_first_token(stories260k: Path) -> None:
    tokenizer = Tokenizer.load(stories260k)
    prompt, rest = tokenizer.encode("Once upon"), tokenizer.encode("Once upon a time")
    new = rest[len(prompt) :]
    alone, after = TextStream(tokenizer, []), TextStream(tokenizer, [], context=prompt)
    assert "".join(map(alone.put, new)) + alone.finish() == "a time"
    assert "".join(map(after.put, new)) + after.finish() == " a time"


def test_bos_goes_before_texts_and_not_before_token_ids() -> None:
    settings = {"bos_token": MARK, "add_bos_token": True}
    tokenizer = Tokenizer(TOKENIZER.vocabulary, settings)

    async def work() -> list[int]:
        async with scripted("ab", tokenizer=tokenizer) as model:
            counts = []
            for fields in (
                {"prompt": "hello"},
                {"prompt": MARK + "hello"},
                {"prompt": "hello", "add_special_tokens": False},
                {"prompt": TOKENIZER.encode("hello")},
            ):
                answer = await complete(model, ask(max_tokens=1, **fields), "1")
                assert answer.usage is not None
                counts.append(answer.usage.prompt_tokens)
            return counts

    length = len(TOKENIZER.encode("hello"))
    assert run(work()) == [length + 1, length + 1, length, length]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"prompt": ""}, RequestError),
        ({"prompt": ["a", ""]}, RequestError),
        ({"prompt": [VOCAB_SIZE]}, RequestError),
        ({"prompt": [START] * 256}, ContextTooLong),
        ({"prompt": "\ud800"}, RequestError),
    ],
)
def test_wrong_prompts_are_refused_before_the_first_chunk(
    fields: dict[str, Any], kind: type[RequestError]
) -> None:
    async def work() -> None:
        async with scripted("a") as model:
            for answer in (complete, complete_stream):
                with pytest.raises(kind):
                    await answer(model, ask(**fields), "1")

    run(work())


def test_one_refused_prompt_aborts_the_others() -> None:
    async def work() -> None:
        async with scripted("a" * 200, max_queued_requests=2) as model:
            with pytest.raises(QueueFull):
                await complete(model, ask(prompt=["a" + MARK] * 64, max_tokens=150), "1")
            # `scripted` waits until the engine has nothing to do.
            while model.worker.num_requests:
                await asyncio.sleep(0.005)

    run(work())


def test_leaving_a_stream_of_several_prompts_aborts_all() -> None:
    async def work() -> None:
        async with scripted("a" * 240, ends=False) as model:
            chunks = await complete_stream(
                model, ask(prompt=["a" + MARK] * 4, max_tokens=200, stream=True), "1"
            )
            await anext(chunks)
            await chunks.aclose()
            while model.worker.num_requests:
                await asyncio.sleep(0.005)
            assert model.worker.engine.load().num_running == 0

    run(work())


def test_any_settings_are_answered_or_refused_as_the_users_mistake() -> None:
    draw = random.Random(6)

    async def work() -> int:
        num_answered = 0
        async with scripted("abc") as model:
            for number in range(300):
                fields = random_fields(draw, CompletionRequest)
                try:
                    request = ask(**{**fields, "max_tokens": 4, "stream": None})
                    await complete(model, request, str(number))
                    num_answered += 1
                except (RequestError, OptionError, ValidationError):
                    continue
        return num_answered

    assert run(work()) > 10


def test_end_token_alone_is_an_empty_text() -> None:
    async def work() -> Completion:
        async with scripted("") as model:
            return await complete(model, ask(logprobs=1), "1")

    [choice] = run(work()).choices
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert choice.logprobs is not None and choice.logprobs.tokens == []
    assert reciter("")([START])[END] == 20
