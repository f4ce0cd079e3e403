"""What a model's library will be like, told without compiling it."""

from __future__ import annotations

from typing import Any

from mlc_llm.artifact import ChatConfig, LibraryMetadata
from mlc_llm.compiler.compile import describe
from mlc_llm.models.base import STEP_ENTRIES
from mlc_llm.models.registry import get_family
from mlc_llm.quantization.apply import build_quantized, plan_parameters
from mlc_llm.quantization.schemes import get_scheme


def outline_library(config: ChatConfig) -> LibraryMetadata:
    """Return what a library for a model will say of itself, but target and temporary memory.

    `memory_usage` is empty: how much temporary memory a step takes is known after compiling.
    Raises OptionError, CorruptFile or UnsupportedModel.
    """
    family = get_family(config.model_type)
    model_config = family.config_from_json(config.model_config)
    scheme = get_scheme(config.quantization)
    model = build_quantized(family, model_config, scheme, formats=config.layer_formats)
    task = "embedding" if family.embedding is not None else config.model_task
    parameters = list(model.named_parameters())
    target: dict[str, Any] = {"target": {}, "isa": []}
    assert task in STEP_ENTRIES
    return describe(config, family, model, task, parameters, {}, target)


def count_parameters(config: ChatConfig) -> int:
    """Return how many numbers a model has learned, before quantization; shared ones count once.

    Raises OptionError, CorruptFile or UnsupportedModel.
    """
    family = get_family(config.model_type)
    model_config = family.config_from_json(config.model_config)
    plan = plan_parameters(family, model_config, get_scheme("q0f32"))
    total = 0
    for item in plan:
        count = 1
        for extent in item.shape:
            count *= extent
        total += count
    return total
