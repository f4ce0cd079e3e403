"""What the threads of a warp do together on NVIDIA's tensor cores: calls of CUDA functions.

A matrix of float16 is spread over the 32 threads of a warp as PTX's manual draws it for
`mma.m16n8k16`, lane = 4 * group + place:

    left (16 x 16)   items 2i, 2i + 1   row group + i % 2 * 8, columns 2 * place + i // 2 * 8, + 1
    right (16 x 8)   items 2i, 2i + 1   rows 2 * place + i * 8, + 1, column group
    sum (16 x 8)     items 2i, 2i + 1   row group + i * 8, columns 2 * place, + 1

So two sums of eight columns each, rounded, are a left matrix as they are. Sums are float32.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T

WARP = 32
# Items of a matrix that a thread has.
LEFT, RIGHT, SUM = 8, 4, 4

_LOAD = """
__device__ __forceinline__ void {name}(void* pair, const void* shared, int place) {{
  unsigned* to = (unsigned*)pair;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"((unsigned)__cvta_generic_to_shared((const short*)shared + place))
               : "memory");
}}
"""
_MULTIPLY = """
__device__ __forceinline__ void multiply_add(float* sums, int sum, const void* lefts, int left,
                                             const void* rights, int right) {
  float* c = sums + sum;
  const unsigned *a = (const unsigned*)lefts + left / 2, *b = (const unsigned*)rights + right / 2;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
"""
# Before sm_80 half of the columns of left, and rows of right, are taken at a time.
_MULTIPLY_HALVES = """
__device__ __forceinline__ void multiply_add(float* sums, int sum, const void* lefts, int left,
                                             const void* rights, int right) {
  float* c = sums + sum;
  const unsigned *a = (const unsigned*)lefts + left / 2, *b = (const unsigned*)rights + right / 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  }
}
"""
_COPY = """
__device__ __forceinline__ void copy_vector(void* shared, int place, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"((unsigned)__cvta_generic_to_shared((short*)shared + place)),
                  "l"(__cvta_generic_to_global(from))
               : "memory");
}
"""
_COPY_AT_ONCE = """
__device__ __forceinline__ void copy_vector(void* shared, int place, const void* from) {
  *(uint4*)((short*)shared + place) = *(const uint4*)from;
}
"""
_WAIT = """
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
"""
_WAIT_FOR_NONE = """
__device__ __forceinline__ void wait_for_copies() {
}
"""
# A code in the fraction of 1024 is 1024 + code, and so are its differences exact.
_WEIGHTS = """
__device__ __forceinline__ unsigned weights_of_codes(unsigned codes, unsigned zeros,
                                                     unsigned scales) {
  unsigned steps, weights;
  codes |= 0x64006400u, zeros |= 0x64006400u;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(steps) : "r"(codes), "r"(zeros));
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(weights) : "r"(steps), "r"(scales));
  return weights;
}
"""
_QUAD = """
__device__ __forceinline__ float {name}(float value) {{
  float other = __shfl_xor_sync(0xffffffffu, value, 1);
  value = {combined};
  other = __shfl_xor_sync(0xffffffffu, value, 2);
  return {combined};
}}
"""


class TensorCores:
    """Expressions of the functions, for sm_80 and newer, or for sm_75, which lacks some.

    max_head_dim: the widest heads of attention for which registers and shared memory suffice.
    """

    def __init__(self, *, is_sm_75: bool) -> None:
        self.max_head_dim = 128 if is_sm_75 else 256
        self._multiply = _MULTIPLY_HALVES if is_sm_75 else _MULTIPLY
        self._copy = _COPY_AT_ONCE if is_sm_75 else _COPY
        self._wait = _WAIT_FOR_NONE if is_sm_75 else _WAIT

    def load_pair(self, pair: Any, shared: Any, place: Any) -> Any:
        """Take two right matrices, side by side, whose columns are contiguous in shared memory.

        pair: the 8 items of this thread. shared: an array; place: of those that `pair_place` says.
        """
        source = _LOAD.format(name="load_pair", kind="")
        return _call("load_pair", pair.data, shared.data, place, source=source)

    def load_pair_of_rows(self, pair: Any, shared: Any, place: Any) -> Any:
        """Take two right matrices, side by side, whose rows are contiguous in shared memory.

        pair: the 8 items of this thread. shared: an array; place: of those that
        `pair_place_of_rows` says.
        """
        source = _LOAD.format(name="load_pair_of_rows", kind=".trans")
        return _call("load_pair_of_rows", pair.data, shared.data, place, source=source)

    def multiply(
        self, sums: Any, total: Any, lefts: Any, left: Any, rights: Any, right: Any
    ) -> Any:
        """Add a product to a sum: of each an array, and where in it this thread's items begin."""
        places = sums.data, total, lefts.data, left, rights.data, right
        return _call("multiply_add", *places, source=self._multiply)

    def weights(self, codes: Any, zeros: Any, scales: Any) -> Any:
        """Return (code - zero) * scale of two of each, in the halves of a uint32.

        Codes and zeros are whole numbers below 1024, scales are float16.
        """
        given = codes, zeros, scales
        return _call("weights_of_codes", *given, source=_WEIGHTS, returned="uint32")

    def copy(self, shared: Any, place: Any, item: Any) -> Any:
        """Begin to copy 16 bytes, from an item on, to a place of an array in shared memory.

        Both begin at a multiple of 16 bytes.
        """
        return _call("copy_vector", shared.data, place, T.address_of(item), source=self._copy)

    def wait(self) -> Any:
        """Wait for the copies of this thread."""
        return _call("wait_for_copies", source=self._wait)

    def quad_max(self, value: Any) -> Any:
        """Return the largest value of the four threads that have parts of the same rows."""
        source = _QUAD.format(name="quad_max", combined="fmaxf(value, other)")
        return _call("quad_max", value, source=source, returned="float32")

    def quad_sum(self, value: Any) -> Any:
        """Return the sum of those four threads' values."""
        source = _QUAD.format(name="quad_sum", combined="value + other")
        return _call("quad_sum", value, source=source, returned="float32")


@functools.cache
def tensor_cores(architecture: str) -> TensorCores | None:
    """Return the functions for an architecture such as sm_90, None for one that lacks most."""
    return None if architecture == "sm_70" else TensorCores(is_sm_75=architecture == "sm_75")


def pair_place(lane: Any) -> tuple[Any, Any]:
    """Return a column of a pair and the first of eight rows: what a lane tells the place of."""
    return lane // 16 * 8 + lane % 8, lane // 8 % 2 * 8


def pair_place_of_rows(lane: Any) -> tuple[Any, Any]:
    """Return a row of a pair and the first of eight columns: what a lane tells the place of."""
    return lane // 8 % 2 * 8 + lane % 8, lane // 16 * 8


def _call(name: str, *args: Any, source: str, returned: str = "void") -> Any:
    return T.cuda.func_call(name, *args, source_code=source, return_type=returned)
