"""One runner for all families: compiled models against the logits that transformers computed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from numpy_model import read_weights
from paged_sequence import PagedSequence
from reference_cases import CASES, Reference, ReferenceCase
from tiny_models import NUM_PAGES, PAGE_SIZE, TinyModels, make_step, relative_error, run_step

from mlc_llm.artifact import read_tensor_index
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.runner import ModelRunner

# What is promised; what holds today leaves room below it.
PROMISED, MEASURED = 1e-4, 1e-5
SAME_MODEL = 1e-5


@dataclass
class Compiled:
    """A reference case in q0f32, ready to run, with all pages free."""

    case: ReferenceCase
    runner: ModelRunner
    reference: Reference
    pool: PagePool

    @property
    def prompt(self) -> list[int]:
        tokens: list[int] = self.reference.token_ids.tolist()
        return tokens

    def new_sequence(self) -> PagedSequence:
        return PagedSequence(self.pool)

    def run(self, *work: tuple[PagedSequence, list[int]]) -> list[np.ndarray]:
        return run_step(self.runner, work)

    def logits_of(self, chunk: int) -> np.ndarray:
        """Return the prompt's logits, `chunk` tokens a step."""
        sequence = self.new_sequence()
        steps = range(0, len(self.prompt), chunk)
        return np.concatenate(
            [self.run((sequence, self.prompt[start : start + chunk]))[0] for start in steps]
        )


@pytest.fixture(params=CASES, ids=str)
def model(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Compiled:
    case: ReferenceCase = request.param
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    return Compiled(case, tiny_models.runner(case.name), case.load(), pool)


@pytest.mark.cpu
def test_logits_equal_the_reference(model: Compiled) -> None:
    error = relative_error(model.logits_of(len(model.prompt)), model.reference.logits)
    assert error < PROMISED
    assert error < MEASURED


@pytest.mark.cpu
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks_do_not_matter(model: Compiled, chunk: int) -> None:
    whole = model.logits_of(len(model.prompt))
    assert relative_error(model.logits_of(chunk), whole) < SAME_MODEL


@pytest.mark.cpu
def test_batched_is_alone(model: Compiled) -> None:
    prompt = model.prompt
    other = prompt[::-1][: len(prompt) - 5]
    alone = [model.run((model.new_sequence(), tokens))[0] for tokens in (prompt, other, prompt[:1])]
    first, second, third = (model.new_sequence() for _ in range(3))
    # Three prefills at different stages, then decode beside prefill.
    early = model.run((first, prompt[:20]), (second, other[:9]))
    later = model.run((second, other[9:-1]), (third, prompt[:1]), (first, prompt[20:-1]))
    last = model.run((first, prompt[-1:]), (second, other[-1:]))
    together = [
        np.concatenate([early[0], later[2], last[0]]),
        np.concatenate([early[1], later[0], last[1]]),
        later[1],
    ]
    for found, expected in zip(together, alone, strict=True):
        assert relative_error(found, expected) < SAME_MODEL


@pytest.mark.cpu
def test_greedy_tokens_equal_the_reference(model: Compiled) -> None:
    sequence = model.new_sequence()
    expected = model.reference.greedy_tokens.tolist()
    logits = model.run((sequence, model.prompt))[0]
    found: list[int] = []
    while True:
        found.append(int(logits[-1].argmax()))
        if len(found) == len(expected):
            break
        logits = model.run((sequence, found[-1:]))[0]
    assert found == expected


@pytest.mark.cpu
def test_logits_are_of_the_wanted_rows(model: Compiled) -> None:
    whole = model.logits_of(len(model.prompt))
    step = make_step([(model.new_sequence(), model.prompt)])
    rows = np.asarray([len(model.prompt) - 1, 0, 7], np.int32)
    logits = model.runner.forward(dataclasses.replace(step, logit_rows=rows))
    assert (logits.shape, logits.dtype) == ((3, model.runner.metadata.vocab_size), np.float32)
    assert relative_error(logits, whole[rows]) < SAME_MODEL


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_of_the_checkpoint_is_used_once(case: ReferenceCase) -> None:
    config = case.config()
    family = find_family(config)
    plan = plan_parameters(family, family.config_from_huggingface(config), get_scheme("q0f32"))
    used = Counter(source for item in plan for source in item.rule.sources)
    assert set(used) == {
        name
        for name in read_weights(case.directory)
        if used[name] or not (name.startswith(family.unused) or name.endswith(".inv_freq"))
    }
    # Keys and values of latent attention are one tensor there and two parameters here; so are the
    # inputs of Qwen3-Next's linear attention, and the token table and the output layer where that
    # is the same.
    is_tied = config.get("tie_word_embeddings", True)
    tables = ("wte.weight",) if is_tied else ()
    halves = ("kv_b_proj.weight", "in_proj_qkvz.weight", "in_proj_ba.weight", *tables)
    for name, count in used.items():
        assert count == (2 if name.endswith(halves) else 1), name


@pytest.mark.cpu
def test_library_expects_what_the_artifact_holds(model: Compiled, tiny_models: TinyModels) -> None:
    artifact = tiny_models.artifact(model.case.name)
    expected = model.runner.metadata.params
    read_tensor_index(artifact).check(expected, str(artifact))
    assert model.runner.metadata.model_type == model.case.model_type
