"""Devices: names to what they are, what this machine has, and the host CPU's instruction sets.

The one place outside `cli/` that reads the environment of the machine. Imports no compiler.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from mlc_llm.errors import DeviceError, OptionError

# Order of automatic detection; the first that is found and supported wins.
DEVICE_NAMES = ("cuda", "rocm", "metal", "vulkan", "opencl", "cpu")
SUPPORTED_DEVICES = ("cpu",)

# Features of a CPU that kernels or LLVM may use beyond its level, and their LLVM names.
_X86_EXTRAS = {
    "AVX512VNNI": "avx512vnni",
    "AVX512BF16": "avx512bf16",
    "AVX512VBMI": "avx512vbmi",
}
_ARM_EXTRAS = {"ASIMDDP": "dotprod", "ASIMDHP": "fullfp16"}
# x86-64 psABI levels by the NumPy feature that stands for each.
_X86_LEVELS = (("X86_V4", "x86-64-v4"), ("X86_V3", "x86-64-v3"), ("X86_V2", "x86-64-v2"))


@dataclass(frozen=True)
class Device:
    """A device by name and index, as in `cuda:1`."""

    name: str
    id: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.id}"


@dataclass(frozen=True)
class DeviceReport:
    """Whether a kind of device was found, and what was seen or missed."""

    name: str
    found: bool
    detail: str


@dataclass(frozen=True)
class HostCPU:
    """The CPU this process runs on.

    arch: "x86_64" or "aarch64" (or whatever the platform says). name: the LLVM CPU that stands
    for its level. isa: level and extra features, the order is stable.
    """

    arch: str
    model: str
    name: str
    isa: tuple[str, ...]
    physical_cores: int

    @property
    def llvm_features(self) -> list[str]:
        """Return the features as LLVM attributes."""
        extras = [f"+{feature}" for feature in self.isa[1:]]
        # Kernels are written for the full register width.
        return [*extras, "-prefer-256-bit"] if self.name == "x86-64-v4" else extras


def parse_device(text: str) -> Device:
    """Turn `auto`, `cpu` or `cpu:0` into a device.

    Raises OptionError for what is no device name, DeviceError for a device we cannot use here.
    """
    if text == "auto":
        return Device("cpu")
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", text)
    if match is None or match[1] not in DEVICE_NAMES:
        raise OptionError(
            f"device {text!r} is not known; use auto or one of {', '.join(DEVICE_NAMES)}, "
            "with an index where there are several (cuda:1)"
        )
    device = Device(match[1], int(match[2] or 0))
    if device.name not in SUPPORTED_DEVICES:
        raise DeviceError(
            f"device {device.name!r} is not supported by this release; use --device cpu"
        )
    if device.id != 0:
        raise DeviceError(f"device {device} does not exist: all CPU cores are cpu:0")
    return device


def detect_devices() -> list[DeviceReport]:
    """Report on every kind of device, in the order of automatic detection."""
    cpu = host_cpu()
    reports = []
    for name in DEVICE_NAMES:
        if name == "cpu":
            detail = f"{cpu.model}, {cpu.physical_cores} cores, {' '.join(cpu.isa)}"
            reports.append(DeviceReport(name, True, detail))
        else:
            seen = _driver_of(name)
            detail = "no driver found"
            if seen is not None:
                detail = f"driver {seen} found, but this release cannot use the device yet"
            reports.append(DeviceReport(name, False, detail))
    return reports


def _driver_of(name: str) -> str | None:
    import ctypes.util

    library = {
        "cuda": "cuda",
        "rocm": "amdhip64",
        "vulkan": "vulkan",
        "opencl": "OpenCL",
    }.get(name)
    if name == "metal":
        return "Metal" if platform.system() == "Darwin" else None
    return ctypes.util.find_library(library) if library else None


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
        if "avx_vnni" in _proc_flags():
            isa.append("avxvnni")
        name = level
    elif arch == "aarch64":
        isa = ["neon", *(llvm for key, llvm in _ARM_EXTRAS.items() if features.get(key))]
        name = "apple-m1" if platform.system() == "Darwin" else "generic"
    else:
        isa, name = ["generic"], "generic"
    return HostCPU(arch, _cpu_model(), name, tuple(isa), _physical_cores())


def _cpu_features() -> dict[str, bool]:
    # NumPy has already asked the CPU on every platform that it supports.
    for name in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return dict(getattr(module, "__cpu_features__", {}))
    return {}


def _proc_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _physical_cores() -> int:
    """Return how many physical cores this process may use: affinity, siblings and cgroup quota."""
    try:
        usable = sorted(os.sched_getaffinity(0))
    except AttributeError:
        return max(1, os.cpu_count() or 1)
    cores = {_siblings(cpu) for cpu in usable}
    quota = _cgroup_cpus()
    count = len(cores) if quota is None else min(len(cores), max(1, math.floor(quota)))
    return max(1, count)


def _siblings(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
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
