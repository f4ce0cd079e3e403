"""How long `mlc_llm compile` takes for each device, and its memory, for the shape of Llama-3.1-8B.

Code depends on shapes alone: there are no weights. Each device is compiled for in a process of its
own, to objects in a directory that is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEVICES = ("cuda:sm_90", "metal", "opencl", "webgpu")
_SMALLER = Path(__file__).with_name("shapes") / "llama_3_2_1b.json"
# What Llama-3.1-8B has other than Llama-3.2-1B.
_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
_ROPE_FACTOR = 8.0
_KIB, _MIB = 1 << 10, 1 << 20


def main() -> int:
    """Print a table of seconds and peak memory; return 1 where a compilation failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", action="append", help=f"default: {', '.join(DEVICES)}")
    parser.add_argument("--quantization", default="q4f16_1")
    parser.add_argument("--layers", type=int, default=_LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--context", type=int, default=8192, help="context_window_size")
    arguments = parser.parse_args()
    print("| device | seconds | of which processor | peak MiB | library MiB |")
    print("|---|---|---|---|---|")
    failures = 0
    with tempfile.TemporaryDirectory(prefix="mlc-llm-compile-") as directory:
        config = Path(directory, "config.json")
        config.write_text(json.dumps(shape(arguments.layers)))
        for device in arguments.device or DEVICES:
            options = [
                *("--device", device, "--quantization", arguments.quantization),
                *("--overrides", f"context_window_size={arguments.context}"),
            ]
            figures = measure(config, options)
            if figures is None:
                failures += 1
            print(f"| {device} | {figures or 'failed'} |", flush=True)
    return min(failures, 1)


def shape(num_layers: int) -> dict[str, object]:
    """Return Hugging Face's `config.json` of Llama-3.1-8B with so many layers."""
    config = json.loads(_SMALLER.read_text()) | _LLAMA_8B | {"num_hidden_layers": num_layers}
    config["rope_scaling"]["factor"] = _ROPE_FACTOR
    return config


def measure(config: Path, options: list[str]) -> str | None:
    """Return the figures of one compilation, None where it failed and has said why."""
    output = config.with_name("library.tar")
    command = [sys.executable, "-m", "mlc_llm", "compile", str(config), "-o", str(output)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return None
    processor, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _KIB / _MIB
    size = output.stat().st_size / _MIB
    return f"{seconds:.1f} | {processor:.1f} | {peak:.0f} | {size:.1f}"


if __name__ == "__main__":
    sys.exit(main())
