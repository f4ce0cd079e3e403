"""The entries of libraries that the engine runs on GPUs: those of CPUs, and copies of pages.

Weights are used as the artifact stores them, in the order of the metadata; there is nothing to
pack. A step of one token has an entry of its own, whose kernels know that there is one row.
"""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import spec

from mlc_llm.errors import UnsupportedModel
from mlc_llm.models.base import STEP_ENTRIES, CausalLM
from mlc_llm.nn import gpu_attention

# Steps of any number of tokens, and of one.
FORWARD, FORWARD_SINGLE = STEP_ENTRIES["chat"], "forward_single"
COPY_PAGES = "copy_pages"
_SINGLE = {"n": 1, "num_starts": 2, "b": 1, "r": 1}


class GPUEntries:
    """The entries of one model. Hidden states have the model's dtype, results are float32.

    task: one of `STEP_ENTRIES`. steps: the names of the entries that run a step.
    """

    def __init__(self, model: CausalLM, task: str) -> None:
        if model.image_inputs is not None:
            raise UnsupportedModel("it takes images, and GPU libraries take text only yet")
        if model.state_specs():
            raise UnsupportedModel("it has recurrent state, which GPU libraries do not hold yet")
        self.model, self.task = model, task
        self.steps = (FORWARD, FORWARD_SINGLE) if task == "chat" else (STEP_ENTRIES[task],)

    def copy_pages(self, pages: nn.Tensor, sources: nn.Tensor, targets: nn.Tensor) -> nn.Tensor:
        """Copy pages of one layer, in place; sources, targets (m) int32."""
        return gpu_attention.copy_pages(pages, sources, targets)

    def export_spec(self) -> spec.ModuleSpec:
        """Return the signatures of the entries for the exporter, with symbolic sizes."""
        name = STEP_ENTRIES[self.task]
        step, run = self.model.entry_specs(self.task)[name], getattr(self.model, name)
        step["$"] = {"param_mode": "packed", "effect_mode": "none"}
        numbers = spec.Tensor(["m"], "int32")
        copy = {
            "pages": step["kv_pages"][0],
            "sources": numbers,
            "targets": numbers,
            "$": {"param_mode": "none", "effect_mode": "none"},
        }
        raw_steps = (step, _of_one_token(step))  # no one waits for a text of one token
        methods = [
            *((name, raw, run) for name, raw in zip(self.steps, raw_steps, strict=False)),
            (COPY_PAGES, copy, self.copy_pages),
        ]
        return spec.ModuleSpec(
            self.model,
            [name for name, _, _ in methods],
            [spec.MethodSpec.from_raw(raw, method) for _, raw, method in methods],
        )


def _of_one_token(step: dict[str, Any]) -> dict[str, Any]:
    """Return the signature of a step with the sizes of a step of one token."""

    def known(tensor: spec.Tensor) -> spec.Tensor:
        return spec.Tensor([_SINGLE.get(extent, extent) for extent in tensor.shape], tensor.dtype)

    return {
        name: known(value) if isinstance(value, spec.Tensor) else value
        for name, value in step.items()
    }
