"""The compiler's products: object files, a shared library, the memory plan and the dump."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paged_sequence import PagedSequence
from reference_cases import get_case
from tiny_models import NUM_PAGES, PAGE_SIZE, TinyModels, relative_error, run_step

from mlc_llm.artifact import LibraryMetadata, read_chat_config, read_tensor_index
from mlc_llm.compiler import compile as compiler
from mlc_llm.compiler.compile import CompileOptions, compile_model
from mlc_llm.errors import CompileError, LinkerNotFound, OptionError
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.model import CompiledRunner
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.parameters import load_parameters

pytestmark = pytest.mark.cpu

NAME, QUANTIZATION = "llama_odd_sizes", "q4f16_1"


@pytest.fixture(scope="module")
def compiled(tiny_models: TinyModels) -> Any:
    return tiny_models.compile(NAME, QUANTIZATION, context_window_size=64)


@pytest.fixture(scope="module")
def artifact(tiny_models: TinyModels) -> Path:
    return tiny_models.artifact(NAME, QUANTIZATION)


# Loads a library and runs a step; prints the argmax of each row.
RUN = """
import sys
from pathlib import Path
import numpy as np
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.model import CompiledRunner
from mlc_llm.runtime.parameters import load_parameters
from mlc_llm.runtime.runner import Step

library = load_library(Path(sys.argv[2]))
parameters = load_parameters(Path(sys.argv[1]), library, lambda _: None)
runner = CompiledRunner(library, parameters, 4)
tokens = [1, 5, 9, 13]
slots = n = np.arange(4, dtype=np.int32)
one = lambda *values: np.asarray(values, np.int32)
pages = np.asarray([[0]], np.int32)
logits = runner.forward(Step(one(*tokens), n, slots, one(0, 4), pages, one(4), n))
print(*logits.argmax(axis=1), "tvm" in sys.modules)
"""


def expected_argmax(library: Path, artifact: Path) -> list[str]:
    loaded = load_library(library)
    runner = CompiledRunner(loaded, load_parameters(artifact, loaded, lambda _: None), 4)
    [logits] = run_step(runner, [(PagedSequence(PagePool(4, 16)), [1, 5, 9, 13])])
    return [str(token) for token in logits.argmax(axis=1)]


def test_objects_run_without_any_program_or_the_compiler(compiled, artifact, tmp_path) -> None:
    directory = tmp_path / "library"
    compiled.save_objects(directory)
    names = sorted(path.name for path in directory.iterdir())
    assert "metadata.json" in names
    assert all(name.endswith(".o") for name in names if name != "metadata.json")
    root = str(Path(compiler.__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(artifact), str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": "", "PYTHONPATH": root},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [*expected_argmax(directory, artifact), "False"]


def test_shared_library_is_the_same_library(compiled, artifact, tmp_path) -> None:
    compiled.link(tmp_path / "lib.so")
    compiled.save_objects(tmp_path / "objects")
    shared, objects = (load_library(tmp_path / name) for name in ("lib.so", "objects"))
    assert shared.metadata == objects.metadata == compiled.metadata
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lib.so", "objects"]
    found = expected_argmax(tmp_path / "lib.so", artifact)
    assert found == expected_argmax(tmp_path / "objects", artifact)
    # A user's file gets no cache beside it.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lib.so", "objects"]


def test_linking_without_a_linker(compiled, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LinkerNotFound, match=r"lib\.so needs a linker.*g\+\+.*install"):
        compiled.link(tmp_path / "lib.so")
    assert list(tmp_path.iterdir()) == []


def test_failing_linker_leaves_nothing(compiled, tmp_path, monkeypatch) -> None:
    linker = tmp_path / "bin" / "c++"
    linker.parent.mkdir()
    linker.write_text("#!/bin/sh\necho no space >&2\nexit 1\n")
    linker.chmod(0o755)
    monkeypatch.setenv("PATH", str(linker.parent))
    output = tmp_path / "output"
    output.mkdir()
    with pytest.raises(CompileError, match=r"linking .*lib\.so with .*c\+\+ failed"):
        compiled.link(output / "lib.so")
    assert list(output.iterdir()) == []


def test_metadata_says_what_was_compiled(compiled, artifact) -> None:
    metadata = compiled.metadata
    config = get_case(NAME).config()
    assert (metadata.model_type, metadata.quantization) == ("llama", QUANTIZATION)
    assert metadata.vocab_size == config["vocab_size"]
    assert metadata.context_window_size == metadata.prefill_chunk_size == 64
    layout = metadata.kv_cache
    assert (layout.num_layers, layout.num_key_value_heads, layout.head_dim) == (2, 1, 20)
    assert (layout.page_size, layout.dtype) == (PAGE_SIZE, "float16")
    read_tensor_index(artifact).check(metadata.params, "artifact")
    assert LibraryMetadata.from_json(metadata.to_json(), "x") == metadata


def test_memory_plan_adds_up(compiled) -> None:
    lines = compiled.memory_plan().splitlines()
    assert [line[:18].strip() for line in lines] == [
        "parameters",
        "temporary",
        "KV cache",
        "in all",
    ]
    numbers = [float(line[18:].split()[0]) for line in lines]
    metadata = compiled.metadata
    parameters = sum(spec.size_bytes for spec in metadata.params)
    # 2 layers of K and V with 1 head of 20 float16 values.
    assert metadata.kv_cache.bytes_per_token == 2 * 2 * 20 * 2
    total = parameters + metadata.memory_usage["forward"] + 160 * 64
    assert numbers[0] == pytest.approx(parameters / 2**20, abs=0.06)
    assert numbers[2] == pytest.approx(160 / 1024, abs=0.06)
    assert numbers[3] == pytest.approx(total / 2**20, abs=0.06)
    assert "chunk of 64 tokens" in lines[1] and "KiB a token" in lines[2]


def test_stages_and_debug_dump(artifact, tmp_path) -> None:
    stages: list[str] = []
    dump = tmp_path / "dump" / "ir"
    options = CompileOptions("cpu", "O0", {}, dump)
    compiled = compile_model(read_chat_config(artifact), options, stages.append)
    assert compiled.metadata.target["opt-level"] == 0
    assert stages == [
        "export",
        "lift packing",
        "lower",
        "plan memory",
        "lower to vm",
        "generate code",
    ]
    files = sorted(path.name for path in dump.iterdir())
    assert files == [f"debug-phase{index}.py" for index in range(5)]
    texts = [(dump / name).read_text() for name in files]
    assert texts[0].startswith("# after export\n") and texts[4].startswith("# after lower_to_vm\n")
    assert "def forward" in texts[0] and "def pack_params" not in texts[0]
    assert "def pack_params" in texts[1]


@pytest.mark.parametrize("opt", ["O0", "O3"])
def test_levels_compute_the_same(tiny_models, artifact, opt) -> None:
    results = []
    for level in ("O2", opt):
        runner = tiny_models.runner(NAME, "q0f32", level)
        sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
        results.append(run_step(runner, [(sequence, list(range(3, 40)))])[0])
    assert relative_error(results[1], results[0]) < 1e-5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"context_window": 5}, "'context_window' is not known; known: .*context_window_size"),
        ({"context_window_size": 0}, "context_window_size=0"),
        ({"prefill_chunk_size": "big"}, "prefill_chunk_size='big'"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype='int4'.*float16"),
    ],
)
def test_bad_overrides_are_refused(artifact, overrides, message) -> None:
    config = read_chat_config(artifact)
    with pytest.raises(OptionError, match=message):
        compile_model(config, CompileOptions("cpu", "O2", overrides), lambda _: None)


def test_failure_in_the_compiler_names_the_stage(artifact, monkeypatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("first line\nthe reason")

    monkeypatch.setattr(compiler, "_lower", broken)
    with pytest.raises(CompileError, match="failed in lowering: the reason; please report"):
        compile_model(read_chat_config(artifact), CompileOptions("cpu"), lambda _: None)


def test_weights_survive_the_trip_to_the_library(tiny_models) -> None:
    """An unquantized norm weight, which needs no packing, comes through as it is."""
    artifact, library = tiny_models.artifact(NAME), load_library(tiny_models.library(NAME))
    norm = read_tensor_index(artifact).read("model.norm.weight")
    packed = load_parameters(artifact, library, lambda _: None)
    assert any(array.shape == norm.shape and np.array_equal(array, norm) for array in packed)
    assert json.loads(library.metadata.to_json())["vocab_size"] == 131
