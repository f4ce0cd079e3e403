"""Sessions on the fake runner, with a small tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import VOCAB_SIZE, FakeRunner
from small_tokenizers import write_tokenizer

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.engine import Engine
from mlc_llm.engine.session import ChatSession
from mlc_llm.text.conversation import Conversation
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer

STOP_ID = 2

OpenSession = Callable[..., ChatSession]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer whose special tokens are 0 to 2."""
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.load(write_tokenizer(directory))


@pytest.fixture
def open_session(tokenizer: Tokenizer) -> OpenSession:
    """Return a maker of sessions on a runner; keywords replace fields of the chat config."""

    def make(
        runner: FakeRunner,
        stop_str: tuple[str, ...] = (),
        opening: str = "",
        **changes: Any,
    ) -> ChatSession:
        metadata = runner.metadata
        values: dict[str, Any] = {
            "model_type": metadata.model_type,
            "quantization": metadata.quantization,
            "model_config": {},
            "vocab_size": VOCAB_SIZE,
            "context_window_size": metadata.context_window_size,
            "prefill_chunk_size": metadata.prefill_chunk_size,
            "conv_template": {},
        }
        config = ChatConfig(**{**values, **changes})
        conversation = Conversation(
            stop_str=list(stop_str), roles={"user": "", "assistant": opening}
        )
        prompts = PromptBuilder(tokenizer, conversation, None, [STOP_ID], VOCAB_SIZE)
        engine = Engine(runner, active_vocab_size=config.active_vocab_size)
        return ChatSession(config, tokenizer, prompts, engine)

    return make
