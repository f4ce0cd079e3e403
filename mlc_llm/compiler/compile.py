"""Compilation: a chat configuration in, a library out. The walk is export, lower, build, save."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from mlc_llm.artifact import ChatConfig, LibraryMetadata, TensorSpec
from mlc_llm.compiler.browser.limits import check_buffers
from mlc_llm.compiler.cuda_code import making_machine_code, require_compiler
from mlc_llm.compiler.gpu import HOST_SAMPLE, gpu_phases, sample_on_host, temporary_of_all
from mlc_llm.compiler.output import CompiledModel
from mlc_llm.compiler.pipeline import PACK_FUNCTION, num_packed, phases, temporary_bytes
from mlc_llm.compiler.tables import lookup_tables
from mlc_llm.compiler.target import describe_any_target, is_for_others, is_gpu
from mlc_llm.errors import CompileError, OptionError, UnsupportedModel
from mlc_llm.kernels.cpu.isa import find_bf16_isa, find_isa
from mlc_llm.models.base import STEP_ENTRIES, CausalLM, Family
from mlc_llm.models.cache_entries import CacheEntries
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.gpu_entries import FORWARD_SINGLE, GPUEntries
from mlc_llm.models.registry import get_family
from mlc_llm.models.vision import IMAGE_ENTRY
from mlc_llm.nn.packed_linear import Float8Linear
from mlc_llm.quantization.apply import build_quantized, named_modules
from mlc_llm.quantization.schemes import get_scheme

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileOptions:
    """What the user may choose: device, optimisation level, overrides, a directory for IR.

    host: the LLVM triple of the system that the library is for, "auto" for what the device implies.
    The override `model_task` ("chat" or "embedding") goes before the model's own task.
    system_prefix: what the names of functions begin with that are linked into a program with other
    models', None for a library of its own.
    """

    device: str = "auto"
    opt: str = "O2"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    debug_dump: Path | None = None
    host: str = "auto"
    system_prefix: str | None = None


def compile_model(
    config: ChatConfig, options: CompileOptions, progress: Callable[[str], None]
) -> CompiledModel:
    """Compile the model of `config` for a device; `progress` is told each stage.

    Raises OptionError, DeviceError, UnsupportedModel or CompileError.
    """
    family = get_family(config.model_type)
    overrides = dict(options.overrides)
    task = overrides.pop("model_task", "embedding" if family.embedding else config.model_task)
    if task not in STEP_ENTRIES:
        raise OptionError(f"model_task={task!r} is not one of {', '.join(STEP_ENTRIES)}")
    if family.embedding is not None and task != "embedding":
        raise OptionError(
            f"model_task={task!r}: {family.name} is for embeddings only; use model_task=embedding"
        )
    model_config = family.config_from_json(config.model_config).with_overrides(overrides)
    scheme = get_scheme(config.quantization)
    if scheme.kind == "gguf" and not config.layer_formats:
        raise OptionError(
            f"quantization {scheme.name} is that of a GGUF file, and the configuration names no "
            "formats of layers; compile from the .gguf file or from what it was converted to"
        )
    described = describe_any_target(options.device, options.opt, options.host)
    target = tvm.target.Target(described["target"])
    if is_for_others(described["target"]) and task != "chat":
        raise UnsupportedModel(
            f"libraries for embeddings are made for the engine only, not for {options.device}"
        )
    if is_for_others(described["target"]) and (
        scheme.dtype == "bfloat16" or scheme.kind == "float8"
    ):
        raise OptionError(
            f"quantization {scheme.name} has numbers in bfloat16 or of 8 bits, which programs for "
            f"{options.device} do not read; use one of float16 or float32, such as q4f16_1"
        )
    if described.get("cuda_graph") and task != "chat":
        raise OptionError(
            "--opt cudagraph=1 records steps of one token, which libraries for embeddings do not "
            "have; leave it out"
        )
    require_compiler(described["target"])

    progress("export")
    int8_isa = bf16_isa = None
    if described["activations"] != "float32":
        int8_isa = find_isa(described["isa"]).name
        found = find_bf16_isa(described["isa"])
        bf16_isa = None if found is None else found.name
    model = build_quantized(family, model_config, scheme, int8_isa, bf16_isa, config.layer_formats)
    if is_gpu(described["target"]):
        return _compile_for_gpu(config, family, model, task, described, options, progress)
    with target:
        mod, parameters = model.export_tvm(model.export_spec(task))
    with _stage_errors("lowering"), target:
        mod, temporary, num_image_params = _lower(mod, model, task, options.debug_dump, progress)
    metadata = describe(config, family, model, task, parameters, temporary, described)
    if metadata.images is not None:
        metadata.images["num_packed"] = num_image_params
    mod["_metadata"] = _constant_function(metadata.to_json())
    progress("generate code")
    with _stage_errors("code generation"):
        executable = _build(mod, target, options.system_prefix)
    steps = (STEP_ENTRIES[task],)
    return CompiledModel(metadata, executable, steps, IMAGE_ENTRY, options.system_prefix or "")


def _compile_for_gpu(
    config: ChatConfig,
    family: Family,
    model: CausalLM,
    task: str,
    described: dict[str, Any],
    options: CompileOptions,
    progress: Callable[[str], None],
) -> CompiledModel:
    """Compile for our engine, or over TVM's cache for the programs of others.

    Raises UnsupportedModel or CompileError.
    """
    target, for_others = tvm.target.Target(described["target"]), is_for_others(described["target"])
    parameters = list(model.named_parameters())  # as artifacts store them
    try:
        if target.kind.name == "webgpu":
            check_buffers(specs_of(parameters), model.kv_layout(), model.config.context_window_size)
        with target:
            entries = CacheEntries(model) if for_others else GPUEntries(model, task)
            for _, layer in named_modules(model, ""):
                if isinstance(layer, Float8Linear):
                    layer.read_words()
            mod, _ = model.export_tvm(entries.export_spec())
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{family.name} for {options.device}: {error}") from None
    bounds = _bounds(model.config, task)
    temporary: dict[str, int] = {}
    _dump(options.debug_dump, 0, "export", mod)
    with _stage_errors("lowering"), target:
        captured = FORWARD_SINGLE if described.get("cuda_graph") else None
        phases = gpu_phases(bounds, captured, is_web=target.kind.name == "webgpu")
        for index, (name, passes) in enumerate(phases, 1):
            progress(name.replace("_", " "))
            mod = tvm.transform.Sequential(passes, name=name)(mod)
            _dump(options.debug_dump, index, name, mod)
            if name == "plan_memory":
                temporary = temporary_of_all(mod)
    metadata = describe(config, family, model, task, parameters, temporary, described)
    mod["_metadata"] = _constant_function(metadata.to_json())
    if task == "chat" and not for_others:
        mod[HOST_SAMPLE] = sample_on_host(target)
    progress("generate code")
    with _stage_errors("code generation"), making_machine_code(described["target"]):
        executable = _build(mod, target, options.system_prefix)
    prefix = options.system_prefix or ""
    return CompiledModel(metadata, executable, entries.steps, IMAGE_ENTRY, prefix)


def _lower(
    mod: tvm.IRModule,
    model: CausalLM,
    task: str,
    dump: Path | None,
    progress: Callable[[str], None],
) -> tuple[tvm.IRModule, dict[str, int], int]:
    """Return the lowered module, temporary bytes by function, packed parameters of images."""
    entry = STEP_ENTRIES[task]
    others = [] if model.image_inputs is None else [IMAGE_ENTRY]
    num_image_params = 0
    bounds = _bounds(model.config, task)
    temporary: dict[str, int] = {}
    _dump(dump, 0, "export", mod)
    for index, (name, passes) in enumerate(phases(bounds, entry, others), 1):
        progress(name.replace("_", " "))
        mod = tvm.transform.Sequential(passes, name=name)(mod)
        _dump(dump, index, name, mod)
        if name == "lift_packing":
            num_image_params = sum(num_packed(mod, other) for other in others)
        if name == "plan_memory":
            temporary = {
                function: temporary_bytes(mod, function)
                for function in (entry, *others, PACK_FUNCTION)
            }
    return mod, temporary, num_image_params


def _bounds(config: DecoderConfig, task: str) -> dict[str, int]:
    """Return the largest symbolic sizes of a step."""
    chunk, batch = config.prefill_chunk_size, config.max_batch_size
    # The mean of a text is made of all its rows.
    rows = batch if task == "chat" else max(chunk, batch)
    return {"n": max(chunk, batch), "b": batch, "num_starts": batch + 1, "r": rows}


def _build(mod: tvm.IRModule, target: tvm.target.Target, prefix: str | None) -> Any:
    """Return the executable of a lowered module, whose functions are named with the prefix."""
    if prefix is not None:
        # AttachGlobalSymbol, which would do it, fails on kernels of TVM 0.27 that have branches.
        for var, function in mod.functions_items():
            if isinstance(function, tvm.tirx.PrimFunc):
                name = prefix + str(function.attrs["global_symbol"])
                mod[var] = function.with_attr("global_symbol", name)
        mod = mod.with_attr("system_lib_prefix", prefix)
    return relax.build(mod, target, relax_pipeline=None)


def _dump(directory: Path | None, index: int, name: str, mod: tvm.IRModule) -> None:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"debug-phase{index}.py").write_text(
            f"# after {name}\n{mod.script(show_meta=True)}\n"
        )


def describe(
    config: ChatConfig,
    family: Family,
    model: CausalLM,
    task: str,
    parameters: list[tuple[str, Any]],
    temporary: dict[str, int],
    described: dict[str, Any],
) -> LibraryMetadata:
    """Return what a library says of itself.

    parameters: names and tensors. temporary: bytes of temporary tensors by function. described: the
    target and its instruction sets.
    """
    shape = model.config
    return LibraryMetadata(
        model_type=config.model_type,
        quantization=config.quantization,
        context_window_size=shape.context_window_size,
        sliding_window_size=shape.sliding_window_size,
        attention_sink_size=shape.attention_sink_size,
        prefill_chunk_size=shape.prefill_chunk_size,
        max_batch_size=shape.max_batch_size,
        vocab_size=shape.vocab_size,
        params=specs_of(parameters),
        kv_cache=model.kv_layout(),
        states=model.state_specs(),
        memory_usage=temporary,
        target=described["target"],
        isa=described["isa"],
        compiler_version=packages.version("apache-tvm"),
        model_task=task,
        model_config=shape.to_json(),
        embedding_metadata=None if family.embedding is None else dict(family.embedding),
        unused_modules=list(family.unused_modules),
        lookup_tables=lookup_tables(model, task),
        images=None if model.image_inputs is None else model.image_inputs.to_json(),
    )


def specs_of(parameters: Iterable[tuple[str, Any]]) -> list[TensorSpec]:
    """Return the names, shapes and dtypes of parameters, which are names and tensors."""
    return [
        TensorSpec(name, tuple(int(extent) for extent in tensor.shape), str(tensor.dtype))
        for name, tensor in parameters
    ]


def _constant_function(text: str) -> Any:
    """Return a function of no arguments that returns `text`."""
    builder = relax.BlockBuilder()
    with builder.function("_metadata", params=[]):
        builder.emit_func_output(tvm.ir.StringImm(text))
    function = builder.finalize()["_metadata"]
    return function.with_attr("global_symbol", "_metadata")


@contextlib.contextmanager
def _stage_errors(stage: str) -> Any:
    """Turn a failure inside the compiler into a CompileError that names the stage."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        summary = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        logger.debug("%s failed", stage, exc_info=True)
        raise CompileError(
            f"the compiler failed in {stage}: {summary}; please report this with the model's "
            "mlc-chat-config.json and the output of `mlc_llm doctor`"
        ) from error
