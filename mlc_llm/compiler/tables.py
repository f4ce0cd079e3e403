"""Which tables of a model are only looked up in, so that a step reads some of their rows."""

from __future__ import annotations

from mlc_llm.models.base import CausalLM
from mlc_llm.nn.linear import (
    Bf16Embedding,
    Bf16Linear,
    Embedding,
    GroupQuantizedEmbedding,
    GroupQuantizedLinear,
    Linear,
)
from mlc_llm.nn.packed_linear import AwqLinear, Float8Linear
from mlc_llm.quantization.apply import named_modules

_TABLES = (Embedding, Bf16Embedding, GroupQuantizedEmbedding)
_LINEARS = (Linear, Bf16Linear, GroupQuantizedLinear, AwqLinear, Float8Linear)


def lookup_tables(model: CausalLM, task: str) -> list[str]:
    """Return the module paths of these tables.

    The table of tokens is not one of them where it is the output layer too: in a library for chats
    of a model that has no other layer with an output for each token.
    """
    modules = dict(named_modules(model, ""))
    vocab_size = model.config.vocab_size
    has_own_head = task != "chat" or any(
        isinstance(module, _LINEARS) and module.out_features == vocab_size
        for path, module in modules.items()
        if not any(part.isdigit() for part in path.split("."))  # those of layers
    )
    return [
        path
        for path, module in modules.items()
        if isinstance(module, _TABLES) and (has_own_head or module.num_embeddings != vocab_size)
    ]
