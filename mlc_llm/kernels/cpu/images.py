"""Kernels of models that see images: patches in, rows of the text's width out."""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import span, vector_lanes

# Below this many rows a parallel launch costs more than it saves, as in `elementwise.py`.
_SERIAL_ROWS = 12


def cut_patches(image_size: int, patch_size: int) -> Any:
    """Cut an image: (3, size, size) float32 -> (patches, 3 * patch_size ** 2), row by row.

    A patch lies as a filter of a convolution does: channel, row, column. Pixels that fill no
    whole patch are left out.
    """
    across = image_size // patch_size
    area = patch_size * patch_size

    @T.prim_func(private=True, s_tir=True)
    def cut_patches_kernel(pixels_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        pixels = T.match_buffer(pixels_handle, (3, image_size, image_size), "float32")
        out = T.match_buffer(out_handle, (across * across, 3 * area), "float32")
        for patch in T.parallel(across * across):
            for channel in T.serial(3):
                for i in T.serial(patch_size):
                    for j in T.serial(patch_size):
                        out[patch, channel * area + i * patch_size + j] = pixels[
                            channel,
                            patch // across * patch_size + i,
                            patch % across * patch_size + j,
                        ]

    return cut_patches_kernel


def add_places(num_patches: int, width: int, dtype: str) -> Any:
    """Put a class token before the patches and add to each what stands for its place.

    patches (num_patches, width) float32, first (width) and places (num_patches + 1, width) of
    `dtype` -> (num_patches + 1, width) float32.
    """

    @T.prim_func(private=True, s_tir=True)
    def add_places_kernel(
        patches_handle: T.handle,
        first_handle: T.handle,
        places_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        patches = T.match_buffer(patches_handle, (num_patches, width), "float32")
        first = T.match_buffer(first_handle, (width,), dtype)
        places = T.match_buffer(places_handle, (num_patches + 1, width), dtype)
        out = T.match_buffer(out_handle, (num_patches + 1, width), "float32")
        for i in T.serial(width):
            out[0, i] = T.Cast("float32", first[i]) + T.Cast("float32", places[0, i])
        for patch in T.serial(num_patches):
            for i in T.serial(width):
                out[patch + 1, i] = patches[patch, i] + T.Cast("float32", places[patch + 1, i])

    return add_places_kernel


def clear_pages(image_size: int, shape: tuple[int, ...]) -> Any:
    """Make pages of zeros for one call: (3, size, size) float32 -> `shape` float32.

    The image is not read; what depends on weights alone would be made once for all calls.
    """
    rows, width = shape[0] * shape[1] * shape[2], shape[3]

    @T.prim_func(private=True, s_tir=True)
    def clear_pages_kernel(pixels_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        T.match_buffer(pixels_handle, (3, image_size, image_size), "float32")
        out = T.match_buffer(out_handle, shape, "float32")
        for row in T.serial(rows):
            for i in T.serial(width):
                out[row // (shape[1] * shape[2]), row // shape[2] % shape[1], row % shape[2], i] = (
                    T.float32(0)
                )

    return clear_pages_kernel


def merge_patches(num_patches: int, width: int, dtype: str) -> Any:
    """Join each two by two neighbouring patches in a row, without the class token.

    states (num_patches + 1, width) float32, two marks (4 * width) of `dtype` -> (num_patches / 4
    + 2, 4 * width) float32: upper left, upper right, lower left, lower right; the marks are last.
    """
    across = math.isqrt(num_patches)
    half, count = across // 2, num_patches // 4

    @T.prim_func(private=True, s_tir=True)
    def merge_patches_kernel(
        states_handle: T.handle,
        first_handle: T.handle,
        second_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        states = T.match_buffer(states_handle, (num_patches + 1, width), "float32")
        first = T.match_buffer(first_handle, (4 * width,), dtype)
        second = T.match_buffer(second_handle, (4 * width,), dtype)
        out = T.match_buffer(out_handle, (count + 2, 4 * width), "float32")
        for row in T.serial(count):
            for part in T.serial(4):
                for i in T.serial(width):
                    out[row, part * width + i] = states[
                        1 + (row // half * 2 + part // 2) * across + row % half * 2 + part % 2,
                        i,
                    ]
        for i in T.serial(4 * width):
            out[count, i] = T.Cast("float32", first[i])
            out[count + 1, i] = T.Cast("float32", second[i])

    return merge_patches_kernel


def put_image_rows(width: int) -> Any:
    """Replace rows by those of images: x (n, width) float32, image_rows (n) int32, images
    (m, width) float32 -> (n, width), row i that of images[image_rows[i]], or x's where it is -1.
    """
    lanes = vector_lanes(width)

    @T.macro
    def put(x: T.handle, rows: T.handle, images: T.handle, out: T.handle, row: T.int32) -> None:
        if rows[row] < 0:
            for i in T.serial(width // lanes):
                out[row, span(i * lanes, lanes)] = x[row, span(i * lanes, lanes)]
        else:
            for i in T.serial(width // lanes):
                out[row, span(i * lanes, lanes)] = images[rows[row], span(i * lanes, lanes)]

    @T.prim_func(private=True, s_tir=True)
    def put_image_rows_kernel(
        x_handle: T.handle, rows_handle: T.handle, images_handle: T.handle, out_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        m = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        rows = T.match_buffer(rows_handle, (n,), "int32")
        images = T.match_buffer(images_handle, (m, width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        if n < _SERIAL_ROWS:
            for row in T.serial(n):
                put(x, rows, images, out, row)
        else:
            for row in T.parallel(n):
                put(x, rows, images, out, row)

    return put_image_rows_kernel
