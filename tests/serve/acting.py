"""A served model that acts: its reply is a function of the prompt's text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from fakes import FakeRunner, Logits
from live_server import LiveServer, live_server
from served import model_on
from small_tokenizers import CHATML_TOKENS, byte_level

from mlc_llm.serve.app import create_app
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.options import AppOptions
from mlc_llm.text.chat_template import ChatTemplate
from mlc_llm.text.conversation import Conversation
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer

NAME = "actor"
CONTEXT = 4096
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TOKENIZER = Tokenizer(byte_level((*CHATML_TOKENS, *MARKS)), {"eos_token": "<|im_end|>"})
VOCAB_SIZE = TOKENIZER.vocab_size
START, END = 1, 2
_ROLE = TOKENIZER.encode("assistant\n")
_NO_THOUGHTS = TOKENIZER.encode("<think>\n\n</think>\n\n")
# In the manner of Qwen3's.
TEMPLATE = """{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

Script = Callable[[str], str]


def call(name: str, arguments: str) -> str:
    """Return a call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def acting(script: Script) -> Callable[[list[int]], Logits]:
    """Return logits by which the script's reply to the prompt follows."""

    @functools.lru_cache
    def play(prompt: tuple[int, ...]) -> tuple[str, list[int]]:
        reply = script(_decode(prompt))
        return reply, [*TOKENIZER.encode(reply), END]

    def logits_of(tokens: list[int]) -> Logits:
        logits = np.zeros(VOCAB_SIZE, np.float32)
        if START not in tokens:
            return logits
        place = len(tokens) - 1 - tokens[::-1].index(START)
        header, said = tokens[place + 1 : place + 1 + len(_ROLE)], tokens[place + 1 + len(_ROLE) :]
        if header == _ROLE:
            if said[: len(_NO_THOUGHTS)] == _NO_THOUGHTS:
                said = said[len(_NO_THOUGHTS) :]
            logits[_next(*play(tuple(tokens[:place])), said)] = 20
        return logits

    return logits_of


def _next(reply: str, script: list[int], said: list[int]) -> int:
    if said == script[: len(said)] and len(said) < len(script):
        return script[len(said)]
    # Tokens that a grammar forced may part the text in another way.
    text = _decode(said)
    rest = reply[len(text) :] if reply.startswith(text) else ""
    return TOKENIZER.encode(rest)[0] if rest else END


def _decode(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens), skip_special_tokens=False)


def make_actor(script: Script) -> ServedModel:
    """Return a model that acts, its worker not yet started."""
    runner = FakeRunner(
        acting(script),
        num_pages=1024,
        vocab_size=VOCAB_SIZE,
        context_window_size=CONTEXT,
        prefill_chunk_size=512,
        max_batch_size=8,
    )
    template = ChatTemplate(TEMPLATE)
    prompts = PromptBuilder(TOKENIZER, Conversation(), template, [END], VOCAB_SIZE)
    return model_on(runner, TOKENIZER, prompts, name=NAME, temperature=0.0)


@contextmanager
def served_actor(script: Script, **options: Any) -> Iterator[LiveServer]:
    """Serve a model that acts over HTTP; leaving checks that its engine gave everything back."""
    model = make_actor(script)
    traffic = Traffic()
    app = create_app(ServedModels(model), AppOptions(**options), traffic)
    try:
        with live_server(app, [model.worker], traffic) as live:
            yield live
    finally:
        model.prompts.close()
        model.worker.engine.close()
    model.worker.engine.check_integrity()
