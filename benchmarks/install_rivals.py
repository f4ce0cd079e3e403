"""Install the rivals of the comparison, each into an environment of its own under one directory.

Each step leaves a mark and is skipped when run again. Nothing here is needed to use mlc_llm.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from engine import DEFAULT_HOME

# The exporters need torch; without the pin its newest release replaces what is already there.
_TORCH = "torch==2.13.0"
_LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
)
_LLAMA_TARGETS = (
    "llama-bench",
    "llama-batched-bench",
    "llama-quantize",
    "llama-server",
    "llama-cli",
    "llama-completion",
)


class InstallDirectory:
    """The directory of one rival: `venv`, `install.log` and marks of finished steps."""

    def __init__(self, home: Path, name: str) -> None:
        self.path = home / name
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def python(self) -> Path:
        """Return the interpreter of the rival's environment."""
        return self.path / "venv" / "bin" / "python"

    def once(self, step: str, work: Callable[[], None]) -> None:
        """Do a step unless it is done."""
        mark = self.path / f".{step}.done"
        if mark.exists():
            print(f"{self.path.name}: {step} is done")
            return
        print(f"{self.path.name}: {step} ...", flush=True)
        work()
        mark.touch()

    def run(self, *command: str | Path) -> None:
        """Run a command, its output going to the log. Raises CalledProcessError."""
        with (self.path / "install.log").open("a", encoding="utf-8") as log:
            words = [str(word) for word in command]
            print("$", *words, file=log, flush=True)
            subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=True)

    def pip(self, *arguments: str | Path) -> None:
        """Run pip of the rival's environment."""
        self.run(self.python, "-m", "pip", *arguments)

    def make_environment(self) -> None:
        """Create the environment and log what it is."""
        self.run(sys.executable, "-m", "venv", "--clear", self.path / "venv")


def install_llama_cpp(home: Path, jobs: int) -> None:
    """Build llama.cpp from the sources that llama-cpp-python ships; up to 30 minutes on 2 cores."""
    place = InstallDirectory(home, "llama_cpp")

    def download() -> None:
        place.make_environment()
        place.pip(
            *("download", "--no-binary", ":all:", "--no-deps", "--dest", place.path),
            "llama-cpp-python",
        )

    def unpack() -> None:
        shutil.rmtree(place.path / "source", ignore_errors=True)
        archive = next(place.path.glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(archive) as sources:
            sources.extractall(place.path / "source", filter="data")

    def build() -> None:
        sources = next((place.path / "source").glob("*/vendor/llama.cpp"))
        place.run("cmake", "-S", sources, "-B", place.path / "build", *_LLAMA_OPTIONS)
        targets = [word for target in _LLAMA_TARGETS for word in ("--target", target)]
        place.run("cmake", "--build", place.path / "build", "-j", str(jobs), *targets)

    place.once("download", download)
    place.once("unpack", unpack)
    place.once("build", build)


def install_openvino(home: Path, jobs: int) -> None:
    """Install OpenVINO GenAI and the exporter."""
    place = InstallDirectory(home, "openvino")

    def install() -> None:
        place.make_environment()
        place.pip("install", _TORCH, "openvino-genai", "optimum-intel[openvino]")
        # Built for another torch than the pinned one it fails on import; text models need none.
        place.pip("uninstall", "--yes", "torchvision")

    place.once("install", install)


def install_onnxruntime(home: Path, jobs: int) -> None:
    """Install ONNX Runtime GenAI and what its model builder imports."""
    place = InstallDirectory(home, "onnxruntime")

    def install() -> None:
        place.make_environment()
        place.pip(
            *("install", _TORCH, "onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir"),
            "transformers",
        )

    place.once("install", install)


RIVALS: dict[str, Callable[[Path, int], None]] = {
    "llama.cpp": install_llama_cpp,
    "openvino": install_openvino,
    "onnxruntime": install_onnxruntime,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Install the rivals named on the command line; return 1 if one could not be installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=DEFAULT_HOME, help="where to install")
    parser.add_argument("--rival", action="append", choices=RIVALS, help="all if left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of the compiler")
    options = parser.parse_args(arguments)
    failed = []
    for name in options.rival or RIVALS:
        try:
            RIVALS[name](options.home.resolve(), options.jobs)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{name} could not be installed: {error}", file=sys.stderr)
            print(f"its install.log under {options.home} says more", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
