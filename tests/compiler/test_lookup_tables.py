"""Tables that are only looked up in are all but the one that makes a model's logits."""

from __future__ import annotations

import pytest
from reference_cases import CASES, ReferenceCase
from tvm.relax.frontend import nn

from mlc_llm.compiler.tables import lookup_tables
from mlc_llm.models.base import CausalLM
from mlc_llm.models.registry import find_family
from mlc_llm.nn.linear import GroupQuantizedEmbedding, GroupQuantizedLinear
from mlc_llm.quantization.apply import build_quantized, named_modules
from mlc_llm.quantization.schemes import get_scheme


class Reached(Exception):
    """The module that was asked for logits."""


def output_layer(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return the first module that rows after the final norm come to."""

    def stop(self: nn.Module, rows: object) -> None:
        raise Reached(self)

    monkeypatch.setattr(GroupQuantizedEmbedding, "logits", stop)
    monkeypatch.setattr(GroupQuantizedLinear, "forward", stop)
    with pytest.raises(Reached) as reached:
        model.logits(object())
    return reached.value.args[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_tables_but_the_output_layer(
    case: ReferenceCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = find_family(case.config())
    config = family.config_from_huggingface(case.config())
    model = build_quantized(family, config, get_scheme("q4f16_1"))
    tables = {
        path: module
        for path, module in named_modules(model, "")
        if isinstance(module, GroupQuantizedEmbedding)
    }
    head = output_layer(model, monkeypatch)
    expected = [path for path, module in tables.items() if module is not head]
    assert tables and lookup_tables(model, "chat") == expected
    # Vectors need no output layer.
    assert lookup_tables(model, "embedding") == list(tables)
