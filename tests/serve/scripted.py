"""A served model that recites: a fake runner which continues every prompt with a given text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
from fakes import FakeRunner, Logits
from small_tokenizers import byte_level

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.engine import Engine
from mlc_llm.engine.grammar_cache import GrammarCache
from mlc_llm.engine.worker import EngineWorker
from mlc_llm.serve.model import ServedModel
from mlc_llm.text.chat_template import ChatTemplate
from mlc_llm.text.conversation import Conversation
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer

Result = TypeVar("Result")

TOKENIZER = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})
VOCAB_SIZE = TOKENIZER.vocab_size
START = 1  # <|im_start|>: the text begins after the last one
END = 2
USUAL = {"user": "", "assistant": "<|im_start|>"}


def reciter(*texts: str, ends: bool = True) -> Callable[[list[int]], Logits]:
    """Return logits that recite the first text; of the others each is less likely by half.

    The second likeliest token of each place is the end, by a factor of e to the 4.
    """
    scripts = [TOKENIZER.encode(text) + ([END] if ends else []) for text in texts]

    def logits_of(tokens: list[int]) -> Logits:
        logits = np.zeros(VOCAB_SIZE, np.float32)
        if START not in tokens:
            return logits
        place = len(tokens) - 1 - (len(tokens) - 1 - tokens[::-1].index(START))
        so_far = tokens[len(tokens) - place :] if place else []
        logits[END] = 16
        for number, script in enumerate(scripts):
            if script[:place] == so_far and place < len(script):
                logits[script[place]] = max(logits[script[place]], 20 - number)
        return logits

    return logits_of


@asynccontextmanager
async def scripted(
    *texts: str,
    conversation: Conversation | None = None,
    template: ChatTemplate | None = None,
    defaults: dict[str, Any] | None = None,
    ends: bool = True,
    tokenizer: Tokenizer = TOKENIZER,
    **worker_options: Any,
) -> AsyncIterator[ServedModel]:
    """Serve a model that recites; leaving checks that its engine gave everything back."""
    runner = FakeRunner(
        reciter(*texts, ends=ends),
        num_pages=256,
        vocab_size=VOCAB_SIZE,
        context_window_size=256,
        prefill_chunk_size=32,
        max_batch_size=16,
    )
    grammars = GrammarCache(lambda: GrammarVocabulary(tokenizer, [END], VOCAB_SIZE))
    engine = Engine(runner, grammars=grammars)
    worker = EngineWorker(engine, **worker_options)
    worker.start()
    config = ChatConfig(
        model_type="llama",
        quantization="q4f16_1",
        model_config={},
        vocab_size=VOCAB_SIZE,
        context_window_size=256,
        prefill_chunk_size=32,
        conv_template={},
        **{"temperature": 0.0, **(defaults or {})},
    )
    prompts = PromptBuilder(
        tokenizer, conversation or Conversation(roles=USUAL), template, [END], VOCAB_SIZE
    )
    try:
        yield ServedModel(
            "scripted", config, tokenizer, prompts, worker, engine.vocab_size, 256, created=1
        )
        while engine.has_work:
            await asyncio.sleep(0.005)
    finally:
        worker.stop()
        prompts.close()
    engine.check_integrity()
    engine.close()
    load = engine.load()
    assert (load.num_running, load.num_waiting) == (0, 0)


def run(work: Awaitable[Result]) -> Result:
    """Run a test's coroutine, not for long."""

    async def limited() -> Result:
        return await asyncio.wait_for(work, 30)

    return asyncio.run(limited())
