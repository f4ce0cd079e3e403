"""The bandwidth of a machine's memory, and of a GPU's. Knows nothing of models.

The machine's is measured in a child process: the memory it reads must not count as the model's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from mlc_llm.device import Device, cpus_of_cores
from mlc_llm.errors import MlcError
from mlc_llm.runtime.gpu_memory import GPUMemory

_COPIED_BYTES, _COPIES = 256 << 20, 10
_READER_PATH = Path(__file__).with_name("bandwidth_reader.py")


class BandwidthMeter:
    """Measures how fast `num_threads` threads can read memory; close it after use."""

    def __init__(self, num_threads: int) -> None:
        command = [sys.executable, "-I", "-S", str(_READER_PATH), str(num_threads)]
        if cpus := cpus_of_cores():
            command.append(",".join(str(cpu) for cpu in cpus))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read_gb_s(self) -> float:
        """Return the best of many passes over 256 MB, in GB/s. Raises MlcError if it is gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise MlcError(
                "the process that measures the memory bandwidth ended with code "
                f"{self._process.wait()}; is there memory left for its 256 MB?"
            ) from None

    def close(self) -> None:
        """End the child process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:  # a question that the child did not live to read
                    continue


class GPUBandwidthMeter:
    """Measures how fast a GPU copies its memory, which is reading and writing. Needs a runner's
    library to be loaded."""

    def __init__(self, device: Device) -> None:
        self._memory = GPUMemory(device)
        self._from, self._to = (self._memory.empty((_COPIED_BYTES,), "uint8") for _ in range(2))

    def read_gb_s(self) -> float:
        """Return the best of some copies, in GB/s that are read and written."""
        seconds = []
        for _ in range(_COPIES):
            start = time.perf_counter()
            self._memory.copy(self._from, self._to)
            self._memory.wait()
            seconds.append(time.perf_counter() - start)
        return 2 * _COPIED_BYTES / min(seconds) / 1e9

    def close(self) -> None:
        """Free its memory."""
        self._from = self._to = None
