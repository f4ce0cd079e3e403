"""Targets and `--opt`: what they stand for, and which values are refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mlc_llm.compiler.target import describe_any_target, describe_target, parse_opt
from mlc_llm.device import host_cpu
from mlc_llm.errors import DeviceError, OptionError


@pytest.mark.parametrize("device", ["auto", "cpu", "cpu:0"])
def test_target_is_this_cpu(device) -> None:
    described = describe_target(device, "O2")
    cpu = host_cpu()
    assert described["target"]["kind"] == "llvm"
    assert described["target"]["mcpu"] == cpu.name
    assert described["target"]["mtriple"].startswith(("arm64", cpu.arch))
    assert described["isa"] == [cpu.arch, *cpu.isa]
    assert described == describe_target("cpu", "O2")
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize(
    ("opt", "level", "activations"),
    [
        ("O0", 0, "int8"),
        ("O1", 1, "int8"),
        ("O2", 2, "int8"),
        ("O3", 3, "int8"),
        ("", 2, "int8"),
        ("activations=float32", 2, "float32"),
        ("O3;activations=float32", 3, "float32"),
        ("O0 ; activations=int8;", 0, "int8"),
    ],
)
def test_opt_is_a_level_and_settings(opt, level, activations) -> None:
    assert parse_opt(opt) == (level, activations, False)
    described = describe_target("cpu", opt)
    assert described["target"]["opt-level"] == level
    assert described["activations"] == activations


@pytest.mark.parametrize(("switch", "is_on"), [("cudagraph=1", True), ("cudagraph=0", False)])
def test_graphs_are_recorded_on_cuda_alone(switch, is_on) -> None:
    described = describe_any_target("cuda:sm_90", f"O3;{switch}")
    assert described.get("cuda_graph", False) is is_on
    assert "cuda_graph" not in describe_any_target("cuda:sm_90", "O3")
    for device in ("opencl", "metal", "webgpu"):
        with pytest.raises(OptionError, match=f"cudagraph has no effect on {device}"):
            describe_any_target(device, switch)
    with pytest.raises(OptionError, match=r"'cudagraph=yes' is not known; use .*cudagraph=0"):
        describe_any_target("cuda:sm_90", "cudagraph=yes")


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        ("O4", "'O4' is not known.*O0, O1, O2, O3"),
        ("fast", "'fast' is not known"),
        ("O2;activations=int4", "activations=int4.*int8|float32"),
        ("O2;flashinfer=1", "flashinfer has no effect on cpu"),
        ("cudagraph=1", "cudagraph has no effect on cpu"),
    ],
)
def test_bad_opt_is_refused(opt, message) -> None:
    with pytest.raises(OptionError, match=message):
        describe_target("cpu", opt)


def test_bad_device_is_refused() -> None:
    with pytest.raises(OptionError, match="toaster"):
        describe_target("toaster", "O2")
    with pytest.raises(DeviceError, match="cpu:1"):
        describe_target("cpu:1", "O2")


def test_describing_imports_no_compiler() -> None:
    code = (
        "import sys; from mlc_llm.compiler.target import describe_target; "
        "describe_target('cpu', 'O2'); print('tvm' in sys.modules, 'tvm_ffi' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
