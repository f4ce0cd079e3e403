"""Names of devices and CPUs: what they stand for, and what this machine can do with them."""

import os
from pathlib import Path

import pytest

from mlc_llm import device
from mlc_llm.device import (
    Device,
    HostCPU,
    TargetCPU,
    cpu_names,
    missing_features,
    parse_cpu,
    parse_device,
    parse_target,
)
from mlc_llm.errors import DeviceError, OptionError

HASWELL = HostCPU("x86_64", "Old CPU", "x86-64-v3", ("x86-64-v3",), 4)
ZEN5 = HostCPU(
    "x86_64",
    "New CPU",
    "x86-64-v4",
    ("x86-64-v4", "avx512vnni", "avx512bf16", "avx512vbmi", "avxvnni"),
    8,
)
ARM = HostCPU("aarch64", "Arm CPU", "generic", ("neon", "dotprod"), 4)


@pytest.fixture
def on(monkeypatch):
    """Return a function that makes this machine have another CPU."""
    return lambda cpu: monkeypatch.setattr(device, "host_cpu", lambda: cpu)


@pytest.mark.parametrize("text", ["auto", "cpu", "cpu:0"])
def test_the_cpu_of_this_machine(on, text):
    on(ARM)
    assert parse_device(text) == Device("cpu", 0)
    assert parse_target(text) == ARM.target == TargetCPU("aarch64", "generic", ARM.isa)


@pytest.mark.parametrize(
    ("text", "arch", "name", "isa"),
    [
        ("x86-64", "x86_64", "x86-64", ("x86-64",)),
        ("haswell", "x86_64", "x86-64-v3", ("x86-64-v3",)),
        ("alderlake", "x86_64", "x86-64-v3", ("x86-64-v3", "avxvnni")),
        ("x86-64-v3+avxvnni", "x86_64", "x86-64-v3", ("x86-64-v3", "avxvnni")),
        ("skylake-avx512", "x86_64", "x86-64-v4", ("x86-64-v4",)),
        ("x86-64-v4+avxvnni+avx512vnni", "x86_64", "x86-64-v4", ZEN5.isa[:2] + ZEN5.isa[-1:]),
        ("cascadelake+avx512bf16", "x86_64", "x86-64-v4", ZEN5.isa[:3]),
        ("znver5", "x86_64", "x86-64-v4", ZEN5.isa),
        ("aarch64", "aarch64", "generic", ("neon",)),
        ("aarch64+dotprod", "aarch64", "generic", ("neon", "dotprod")),
        ("neoverse-n1", "aarch64", "generic", ("neon", "dotprod", "fullfp16")),
        ("apple-m1", "aarch64", "apple-m1", ("neon", "dotprod", "fullfp16")),
        ("riscv64", "riscv64", "generic-rv64", ("rv64", "m", "a", "f", "d", "c")),
    ],
)
def test_names_of_cpus(text, arch, name, isa):
    assert parse_cpu(text) == TargetCPU(arch, name, isa)
    assert parse_target(text) == TargetCPU(arch, name, isa)


def test_every_name_stands_for_a_cpu():
    assert len(cpu_names()) == len(set(cpu_names())) > 40
    for name in cpu_names():
        assert parse_cpu(name).arch in ("x86_64", "aarch64", "riscv64", "wasm32")


def test_a_host_is_described_as_its_name_is(on):
    on(ZEN5)
    assert parse_target("auto") == parse_target("znver5")
    assert parse_cpu("znver5").llvm_features[-1] == "-prefer-256-bit"
    assert parse_cpu("alderlake").llvm_features == ["+avxvnni"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toaster", ["'toaster' is not known", "cuda", "cpu", "x86-64-v3", "znver4", "apple-m1"]),
        ("x86-64-v5", ["'x86-64-v5' is not known"]),
        ("", ["'' is not known"]),
        ("cpu:x", ["'cpu:x' is not known"]),
        ("znver4:1", ["'znver4:1' is not known"]),
        ("x86-64-v4+avx1024", ["'avx1024' is not known for x86-64-v4", "avx512vnni", "avxvnni"]),
        ("x86-64-v4+", ["feature '' is not known"]),
        ("aarch64+avxvnni", ["'avxvnni' is not known for aarch64", "dotprod"]),
        ("haswell+avx512vnni", ["avx512vnni needs x86-64-v4, not x86-64-v3"]),
        ("x86-64-v2+avxvnni", ["avxvnni needs x86-64-v3, not x86-64-v2"]),
    ],
)
def test_unknown_names(text, words):
    for parse in (parse_device, parse_target):
        with pytest.raises(OptionError) as caught:
            parse(text)
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("text", ["rocm", "vulkan:0", "cpu:1"])
def test_devices_that_cannot_be_used(text):
    for parse in (parse_device, parse_target):
        with pytest.raises(DeviceError, match=r"--device cpu|all CPU cores are cpu:0"):
            parse(text)


@pytest.mark.parametrize(
    ("cpu", "text"),
    [(HASWELL, "x86-64-v2"), (HASWELL, "znver3"), (ZEN5, "znver4"), (ZEN5, "alderlake")],
)
def test_a_lesser_cpu_runs_here(on, cpu, text):
    on(cpu)
    assert parse_device(text) == Device("cpu")


@pytest.mark.parametrize(
    ("cpu", "text", "words"),
    [
        (HASWELL, "znver4", ["x86-64-v4", "avx512vnni", "Old CPU", "mlc_llm compile"]),
        (HASWELL, "alderlake", ["'alderlake' has avxvnni", "Old CPU"]),
        (HASWELL, "aarch64", ["aarch64 CPU, this machine is x86_64"]),
        (ARM, "haswell", ["x86_64 CPU, this machine is aarch64"]),
        (ARM, "neoverse-n1", ["has fullfp16", "Arm CPU"]),
    ],
)
def test_a_cpu_that_this_machine_is_not(on, cpu, text, words):
    on(cpu)
    with pytest.raises(DeviceError) as caught:
        parse_device(text)
    assert all(word in str(caught.value) for word in words)
    assert parse_target(text) == parse_cpu(text)


def test_a_level_includes_those_below(on):
    on(HASWELL)
    assert missing_features(["x86-64", "x86-64-v2", "x86-64-v3"]) == []
    assert missing_features(["x86-64-v4", "avx512vnni"]) == ["avx512vnni", "x86-64-v4"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_one_cpu_of_each_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Four cores of two threads each, of which this process may use three, one of them by half.
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(device, "_CPUS", tmp_path)
    monkeypatch.setattr(device, "_cgroup_cpus", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 1, 2, 7, 6})
    assert device.cpus_of_cores() == [1, 2, 7]
    assert device._physical_cores() == 3
    monkeypatch.setattr(device, "_cgroup_cpus", lambda: 2.5)
    assert device._physical_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert device.cpus_of_cores() == []
