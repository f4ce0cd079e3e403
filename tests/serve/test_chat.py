"""Chat completions on the worker, without HTTP: what is said, when, and what it counts."""

from __future__ import annotations

import math

import pytest
from chats import ask, stream, text_of
from openai.types.chat import ChatCompletion as TheirAnswer
from openai.types.chat import ChatCompletionChunk as TheirChunk
from openai_shapes import strictly
from scripted import END, START, TOKENIZER, reciter, run, scripted
from small_tokenizers import CHATML_TEMPLATE

from mlc_llm.errors import (
    RequestError,
)
from mlc_llm.serve.chat import chat
from mlc_llm.serve.protocol.chat import (
    ChatCompletion,
    ChatCompletionChunk,
)
from mlc_llm.text.chat_template import ChatTemplate
from mlc_llm.text.conversation import Conversation

LION = "\N{LION FACE}"


def test_answer_has_openais_shape() -> None:
    async def work() -> ChatCompletion:
        async with scripted("Good day.") as model:
            return await chat(model, ask(service_tier="auto"), "abc")

    answer = run(work())
    parsed = strictly(TheirAnswer, answer)
    assert (parsed.id, parsed.object, parsed.model) == (
        "chatcmpl-abc",
        "chat.completion",
        "scripted",
    )
    assert parsed.service_tier == "default"
    assert parsed.system_fingerprint.startswith("fp_")
    [choice] = parsed.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Good day.")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    usage = parsed.usage
    num_made = len(TOKENIZER.encode("Good day."))
    assert usage.completion_tokens == num_made
    assert usage.total_tokens == usage.prompt_tokens + num_made
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert usage.completion_tokens_details.reasoning_tokens == 0
    written = answer.model_dump()
    assert written["choices"][0]["message"]["refusal"] is None
    assert written["choices"][0]["message"]["annotations"] == []
    assert written["choices"][0]["logprobs"] is None


def test_stream_says_role_text_end_and_usage() -> None:
    async def work() -> tuple[list[ChatCompletionChunk], list[ChatCompletionChunk]]:
        async with scripted("Good day.") as model:
            plain = await stream(model)
            return plain, await stream(model, stream_options={"include_usage": True})

    plain, counted = run(work())
    for chunk in plain + counted:
        strictly(TheirChunk, chunk)
    first, *middle, last = plain
    assert first.model_dump()["choices"][0]["delta"] == {
        "role": "assistant",
        "content": "",
        "refusal": None,
    }
    assert text_of(plain) == "Good day."
    for chunk in middle:
        assert set(chunk.model_dump()["choices"][0]["delta"]) == {"content"}
        assert chunk.choices[0].finish_reason is None
    assert last.model_dump()["choices"][0]["delta"] == {}
    assert last.choices[0].finish_reason == "stop"
    assert not any("usage" in chunk.model_dump() for chunk in plain)
    *others, total = counted
    assert all(chunk.model_dump()["usage"] is None for chunk in others)
    assert total.choices == [] and total.usage is not None
    assert total.usage.completion_tokens == len(TOKENIZER.encode("Good day."))
    # The same prompt came before: whole pages of it are shared, but here it is shorter than one.
    assert total.usage.prompt_tokens_details.cached_tokens == 0
    assert len({chunk.id for chunk in counted}) == 1


def test_cached_tokens_are_counted() -> None:
    async def work() -> tuple[int, int]:
        async with scripted("Yes.") as model:
            request = ask(messages=[{"role": "user", "content": "x" * 100}])
            first = await chat(model, request, "1")
            second = await chat(model, request, "2")
            return (
                first.usage.prompt_tokens_details.cached_tokens,
                second.usage.prompt_tokens_details.cached_tokens,
            )

    first, second = run(work())
    assert first == 0
    assert second >= 80


def test_characters_are_never_split() -> None:
    text = f"a{LION}b{LION}{LION}c"

    async def work() -> list[ChatCompletionChunk]:
        async with scripted(text) as model:
            return await stream(model)

    chunks = run(work())
    assert text_of(chunks) == text
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("is_stream", [False, True])
def test_stop_string_ends_the_answer_and_is_not_shown(is_stream: bool) -> None:
    async def work() -> tuple[str, str | None, int]:
        async with scripted("one two three four") as model:
            fields = {"stop": ["thr", "nine"], "logprobs": True}
            if is_stream:
                options = {"include_usage": True}
                chunks = await stream(model, stream_options=options, **fields)
                *_, end, total = chunks
                assert total.usage is not None
                tokens = [
                    token.token
                    for chunk in chunks
                    for choice in chunk.choices
                    if choice.logprobs is not None
                    for token in choice.logprobs.content or []
                ]
                assert "".join(tokens) == "one two "
                reason = end.choices[0].finish_reason
                return text_of(chunks), reason, total.usage.completion_tokens
            answer = await chat(model, ask(**fields), "r")
            [choice] = answer.choices
            assert choice.logprobs is not None and choice.logprobs.content is not None
            assert "".join(token.token for token in choice.logprobs.content) == "one two "
            return (
                choice.message.content or "",
                choice.finish_reason,
                answer.usage.completion_tokens,
            )

    text, reason, num_tokens = run(work())
    assert (text, reason) == ("one two ", "stop")
    assert num_tokens == len(TOKENIZER.encode("one two thr"))


def test_stop_string_that_never_completes_is_shown() -> None:
    async def work() -> str:
        async with scripted("one two th") as model:
            return text_of(await stream(model, stop="three"))

    assert run(work()) == "one two th"


def test_min_tokens_holds_off_ends_and_stop_strings() -> None:
    async def work() -> tuple[str, str]:
        async with scripted("one two one two") as model:
            count = len(TOKENIZER.encode("one two"))
            held = await chat(model, ask(stop="two", min_tokens=count), "1")
            free = await chat(model, ask(stop="two"), "2")
            return held.choices[0].message.content or "", free.choices[0].message.content or ""

    assert run(work()) == ("one two one ", "one ")


def test_end_and_stop_token_ids_and_ignore_eos() -> None:
    async def work() -> list[tuple[str | None, str]]:
        async with scripted("abcdef") as model:
            answers = [
                await chat(model, ask(max_tokens=3), "1"),
                await chat(model, ask(max_completion_tokens=50), "2"),
                await chat(model, ask(stop_token_ids=TOKENIZER.encode("c")), "3"),
                await chat(model, ask(ignore_eos=True, max_tokens=8), "4"),
                await chat(model, ask(debug_config={"ignore_eos": True}, max_tokens=8), "5"),
            ]
            assert [answer.usage.completion_tokens for answer in answers] == [3, 6, 2, 8, 8]
            return [
                (answer.choices[0].message.content, answer.choices[0].finish_reason)
                for answer in answers
            ]

    short, whole, before, longer, debugged = run(work())
    assert (short, whole, before) == (("abc", "length"), ("abcdef", "stop"), ("ab", "stop"))
    assert longer == debugged
    assert longer[1] == "length"


def test_stop_strings_of_the_template_apply_unless_ends_are_ignored() -> None:
    conversation = Conversation(roles={"user": "", "assistant": "<|im_start|>"}, stop_str=["cd"])

    async def work() -> tuple[str | None, str | None]:
        async with scripted("abcdef", conversation=conversation) as model:
            usual = await chat(model, ask(), "1")
            forced = await chat(model, ask(ignore_eos=True, max_tokens=5), "2")
            return usual.choices[0].message.content, forced.choices[0].message.content

    assert run(work()) == ("ab", "abcde")


def test_choices_are_told_apart_by_index() -> None:
    async def work() -> tuple[ChatCompletion, list[ChatCompletionChunk]]:
        async with scripted("red", "blue", "green") as model:
            fields = {"n": 6, "temperature": 2.0, "top_k": 3, "seed": 7, "max_tokens": 12}
            return await chat(model, ask(**fields), "1"), await stream(model, **fields)

    answer, chunks = run(work())
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len(set(texts)) > 1
    assert [text_of(chunks, index) for index in range(6)] == texts
    ends = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(ends) == list(range(6))
    starts = [c.index for chunk in chunks for c in chunk.choices if c.delta.role]
    assert sorted(starts) == list(range(6))
    # One prompt, six answers.
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode("hello")) + 1
    assert answer.usage.completion_tokens == sum(len(TOKENIZER.encode(t or "")) for t in texts)


def test_a_stop_string_ends_one_choice_and_not_the_others() -> None:
    async def work() -> ChatCompletion:
        async with scripted("red or dead", "blue or new") as model:
            fields = {"n": 8, "temperature": 1.5, "top_k": 2, "seed": 1, "stop": " or dead"}
            return await chat(model, ask(**fields), "1")

    texts = [choice.message.content for choice in run(work()).choices]
    assert "red" in texts and "blue or new" in texts
    assert not any("dead" in (text or "") for text in texts)


def test_logprobs_name_tokens_bytes_and_likeliest_ones() -> None:
    async def work() -> ChatCompletion:
        async with scripted(f"hi{LION}") as model:
            return await chat(model, ask(logprobs=True, top_logprobs=2), "1")

    answer = run(work())
    strictly(TheirAnswer, answer)
    block = answer.choices[0].logprobs
    assert block is not None and block.content is not None and block.refusal is None
    assert [token.token for token in block.content[:2]] == ["h", "i"]
    # A lion is four bytes, which are tokens of their own here.
    assert [token.token for token in block.content[2:]] == ["\\xf0", "\\x9f", "\\xa6", "\\x81"]
    raw = bytes(byte for token in block.content for byte in token.bytes or [])
    assert raw.decode() == f"hi{LION}"
    for place, token in enumerate(block.content):
        assert [top.token for top in token.top_logprobs] == [token.token, "<|im_end|>"]
        logits = reciter(f"hi{LION}")([START, *TOKENIZER.encode(f"hi{LION}")[:place]])
        expected = float(logits[END]) - math.log(sum(math.exp(x) for x in logits.tolist()))
        assert token.top_logprobs[1].logprob == pytest.approx(expected, abs=1e-4)


def test_defaults_come_from_the_model() -> None:
    async def work() -> tuple[float, float]:
        async with scripted("a", defaults={"temperature": 0.25, "top_p": 0.5}) as model:
            return model.defaults.temperature, model.defaults.top_p

    assert run(work()) == (0.25, 0.5)


def test_template_gets_history_and_variables() -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}"
        "{% endif %}{% if m.tool_call_id %}"
        "={{ m.tool_call_id }}{% endif %}]{{ m.content }}{% endfor %}{{ mood }}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "t"},
    ]
    expected = "[system]s[user]uv[assistantf{}][tool=1]t"

    async def work() -> None:
        async with scripted("a", template=ChatTemplate(source)) as model:
            fields = {"messages": messages, "chat_template_kwargs": {"mood": "!"}}
            answer = await chat(model, ask(**fields), "1")
            assert answer.usage.prompt_tokens == len(TOKENIZER.encode(expected + "!")) + 1
            bare = await chat(model, ask(**fields, add_generation_prompt=False, max_tokens=1), "2")
            assert bare.usage.prompt_tokens == len(TOKENIZER.encode(expected + "!"))
            for name in ("messages", "self", "add_generation_prompt", "chat_template"):
                with pytest.raises(RequestError) as caught:
                    await chat(model, ask(chat_template_kwargs={name: 1}), "3")
                assert caught.value.param == f"chat_template_kwargs.{name}"

    run(work())


def test_final_message_can_be_continued() -> None:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<|im_start|>one two"},
    ]

    async def work() -> str | None:
        async with scripted("one two three", template=ChatTemplate(CHATML_TEMPLATE)) as model:
            answer = await chat(model, ask(messages=messages, continue_final_message=True), "1")
            with pytest.raises(RequestError, match="needs a last message of role 'assistant'"):
                await chat(model, ask(continue_final_message=True), "2")
            return answer.choices[0].message.content

    assert run(work()) == " three"
