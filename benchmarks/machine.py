"""What the machine can do: read bandwidth and int8 arithmetic, with a number of threads.

Bandwidth: what `mlc_llm bench` compares with, see `mlc_llm/bench/bandwidth_reader.py`. Int8: a
kernel that does nothing but the host's best 8-bit multiply-adds, in registers. Both take the best
of several passes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlc_llm.kernels.cpu.isa import Isa

_PASSES = 9
_CHAINS = 16  # independent sums, more than the latency of one instruction asks for
_STEPS = 40_000_000


def read_bandwidth(threads: int) -> list[float]:
    """Return GB/s of each pass."""
    from mlc_llm.bench.bandwidth import BandwidthMeter

    with closing(BandwidthMeter(threads)) as meter:
        return [meter.read_gb_s() for _ in range(_PASSES)]


def int8_peak(threads: int) -> list[float]:
    """Return tera-operations a second of each pass; a multiply-add is two operations."""
    import numpy as np
    import tvm

    from mlc_llm.compiler.target import describe_target
    from mlc_llm.kernels.cpu.isa import find_isa

    host = describe_target("cpu", "O2")
    isa = find_isa(host["isa"])
    module = tvm.compile(_dot_kernel(isa, threads), target=host["target"])
    result = tvm.runtime.tensor(np.zeros((threads, isa.lanes), np.int32))
    operations = threads * _STEPS * _CHAINS * isa.lanes * 4 * 2
    figures = []
    for _ in range(_PASSES + 1):
        start = time.perf_counter()
        module["multiply"](result)
        figures.append(operations / 1e12 / (time.perf_counter() - start))
    return figures[1:]


def _dot_kernel(isa: Isa, threads: int) -> object:
    from tvm.script import tirx as T

    lanes = isa.lanes

    @T.prim_func(s_tir=True)
    def multiply(result: T.Buffer((threads, lanes), "int32")) -> None:
        T.func_attr({"global_symbol": "multiply"})
        for thread in T.parallel(threads):
            sums = T.alloc_buffer((_CHAINS, lanes), "int32")
            for chain in T.unroll(_CHAINS):
                sums[chain, T.ramp(0, 1, lanes)] = T.broadcast(chain, lanes)
            for step in T.serial(_STEPS):
                for chain in T.unroll(_CHAINS):
                    sums[chain, T.ramp(0, 1, lanes)] = isa.dot4_small(
                        sums[chain, T.ramp(0, 1, lanes)],
                        T.broadcast(T.Cast("uint32", step), lanes),
                        T.broadcast(step, lanes),
                    )
            for chain in T.unroll(_CHAINS):
                result[thread, T.ramp(0, 1, lanes)] += sums[chain, T.ramp(0, 1, lanes)]

    return multiply


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--int8", action="store_true", help="int8 arithmetic instead of bandwidth")
    options = parser.parse_args(arguments)
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    passes = int8_peak(options.threads) if options.int8 else read_bandwidth(options.threads)
    print(json.dumps({"best": max(passes), "passes": [round(figure, 2) for figure in passes]}))


if __name__ == "__main__":
    main()
