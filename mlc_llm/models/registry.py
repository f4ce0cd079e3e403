"""All model families by name, and the search for the one that fits a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_llm.errors import CorruptFile, OptionError, UnsupportedModel
from mlc_llm.models import (
    arcee,
    baichuan,
    bert,
    chatglm,
    cohere,
    cohere2,
    deepseek,
    deepseek_v2,
    dots1,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm4,
    glm4_moe,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    hunyuan_v1_dense,
    internlm,
    internlm2,
    llama,
    llama4,
    llava,
    minicpm,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    orion,
    phi,
    phi3,
    phi3_v,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    rwkv5,
    rwkv6,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from mlc_llm.models.base import Family

_MODULES = (
    arcee,
    baichuan,
    bert,
    chatglm,
    cohere,
    cohere2,
    deepseek,
    deepseek_v2,
    dots1,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm4,
    glm4_moe,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    hunyuan_v1_dense,
    internlm,
    internlm2,
    llama,
    llama4,
    llava,
    minicpm,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    orion,
    phi,
    phi3,
    phi3_v,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    rwkv5,
    rwkv6,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(module.FAMILY for module in _MODULES),
        bert.BGE,
        deepseek_v2.V3,
        gemma3.TEXT,
        glm4.FIRST,
        granite.MOE,
        granite.SHARED,
        granite.HYBRID,
        llama4.TEXT,
        ministral3.TEXT,
        phi.MIXFORMER,
        qwen3.EMBEDDING,
        qwen3_5.TEXT,
        qwen3_5_moe.TEXT,
        qwen3_5_moe.NEXT,
    )
}


def find_family(config: Mapping[str, Any], model_type: str = "auto", task: str = "chat") -> Family:
    """Return the family of a Hugging Face `config.json`, or the one named by `model_type`.

    task: what the checkpoint is for, where several families have its architecture.
    Raises OptionError for an unknown name, UnsupportedModel for an unknown architecture.
    """
    if model_type != "auto":
        return get_family(model_type)
    architectures = config.get("architectures") or []
    named = config.get("model_type")
    if not isinstance(architectures, list) or not isinstance(named, str | None):
        raise CorruptFile(
            f"configuration: architectures is {architectures!r:.60}, model_type is {named!r:.60}; "
            "fetch config.json again"
        )
    fitting = [
        family
        for family in FAMILIES.values()
        if any(name in family.architectures for name in architectures)
    ]
    if fitting:
        fitting = [family for family in fitting if family.task == task] or fitting
        return next((family for family in fitting if family.name == named), fitting[0])
    if not architectures and config.get("model_type") in FAMILIES:
        return FAMILIES[str(config["model_type"])]
    found = ", ".join(map(str, architectures)) or config.get("model_type") or "not named"
    supported = ", ".join(dict.fromkeys(n for f in FAMILIES.values() for n in f.architectures))
    raise UnsupportedModel(
        f"architecture {found} is not supported; supported: {supported}. "
        "If it is one of these under another name, pass --model-type"
    )


def get_family(name: str) -> Family:
    """Return the family called `name`. Raises OptionError, which lists the names."""
    if name not in FAMILIES:
        raise OptionError(f"model type {name!r} is not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
