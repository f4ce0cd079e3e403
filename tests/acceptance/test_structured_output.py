"""500 schemas, the demo model, temperature 1: what is finished is valid, what is cut begins so.

Validity is for the `jsonschema` package to say, which knows nothing of how answers are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_model import open_demo_model
from program import Program
from random_schemas import random_schemas
from schema_judge import find_error

from mlc_llm.engine.config import EngineConfig
from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.engine.open import OpenModel
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams

pytestmark = [pytest.mark.cpu, pytest.mark.weights]

NUM_SCHEMAS = 500
PARAMS = SamplingParams(temperature=1.0, max_tokens=48)
Answer = tuple[list[int], str]


@pytest.fixture(scope="module")
def model(program: Program, demo_gguf: Path) -> Iterator[OpenModel]:
    config = EngineConfig(
        mode="server", max_num_sequence=32, max_total_sequence_length=16384, prefill_chunk_size=512
    )
    opened = open_demo_model(program, demo_gguf, config)
    yield opened
    opened.close()


def answers_to(model: OpenModel, specs: list[GrammarSpec]) -> list[Answer]:
    """Return the tokens and the reason of the end of an answer to each grammar."""
    prompt = model.prompts.token_ids([{"role": "user", "content": "Make up an example."}])
    answers: list[list[int]] = [[] for _ in specs]
    ends = [""] * len(specs)
    for number, spec in enumerate(specs):
        params = PARAMS.with_changes(seed=number)
        stops = model.prompts.stop_token_ids
        model.engine.add(Request(str(number), prompt, params, stop_token_ids=stops, grammar=spec))
    while model.engine.has_work:
        for output in model.engine.step():
            assert output.error is None, output.error
            if output.token_id is not None:
                answers[int(output.request_id)].append(output.token_id)
            if output.finish_reason is not None:
                ends[int(output.request_id)] = output.finish_reason
    return list(zip(answers, ends, strict=True))


def test_every_answer_keeps_to_its_schema(model: OpenModel) -> None:
    schemas = random_schemas(NUM_SCHEMAS, seed=1)
    specs = [GrammarSpec("json_schema", json.dumps(schema)) for schema in schemas]
    num_finished = 0
    assert model.engine.grammars is not None
    for schema, spec, (tokens, end) in zip(schemas, specs, answers_to(model, specs), strict=True):
        text = model.tokenizer.decode(tokens)
        if end == "stop":
            num_finished += 1
            error = find_error(schema, json.loads(text))
            assert error is None, f"{text} for {spec.source}: {error}"
        else:
            assert end == "length"
            matcher = model.engine.grammars.compile(spec).matcher
            assert matcher.validate_tokens(tokens) == len(tokens), f"{text} for {spec.source}"
    assert num_finished > NUM_SCHEMAS // 2
