"""Operations of `image_ops.py` on GPUs: each a call of the kernel for its shapes.

Pixels and all that is made of them have the model's dtype; rows of images come as float32.
"""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.kernels.gpu import images as kernels
from mlc_llm.nn.gpu_ops import known_rows
from mlc_llm.nn.kernel_call import call, kernel_of


def cut_patches(pixels: nn.Tensor, patch_size: int) -> nn.Tensor:
    """Return (patches, 3 * patch_size ** 2) for an image (3, size, size)."""
    size = int(pixels.shape[1])
    kernel = kernel_of(kernels.cut_patches, size, patch_size, pixels.dtype)
    shape = [(size // patch_size) ** 2, 3 * patch_size * patch_size]
    patches: nn.Tensor = call("cut_patches", kernel, [pixels], shape, pixels.dtype)
    return patches


def add_places(patches: nn.Tensor, first: nn.Tensor, places: nn.Tensor) -> nn.Tensor:
    """Return a class token and the patches, each with what stands for its place added."""
    count, width = (int(extent) for extent in patches.shape)
    kernel = kernel_of(kernels.add_places, count, width, patches.dtype)
    shape = [count + 1, width]
    placed: nn.Tensor = call("add_places", kernel, [patches, first, places], shape, patches.dtype)
    return placed


def clear_pages(pixels: nn.Tensor, shape: tuple[int, ...]) -> nn.Tensor:
    """Return pages of zeros, float32, that live as long as the call that brought `pixels`."""
    kernel = kernel_of(kernels.clear_pages, int(pixels.shape[1]), pixels.dtype, shape)
    pages: nn.Tensor = call("clear_pages", kernel, [pixels], list(shape), "float32")
    return pages


def merge_patches(states: nn.Tensor, first_mark: nn.Tensor, second_mark: nn.Tensor) -> nn.Tensor:
    """Return squares of four patches each as rows, and two marks (4 * width) after them."""
    count, width = (int(extent) for extent in states.shape)
    kernel = kernel_of(kernels.merge_patches, count - 1, width, states.dtype)
    shape = [(count - 1) // 4 + 2, 4 * width]
    args = [states, first_mark, second_mark]
    merged: nn.Tensor = call("merge_patches", kernel, args, shape, states.dtype)
    return merged


def put_image_rows(x: nn.Tensor, image_rows: nn.Tensor, images: nn.Tensor) -> nn.Tensor:
    """Return x (n, width) with rows replaced by those of images (m, width) float32."""
    kernel = kernel_of(kernels.put_image_rows, known_rows(x), int(x.shape[1]), x.dtype)
    args = [x, image_rows, images]
    mixed: nn.Tensor = call("put_image_rows", kernel, args, list(x.shape), x.dtype)
    return mixed
