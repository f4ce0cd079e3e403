"""Where a step's time goes: every kernel's time, calls, share, bytes and operations.

The model is a shape of `shapes/`, a directory with a Hugging Face `config.json` or a compiled
library; its weights are random. GB/s count weights, keys and values that are read and the rows
that go in and out, Gop/s a multiply-add as two operations; `machine.py` measures the bandwidth and
the int8 peak they are compared with. A call's time holds about a microsecond of measuring; "step"
is the time of steps without it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import shape_names

if TYPE_CHECKING:
    from mlc_llm.bench.workloads import Workload
    from mlc_llm.runtime.library import Library
    from mlc_llm.runtime.runner import ModelRunner, Step

_HERE = Path(__file__).parent
_SHAPES = _HERE / "shapes"
_LINEARS = ("linear", "group_linear", "int8_linear", "bf16_linear")
# The virtual machine's own work: checks of arguments, shapes, memory.
_MACHINE = "vm.builtin."


def main() -> None:
    """Print a table for each workload."""
    options = parse_arguments()
    from mlc_llm.device import export_num_threads

    threads = export_num_threads(options.threads)  # before TVM's threads start
    from mlc_llm.bench.random_weights import random_parameters
    from mlc_llm.bench.workloads import check_workloads, num_pages_of, num_state_slots_of
    from mlc_llm.quantization.schemes import get_scheme
    from mlc_llm.runtime.library import load_library
    from mlc_llm.runtime.model import CompiledRunner

    workloads = list(plan(options))
    with tempfile.TemporaryDirectory(prefix="mlc_llm-profile-") as directory:
        library = load_library(options.library or compile_library(options, Path(directory)))
    metadata = library.metadata
    check_workloads(workloads, metadata, None)
    parameters = random_parameters(library, get_scheme(metadata.quantization).bits, seed=0)
    slots = num_state_slots_of(workloads)
    num_pages = num_pages_of(workloads, metadata.kv_cache.page_size)
    clock = Clock()
    plain = CompiledRunner(library, parameters, num_pages, slots)
    clocked = CompiledRunner(clock.watch(library), parameters, num_pages, slots)
    machine = Machine() if options.no_machine else Machine.measure(threads)
    weight_mb = sum(array.nbytes for array in parameters) / 1e6
    print(f"{options.model}, {metadata.quantization}, {weight_mb:.0f} MB packed, {threads} threads")
    if not options.no_machine:
        print(f"read bandwidth {machine.gb_s:.1f} GB/s, int8 peak {machine.int8_gop_s:.0f} Gop/s")
    for workload in workloads:
        profile = run(workload, plain, clocked, clock, options.repeats)
        table = format_table(profile, machine, options.top)
        print(f"\n{describe_workload(workload)}\n{table}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ends the process with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(shape_names())
    parser.add_argument(
        *("model",),
        nargs="?",
        default="smollm2_135m",
        help=f"{names}, or a directory with config.json (default: %(default)s)",
    )
    parser.add_argument("--library", type=Path, metavar="PATH", help="in place of compiling")
    parser.add_argument("--quantization", default="q4f16_1", metavar="NAME")
    parser.add_argument("--opt", default="O2", help="as for `mlc_llm compile`")
    parser.add_argument("--device", default="cpu", help="as for `mlc_llm compile`")
    parser.add_argument("--kv-cache-dtype", default="auto", metavar="DTYPE")
    parser.add_argument("--threads", type=int, help="one per core if left out")
    parser.add_argument(
        "--decode", nargs="*", type=int, default=[1], metavar="BATCH", help="sequences at once"
    )
    parser.add_argument(
        "--prefill", nargs="*", type=int, default=[512], metavar="N", help="tokens of a prompt"
    )
    parser.add_argument(
        "--context", nargs="+", type=int, default=[32], metavar="N", help="tokens before a decode"
    )
    parser.add_argument("--repeats", type=int, default=10, help="steps; medians count")
    parser.add_argument("--top", type=int, default=15, help="lines of a table")
    parser.add_argument(
        "--no-machine", action="store_true", help="do not measure bandwidth and peak; no shares"
    )
    options = parser.parse_args()
    least = {"repeats": 1, "top": 1, "decode": 1, "prefill": 1, "context": 0}
    for name, limit in least.items():
        value = getattr(options, name)
        if any(number < limit for number in (value if isinstance(value, list) else [value])):
            parser.error(f"--{name} must be at least {limit}")
    if options.library is not None:
        options.model = str(options.library)
    elif not config_path(options.model).is_file():
        parser.error(f"{options.model} is neither a shape ({names}) nor has it a config.json")
    return options


def config_path(model: str) -> Path:
    """Return where the configuration of a shape or a model's directory is."""
    return _SHAPES / f"{model}.json" if model in shape_names() else Path(model) / "config.json"


def plan(options: argparse.Namespace) -> Iterator[Workload]:
    """Yield what is run."""
    from mlc_llm.bench.workloads import Workload

    for context in options.context:
        for batch in options.decode:
            yield Workload("decode", options.repeats + 1, batch, context)
    for tokens in options.prefill:
        yield Workload("prefill", tokens)


def describe_workload(workload: Workload) -> str:
    """Return what one repeat runs."""
    if workload.name == "prefill":
        return f"prefill of {workload.tokens} tokens"
    return f"decode step, {workload.batch} sequences after {workload.context} tokens"


def compile_library(options: argparse.Namespace, directory: Path) -> Path:
    """Compile the model into an empty directory and return that of its objects."""
    from mlc_llm.compiler.compile import CompileOptions, compile_model
    from mlc_llm.prepare.original import read_compile_config

    path = directory / "config.json"
    path.write_text(config_path(options.model).read_text(encoding="utf-8"), encoding="utf-8")
    config = read_compile_config(path, quantization=options.quantization)
    overrides = {}
    if options.kv_cache_dtype != "auto":
        overrides["kv_cache_dtype"] = options.kv_cache_dtype
    compile_options = CompileOptions(options.device, options.opt, overrides)
    compiled = compile_model(config, compile_options, lambda stage: None)
    compiled.save_objects(directory / "library")
    return directory / "library"


# Shape of a tensor and bytes of an item.
Argument = tuple[tuple[int, ...], int]


class Clock:
    """Stops the time of every call that a virtual machine makes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.arguments: dict[str, list[Argument]] = {}
        self._start = 0.0

    def watch(self, library: Library) -> Library:
        """Return the library with machines that call this clock."""
        import tvm_ffi

        from mlc_llm.runtime.library import Library

        instrument = tvm_ffi.convert(self._tick)

        class WatchedLibrary(Library):
            def open_machine(self, *, is_pooled: bool = True) -> Any:
                machine = super().open_machine(is_pooled=is_pooled)
                machine["set_instrument"](instrument)
                return machine

        return WatchedLibrary(library.metadata, library.module, library.path)

    def reset(self) -> None:
        """Forget all calls; what arguments look like depends on the workload too."""
        self.seconds, self.calls, self.arguments = {}, {}, {}

    def _tick(self, _: Any, name: str, is_before: bool, __: Any, *arguments: Any) -> int:
        if is_before:
            self._start = time.perf_counter()
            return 0
        elapsed = time.perf_counter() - self._start
        name = str(name)
        if name not in self.calls:
            self.arguments[name] = [
                (tuple(argument.shape), argument.dtype.bits // 8)
                for argument in arguments
                if hasattr(argument, "dtype")
            ]
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        self.calls[name] = self.calls.get(name, 0) + 1
        return 0


@dataclass
class Kernel:
    """A kernel in one workload: seconds of all its calls in each repeat, and what a call moves."""

    name: str
    calls: int
    out_shape: tuple[int, ...]
    call_bytes: int
    operations: int
    seconds: list[float] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """Return the median over repeats."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Profile:
    """One workload's kernels, and its time without the clock."""

    kernels: Sequence[Kernel]
    step_s: float
    num_tokens: int


@dataclass(frozen=True)
class Machine:
    """What `machine.py` measures; 0 where it was not asked."""

    gb_s: float = 0.0
    int8_gop_s: float = 0.0

    @staticmethod
    def measure(threads: int) -> Machine:
        """Run it, once for each figure."""
        command = [sys.executable, str(_HERE / "machine.py"), "--threads", str(threads)]
        bandwidth, peak = (
            json.loads(subprocess.run(words, check=True, capture_output=True).stdout)["best"]
            for words in (command, [*command, "--int8"])
        )
        return Machine(bandwidth, peak * 1e3)


def run(
    workload: Workload, plain: ModelRunner, clocked: ModelRunner, clock: Clock, repeats: int
) -> Profile:
    """Run a workload without and with the clock: a decode step by step, a prefill as a whole."""
    from mlc_llm.bench.workloads import make_steps

    steps = make_steps(workload, plain.metadata, seed=0)
    units = [[step] for step in steps] if workload.name == "decode" else [steps] * (repeats + 1)
    for step in units[0]:
        clock.reset()
        plain.forward(step)
        clocked.forward(step)
    kernels = {
        name: describe(name, arguments, clock.calls[name] * len(units[0]), step, plain)
        for name, arguments in clock.arguments.items()
    }
    times = []
    for unit in units[1:]:
        start = time.perf_counter()
        for step in unit:
            plain.forward(step)
        times.append(time.perf_counter() - start)
        clock.reset()
        for step in unit:
            clocked.forward(step)
        for name, kernel in kernels.items():
            kernel.seconds.append(clock.seconds.get(name, 0.0))
    tokens = sum(len(step.token_ids) for step in units[0])
    return Profile(list(kernels.values()), statistics.median(times), tokens)


def describe(
    name: str,
    arguments: Sequence[Argument],
    calls: int,
    step: Step,
    runner: ModelRunner,
) -> Kernel:
    """Return a kernel of a step; the output is the last argument."""
    if name.startswith(_MACHINE) or not arguments:
        return Kernel(name, calls, (), 0, 0)
    kind = name.rstrip("0123456789")
    out_shape = arguments[-1][0]
    layout = runner.metadata.kv_cache
    token_bytes = layout.bytes_per_token // max(layout.num_layers, 1)
    num_tokens = len(step.token_ids)
    total = 0
    for shape, item_bytes in arguments:
        size = item_bytes * math.prod(shape)
        if kind in ("paged_attention", "rope_and_write") and shape == layout.page_shape(
            runner.num_pages
        ):
            # Pages in use, or those of new tokens, out of all.
            is_write = kind == "rope_and_write"
            size = token_bytes * (num_tokens if is_write else int(step.context_len.sum()))
        elif kind in ("embed", "group_embed", "take_rows") and len(shape) > 1:
            size = min(size, 4 * out_shape[0] * out_shape[1])  # rows of it
        total += size
    return Kernel(name, calls, out_shape, total, count_operations(kind, arguments, step, runner))


def count_operations(
    kind: str, arguments: Sequence[Argument], step: Step, runner: ModelRunner
) -> int:
    """Return the operations of a linear layer (its padding included) or attention, else 0."""
    if kind == "paged_attention":
        (_, heads, head_dim), _ = arguments[0]
        # Scores and values for every key at or before a token.
        return 4 * heads * head_dim * int((step.positions.astype(int) + 1).sum())
    if kind not in _LINEARS:
        return 0
    from mlc_llm.quantization.schemes import get_scheme

    weights, _ = arguments[1]
    bits = get_scheme(runner.metadata.quantization).bits
    values = {"bf16_linear": 2, "group_linear": 32 // bits if bits else 1}.get(kind, 1)
    if kind == "int8_linear":
        values = 4 if bits == 8 else 8
    return 2 * arguments[-1][0][0] * values * math.prod(weights)


def format_table(profile: Profile, machine: Machine, top: int) -> str:
    """Return lines: kernels by time, then the virtual machine's own calls and the whole."""
    total = sum(kernel.step_s for kernel in profile.kernels)
    own = [kernel for kernel in profile.kernels if kernel.name.startswith(_MACHINE)]
    kernels = sorted(
        (kernel for kernel in profile.kernels if kernel not in own), key=lambda k: -k.step_s
    )
    lines = [
        f"{'kernel':22} {'out':>12} {'calls':>6} {'us a call':>10} {'ms':>9} {'share':>6} "
        f"{'GB/s':>7} {'of it':>6} {'Gop/s':>7} {'of int8':>7}"
    ]
    for kernel in kernels[:top]:
        gb_s, gop_s = (
            amount * kernel.calls / kernel.step_s / 1e9
            for amount in (kernel.call_bytes, kernel.operations)
        )
        is_int8 = kernel.name.startswith("int8")
        out = "x".join(str(extent) for extent in kernel.out_shape)
        lines.append(
            f"{kernel.name:22} {out:>12} {kernel.calls:6} "
            f"{kernel.step_s / kernel.calls * 1e6:10.1f} {kernel.step_s * 1e3:9.3f} "
            f"{kernel.step_s / total:6.1%} {gb_s:7.1f} {_share(gb_s, machine.gb_s)} "
            f"{f'{gop_s:.0f}' if gop_s else '':>7} "
            f"{_share(gop_s if is_int8 else 0, machine.int8_gop_s)}"
        )
    rest = sum(kernel.step_s for kernel in kernels[top:])
    if rest:
        lines.append(_line(f"{len(kernels) - top} other kernels", rest, total))
    calls = sum(kernel.calls for kernel in own)
    own_s = sum(kernel.step_s for kernel in own)
    lines.append(_line(f"virtual machine, {calls} calls", own_s, total))
    lines.append(_line("sum", total, total))
    rate = profile.num_tokens / profile.step_s
    lines.append(f"step {profile.step_s * 1e3:.3f} ms without the clock, {rate:,.1f} tokens/s")
    return "\n".join(lines)


def _line(name: str, seconds: float, total: float) -> str:
    return f"{name:53} {seconds * 1e3:9.3f} {seconds / total:6.1%}"


def _share(figure: float, whole: float) -> str:
    return f"{figure / whole:6.0%}" if figure and whole else " " * 6


if __name__ == "__main__":
    main()
