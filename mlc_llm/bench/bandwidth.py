"""The read bandwidth of this machine, measured in a child process on memory of its own.

A child, because the memory it reads must not count as the model's. Knows nothing of models.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlc_llm.device import cpus_of_cores
from mlc_llm.errors import MlcError

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
