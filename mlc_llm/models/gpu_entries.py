"""The entries of libraries that the engine runs on GPUs: those of CPUs, and copies of pages.

Weights are used as the artifact stores them, in the order of the metadata; there is nothing to
pack. A step of one token of text has an entry of its own, whose kernels know that there is one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import spec

from mlc_llm.models.base import STEP_ENTRIES, CausalLM, as_float32
from mlc_llm.models.vision import IMAGE_ENTRY, VisionLM
from mlc_llm.nn import gpu_attention

# Steps of any number of tokens, and of one.
FORWARD, FORWARD_SINGLE = STEP_ENTRIES["chat"], "forward_single"
COPY_PAGES = "copy_pages"
# What a step brings beside text.
_IMAGE_ARGUMENTS = ("image_rows", "image_embeds")
_SINGLE = {"n": 1, "num_starts": 2, "b": 1, "r": 1}


class GPUEntries:
    """The entries of one model. Hidden states have the model's dtype, results are float32.

    task: one of `STEP_ENTRIES`. steps: the names of the entries that run a step.
    """

    def __init__(self, model: CausalLM, task: str) -> None:
        self.model, self.task = model, task
        self.steps = (FORWARD, FORWARD_SINGLE) if task == "chat" else (STEP_ENTRIES[task],)

    def copy_pages(self, pages: nn.Tensor, sources: nn.Tensor, targets: nn.Tensor) -> nn.Tensor:
        """Copy pages of one layer, in place; sources, targets (m) int32."""
        return gpu_attention.copy_pages(pages, sources, targets)

    def embed_image(self, pixels: nn.Tensor) -> nn.Tensor:
        """Return the rows (num_rows, hidden) float32 of a view (3, size, size) float32."""
        assert isinstance(self.model, VisionLM)
        dtype = self.model.dtype_name
        seen = pixels if dtype == "float32" else nn.op.astype(pixels, dtype)
        return as_float32(self.model.embed_image(seen))

    def export_spec(self) -> spec.ModuleSpec:
        """Return the signatures of the entries for the exporter, with symbolic sizes."""
        entries = self.model.entry_specs(self.task)
        name = STEP_ENTRIES[self.task]
        step, run = _arguments(entries[name]), getattr(self.model, name)
        text = {key: value for key, value in step.items() if key not in _IMAGE_ARGUMENTS}
        numbers = spec.Tensor(["m"], "int32")
        methods = {}
        for pages in step["kv_pages"][:1]:  # none, where every layer has a state instead
            copy = {"pages": pages, "sources": numbers, "targets": numbers}
            methods[COPY_PAGES] = _method(copy, self.copy_pages, has_weights=False)
        if isinstance(self.model, VisionLM):
            methods[name] = _method(step, self.model.forward_with_images)
            methods[IMAGE_ENTRY] = _method(_arguments(entries[IMAGE_ENTRY]), self.embed_image)
        else:
            methods[name] = _method(step, run)
        if self.task == "chat":
            methods[FORWARD_SINGLE] = _method(_of_one_token(text), run)
        return spec.ModuleSpec(self.model, list(methods), list(methods.values()))


def _arguments(entry: spec.MethodSpec | dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an entry, but for weights."""
    if isinstance(entry, spec.MethodSpec):
        values = [list(s.elements) if isinstance(s, spec.Tuple) else s for s in entry.arg_specs]
        return dict(zip(entry.arg_names, values, strict=True))
    return {name: value for name, value in entry.items() if name != "$"}


def _method(
    arguments: dict[str, Any], method: Callable[..., Any], has_weights: bool = True
) -> spec.MethodSpec:
    mode = {"param_mode": "packed" if has_weights else "none", "effect_mode": "none"}
    return spec.MethodSpec.from_raw({**arguments, "$": mode}, method)


def _of_one_token(step: dict[str, Any]) -> dict[str, Any]:
    """Return the signature of a step with the sizes of a step of one token."""

    def known(tensor: spec.Tensor) -> spec.Tensor:
        return spec.Tensor([_SINGLE.get(extent, extent) for extent in tensor.shape], tensor.dtype)

    return {
        name: known(value) if isinstance(value, spec.Tensor) else value
        for name, value in step.items()
    }
