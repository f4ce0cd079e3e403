"""A `model_config` as MLC LLM writes it means the model that the same `config.json` means."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from mlc_names_dense import MODEL_TYPES, model_config
from reference_cases import CASES, ReferenceCase

from mlc_llm.models.registry import find_family

# Limits, and what only the checkpoint's configuration or our own artifacts say.
LEFT_OUT = {
    *("context_window_size", "prefill_chunk_size", "sliding_window_size", "layer_types"),
    *("max_batch_size", "max_window_layers", "normalized_head", "rope_scaling"),
}
DENSE = [case for case in CASES if case.model_type in MODEL_TYPES]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_fields_of_mlc_llm_mean_the_same(case: ReferenceCase) -> None:
    config = case.config()
    family = find_family(config)
    ours = dataclasses.asdict(family.config_from_huggingface(config))
    limits = {"context_window_size": 256, "prefill_chunk_size": 256, "max_batch_size": 128}
    # Some of their classes take the base from fields of their own, and none knows ALiBi.
    base = {"position_embedding_base": ours["position_embedding_base"]}
    alibi = {"alibi": ours.get("alibi", False)}
    theirs = family.config_from_json({**model_config(config), **base, **alibi, **limits})
    found = dataclasses.asdict(theirs)
    assert {k: v for k, v in found.items() if k not in LEFT_OUT} == {
        k: v for k, v in ours.items() if k not in LEFT_OUT
    }
    ropes = [config.ropes for config in (theirs, family.config_from_huggingface(case.config()))]
    for found_rope, rope in zip(*ropes, strict=True):
        assert np.array_equal(found_rope.inverse_frequencies(), rope.inverse_frequencies())
        assert found_rope.table_scale == rope.table_scale


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_our_own_fields_read_back(case: ReferenceCase) -> None:
    family = find_family(case.config())
    config = family.config_from_huggingface(case.config())
    assert family.config_from_json(config.to_json()) == config
    layers = range(config.num_hidden_layers)
    again = family.config_from_json(config.to_json())
    assert [again.window_of(i) for i in layers] == [config.window_of(i) for i in layers]
    assert [again.rope_of(i) for i in layers] == [config.rope_of(i) for i in layers]
