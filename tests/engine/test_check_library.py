"""Whether a library belongs to a model and to the settings asked for."""

from __future__ import annotations

import pytest
from fakes import make_metadata

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.open import check_library
from mlc_llm.errors import LibraryMismatch, OptionError

CONFIG = ChatConfig(
    model_type="llama",
    quantization="q4f16_1",
    model_config={},
    vocab_size=512,
    context_window_size=64,
    prefill_chunk_size=8,
    conv_template={},
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "lib.so was compiled for model_type qwen2, the model has llama"),
        ({"model_task": "embedding"}, "for the task embedding, not for chat; .*model_task=chat"),
        ({"quantization": "q0f32"}, "compiled for quantization q0f32, the model has q4f16_1"),
    ],
)
def test_library_of_another_model(changes, message) -> None:
    with pytest.raises(LibraryMismatch, match=message):
        check_library(make_metadata(**changes), CONFIG, {}, "lib.so")


def test_overrides_must_be_those_of_the_library() -> None:
    metadata = make_metadata()
    check_library(metadata, CONFIG, {"context_window_size": 64, "max_batch_size": 4}, "lib.so")
    with pytest.raises(OptionError, match="context_window_size=64, the override says 32"):
        check_library(metadata, CONFIG, {"context_window_size": 32}, "lib.so")
