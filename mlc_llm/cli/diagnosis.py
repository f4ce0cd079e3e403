"""What `mlc_llm doctor` looks at: versions, the machine, devices, caches, the runtime.

Only looks: nothing is downloaded, compiled or changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlc_llm
from mlc_llm.cli.options import read_caches
from mlc_llm.cli.progress import format_size
from mlc_llm.errors import OptionError

_LOW_DISK_BYTES = 2_000_000_000
_RUNTIME_TIMEOUT_S = 60
_VARIABLES = (
    "MLC_LLM_HOME",
    "MLC_JIT_POLICY",
    "MLC_DOWNLOAD_CACHE_POLICY",
    "HF_ENDPOINT",
    "TVM_NUM_THREADS",
)
_LINKERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")  # those `compile` tries


@dataclass(frozen=True)
class Finding:
    """One line of the report; `problem` says what is wrong and how to mend it."""

    section: str
    name: str
    value: str
    problem: str | None = None


def examine(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield everything there is to say, section by section."""
    yield from _examine_versions()
    yield from _examine_machine()
    yield from _examine_devices()
    yield from _examine_caches(environment)
    yield from _examine_environment(environment)
    yield from _examine_tools()


def _examine_versions() -> Iterator[Finding]:
    section = "Versions"
    yield Finding(section, "python", f"{platform.python_version()} ({sys.executable})")
    yield Finding(section, "mlc_llm", mlc_llm.__version__)
    try:
        requirements = importlib.metadata.requires("mlc_llm") or []
    except importlib.metadata.PackageNotFoundError:
        note = "none, this is a checkout; the versions of what it needs are not checked"
        yield Finding(section, "installation", note)
        return
    for requirement in requirements:
        if "extra ==" not in requirement:
            yield _examine_requirement(requirement)


def _examine_requirement(requirement: str) -> Finding:
    """Check that a package is there and, where its version is pinned, that it is that one."""
    requirement = requirement.partition(";")[0].strip()
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    mend = f"run `pip install '{requirement}'`"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("Versions", name, "not installed", f"{name} is missing; {mend}")
    _, _, pinned = requirement.partition("==")
    problem = None
    if pinned and found != pinned:
        problem = f"{name} is {found}, but this release works with {pinned} only; {mend}"
    return Finding("Versions", name, found, problem)


def _examine_machine() -> Iterator[Finding]:
    from mlc_llm.device import host_cpu

    section = "CPU"
    cpu = host_cpu()
    yield Finding(section, "system", f"{platform.system()} {platform.machine()}")
    yield Finding(section, "model", cpu.model)
    yield Finding(section, "code is made for", cpu.name)
    yield Finding(section, "instruction sets", " ".join(cpu.isa) or "the base set only")
    yield Finding(section, "physical cores", str(cpu.physical_cores))
    yield Finding(section, "threads this process may use", str(_usable_threads()))


def _usable_threads() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _examine_devices() -> Iterator[Finding]:
    from mlc_llm.device import detect_devices

    reports = detect_devices()
    for report in reports:
        value = f"found, {report.detail}" if report.found else f"not found: {report.detail}"
        yield Finding("Devices", report.name, value)
    if not any(report.found for report in reports):
        yield Finding("Devices", "usable", "none", "no device can run a model on this machine")


def _examine_caches(environment: Mapping[str, str]) -> Iterator[Finding]:
    section = "Caches"
    try:
        caches = read_caches(environment)
    except OptionError as error:
        yield Finding(section, "settings", "not valid", str(error))
        return
    root = caches.home.root
    size = format_size(caches.home.size_bytes()) if root.exists() else "nothing there yet"
    yield Finding(section, "directory", f"{root} ({size})", _writing_problem(root))
    for entry in caches.home.entries():
        yield Finding(section, f"{entry.kind} {entry.name}", format_size(entry.size_bytes))
    free = shutil.disk_usage(_existing_parent(root)).free
    problem = None
    if free < _LOW_DISK_BYTES:
        problem = (
            f"only {format_size(free)} are free on the disk of the cache; free some space, or let "
            "MLC_LLM_HOME point to a directory on another disk"
        )
    yield Finding(section, "free disk", format_size(free), problem)
    yield Finding(section, "download policy", caches.download_policy.value)
    yield Finding(section, "library policy", caches.jit_policy.value)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _writing_problem(root: Path) -> str | None:
    parent = _existing_parent(root)
    try:
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return (
            f"{parent} cannot be written ({error.strerror}); change its permissions, or let "
            "MLC_LLM_HOME point to a directory you may write to"
        )


def _examine_environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name in _VARIABLES:
        value = environment.get(name)
        problem = None
        if name == "HF_ENDPOINT" and value and not re.match(r"https?://[^/\s]", value):
            problem = (
                f"HF_ENDPOINT is {value!r}; set it to an address such as https://huggingface.co"
            )
        yield Finding("Environment", name, "not set" if value is None else value, problem)
    # Its value is a secret.
    is_set = bool(environment.get("HF_TOKEN"))
    yield Finding("Environment", "HF_TOKEN", "set" if is_set else "not set")


def _examine_tools() -> Iterator[Finding]:
    section = "Runtime and tools"
    num_threads, problem = _try_runtime()
    value = f"loads, uses {num_threads} threads" if problem is None else "broken"
    yield Finding(section, "TVM runtime", value, problem)
    found = next((path for name in _LINKERS if (path := shutil.which(name))), None)
    absent = "none found; only `mlc_llm compile` needs one, chat does without"
    yield Finding(section, "linker", found or absent)


def _try_runtime() -> tuple[int, str | None]:
    """Load the runtime in a process of its own, so that a crash in native code is a finding.

    Returns the number of threads it uses and what is wrong, if anything.
    """
    code = (
        "import tvm_ffi_orcjit; from mlc_llm.runtime.library import num_threads; "
        "print(num_threads())"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_RUNTIME_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 0, f"the TVM runtime did not load within {_RUNTIME_TIMEOUT_S} seconds; try again"
    if done.returncode == 0:
        return int(done.stdout), None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    mend = "install mlc_llm anew: `pip install --force-reinstall .` in its directory"
    return 0, f"the TVM runtime does not load ({lines[-1]}); {mend}"
