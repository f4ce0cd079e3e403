"""A program that runs `chain` of opencl_programs.py without TVM's compiler in its process.

Arguments: the directory of the objects, the cache of OpenCL's runtime. Prints the largest error of
each run as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from mlc_llm.device import Device
from mlc_llm.runtime.gpu_memory import GPUMemory
from mlc_llm.runtime.library import _load_runtime
from mlc_llm.runtime.opencl import load_opencl_runtime

_OPENCL, _CPU, _POOLED = 4, 1, 2


def main() -> None:
    _load_runtime()
    load_opencl_runtime(Path(sys.argv[2]), lambda _: None, allow_cpu=True)
    from tvm_ffi_orcjit import default_session

    objects = sorted(str(path) for path in Path(sys.argv[1]).glob("*.o"))
    machine = default_session().load_module(objects)["vm_load_executable"]()
    machine["vm_initialization"](_OPENCL, 0, _POOLED, _CPU, 0, _POOLED)
    memory, generator, errors = GPUMemory(Device("opencl")), np.random.default_rng(0), {}
    w = generator.standard_normal((96, 80), np.float32)
    for rows in (1, 7, 64, 7):
        x = generator.standard_normal((rows, 96), np.float32)
        found = memory.array(machine["chain"](memory.put(x), memory.put(w)))
        power = np.exp(np.maximum(x @ w, 0) + 1)
        expected = 2 * power / power.sum(axis=-1, keepdims=True)
        errors[rows] = float(np.abs(found - expected).max())
    assert "tvm" not in sys.modules
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
