"""A model that is served: how its prompts are made, and the worker that continues them."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import mlc_llm
from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.ranking import RankingPrompts
from mlc_llm.text.token_bytes import TokenBytes
from mlc_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlc_llm.engine.open import OpenModel
    from mlc_llm.engine.worker import EngineWorker


@dataclass
class ServedModel:
    """Everything that answering requests needs of a model.

    max_sequence_len: tokens of prompt and answer together. created: Unix time. timeout_s: how long
    a request may take, None for what the worker has been told. ranking: how it is asked for scores,
    None where it is no reranker.
    """

    name: str
    config: ChatConfig
    tokenizer: Tokenizer
    prompts: PromptBuilder
    worker: EngineWorker
    vocab_size: int
    max_sequence_len: int
    created: int = field(default_factory=lambda: int(time.time()))
    timeout_s: float | None = None
    ranking: RankingPrompts | None = None

    @classmethod
    def of(cls, name: str, opened: OpenModel, worker: EngineWorker) -> ServedModel:
        """Return an opened model under a name; `worker` runs its engine."""
        return cls(
            name,
            opened.config,
            opened.tokenizer,
            opened.prompts,
            worker,
            opened.engine.vocab_size,
            opened.engine.max_sequence_len,
            ranking=opened.ranking,
        )

    @cached_property
    def defaults(self) -> SamplingParams:
        """How tokens are chosen where a request does not say."""
        return SamplingParams.from_config(self.config)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """What single tokens stand for."""
        return TokenBytes(self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """A name for the model and this release: answers to a seed may change with it."""
        text = json.dumps([mlc_llm.__version__, self.config.to_json()], sort_keys=True)
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]

    def abort(self, request_id: str) -> None:
        """End a request within a step; ids that are not known are fine."""
        self.worker.abort(request_id)
