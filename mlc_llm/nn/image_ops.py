"""Operations of models that see images, each a call of the kernel for its shapes."""

from __future__ import annotations

import numpy as np
from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu import images as kernels
from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.nn import gpu_image_ops
from mlc_llm.nn.kernel_call import on_gpu
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.ops import emit, kernel_of


class Unquantized(nn.Module):
    """A part of a model whose weights stay as they are in every quantization."""


@on_gpu(gpu_image_ops.cut_patches)
def cut_patches(pixels: nn.Tensor, patch_size: int) -> nn.Tensor:
    """Return (patches, 3 * patch_size ** 2) float32 for an image (3, size, size) float32."""
    size = int(pixels.shape[1])
    kernel = kernel_of(kernels.cut_patches, size, patch_size)
    shape = [(size // patch_size) ** 2, 3 * patch_size * patch_size]
    return emit("cut_patches", kernel, [pixels], shape)


@on_gpu(gpu_image_ops.add_places)
def add_places(patches: nn.Tensor, first: nn.Tensor, places: nn.Tensor) -> nn.Tensor:
    """Return a class token and the patches, each with what stands for its place added.

    patches (p, width) float32, first (width), places (p + 1, width) -> (p + 1, width) float32.
    """
    count, width = (int(extent) for extent in patches.shape)
    kernel = kernel_of(kernels.add_places, count, width, first.dtype)
    return emit("add_places", kernel, [patches, first, places], [count + 1, width])


def whole_sequence(pixels: nn.Tensor, num_tokens: int, shape: AttentionShape) -> PagedKV:
    """Return what attention needs for one sequence of tokens that see each other, and no pages
    of the engine's: they live as long as the call that `pixels` (3, size, size) came with.
    """
    num_pages = -(-num_tokens // shape.page_size)
    page_shape = (num_pages, 2, shape.num_kv_heads, shape.page_size * shape.head_dim)
    pages = _clear_pages(pixels, page_shape)

    def constant(values: list[int]) -> nn.Tensor:
        return nn.Tensor.from_const(np.asarray(values, np.int32))

    return PagedKV(
        # Causal attention from the last position is attention to the whole sequence.
        positions=constant([num_tokens - 1] * num_tokens),
        query_start=constant([0, num_tokens]),
        slots=constant(list(range(num_tokens))),
        page_table=nn.Tensor.from_const(np.arange(num_pages, dtype=np.int32)[None]),
        context_len=constant([num_tokens]),
        pages=[pages],
        ropes=[],
    )


@on_gpu(gpu_image_ops.clear_pages)
def _clear_pages(pixels: nn.Tensor, shape: tuple[int, ...]) -> nn.Tensor:
    kernel = kernel_of(kernels.clear_pages, int(pixels.shape[1]), shape)
    pages: nn.Tensor = emit("clear_pages", kernel, [pixels], list(shape))
    return pages


def merge_patches(states: nn.Tensor, first_mark: nn.Tensor, second_mark: nn.Tensor) -> nn.Tensor:
    """Return squares of four patches each as rows, and two marks after them.

    states: (patches + 1, width) float32, a class token before a square of patches; marks have
    4 * width items -> (patches / 4 + 2, 4 * width) float32.
    """
    width = int(states.shape[1])
    marks = [nn.op.reshape(mark, (4 * width,)) for mark in (first_mark, second_mark)]
    return _merge_patches(states, *marks)


@on_gpu(gpu_image_ops.merge_patches)
def _merge_patches(states: nn.Tensor, first_mark: nn.Tensor, second_mark: nn.Tensor) -> nn.Tensor:
    count, width = (int(extent) for extent in states.shape)
    kernel = kernel_of(kernels.merge_patches, count - 1, width, first_mark.dtype)
    shape = [(count - 1) // 4 + 2, 4 * width]
    merged: nn.Tensor = emit("merge_patches", kernel, [states, first_mark, second_mark], shape)
    return merged


@on_gpu(gpu_image_ops.put_image_rows)
def put_image_rows(x: nn.Tensor, image_rows: nn.Tensor, images: nn.Tensor) -> nn.Tensor:
    """Return x (n, width) float32 with rows replaced by those of images (m, width) float32.

    image_rows: (n) int32, the row of `images` that each is replaced by, -1 for none.
    """
    kernel = kernel_of(kernels.put_image_rows, int(x.shape[1]))
    return emit("put_image_rows", kernel, [x, image_rows, images], x.shape)
