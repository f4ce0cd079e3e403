"""Runs kernels as browsers do: compiled to WGSL, on whatever WebGPU the package `wgpu` finds.

Without a GPU that is Mesa's lavapipe, which computes on the CPU and knows float16.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm.tirx.build import codegen_build, split_host_device_mods

from mlc_llm.compiler.gpu import schedule_rules
from mlc_llm.compiler.target import describe_any_target

_BINDING = re.compile(r"@binding\((\d+)\) var<storage, read(?:_write)?> (\w+?)_ptr")
_THREADS = {"threadIdx.x", "threadIdx.y", "threadIdx.z"}
_MAX_GROUPS = 65535


class Device:
    """A WebGPU device."""

    def __init__(self) -> None:
        import wgpu

        self._wgpu = wgpu
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
        self.name = adapter.summary
        self.has_float16 = "shader-f16" in adapter.features
        features = ["shader-f16"] if self.has_float16 else []
        limits = {"max-compute-workgroup-storage-size": 32768}
        self._device = adapter.request_device_sync(
            required_features=features, required_limits=limits
        )

    def run(self, kernel: Any, **tensors: np.ndarray) -> dict[str, np.ndarray]:
        """Run a kernel on tensors by the names of its arguments; return what they hold then."""
        return self.start(translate(kernel, shapes_of(tensors)), tensors)

    def start(
        self, launches: Sequence[Launch], tensors: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Run shaders in order on tensors; return what they hold then."""
        usage = self._wgpu.BufferUsage
        buffers, sizes = {}, {}
        for name in {name for launch in launches for _, name in launch.bindings}:
            data = np.ascontiguousarray(tensors[name]).tobytes()
            data += bytes(-len(data) % 4)
            buffers[name] = self._device.create_buffer_with_data(
                data=data, usage=usage.STORAGE | usage.COPY_SRC
            )
            sizes[name] = len(data)
        for launch in launches:
            self._launch(launch, buffers, sizes)
        found = {}
        for name, tensor in tensors.items():
            data = self._device.queue.read_buffer(buffers[name]) if name in buffers else b""
            flat = np.frombuffer(data, tensor.dtype, tensor.size if data else 0)
            found[name] = flat.reshape(tensor.shape) if data else tensor
        return found

    def _launch(self, launch: Launch, buffers: dict[str, Any], sizes: dict[str, int]) -> None:
        """Run one shader."""
        groups, rows = launch.groups
        entries = [(at, buffers[name], sizes[name]) for at, name in launch.bindings]
        pod = np.array([*launch.numbers, groups - 1], np.int32).tobytes()
        pod_buffer = self._device.create_buffer_with_data(
            data=pod, usage=self._wgpu.BufferUsage.UNIFORM
        )
        entries.append((len(entries), pod_buffer, len(pod)))
        module = self._device.create_shader_module(code=launch.source)
        pipeline = self._device.create_compute_pipeline(
            layout="auto", compute={"module": module, "entry_point": launch.name}
        )
        group = self._device.create_bind_group(
            layout=pipeline.get_bind_group_layout(0),
            entries=[
                {"binding": at, "resource": {"buffer": buffer, "offset": 0, "size": size}}
                for at, buffer, size in entries
            ],
        )
        encoder = self._device.create_command_encoder()
        step = encoder.begin_compute_pass()
        step.set_pipeline(pipeline)
        step.set_bind_group(0, group)
        wide = min(groups, _MAX_GROUPS)
        step.dispatch_workgroups(wide, rows, -(-groups // wide))
        step.end()
        self._device.queue.submit([encoder.finish()])


@dataclass(frozen=True)
class Launch:
    """One start of a shader: its WGSL, its groups of threads in x and y, and its numbers."""

    name: str
    source: str
    groups: tuple[int, int]
    numbers: list[int]

    @property
    def bindings(self) -> list[tuple[int, str]]:
        """Return the number and the tensor of each storage buffer."""
        return [(int(at), name) for at, name in _BINDING.findall(self.source)]


def shapes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by their names."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def translate(
    kernel: Any, shapes: dict[str, tuple[int, ...]], *, has_few_rows: bool = True
) -> list[Launch]:
    """Return the shaders that a kernel starts, in order.

    shapes: of its tensors by name; they say what symbolic sizes are. has_few_rows: see
    `schedule_rules`; libraries for browsers have none.
    """
    symbols = {}
    for buffer in kernel.params:
        if isinstance(buffer.elem_offset, tvm.ir.Var):
            symbols[str(buffer.elem_offset.name)] = 0
        for extent, value in zip(buffer.shape, shapes[str(buffer.name)], strict=True):
            if isinstance(extent, tvm.ir.Var):
                symbols[str(extent.name)] = value
    target = tvm.target.Target(describe_any_target("webgpu", "O2")["target"])
    mod = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    with target:
        mod = schedule_rules(has_few_rows=has_few_rows)(mod)
    mod = tvm.tirx.transform.BindTarget(target)(mod)
    pipeline, _, finish = tvm.tirx.get_default_tir_pipeline(target)
    host, devices = split_host_device_mods(pipeline(mod))
    ((device_target, device),) = devices.items()
    source = codegen_build(finish()(device), device_target).inspect_source()
    # Each shader comes after its name between lines of dashes.
    parts = re.split(r"^//-+\n// Function: (\w+)$", source, flags=re.MULTILINE)
    sources = dict(zip(parts[1::2], parts[2::2], strict=True))
    return [
        Launch(name, sources[name], groups, numbers)
        for name, groups, numbers in launches_of(host["kernel"].script(), symbols)
    ]


def launches_of(host: str, symbols: dict[str, int]) -> list[tuple[str, tuple[int, int], list[int]]]:
    """Return what the host's code, a script, starts: names, groups of threads, and numbers."""
    found: list[tuple[str, tuple[int, int], list[int]]] = []

    def start(name: str, *given: Any, launch_params: list[str], ret_ty: str) -> None:
        numbers = [value for value in given if value is not None]
        count = len(launch_params)
        launch = dict(zip(launch_params, numbers[-count:], strict=True))
        assert launch.keys() - {"blockIdx.x", "blockIdx.y"} <= _THREADS
        groups = launch["blockIdx.x"], launch.get("blockIdx.y", 1)
        found.append((name, groups, numbers[:-count]))

    _, after_checks = host.split("__tvm_set_device", 1)
    kept = re.findall(
        r"^ +(?:cse_v\d+: |if |else:|for |T\.call_ffi_kernel).*", after_checks, re.MULTILINE
    )
    code = re.sub(r": T\.let\[.*?\] =", " =", textwrap.dedent("\n".join(kept)))
    code = re.sub(r"\b\w+[.]data\b", "None", code).replace("T.call_ffi_kernel", "start")
    exec(code, {"T": _Script, "start": start, **symbols})
    return found


class _Script:
    """What scripts call on whole numbers."""

    int64 = int32 = int
    min, max = min, max

    @staticmethod
    def Select(condition: bool, yes: int, no: int) -> int:
        return yes if condition else no

    @staticmethod
    def Cast(_: str, value: int) -> int:
        return value

    @staticmethod
    def Div(x: int, y: int) -> int:
        return x // y

    shift_right = staticmethod(lambda x, y: x >> y)
    shift_left = staticmethod(lambda x, y: x << y)
