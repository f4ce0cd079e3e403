"""What engines are made of, on fake runners: answers are letters, a function of what was before."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from fakes import HIDDEN_SIZE, FakeEncodingRunner, FakeRunner, Logits, next_token, only
from small_tokenizers import byte_level

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.embedding import EmbeddingModel
from mlc_llm.engine.encoder import Encoder, pages_for_encoding
from mlc_llm.engine.engine import Engine
from mlc_llm.engine.grammar_cache import GrammarCache
from mlc_llm.engine.worker import EngineWorker
from mlc_llm.runtime.runner import Step
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.model import ServedModel
from mlc_llm.text.conversation import Conversation
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})
VOCAB_SIZE = TOKENIZER.vocab_size
EOS_ID = TOKENIZER.token_to_id("<|im_end|>") or 0
LETTERS = [TOKENIZER.encode(letter)[0] for letter in "abcdefghijklmnopqrstuvwxyz"]


class GatedRunner(FakeRunner):
    """A fake runner whose steps wait while its gate is closed."""

    def __init__(self, **options: Any) -> None:
        def letter_after(tokens: list[int]) -> Logits:
            return only(LETTERS[next_token(tokens) % len(LETTERS)], VOCAB_SIZE)

        super().__init__(letter_after, vocab_size=VOCAB_SIZE, **options)
        self.gate, self.is_in_step = threading.Event(), threading.Event()
        self.gate.set()

    def forward(self, step: Step) -> Logits:
        self.is_in_step.set()
        assert self.gate.wait(10)
        return super().forward(step)


@dataclass
class Parts:
    """What an engine is made of, for tests to look at."""

    models: ServedModels
    runner: GatedRunner
    closings: list[str] = field(default_factory=list)

    def close(self) -> None:
        """End the models, as an engine does."""
        self.closings.append("closed")
        self.runner.gate.set()
        self.models.chat.worker.stop()
        if self.models.embedding is not None:
            self.models.embedding.close()
        self.models.chat.worker.engine.check_integrity()
        self.models.chat.worker.engine.close()


def make_config() -> ChatConfig:
    return ChatConfig(
        model_type="llama",
        quantization="q4f16_1",
        model_config={"hidden_size": HIDDEN_SIZE},
        vocab_size=VOCAB_SIZE,
        context_window_size=256,
        prefill_chunk_size=32,
        conv_template={},
        eos_token_id=EOS_ID,
    )


def make_parts(has_embedding: bool = True) -> Parts:
    """Return the parts of an engine, its worker running."""
    runner = GatedRunner(
        num_pages=64, context_window_size=256, prefill_chunk_size=32, max_batch_size=8
    )
    grammars = GrammarCache(lambda: GrammarVocabulary(TOKENIZER, [EOS_ID], VOCAB_SIZE))
    engine = Engine(runner, active_vocab_size=VOCAB_SIZE, grammars=grammars)
    worker = EngineWorker(engine)
    worker.start()
    config = make_config()
    prompts = PromptBuilder(TOKENIZER, Conversation(), None, [EOS_ID], VOCAB_SIZE)
    chat = ServedModel(
        name="tiny",
        config=config,
        tokenizer=TOKENIZER,
        prompts=prompts,
        worker=worker,
        vocab_size=engine.vocab_size,
        max_sequence_len=engine.max_sequence_len,
    )
    embedding = None
    if has_embedding:
        encoding = FakeEncodingRunner(pages_for_encoding(FakeEncodingRunner().metadata))
        embedding = EmbeddingModel("vectors", config, TOKENIZER, Encoder(encoding))
    return Parts(ServedModels(chat, embedding), runner)
