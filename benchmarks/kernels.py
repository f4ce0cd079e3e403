"""Speed of single CPU kernels: int8 and bfloat16 linears, quantization, row kernels, attention.

GB/s count what must come from memory (weights, keys and values, or the rows themselves) and stand
beside the bandwidth of a kernel that only reads; Gop/s count a multiply-add as two operations.
Weights are cycled through more memory than caches hold. Every figure is a median.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

# (out, in) of the linear layers of Llama-3.2-1B and SmolLM2-135M.
SHAPES = ("3072x2048", "2048x2048", "16384x2048", "2048x8192", "3072x576", "576x1536")
ROWS = (1, 4, 16, 512)
# What copies of a layer's weights take together, to be read from memory.
FOOTPRINT_BYTES, MAX_COPIES = 192 << 20, 1000
MIN_RUNS, MIN_SECONDS = 7, 0.1
# A run of the reading kernel: short like the others', so that it is disturbed as rarely.
READ_BYTES = 8 << 20

Arrays = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """A kernel and what it works on; `inputs` are cycled through, run by run."""

    name: str
    kernel: Any
    inputs: Sequence[Arrays]
    out_shape: tuple[int, ...]
    out_dtype: str = "float32"
    read_bytes: int = 0
    operations: int = 0


def main() -> None:
    """Print the table."""
    options = parse_arguments()
    from mlc_llm.device import export_num_threads, host_cpu

    threads = export_num_threads(options.threads)  # before TVM's threads start
    from mlc_llm.compiler.target import describe_target
    from mlc_llm.kernels.cpu.isa import find_isa

    isa = find_isa(describe_target(options.device, "O2")["isa"]).name
    print(f"{host_cpu().model}, {threads} threads, code for {options.device}: {isa}")
    print(f"{'':44} {'us':>10} {'GB/s':>7} {'Gop/s':>7}", flush=True)
    rng = np.random.default_rng(0)
    for make in all_cases(options, isa, rng):
        for case in make():
            if options.only in case.name:
                report(case, measure(case, options.device))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, help="one per core if left out")
    parser.add_argument("--device", default="cpu", help="as for `mlc_llm compile`")
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="OUTxIN", help="of linears")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="N", help="tokens")
    parser.add_argument("--bits", nargs="+", type=int, default=(4,), choices=(4, 8))
    parser.add_argument(
        "--prefetch", nargs="+", type=int, metavar="BYTES", help="distances of linears to compare"
    )
    parser.add_argument("--context", type=int, default=4096, help="keys that one token attends to")
    parser.add_argument(
        *("--only", "-k"),
        default="",
        metavar="TEXT",
        help="run cases whose name has this: read, int8, quantize, rms_norm, attention ...",
    )
    return parser.parse_args()


def all_cases(
    options: argparse.Namespace, isa: str, rng: np.random.Generator
) -> Iterator[Callable[[], Iterator[Case]]]:
    """Yield makers of cases, so that memory is taken for one kind at a time."""
    yield read_cases
    for bits, text in itertools.product(options.bits, options.shape):
        out_features, in_features = (int(part) for part in text.split("x"))
        for distance in options.prefetch or (None,):
            yield partial(
                linear_cases, out_features, in_features, bits, isa, distance, options.rows, rng
            )
    for text in options.shape:
        out_features, in_features = (int(part) for part in text.split("x"))
        yield partial(bf16_cases, out_features, in_features, options.device, options.rows, rng)
    yield partial(quantize_cases, isa, options.rows, rng)
    yield partial(row_cases, rng)
    yield partial(attention_cases, options.context, rng)
    yield read_cases  # other tenants of the memory may have come or gone


def read_cases() -> Iterator[Case]:
    """A kernel that sums vectors, fetched ahead: the bandwidth that others can reach."""
    from tvm.script import tirx as T

    from mlc_llm.kernels.cpu.int8_tiles import PREFETCH_BYTES

    chains, steps, lanes = 4, 256, 16
    ahead = PREFETCH_BYTES // 4
    prefetch = T.llvm_lookup_intrinsic_id("llvm.prefetch.p0")
    blocks = READ_BYTES // (4 * chains * steps * lanes)

    @T.prim_func(private=True, s_tir=True)
    def read_kernel(
        x: T.Buffer((blocks, steps * chains, lanes), "int32"),
        out: T.Buffer((blocks, lanes), "int32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for b in T.parallel(blocks):
            sums = T.alloc_buffer((chains, lanes), "int32")
            for i in T.unroll(chains):
                sums[i, T.ramp(0, 1, lanes)] = T.broadcast(T.int32(0), lanes)
            for k in T.serial(steps):
                for i in T.unroll(chains):
                    T.evaluate(
                        T.call_llvm_intrin(
                            prefetch,
                            x.access_ptr(
                                "r", offset=((b * steps + k) * chains + i) * lanes + ahead
                            ),
                            T.int32(0),
                            T.int32(3),
                            T.int32(1),
                            dtype="void",
                        )
                    )
                    sums[i, T.ramp(0, 1, lanes)] = (
                        sums[i, T.ramp(0, 1, lanes)] + x[b, k * chains + i, T.ramp(0, 1, lanes)]
                    )
            out[b, T.ramp(0, 1, lanes)] = (
                sums[0, T.ramp(0, 1, lanes)]
                + sums[1, T.ramp(0, 1, lanes)]
                + sums[2, T.ramp(0, 1, lanes)]
                + sums[3, T.ramp(0, 1, lanes)]
            )

    shape = (blocks, steps * chains, lanes)
    inputs = [[np.ones(shape, np.int32)] for _ in range(FOOTPRINT_BYTES // READ_BYTES)]
    yield Case("read", read_kernel, inputs, (blocks, lanes), "int32", READ_BYTES)


def linear_cases(
    out_features: int,
    in_features: int,
    bits: int,
    isa: str,
    distance: int | None,
    rows: Sequence[int],
    rng: np.random.Generator,
) -> Iterator[Case]:
    """A linear layer with int8 activations; few rows stream the weights, many multiply."""
    from mlc_llm.kernels.cpu import int8_linear, int8_tiles
    from mlc_llm.kernels.cpu.activations import TILE, Int8Shape
    from mlc_llm.kernels.cpu.group_format import GroupFormat

    form = GroupFormat(bits, 32, "float16", False)
    shape = Int8Shape(out_features, in_features, form, isa)
    usual = int8_tiles.PREFETCH_BYTES
    int8_tiles.PREFETCH_BYTES = usual if distance is None else distance
    kernel = int8_linear.matmul(shape, None)
    int8_tiles.PREFETCH_BYTES = usual
    words = rng.integers(0, 1 << 32, form.word_shape(out_features, in_features), np.uint32)
    scales = rng.random(form.scale_shape(out_features, in_features)).astype(np.float16)
    size = words.nbytes + scales.nbytes
    num_copies = min(MAX_COPIES, -(-FOOTPRINT_BYTES // size))
    copies = [(words.copy(), scales.copy()) for _ in range(num_copies)]
    label = f"int8 {out_features}x{in_features}, {bits} bits"
    if distance is not None:
        label += f", prefetch {distance}"
    for n in rows:
        quantized = rng.integers(0, 1 << 20, (-(-n // TILE), shape.width * TILE)).astype(np.int32)
        yield Case(
            f"{label}, {n} rows",
            kernel,
            [(quantized, *weights) for weights in copies],
            (n, out_features),
            read_bytes=size,
            operations=2 * n * out_features * in_features,
        )


def bf16_cases(
    out_features: int, in_features: int, device: str, rows: Sequence[int], rng: np.random.Generator
) -> Iterator[Case]:
    """A linear layer on bfloat16 weights: in pairs where the CPU has them, and in float32."""
    from mlc_llm.artifact import numpy_dtype
    from mlc_llm.compiler.target import describe_target
    from mlc_llm.kernels.cpu import bf16_activations, bf16_linear, linear
    from mlc_llm.kernels.cpu.isa import find_bf16_isa

    isa = find_bf16_isa(describe_target(device, "O2")["isa"])
    # From 0.5 to 1, whatever the packing.
    bits = rng.integers(0x3F00, 0x3F80, linear.packed_shape(out_features, in_features), np.uint16)
    weights = bits.view(numpy_dtype("bfloat16"))
    num_copies = min(MAX_COPIES, -(-FOOTPRINT_BYTES // weights.nbytes))
    for n in rows:
        operations = 2 * n * out_features * in_features
        sizes = (n, out_features), "float32", weights.nbytes, operations
        kernel = linear.matmul(out_features, in_features, "bfloat16", False)
        x = rng.standard_normal((n, in_features)).astype(np.float32)
        inputs = [(x, weights.copy()) for _ in range(num_copies)]
        yield Case(f"bf16 {out_features}x{in_features}, float32, {n} rows", kernel, inputs, *sizes)
        if isa is None:
            continue
        kernel = bf16_linear.matmul(out_features, in_features, isa.name, None)
        packed = np.full(bf16_linear.packed_shape(out_features, in_features), 0x3F003F00, np.uint32)
        step = bf16_activations.ROW_STEP
        pairs = np.ones((-(-n // step) * step, bf16_activations.row_words(in_features)), np.int32)
        inputs = [(pairs, packed.copy()) for _ in range(num_copies)]
        yield Case(f"bf16 {out_features}x{in_features}, pairs, {n} rows", kernel, inputs, *sizes)


def quantize_cases(isa: str, rows: Sequence[int], rng: np.random.Generator) -> Iterator[Case]:
    """Quantization of activations, alone and with what comes before it."""
    from mlc_llm.kernels.cpu import activations
    from mlc_llm.kernels.cpu.activations import TILE, Int8Shape, Source
    from mlc_llm.kernels.cpu.group_format import GroupFormat

    width = 2048
    shape = Int8Shape(16, width, GroupFormat(4, 32, "float16", False), isa)
    weight = rng.random(width).astype(np.float16)
    sources = Source(), Source("rms_norm", "float16", 1e-5), Source("silu_mul")
    for source in sources:
        kernel = activations.quantize_activations(shape, source)
        for n in rows:
            x_width = 2 * width if source.kind == "silu_mul" else width
            x = rng.standard_normal((n, x_width)).astype(np.float32)
            yield Case(
                f"quantize {source.kind} {width}, {n} rows",
                kernel,
                [(x, weight) if source.kind == "rms_norm" else (x,)],
                (-(-n // TILE), shape.width * TILE),
                "int32",
                x.nbytes,
            )


def row_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Norm and gate of few rows, about where one thread gives way to all."""
    from mlc_llm.kernels.cpu import elementwise

    for width in (576, 2048):
        norm = elementwise.rms_norm(width, "float16", 1e-5)
        gate = elementwise.silu_mul(width)
        weight = rng.random(width).astype(np.float16)
        for n in (1, 2, 3, 4, 8, 512):
            x = rng.standard_normal((n, width)).astype(np.float32)
            yield Case(f"rms_norm {width}, {n} rows", norm, [(x, weight)], (n, width),
                       read_bytes=x.nbytes)  # fmt: skip
            both = rng.standard_normal((n, 2 * width)).astype(np.float32)
            yield Case(f"silu_mul {width}, {n} rows", gate, [(both,)], (n, width),
                       read_bytes=both.nbytes)  # fmt: skip


def attention_cases(context: int, rng: np.random.Generator) -> Iterator[Case]:
    """One token after a long context, 16 sequences of it, and a prompt of 512; Llama-3.2-1B."""
    from mlc_llm.kernels.cpu.attention import AttentionShape, paged_attention

    heads, kv_heads, head_dim, page = 32, 8, 64, 16
    for dtype in ("float16", "int8"):
        shape = AttentionShape(heads, kv_heads, head_dim, page, dtype, head_dim**-0.5, -1)
        kernel = paged_attention(shape)
        for name, batch, length, new in (
            (f"{context} keys", 1, context, 1),
            (f"16 x {context // 16} keys", 16, context // 16, 1),
            ("prompt of 512", 1, 512, 512),
        ):
            table = np.arange(batch * -(-length // page), dtype=np.int32).reshape(batch, -1)
            item = np.dtype(dtype).itemsize
            pages = rng.integers(0, 60, (table.size, 2, kv_heads, shape.page_items * item))
            pages = pages.astype(np.uint8).view(dtype)
            n = batch * new
            yield Case(
                f"attention {dtype}, {name}",
                kernel,
                [
                    (
                        rng.standard_normal((n, heads, head_dim)).astype(np.float32),
                        pages,
                        np.arange(batch + 1, dtype=np.int32) * np.int32(new),
                        table,
                        np.full(batch, length, np.int32),
                        np.tile(np.arange(length - new, length, dtype=np.int32), batch),
                    )
                ],
                (n, heads * head_dim),
                read_bytes=pages.nbytes,
                # Scores and values; a prompt sees half of its square.
                operations=4 * n * heads * head_dim * (length if new == 1 else length // 2),
            )


_BUILT: dict[tuple[Any, str], Any] = {}


def build(kernel: Any, device: str) -> Any:
    """Compile a kernel, once for all of its cases."""
    import tvm

    from mlc_llm.compiler.target import describe_target

    if (kernel, device) not in _BUILT:
        _BUILT.clear()
        target = tvm.target.Target(describe_target(device, "O2")["target"])
        module = tvm.IRModule({"f": kernel.with_attr("global_symbol", "f")})
        _BUILT[kernel, device] = tvm.compile(module, target=target)["f"]
    return _BUILT[kernel, device]


def measure(case: Case, device: str) -> float:
    """Return the median seconds of a run."""
    from mlc_llm.runtime.memory import aligned_zeros, as_aligned, as_tensor

    function = build(case.kernel, device)
    out = as_tensor(aligned_zeros(case.out_shape, case.out_dtype))
    tensors = [[*(as_tensor(as_aligned(array)) for array in arrays), out] for arrays in case.inputs]
    function(*tensors[0])
    times: list[float] = []
    begin = time.perf_counter()
    for arguments in itertools.cycle(tensors):
        start = time.perf_counter()
        function(*arguments)
        end = time.perf_counter()
        times.append(end - start)
        if len(times) >= MIN_RUNS and end - begin > MIN_SECONDS:
            return statistics.median(times)
    raise AssertionError("a case has inputs")


def report(case: Case, seconds: float) -> None:
    """Print a line."""
    rate = f"{case.operations / seconds / 1e9:7.0f}" if case.operations else ""
    print(
        f"{case.name:44} {seconds * 1e6:10.1f} {case.read_bytes / seconds / 1e9:7.1f} {rate}",
        flush=True,
    )


if __name__ == "__main__":
    main()
