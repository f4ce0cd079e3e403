"""Scores of a reranker: how much likelier it says yes than no when asked for each document.

Knows the engine's requests. What is asked is text/ranking.py's affair.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.errors import ContextTooLong, StepFailed
from mlc_llm.serve.model import ServedModel
from mlc_llm.text.ranking import RankingPrompts


async def judge(
    model: ServedModel,
    query: str,
    documents: Sequence[str],
    instruction: str | None = None,
    max_len: int | None = None,
) -> tuple[NDArray[np.float64], int]:
    """Return each document's probability to fit, (n) from 0 to 1, and the tokens of all prompts.

    max_len: prompts with more tokens lose the end of their document; -1 stands for the most that
    the model takes. At most as many are asked at once as the engine runs; what one of them raises
    ends the others. Raises RequestError, ContextTooLong, QueueFull, EngineStopped or StepFailed.
    """
    ranking = model.ranking
    assert ranking is not None
    limit = model.max_sequence_len - 1  # a token is computed to know what it might be
    given = limit if max_len == -1 else max_len
    # Tokenizing megabytes of text must not hold up other requests of the event loop.
    prompts = await asyncio.to_thread(_build_prompts, ranking, query, documents, instruction, given)
    for number, prompt in enumerate(prompts):
        if len(prompt) > limit:
            raise ContextTooLong(
                f"documents[{number}] and the query make a prompt of {len(prompt):,} tokens, the "
                f"model takes {limit:,}; split it, or send truncate_prompt_tokens=-1 to leave out "
                "its end",
                f"documents[{number}]",
            )
    scores = np.zeros(len(prompts))
    waiting = iter(enumerate(prompts))

    async def work() -> None:
        for number, prompt in waiting:
            scores[number] = await _ask(model, ranking, prompt)

    num_tasks = min(len(prompts), model.worker.engine.max_num_sequence)
    tasks = [asyncio.create_task(work()) for _ in range(num_tasks)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return scores, sum(len(prompt) for prompt in prompts)


def _build_prompts(
    ranking: RankingPrompts,
    query: str,
    documents: Sequence[str],
    instruction: str | None,
    max_len: int | None,
) -> list[list[int]]:
    return [ranking.build(query, document, instruction, max_len) for document in documents]


async def _ask(model: ServedModel, ranking: RankingPrompts, prompt: list[int]) -> float:
    """Return the probability of yes, among yes and no, as the token after a prompt."""
    answers = (ranking.yes_id, ranking.no_id)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, logprob_token_ids=answers)
    request = Request(f"rerank-{uuid.uuid4().hex}", prompt, params)
    async with await model.worker.submit(request, model.timeout_s) as stream:
        async for outputs in stream:
            for output in outputs:
                if output.error is not None:
                    raise output.error
                if output.logprobs is not None:
                    yes, no = (logprob for _, logprob in output.logprobs.top)
                    return 1 / (1 + math.exp(min(no - yes, 700)))
    raise StepFailed("the engine ended the request before it was answered; try again")
