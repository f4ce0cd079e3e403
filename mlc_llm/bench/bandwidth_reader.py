"""Child process that reads memory as fast as it can, once for every line on stdin.

Run by path, never imported: bandwidth_reader.py THREADS [CPU,CPU,...]. Each thread compares the
halves of a piece of its own memory with the C library's memcmp, without the interpreter lock and
as two streams; the fastest of many passes is printed in GB/s. Of what Python can call this reads
fastest: as a kernel that prefetches does, 5 % above memchr and 10 % above NumPy's reductions over
larger pieces (2-core Zen 5). Threads that are not bound to a CPU share one for whole passes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import time

_SIZE_BYTES = 256 << 20  # of all threads, more than most caches
_PIECE_BYTES = 16 << 20  # that a thread reads in a pass
_PAGE_BYTES = 2 << 20
_NUM_ROUNDS = 4  # over all memory


class Reader:
    """A thread with memory of its own, which it reads piece by piece when all others do."""

    def __init__(self, size_bytes: int, cpu: int | None, start: threading.Barrier) -> None:
        self._memory = mmap.mmap(-1, size_bytes)
        self._cpu, self._start = cpu, start
        self.piece_bytes = min(size_bytes, _PIECE_BYTES)
        self.num_pieces = size_bytes // self.piece_bytes
        self.times: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        if self._cpu is not None:
            os.sched_setaffinity(0, {self._cpu})  # of this thread alone
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        ctypes.memset(address, 1, len(self._memory))
        half = ctypes.c_size_t(self.piece_bytes // 2)
        compare = ctypes.CDLL("vcruntime140" if sys.platform == "win32" else None).memcmp
        while True:
            for piece in range(self.num_pieces):
                first = address + piece * self.piece_bytes
                pointers = ctypes.c_void_p(first), ctypes.c_void_p(first + half.value)
                self._start.wait()
                begin = time.perf_counter()
                difference = compare(*pointers, half)
                self.times.append((begin, time.perf_counter()))
                assert difference == 0
                self._start.wait()


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    num_threads = int(sys.argv[1])
    cpus = [int(cpu) for cpu in sys.argv[2].split(",")] if len(sys.argv) > 2 else []
    size_bytes = max(_PAGE_BYTES, _SIZE_BYTES // num_threads // _PAGE_BYTES * _PAGE_BYTES)
    barrier = threading.Barrier(num_threads + 1)
    readers = [
        Reader(size_bytes, cpus[index % len(cpus)] if cpus else None, barrier)
        for index in range(num_threads)
    ]
    pass_bytes = sum(reader.piece_bytes for reader in readers)
    for _ in sys.stdin:
        seconds = []
        for _ in range(_NUM_ROUNDS * readers[0].num_pieces):
            barrier.wait()  # all read
            barrier.wait()  # all have read
            times = [reader.times.pop() for reader in readers]
            seconds.append(max(end for _, end in times) - min(begin for begin, _ in times))
        print(pass_bytes / min(seconds) / 1e9, flush=True)


if __name__ == "__main__":
    main()
