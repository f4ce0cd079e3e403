"""Static archives: object files of several models in one `.a`, for the linker of an app."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlc_llm.errors import CompileError, LinkerNotFound

# Distributions have releases of LLVM side by side.
_ARCHIVERS = ("llvm-ar", *(f"llvm-ar-{release}" for release in range(24, 13, -1)))


def write_static_archive(tars: Sequence[Path], path: Path, device: str) -> None:
    """Write the object files of several `.tar` libraries to one archive, whole or not at all.

    Raises LinkerNotFound, which says what to install, and CompileError.
    """
    command = _find_archiver(device)
    if command is None:
        raise LinkerNotFound(
            f"{path} is not made: there is no llvm-ar (Debian: apt install llvm; or pip install "
            f"ziglang); link the object files of {', '.join(tar.name for tar in tars)}"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with tempfile.TemporaryDirectory(prefix="mlc-llm-archive-") as directory:
            objects: list[str] = []
            for tar in tars:
                with tarfile.open(tar) as archive:
                    for member in archive.getmembers():
                        # Of a library that was given, any path may be in there.
                        target = Path(directory) / f"{len(objects)}-{Path(member.name).name}"
                        source = archive.extractfile(member)
                        if source is not None:
                            target.write_bytes(source.read())
                            objects.append(str(target))
            done = subprocess.run(
                [*command, str(temporary), *objects], capture_output=True, text=True, check=False
            )
        if done.returncode != 0:
            raise CompileError(
                f"making {path} with {command[0]} failed: {done.stderr.strip()[-400:]}"
            )
        temporary.replace(path)
    except tarfile.TarError as error:
        raise CompileError(f"making {path} failed: a library is no archive ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _find_archiver(device: str) -> list[str] | None:
    """Return the beginning of a command line, up to the archive's name; None without a program."""
    form = [] if device == "android" else ["--format=darwin"]
    for name in _ARCHIVERS:
        if program := shutil.which(name):
            return [program, *form, "rcs"]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ar", *form, "rcs"]
    program = shutil.which("aarch64-linux-gnu-ar") if device == "android" else None
    return None if program is None else [program, "rcs"]
