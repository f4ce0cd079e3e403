"""What int8 linears compute, in NumPy: integers until the scales come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import numpy_dtype
from mlc_llm.device import host_cpu, missing_features, parse_cpu
from mlc_llm.kernels.cpu import activations, int8_linear
from mlc_llm.kernels.cpu.activations import TILE, Int8Shape, Source
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.isa import find_isa

# Each way through the kernel: 1 token, 2, a tile, several tiles, unpacked weights; whole and not.
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 20, 21, 31, 33, 40, 41, 45, 64]
PLAIN = Source()
FORMS = {
    "3 bits": GroupFormat(3, 40, "float16", False).with_byte_codes(),
    "4 bits": GroupFormat(4, 32, "float16", False),
    "8 bits": GroupFormat(8, 32, "float16", False),
    "4 bits, minimum": GroupFormat(4, 32, "float16", False, has_minimum=True),
    "4 bits, groups of 128": GroupFormat(4, 128, "float32", False, has_minimum=True),
    "5 bits, minimum": GroupFormat(5, 32, "float16", False, has_minimum=True),
    "5 bits": GroupFormat(5, 32, "float16", False, code_of_zero=16),
    "6 bits, groups of 16": GroupFormat(6, 16, "float16", False, code_of_zero=32),
    "8 bits, minimum": GroupFormat(8, 16, "float16", False, has_minimum=True),
    "8 bits, zero 128": GroupFormat(8, 32, "float16", False, code_of_zero=128),
}
# Those with codes in two planes or minima, or groups of another size.
GENERAL_FORMS = list(FORMS)[3:]
# Devices for which different code is made; together they stand for every instruction set.
X86_DEVICES = ["x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v3+avxvnni", "x86-64-v4+avx512vnni"]
ARM_DEVICES = ["aarch64", "aarch64+dotprod"]

Build = Callable[[Any], Callable[..., NDArray[Any]]]


def runnable_devices() -> list[str]:
    """Return the devices whose code runs on the CPU of the test."""
    return [
        device
        for device in X86_DEVICES + ARM_DEVICES
        if parse_cpu(device).arch == host_cpu().arch and not missing_features(parse_cpu(device).isa)
    ]


def isa_of(device: str) -> str:
    """Return the instruction set that code for a device uses."""
    return find_isa(parse_cpu(device).isa).name


class Layer:
    """Random codes and scales in the packed layout, and what they stand for."""

    def __init__(
        self,
        rng: np.random.Generator,
        out_features: int,
        in_features: int,
        form: GroupFormat,
        bias_dtype: str | None = None,
    ) -> None:
        self.form, self.in_features, self.out_features = form, in_features, out_features
        blocks, self.groups = -(-out_features // 16), form.num_groups(in_features)
        width = self.groups * form.group_size
        is_symmetric = form.code_of_zero is None and not form.has_minimum
        largest = 2 * form.zero_point if is_symmetric else (1 << form.bits) - 1
        codes = rng.integers(0, largest + 1, (blocks * 16, width), dtype=np.uint32)
        codes[0] = largest  # the largest sums there can be
        codes[1] = 0
        scales = rng.uniform(0.5, 1.5, (blocks * 16, self.groups))
        scales = scales.astype(numpy_dtype(form.scale_dtype))
        grouped = codes.reshape(-1, self.groups, form.group_size)
        self.weight = grouped[:out_features].astype(np.int64) - form.zero_point
        self.scales = scales[:out_features].astype(np.float64)
        self.minima = np.zeros_like(self.scales)
        if form.has_minimum:
            minima = rng.uniform(-9, 3, scales.shape).astype(scales.dtype)
            self.minima = minima[:out_features].astype(np.float64)
            scales = np.stack([scales, minima], axis=2).reshape(len(codes), -1)
        words = pack_codes(grouped, form).reshape(len(codes), -1)
        self.packed = [interleave(words), interleave(scales)]
        self.bias = None
        if bias_dtype is not None:
            self.bias = rng.standard_normal(out_features).astype(numpy_dtype(bias_dtype))

    def shape(self, isa: str) -> Int8Shape:
        """Return what kernels are specialised for."""
        return Int8Shape(self.out_features, self.in_features, self.form, isa)


def pack_codes(groups: NDArray[np.uint32], form: GroupFormat) -> NDArray[np.uint32]:
    """Pack codes (rows, groups, group size) into words (rows, groups, words), bit by bit."""
    words = np.zeros((*groups.shape[:2], form.words_per_group), np.uint32)
    low_bits = min(form.bits, 4) if form.bits < 8 else 8
    per_word = 32 // low_bits
    for k in range(form.group_size):
        code = groups[..., k]
        low = code & np.uint32((1 << low_bits) - 1)
        words[..., k // per_word] |= low << np.uint32(k % per_word * low_bits)
        for bit in range(form.bits - low_bits):
            # High words: quads of every second code of a word, a byte for each of its four.
            count = form.bits - low_bits
            quad, byte = k // 8 * 2 + k % 2, k % 8 // 2
            place = byte * 8 + quad % (8 // count) * count + bit
            one = code >> np.uint32(low_bits + bit) & np.uint32(1)
            words[..., form.group_size // 8 + quad // (8 // count)] |= one << np.uint32(place)
    return words


def interleave(rows: NDArray[Any]) -> NDArray[Any]:
    """Pack (rows, columns) into (rows / 16, columns, 16)."""
    return np.ascontiguousarray(rows.reshape(-1, 16, rows.shape[1]).swapaxes(1, 2))


def quantize(
    x: NDArray[np.float32], shape: Int8Shape
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return int8 values (n, groups, group size), scales and starts (n, groups), by definition.

    Rounding is float32's, so that kernels must agree to the last bit.
    """
    groups = np.zeros((len(x), shape.groups * shape.form.group_size), np.float32)
    groups[:, : shape.in_features] = x
    groups = groups.reshape(len(x), shape.groups, -1)
    largest = np.abs(groups).max(axis=2)
    inverse = np.divide(
        np.float32(127), largest, out=np.zeros_like(largest), where=largest > np.float32(0)
    )
    codes = np.rint(groups * inverse[..., None]).astype(np.int64)
    scales = largest * np.float32(1 / 127)
    return codes, scales, codes.sum(axis=2) * -shape.code_offset


def unpack(
    quantized: NDArray[np.int32], n: int, shape: Int8Shape
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Take a kernel's quantized activations of n tokens apart, as `quantize` returns them."""
    entries = quantized.reshape(-1, shape.width, TILE).swapaxes(1, 2).reshape(-1, shape.width)[:n]
    quads = np.ascontiguousarray(entries[:, : shape.scale_at])
    scales = np.ascontiguousarray(entries[:, shape.scale_at : shape.start_at]).view(np.float32)
    starts = entries[:, shape.start_at : shape.start_at + shape.groups]
    # Quad j of a word holds the values j, j + quads_per_word, ... of the word.
    codes = quads.view(np.int8).reshape(n, -1, shape.quads_per_word, 4)
    codes = codes.swapaxes(2, 3).reshape(n, shape.groups, shape.form.group_size)
    if shape.form.has_minimum:
        sums = np.ascontiguousarray(entries[:, shape.start_at + shape.groups :]).view(np.float32)
        np.testing.assert_array_equal(sums, codes.sum(axis=2).astype(np.float32) * scales)
    return codes.astype(np.int64), scales, starts.astype(np.int64)


def product(
    layer: Layer, codes: NDArray[np.int64], scales: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the exact product (n, out), and the sum of its groups' magnitudes."""
    sums = np.einsum("ngs,ogs->nog", codes, layer.weight)
    terms = sums * scales[:, None].astype(np.float64) * layer.scales
    # What a group's sum of activations (n, groups) adds for each row.
    rest = codes.sum(axis=2)[:, None] * scales[:, None].astype(np.float64) * layer.minima
    bias = np.zeros(layer.out_features) if layer.bias is None else layer.bias.astype(np.float64)
    magnitude = np.abs(terms).sum(axis=2) + np.abs(rest).sum(axis=2) + np.abs(bias)
    return terms.sum(axis=2) + rest.sum(axis=2) + bias, magnitude


def build_quantizer(build: Build, shape: Int8Shape, source: Source = PLAIN) -> Any:
    """Return a function from what `source` reads to quantized activations."""
    kernel = build(activations.quantize_activations(shape, source))

    def call(*inputs: NDArray[Any]) -> NDArray[np.int32]:
        out_shape = (-(-len(inputs[0]) // TILE), shape.width * TILE)
        quantized: NDArray[np.int32] = kernel(*inputs, shape=out_shape, dtype=np.int32)
        return quantized

    return call


def build_product(build: Build, layer: Layer, isa: str) -> Any:
    """Return a function from quantized activations of n tokens, and n, to the product."""
    kernel = build(
        int8_linear.matmul(layer.shape(isa), None if layer.bias is None else layer.bias.dtype.name)
    )
    extra = [] if layer.bias is None else [layer.bias]

    def call(quantized: NDArray[np.int32], n: int) -> NDArray[np.float32]:
        out: NDArray[np.float32] = kernel(
            quantized, *layer.packed, *extra, shape=(n, layer.out_features)
        )
        return out

    return call


def check_quantizer(
    build: Build, rng: np.random.Generator, shape: Int8Shape, rows: Sequence[int] = ROWS
) -> None:
    """Assert that quantized activations are those of the definition, bit for bit."""
    kernel = build_quantizer(build, shape)
    for n in rows:
        x = make_rows(rng, n, shape.in_features)
        for found, expected in zip(unpack(kernel(x), n, shape), quantize(x, shape), strict=True):
            np.testing.assert_array_equal(found, expected)


def check_product(
    build: Build,
    rng: np.random.Generator,
    layer: Layer,
    isa: str,
    rows: Sequence[int] = ROWS,
) -> None:
    """Assert that sums of products are exact up to float32 scales, and no row knows of others."""
    shape = layer.shape(isa)
    quantizer, multiply = build_quantizer(build, shape), build_product(build, layer, isa)
    x = make_rows(rng, max(rows), layer.in_features)
    together = multiply(quantizer(x), len(x))
    expected, magnitude = product(layer, *quantize(x, shape)[:2])
    for n in rows:
        found = multiply(quantizer(x[:n]), n)
        assert (np.abs(found - expected[:n]) <= 1e-6 * magnitude[:n]).all()
        np.testing.assert_array_equal(found, together[:n])


def make_rows(rng: np.random.Generator, n: int, width: int) -> NDArray[np.float32]:
    """Return random rows of very different sizes, among them zeros."""
    x = rng.standard_normal((n, width)) * 10.0 ** rng.integers(-3, 3, (n, 1))
    x[n // 2] = 0
    x[-1, : width // 2] = 0
    x[0, 0] = 1000
    return x.astype(np.float32)
