"""Vectors of texts on a GPU, against the states that transformers computed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from encoder_models import TinyEncoders, embed, pooled, read_inputs
from gpu_device import find_gpu
from tiny_models import relative_error

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyEncoders]:
    made = TinyEncoders(tmp_path_factory.mktemp("gpu_encoders"))
    yield made
    made.close()


# One sees texts as a whole and wants all rows; the other is a decoder and wants the last.
@pytest.mark.parametrize("name", ["bert_mean", "qwen3_embedding"])
def test_vectors_equal_the_reference(encoders: TinyEncoders, name: str) -> None:
    model = encoders.model(name, opt="O2", device=find_gpu())
    fitting = [
        (ids, states) for ids, states in read_inputs(name) if len(ids) <= model.max_input_len
    ]
    found = embed(model, [ids for ids, _ in fitting])
    for vector, (tokens, states) in zip(found, fitting, strict=True):
        assert relative_error(vector, pooled(name, states)) < 1e-5
        assert relative_error(embed(model, [tokens])[0], vector) < 1e-5
    # Texts of one token; several a step are what a step of decoding looks like.
    alone = np.concatenate([embed(model, [[token]]) for token in (7, 9)])
    assert relative_error(embed(model, [[7], [9]]), alone) < 1e-5
