"""Steps of one token as CUDA graphs: what is recorded, and that it can be started again and again.

Where the device is not CUDA's, the two functions of TVM's runtime that record and start graphs are
stood in for: the recorded function runs, on the arguments of the first call, as a graph does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from gpu_device import find_gpu
from paged_sequence import PagedSequence
from reference_cases import get_case
from tiny_models import NUM_PAGES, PAGE_SIZE, TinyModels, relative_error, run_step
from tvm import relax

from mlc_llm.artifact import read_chat_config
from mlc_llm.compiler import compile as compiler
from mlc_llm.compiler.gpu import gpu_phases
from mlc_llm.compiler.target import describe_any_target
from mlc_llm.models.gpu_entries import FORWARD, FORWARD_SINGLE, GPUEntries
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import build_quantized
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.model import CompiledRunner
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.parameters import load_parameters

pytestmark = pytest.mark.cpu

_FUNCTIONS = "vm.builtin.cuda_graph.run_or_capture", "vm.builtin.cuda_graph.get_cached_alloc"


class Graphs:
    """Stands in for graphs: of a recorded function what it was first called with."""

    def __init__(self) -> None:
        self.arguments: dict[Any, Any] = {}
        self.allocated: dict[int, Any] = {}
        self.num_runs = 0
        self._invoke = tvm_ffi.get_global_func("vm.builtin.invoke_closure")

    def run(self, machine: Any, function: Any, arguments: Any, index: int, sizes: Any) -> Any:
        """Run a function for sizes on the arguments of its first call."""
        self.num_runs += 1
        first = self.arguments.setdefault((index, tuple(sizes)), arguments)
        return self._invoke(machine, function, *first)

    def allocate(self, machine: Any, function: Any, index: int) -> Any:
        """Return what a function has allocated when it was first called."""
        if index not in self.allocated:
            self.allocated[index] = self._invoke(machine, function)
        return self.allocated[index]


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels, tmp_path_factory) -> Iterator[Any]:
    """The runner of a model whose single steps are recorded, its graphs, and a text."""
    device, name = find_gpu(), "llama_gqa"
    artifact, directory = tiny_models.artifact(name), tmp_path_factory.mktemp(name)
    options = compiler.CompileOptions(device)
    is_cuda = device.startswith("cuda")
    with pytest.MonkeyPatch.context() as patch:
        described = {**describe_any_target(device, "O2"), "cuda_graph": True}
        patch.setattr(compiler, "describe_any_target", lambda *_: described)
        compiled = compiler.compile_model(read_chat_config(artifact), options, lambda _: None)
    compiled.save_objects(directory)
    library = load_library(directory, device)
    graphs = None if is_cuda else Graphs()
    if graphs is not None:
        for function, stand_in in zip(_FUNCTIONS, (graphs.run, graphs.allocate), strict=True):
            tvm_ffi.register_global_func(function, stand_in)
    try:
        parameters = load_parameters(artifact, library, lambda _: None)
        with closing(CompiledRunner(library, parameters, NUM_PAGES, NUM_PAGES)) as runner:
            yield runner, graphs, get_case(name).load().token_ids.tolist()
    finally:
        if graphs is not None:
            for function in _FUNCTIONS:
                tvm_ffi.registry.remove_global_func(function)


def test_steps_are_started_again(model: Any) -> None:
    runner, graphs, prompt = model
    text = (prompt * 20)[:130]
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    whole, first, second = (PagedSequence(pool) for _ in range(3))
    (expected,) = run_step(runner, [(whole, text)])
    whole.truncate(0)
    # Two sequences in turns, another step between; in the end one has more than eight pages.
    run_step(runner, [(first, text[:127]), (second, text[:3])])
    found: dict[int, list[np.ndarray]] = {127: [], 3: []}
    for step in range(3):
        for sequence, start in ((first, 127), (second, 3)):
            token = text[start + step]
            found[start].append(run_step(runner, [(sequence, [token])])[0][0])
        if step == 1:
            run_step(runner, [(whole, text[:5])])
    for start, rows in found.items():
        assert relative_error(np.stack(rows), expected[start : start + 3]) < 1e-5
    if graphs is not None:
        assert graphs.num_runs == 6
        assert len(graphs.arguments) == 2  # up to 8 pages, and 9 to 16


def kernels_of(mod: tvm.IRModule, function: Any) -> list[str]:
    """Return the names of the kernels that a function starts, in order."""
    names: list[str] = []

    def visit(expression: Any) -> None:
        if isinstance(expression, relax.Call) and isinstance(expression.op, tvm.ir.GlobalVar):
            names.append(str(expression.op.name_hint))

    relax.analysis.post_order_visit(function, visit)
    return names


# Attention alone, and recurrent states beside it, which a step changes in place.
@pytest.mark.parametrize("name", ["gemma2", "qwen3_5"])
def test_all_kernels_but_the_last_are_recorded(name: str) -> None:
    family = find_family(get_case(name).config())
    config = family.config_from_huggingface(get_case(name).config())
    model = build_quantized(family, config, get_scheme("q4f16_1"), None, None, {})
    target = tvm.target.Target(describe_any_target("cuda:sm_90", "O2")["target"])
    bounds = {"n": 64, "b": 4, "num_starts": 5, "r": 4}
    with target:
        mod, _ = model.export_tvm(GPUEntries(model, "chat").export_spec())
        for phase, passes in gpu_phases(bounds, FORWARD_SINGLE):
            if phase == "capture":
                before = tvm.IRModule(mod.functions)
                break
            if phase != "schedule":
                mod = tvm.transform.Sequential(passes)(mod)
        mod = tvm.transform.Sequential(passes)(mod)
    tvm.ir.assert_structural_equal(mod[FORWARD], before[FORWARD])
    (recorded,) = [var for var, _ in mod.functions_items() if "capture" in var.name_hint]
    *started, last = kernels_of(before, before[FORWARD_SINGLE])
    assert len(started) > 10
    assert kernels_of(mod, mod[recorded]) == started
    assert kernels_of(mod, mod[FORWARD_SINGLE]) == [last]
