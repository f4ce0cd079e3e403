"""Devices: names to what they are, what this machine has: the host CPU's abilities, free memory.

The one place outside `cli/` that reads the environment. Imports no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlc_llm.errors import DeviceError, OptionError
from mlc_llm.gpus import GPU_KINDS, find_gpu, first_gpu, gpus_of

# Order of automatic detection; the first that is found wins. OpenCL's GPUs, often no faster than
# the CPU, are taken where they are asked for.
DEVICE_NAMES, _BY_NAME_ONLY = (*GPU_KINDS, "cpu"), ("opencl",)
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")

# Features of a CPU that kernels or LLVM may use beyond its level, and their LLVM names.
_X86_EXTRAS = {
    "AVX512VNNI": "avx512vnni",
    "AVX512BF16": "avx512bf16",
    "AVX512VBMI": "avx512vbmi",
}
_ARM_EXTRAS = {"ASIMDDP": "dotprod", "ASIMDHP": "fullfp16"}
# x86-64 psABI levels by the NumPy feature that stands for each.
_X86_LEVELS = (("X86_V4", "x86-64-v4"), ("X86_V3", "x86-64-v3"), ("X86_V2", "x86-64-v2"))
_X86_LEVEL_NAMES = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")

# Feature -> the level that it asks for: a CPU name may add these after plus signs.
_X86_FEATURES = {
    **dict.fromkeys(_X86_EXTRAS.values(), "x86-64-v4"),
    "avxvnni": "x86-64-v3",
}
_ARM_FEATURES = dict.fromkeys(_ARM_EXTRAS.values(), "aarch64")
_RISCV = ("riscv64", dict.fromkeys("mafdc", "rv64"), "generic-rv64")  # features, LLVM's CPU
_OTHER_LEVELS = {"rv64": _RISCV, "wasm": ("wasm32", {"simd128": "wasm"}, "generic")}
# CPUs by LLVM's names: a level, and the features of ours that all of them have.
_CPU_NAMES = {
    **dict.fromkeys(("nehalem", "westmere", "sandybridge", "ivybridge"), "x86-64-v2"),
    **dict.fromkeys(("haswell", "broadwell", "skylake"), "x86-64-v3"),
    **dict.fromkeys(("znver1", "znver2", "znver3"), "x86-64-v3"),
    **dict.fromkeys(
        ("alderlake", "raptorlake", "meteorlake", "arrowlake", "lunarlake", "sierraforest"),
        "x86-64-v3+avxvnni",
    ),
    "skylake-avx512": "x86-64-v4",
    "cascadelake": "x86-64-v4+avx512vnni",
    "cooperlake": "x86-64-v4+avx512vnni+avx512bf16",
    **dict.fromkeys(
        ("icelake-client", "icelake-server", "tigerlake", "rocketlake"),
        "x86-64-v4+avx512vnni+avx512vbmi",
    ),
    "znver4": "x86-64-v4+avx512vnni+avx512bf16+avx512vbmi",
    **dict.fromkeys(
        ("sapphirerapids", "emeraldrapids", "graniterapids", "znver5"),
        "x86-64-v4+avx512vnni+avx512bf16+avx512vbmi+avxvnni",
    ),
    **dict.fromkeys(("cortex-a53", "cortex-a57", "cortex-a72", "cortex-a73"), "aarch64"),
    **{"a64fx": "aarch64+fullfp16", "riscv64": "rv64+m+a+f+d+c", "wasm32": "wasm+simd128"},
    **dict.fromkeys(
        (
            *("cortex-a55", "cortex-a75", "cortex-a76", "cortex-a78", "cortex-x1"),
            *("neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2", "ampere1"),
            *("apple-m1", "apple-m2", "apple-m3", "apple-m4"),
        ),
        "aarch64+dotprod+fullfp16",
    ),
}


@dataclass(frozen=True)
class Device:
    """A device by name and index, as in `cuda:1`."""

    name: str
    id: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.id}"

    @property
    def is_gpu(self) -> bool:
        """Return whether code runs on a GPU, in memory of its own."""
        return self.name != "cpu"


CPU = Device("cpu")


@dataclass(frozen=True)
class DeviceReport:
    """Whether a kind of device was found, and what was seen or missed."""

    name: str
    found: bool
    detail: str


@dataclass(frozen=True)
class TargetCPU:
    """A kind of CPU that code is made for.

    arch: "x86_64" or "aarch64" (or whatever the platform says). name: the LLVM CPU that stands
    for its level. isa: level and extra features, in a stable order.
    """

    arch: str
    name: str
    isa: tuple[str, ...]

    @property
    def llvm_features(self) -> list[str]:
        """Return the features as LLVM attributes."""
        extras = [f"+{feature}" for feature in self.isa[1:]]
        # Kernels are written for the full register width.
        return [*extras, "-prefer-256-bit"] if self.name == "x86-64-v4" else extras


@dataclass(frozen=True)
class HostCPU:
    """The CPU this process runs on; arch, name and isa are those of code made for it."""

    arch: str
    model: str
    name: str
    isa: tuple[str, ...]
    physical_cores: int

    @property
    def target(self) -> TargetCPU:
        """Return what code for this CPU is made for."""
        return TargetCPU(self.arch, self.name, self.isa)


def parse_device(text: str) -> Device:
    """Turn `auto`, `cpu`, `cuda:1` or the name of a CPU into a device of this machine.

    Raises OptionError for what is no device name, DeviceError for a device we cannot use here.
    """
    if text == "auto":
        return detect_device()
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", text)
    if match is None or match[1] not in DEVICE_NAMES:
        _require_host(text, parse_cpu(text))
        return CPU
    device = Device(match[1], int(match[2] or 0))
    if device.is_gpu:
        try:
            find_gpu(device.name, device.id)
        except DeviceError as error:
            raise DeviceError(f"device {text!r}: {error}; or use --device cpu") from None
    elif device.id != 0:
        raise DeviceError(f"device {device} does not exist: all CPU cores are cpu:0")
    return device


def detect_device() -> Device:
    """Return the first device that is found, in the order of `DEVICE_NAMES`; asks no further."""
    gpu = first_gpu([kind for kind in GPU_KINDS if kind not in _BY_NAME_ONLY])
    return CPU if gpu is None else Device(gpu.kind, gpu.id)


def parse_target(text: str, others: Iterable[str] = ()) -> TargetCPU:
    """Turn a device as `parse_device` takes it into the CPU to make code for.

    The CPU may be another than this machine's. Raises OptionError or DeviceError.
    """
    name = text.partition(":")[0]
    if name == "auto" or name in DEVICE_NAMES:
        if parse_device(text).is_gpu and name != "auto":
            raise OptionError(f"device {text!r} is no CPU; use cpu or the name of one")
        return host_cpu().target
    return parse_cpu(text, others)


def parse_cpu(text: str, others: Iterable[str] = ()) -> TargetCPU:
    """Turn a level or the name of a CPU, with features after plus signs, into what it stands for.

    others: names of devices that a caller knows beside those here. Raises OptionError.
    """
    name, *features = text.split("+")
    level, *own = _CPU_NAMES.get(name, name).split("+")
    if level in _X86_LEVEL_NAMES:
        arch, known, isa_level, llvm = "x86_64", _X86_FEATURES, level, level
    elif level == "aarch64":
        arch, known, isa_level = "aarch64", _ARM_FEATURES, "neon"
        llvm = "apple-m1" if name.startswith("apple-") else "generic"
    elif level in _OTHER_LEVELS:
        (arch, known, llvm), isa_level = _OTHER_LEVELS[level], level
    else:
        raise OptionError(
            f"device {text!r} is not known; use auto or one of "
            f"{', '.join((*DEVICE_NAMES, *others))}, with an "
            "index where there are several (cuda:1), or a CPU by its level or LLVM's name, with "
            f"features after plus signs (x86-64-v4+avx512vnni): {', '.join(cpu_names())}"
        )
    for feature in features:
        if feature not in known:
            raise OptionError(
                f"device {text!r}: the feature {feature!r} is not known for {name}; "
                f"known: {', '.join(known)}"
            )
        if level in _X86_LEVEL_NAMES and known[feature] > level:
            raise OptionError(f"device {text!r}: {feature} needs {known[feature]}, not {level}")
    wanted = {*own, *features}
    return TargetCPU(arch, llvm, (isa_level, *(name for name in known if name in wanted)))


def cpu_names() -> list[str]:
    """Return the levels and names of CPUs that code can be made for."""
    return [*_X86_LEVEL_NAMES, "aarch64", *_CPU_NAMES]


def missing_features(needed: Iterable[str]) -> list[str]:
    """Return which of `needed` levels and features the CPU of this machine lacks."""
    cpu = host_cpu()
    have = set(cpu.isa)
    if cpu.name in _X86_LEVEL_NAMES:
        have.update(_X86_LEVEL_NAMES[: _X86_LEVEL_NAMES.index(cpu.name) + 1])
    return sorted(set(needed) - have)


def _require_host(text: str, cpu: TargetCPU) -> None:
    host = host_cpu()
    if cpu.arch != host.arch:
        raise DeviceError(
            f"device {text!r} is an {cpu.arch} CPU, this machine is {host.arch}; use --device cpu "
            "to run here, or `mlc_llm compile` to make a library for the other machine"
        )
    if missing := missing_features(cpu.isa):
        raise DeviceError(
            f"device {text!r} has {', '.join(missing)}, which this CPU ({host.model}) lacks; use "
            "--device cpu to run here, or `mlc_llm compile` to make a library for the other CPU"
        )


def detect_devices() -> list[DeviceReport]:
    """Report on every kind of device, in the order of automatic detection."""
    cpu, reports = host_cpu(), []
    for kind in GPU_KINDS:
        try:
            names = [f"{gpu.name} ({gpu.kind}:{gpu.id})" for gpu in gpus_of(kind)]
            reports.append(DeviceReport(kind, True, ", ".join(names)))
        except DeviceError as error:
            reports.append(DeviceReport(kind, False, str(error)))
    detail = f"{cpu.model}, {cpu.physical_cores} cores, {' '.join(cpu.isa)}"
    return [*reports, DeviceReport("cpu", True, detail)]


@functools.cache
def host_cpu() -> HostCPU:
    """Return what the CPU of this machine can do. The result does not change in a process."""
    machine = platform.machine().lower()
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    features = _cpu_features()
    if arch == "x86_64":
        level = next((llvm for key, llvm in _X86_LEVELS if features.get(key)), "x86-64")
        extras = _X86_EXTRAS if level == "x86-64-v4" else {}
        isa = [level, *(llvm for key, llvm in extras.items() if features.get(key))]
        if "avx_vnni" in _cpu_info("flags").split():
            isa.append("avxvnni")
        name = level
    elif arch == "aarch64":
        isa = ["neon", *(llvm for key, llvm in _ARM_EXTRAS.items() if features.get(key))]
        name = "apple-m1" if platform.system() == "Darwin" else "generic"
    else:
        isa, name = ["generic"], "generic"
    model = _cpu_info("model name") or platform.processor() or platform.machine()
    return HostCPU(arch, model, name, tuple(isa), _physical_cores())


def _cpu_features() -> dict[str, bool]:
    # NumPy has already asked the CPU on every platform that it supports.
    for name in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return dict(getattr(module, "__cpu_features__", {}))
    return {}


def _cpu_info(field: str) -> str:
    """Return a field of the first CPU that the system describes, "" where it does not."""
    try:
        text = (_PROC / "cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def _physical_cores() -> int:
    """Return how many physical cores this process may use: affinity, siblings and cgroup quota."""
    count = len(cpus_of_cores()) or os.cpu_count() or 1
    quota = _cgroup_cpus()
    return count if quota is None else min(count, max(1, math.floor(quota)))


def cpus_of_cores() -> list[int]:
    """Return one CPU of each physical core this process may use, [] where the system tells none."""
    try:
        usable = sorted(os.sched_getaffinity(0))
    except AttributeError:
        return []
    return list({_siblings(cpu): cpu for cpu in reversed(usable)}.values())[::-1]


def _siblings(cpu: int) -> str:
    path = _CPUS / f"cpu{cpu}/topology/thread_siblings_list"
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> float | None:
    """Return the CPU quota of this control group in CPUs, None for no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    base = Path("/sys/fs/cgroup/cpu")
    try:
        quota_us = int((base / "cpu.cfs_quota_us").read_text())
        period_us = int((base / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def export_num_threads(count: int | None = None) -> int:
    """Tell TVM's thread pool its size, before its first use: `count`, or one per physical core.

    Returns the size. Raises OptionError for a count below one or above the machine's CPUs.
    """
    limit = os.cpu_count() or 1
    if count is not None and not 1 <= count <= limit:
        raise OptionError(f"{count} threads were asked for; use 1 to {limit} on this machine")
    if count is not None or "TVM_NUM_THREADS" not in os.environ:
        os.environ["TVM_NUM_THREADS"] = str(count or host_cpu().physical_cores)
    return int(os.environ["TVM_NUM_THREADS"])


def environment() -> Mapping[str, str]:
    """Return the variables of the environment, for callers that have no command line."""
    return os.environ


def free_memory_bytes() -> int:
    """Return the memory that may still be taken without swapping, within the control groups.

    Raises DeviceError where the system does not tell.
    """
    try:
        if platform.system() == "Darwin":
            run = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, check=True)
            size = re.search(r"page size of (\d+)", run.stdout)
            pages = re.findall(r"Pages (?:free|inactive|speculative):\s*(\d+)", run.stdout)
            return int(size[1] if size else 0) * sum(map(int, pages))
        if platform.system() == "Windows":
            status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX, 64 bytes; [2] is ullAvailPhys
            getattr(ctypes, "windll").kernel32.GlobalMemoryStatusEx(status)  # noqa: B009
            return status[2]
        match = re.search(r"^MemAvailable:\s*(\d+)", (_PROC / "meminfo").read_text(), re.MULTILINE)
        return min([int(match[1] if match else 0) << 10, *_cgroup_free_bytes()])
    except (OSError, subprocess.CalledProcessError) as error:
        raise DeviceError(f"the system does not tell how much memory is free: {error}") from None


def _cgroup_free_bytes() -> Iterator[int]:
    """Yield what each control group of this process, versions 1 and 2, leaves to it."""
    for line in (_PROC / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        base, limit, used, prefix = _CGROUPS, "memory.max", "memory.current", ""
        if "memory" in controllers.split(","):
            base, limit, used = base / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            try:
                left = int((directory / limit).read_text()) - int((directory / used).read_text())
                stat = dict(re.findall(r"(\w+) (\d+)", (directory / "memory.stat").read_text()))
            except (OSError, ValueError):  # no such group here, or "max": no limit
                continue
            # Cached files count as used, yet make room when memory is asked for.
            cached = sum(int(stat.get(f"{prefix}{age}active_file", 0)) for age in ("", "in"))
            yield max(left + cached, 0)
