"""Free memory: what the system says, and what control groups leave of it."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from mlc_llm import device
from mlc_llm.device import free_memory_bytes
from mlc_llm.errors import DeviceError

GIB = 1 << 30
UNLIMITED_V1 = 0x7FFF_FFFF_FFFF_F000


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """Return a function that writes files under /proc and /sys/fs/cgroup of a Linux machine."""
    monkeypatch.setattr(device, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(device, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(device.platform, "system", lambda: "Linux")

    def write(cgroup: str, files: dict[str, str], available_kib: int = 8 << 20) -> None:
        files = {
            "proc/meminfo": f"MemTotal: 16 kB\nMemFree: 1 kB\nMemAvailable:  {available_kib} kB\n",
            "proc/self/cgroup": cgroup,
            **{f"cgroup/{name}": text for name, text in files.items()},
        }
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def group_v2(where: str, limit: object, used: int, inactive: int = 0, active: int = 0):
    return {
        f"{where}memory.max": f"{limit}\n",
        f"{where}memory.current": f"{used}\n",
        f"{where}memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file {active}\n",
    }


def group_v1(where: str, limit: int, used: int, inactive: int = 0):
    return {
        f"memory/{where}memory.limit_in_bytes": f"{limit}\n",
        f"memory/{where}memory.usage_in_bytes": f"{used}\n",
        f"memory/{where}memory.stat": f"inactive_file 7\ntotal_inactive_file {inactive}\n",
    }


def test_this_machine_has_free_memory() -> None:
    assert 1 << 20 < free_memory_bytes() < 1 << 50


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/a/b\n", group_v2("a/b/", "max", GIB), 8 * GIB),
        ("0::/a/b\n", group_v2("a/b/", 4 * GIB, GIB), 3 * GIB),
        ("0::/a/b\n", group_v2("a/b/", 4 * GIB, 3 * GIB, GIB, 1024), 2 * GIB + 1024),
        ("0::/a/b\n", group_v2("a/", 2 * GIB, GIB), GIB),  # a limit further up
        ("0::/not/seen/here\n", group_v2("", 2 * GIB, GIB), GIB),  # inside a container
        ("0::/../../x\n", group_v2("", 2 * GIB, GIB), GIB),
        ("0::/a\n", group_v2("a/", GIB, 2 * GIB), 0),
        ("0::/a\n", group_v2("a/", 64 * GIB, GIB), 8 * GIB),
        ("3:cpu:/c\n4:memory:/m\n0::/\n", group_v1("m/", UNLIMITED_V1, GIB), 8 * GIB),
        ("3:cpu:/c\n4:memory:/m\n0::/\n", group_v1("m/", 4 * GIB, 2 * GIB, GIB), 3 * GIB),
        ("4:hugetlb,memory:/docker/1\n", group_v1("", 4 * GIB, 2 * GIB), 2 * GIB),
        ("4:memory:/m\n", {"memory/m/memory.limit_in_bytes": "not a number"}, 8 * GIB),
    ],
)
def test_control_groups(linux, cgroup, files, expected) -> None:
    linux(cgroup, files)
    assert free_memory_bytes() == expected


def test_a_system_that_says_nothing(linux) -> None:
    with pytest.raises(DeviceError, match="does not tell how much memory is free"):
        free_memory_bytes()


def test_macos(monkeypatch) -> None:
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               100.\n"
        "Pages active:                          700000.\n"
        "Pages inactive:                           200.\n"
        "Pages speculative:                         30.\n"
        "Pages wired down:                       90000.\n"
    )
    monkeypatch.setattr(device.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text))
    assert free_memory_bytes() == 330 * 16384
