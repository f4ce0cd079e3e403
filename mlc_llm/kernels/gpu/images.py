"""Kernels of models that see images: patches in, rows of the text's width out.

But for pages, they are computations without a schedule. What a patch is, is said in
`kernels.cpu.images`.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import te, tirx
from tvm.script import tirx as T

from mlc_llm.kernels.gpu.attention_pages import THREADS
from mlc_llm.kernels.gpu.rows import (
    RowCount,
    computation,
    compute,
    narrow,
    num_rows,
    tensor,
    wide,
)


def cut_patches(image_size: int, patch_size: int, dtype: str) -> Any:
    """Cut an image: (3, size, size) -> (patches, 3 * patch_size ** 2), row by row."""
    across, area = image_size // patch_size, patch_size * patch_size
    pixels = tensor("pixels", (3, image_size, image_size), dtype)

    def item(patch: Any, c: Any) -> Any:
        row = patch // across * patch_size + c % area // patch_size
        return pixels[c // area, row, patch % across * patch_size + c % patch_size]

    out = compute((across * across, 3 * area), item, name="out")
    return computation([pixels, out])


def add_places(num_patches: int, width: int, dtype: str) -> Any:
    """Put a class token before the patches and add to each what stands for its place.

    patches (num_patches, width), first (width), places (num_patches + 1, width) ->
    (num_patches + 1, width).
    """
    patches = tensor("patches", (num_patches, width), dtype)
    first = tensor("first", (width,), dtype)
    places = tensor("places", (num_patches + 1, width), dtype)

    def item(i: Any, c: Any) -> Any:
        token = tirx.if_then_else(i == 0, wide(first[c]), wide(patches[i - 1, c]))
        return narrow(token + wide(places[i, c]), dtype)

    out = compute((num_patches + 1, width), item, name="out")
    return computation([patches, first, places, out])


def merge_patches(num_patches: int, width: int, dtype: str) -> Any:
    """Join each two by two neighbouring patches in a row, without the class token.

    states (num_patches + 1, width), two marks (4 * width) -> (num_patches / 4 + 2, 4 * width), the
    marks last.
    """
    across = math.isqrt(num_patches)
    half, count = across // 2, num_patches // 4
    states = tensor("states", (num_patches + 1, width), dtype)
    marks = [tensor(name, (4 * width,), dtype) for name in ("first", "second")]

    def item(i: Any, c: Any) -> Any:
        part = c // width
        patch = (i // half * 2 + part // 2) * across + i % half * 2 + part % 2
        merged = tirx.if_then_else(i < count, states[1 + patch, c % width], marks[0][c])
        return tirx.if_then_else(i <= count, merged, marks[1][c])

    out = compute((count + 2, 4 * width), item, name="out")
    return computation([states, *marks, out])


def put_image_rows(n: RowCount, width: int, dtype: str) -> Any:
    """Replace rows by those of images: x (n, width), image_rows (n) int32, images (m, width)
    float32 -> (n, width), row i that of images[image_rows[i]], or x's where it is -1.
    """
    rows, items = num_rows(n), te.var("m", "int64")
    x = tensor("x", (rows, width), dtype)
    chosen = tensor("image_rows", (rows,), "int32")
    images = tensor("images", (items, width), "float32")

    def item(i: Any, c: Any) -> Any:
        return tirx.if_then_else(chosen[i] < 0, x[i, c], narrow(images[chosen[i], c], dtype))

    out = compute((rows, width), item, name="out")
    return computation([x, chosen, images, out])


def clear_pages(image_size: int, dtype: str, shape: tuple[int, ...]) -> Any:
    """Make pages of zeros for one call: (3, size, size) of dtype -> `shape` float32.

    The image is not read; what depends on no argument would be made once for all calls.
    """
    count = math.prod(shape)

    @T.prim_func(private=True, s_tir=True)
    def clear_pages_kernel(
        pixels: T.Buffer((3, image_size, image_size), dtype), out: T.Buffer(shape, "float32")
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for block in T.thread_binding((count + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                i: T.let = block * THREADS + thread
                row: T.let = i // shape[3]
                if i < count:
                    out[
                        row // (shape[1] * shape[2]),
                        row // shape[2] % shape[1],
                        row % shape[2],
                        i % shape[3],
                    ] = T.float32(0)

    return clear_pages_kernel
