"""A served model that answers from a script, and an agent that asks it with the official client.

The next reply depends on how many results of tools the prompt has, so that a loop goes on only
where calls, results and history reach the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from fakes import FakeRunner, Logits
from live_server import live_server
from openai import OpenAI
from served import model_on
from small_tokenizers import CHATML_TOKENS, byte_level

from mlc_llm.serve.app import create_app
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.options import AppOptions
from mlc_llm.text.answers import AnswerFormats
from mlc_llm.text.chat_template import ChatTemplate
from mlc_llm.text.conversation import Conversation
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer
from mlc_llm.text.tool_calls.registry import format_names, get_format
from mlc_llm.text.tool_calls.tools import WrittenCall

SPECIAL = [
    *dict.fromkeys(text for name in format_names() for text in get_format(name).shape.special)
]
TOKENIZER = Tokenizer(byte_level((*CHATML_TOKENS, *SPECIAL)), {"eos_token": "<|im_end|>"})
VOCAB_SIZE = TOKENIZER.vocab_size
START, END = 1, 2
RESULT = "<result>"
# Writes what an agent sends, so that what does not arrive is missed.
TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}
{% if m.role == 'tool' %}<result>{{ m.content }}{% else %}{{ m.role }}:{{ m.content or '' }}\
{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}\
{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}\
{% endfor %}{% endif %}{% endfor %}<|im_start|>{% if enable_thinking %}<think>
{% endif %}"""
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    },
]

WEATHER = WrittenCall("get_weather", '{"city": "Paris \\"x\\""}')
ADD = WrittenCall("add", '{"a": 1, "b": 2}')


def replies_of(name: str) -> list[str]:
    """Return a call, then another one, then an answer, as the format has them."""
    write = get_format(name).shape.write
    said = "It is sunny, and 3."
    if name == "gpt_oss":
        thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        return [thought + write([WEATHER]), write([ADD]), f"<|channel|>final<|message|>{said}"]
    return [write([WEATHER]), write([ADD]), said]


class ScriptedRunner(FakeRunner):
    """Recites the reply of the number of results that the prompt has."""

    def __init__(self, replies: Sequence[str], context: int) -> None:
        super().__init__(
            self._say,
            num_pages=4 * context // 16,
            vocab_size=VOCAB_SIZE,
            context_window_size=context,
            prefill_chunk_size=256,
            max_batch_size=4,
        )
        self.replies = [[*TOKENIZER.encode(reply), END] for reply in replies]
        self.prompts: list[str] = []
        self._result = TOKENIZER.encode(RESULT)

    def _say(self, tokens: list[int]) -> Logits:
        logits = np.zeros(VOCAB_SIZE, np.float32)
        if START not in tokens:
            return logits
        first = len(tokens) - tokens[::-1].index(START)
        prompt, said = tokens[:first], tokens[first:]
        opening = TOKENIZER.encode("<think>\n")
        if not said or said == opening:
            self.prompts.append(TOKENIZER.decode(prompt, skip_special_tokens=False))
        number = TOKENIZER.decode(prompt).count(RESULT)
        reply = self.replies[min(number, len(self.replies) - 1)]
        if said[: len(opening)] == opening != reply[: len(opening)]:
            said = said[len(opening) :]  # the prompt has begun the thoughts
        is_reply = said == reply[: len(said)] and len(said) < len(reply)
        logits[reply[len(said)] if is_reply else END] = 30
        return logits


@contextmanager
def agent_model(
    name: str,
    replies: Sequence[str],
    *,
    context: int = 2048,
    template: str | None = TEMPLATE,
    reasoning: str = "none",
) -> Iterator[tuple[ServedModel, ScriptedRunner]]:
    """Return a model that replies in the words of a format; its worker has not started."""
    runner = ScriptedRunner(replies, context)
    jinja = None if template is None else ChatTemplate(template)
    prompts = PromptBuilder(
        TOKENIZER,
        Conversation(roles={"user": "\nuser:", "assistant": "<|im_start|>"}),
        jinja,
        [END],
        VOCAB_SIZE,
        formats=AnswerFormats.find(template, "", name, reasoning),
    )
    model = model_on(runner, TOKENIZER, prompts, name="fake", temperature=0.0)
    try:
        yield model, runner
    finally:
        prompts.close()
        model.worker.engine.close()
    model.worker.engine.check_integrity()


@contextmanager
def agent_server(
    name: str, replies: Sequence[str], **options: Any
) -> Iterator[tuple[OpenAI, ScriptedRunner]]:
    """Serve such a model; return a client and what is behind the server."""
    with agent_model(name, replies, **options) as (model, runner):
        traffic = Traffic()
        app = create_app(ServedModels(model), AppOptions(), traffic)
        with live_server(app, [model.worker], traffic) as live:
            with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
                yield client, runner


def run_tool(name: str, arguments: str) -> str:
    """Do what a tool does."""
    values = json.loads(arguments)
    if name == "get_weather":
        return f"sunny in {values['city']}"
    assert name == "add"
    return str(values["a"] + values["b"])


def ask(client: OpenAI, messages: list[Any], *, stream: bool, **fields: Any) -> tuple[Any, str]:
    """Return the assistant's message, as a client keeps it, and the reason why it ended."""
    if not stream:
        answer = client.chat.completions.create(model="fake", messages=messages, **fields)
        choice = answer.choices[0]
        return choice.message.model_dump(exclude_none=True), choice.finish_reason
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    reason = ""
    chunks = client.chat.completions.create(model="fake", messages=messages, stream=True, **fields)
    for chunk in chunks:
        [choice] = chunk.choices
        delta = choice.delta
        message["content"] += delta.content or ""
        if thought := (delta.model_extra or {}).get("reasoning_content"):
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        for call in delta.tool_calls or ():
            calls = message.setdefault("tool_calls", [])
            assert call.function is not None
            if call.index == len(calls):
                assert call.id and call.type == "function" and call.function.name
                function = {"name": call.function.name, "arguments": call.function.arguments}
                calls.append({"id": call.id, "type": call.type, "function": function})
            else:
                assert (call.id, call.type, call.function.name) == (None, None, None)
                calls[call.index]["function"]["arguments"] += call.function.arguments
        reason = choice.finish_reason or reason
    return message, reason


def run_agent(client: OpenAI, question: str, *, stream: bool, **fields: Any) -> list[Any]:
    """Ask, and do what the model calls for, until it answers; return all messages."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(8):
        message, reason = ask(client, messages, stream=stream, tools=TOOLS, **fields)
        messages.append(message)
        assert (reason == "tool_calls") == bool(message.get("tool_calls")), (reason, message)
        if reason != "tool_calls":
            return messages
        for call in message["tool_calls"]:
            result = run_tool(call["function"]["name"], call["function"]["arguments"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    raise AssertionError("the agent never ended")
