"""Child process that reads memory as fast as it can, once for every line on stdin.

Run by path, never imported. Each thread takes the maximum of its part of an array of 256 MB, which
NumPy does without the interpreter lock and with the widest registers there are; the fastest of
several passes is printed in GB/s.
"""

from __future__ import annotations

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_SIZE_BYTES = 256_000_000
_NUM_PASSES = 5


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    num_threads = int(sys.argv[1])
    values = np.ones(_SIZE_BYTES // 4, np.int32)
    parts = np.array_split(values, num_threads)
    with ThreadPoolExecutor(num_threads) as threads:
        for _ in sys.stdin:
            seconds = []
            for _ in range(_NUM_PASSES):
                start = time.perf_counter()
                largest = list(threads.map(np.maximum.reduce, parts))
                seconds.append(time.perf_counter() - start)
                assert len(largest) == num_threads
            print(values.nbytes / min(seconds) / 1e9, flush=True)


if __name__ == "__main__":
    main()
