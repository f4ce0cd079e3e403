"""litellm against a server: `python litellm_client.py BASE_URL MODEL`.

Prints one line of JSON for each check: {"check": name, "problem": null or text}.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from checks import run_checks

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would be fetched from the internet
import litellm

litellm.suppress_debug_info = True
BASE_URL, MODEL = sys.argv[1:3]
SERVER = {"api_base": BASE_URL, "api_key": "none", "num_retries": 0}
MESSAGES = [{"role": "user", "content": "Name three colours and say why."}]


def ask(**options: Any) -> Any:
    values = {"model": f"openai/{MODEL}", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    return litellm.completion(**SERVER, **{**values, **options})


def chat() -> None:
    answer = ask()
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


def stream() -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask().choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 16


def asynchronous() -> None:
    answer = asyncio.run(
        litellm.acompletion(
            model=f"openai/{MODEL}", messages=MESSAGES, max_tokens=16, temperature=0, **SERVER
        )
    )
    assert answer.choices[0].message.content == ask().choices[0].message.content


def choices() -> None:
    answer = ask(n=3, seed=5, temperature=1.0)
    assert len({choice.message.content for choice in answer.choices}) == 3


def logprobs() -> None:
    choice = ask(logprobs=True, top_logprobs=2).choices[0]
    tokens = [entry["token"] for entry in choice.model_dump()["logprobs"]["content"]]
    assert "".join(tokens) == choice.message.content


def completions() -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        prompt="Once upon a time",
        max_tokens=8,
        temperature=0,
        **SERVER,
    )
    assert answer.choices[0].text


def errors() -> None:
    for kind, options in (
        (litellm.BadRequestError, {"top_p": 7}),
        (litellm.NotFoundError, {"model": "openai/another"}),
    ):
        try:
            ask(**options)
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__} was raised")


def long_prompt() -> None:
    try:
        ask(messages=[{**MESSAGES[0], "content": "word " * 9000}])
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("a prompt longer than the context was taken")


run_checks([chat, stream, asynchronous, choices, logprobs, completions, errors, long_prompt])
