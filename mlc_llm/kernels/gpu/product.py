"""The kernel of a linear layer, fused with what follows, taken apart: what kernels for few rows
are put together from.

Knows the computations of `linear.py` and their fusion, and no format of weights: it reads off their
expressions which items of which tensors a piece of weights is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir.expr import TensorLoad

_SIZES = {"float32": 4, "uint32": 4, "float16": 2, "bfloat16": 2}
# Formats whose codes are bytes or shorter have what `Code` says.
MAX_CODE = 256
# What threads keep of a piece of weights: codes, and scales.
_MOST_OPERANDS = 2


@dataclass(frozen=True)
class Product:
    """out[i, o] = finish(i, o, sum over k of x[i, k] * weight(o, k)), all in one kernel.

    x: (n, in_features); out: (n, out_features). weight is of `weight_dtype`, sums are float32.
    """

    x: Any
    out: Any
    in_features: int
    weight_dtype: str
    weight: Callable[[Any, Any], Any]
    finish: Callable[[Any, Any, Any], Any]

    @property
    def num_rows(self) -> Any:
        """Return the variable, or the number, of rows."""
        return self.out.shape[0]

    @property
    def out_features(self) -> int:
        """Return the number of columns of the result."""
        return int(self.out.shape[1])


def take_apart(kernel: Any) -> Product | None:
    """Return the parts of a kernel that has no schedule; None where it is no such product."""
    values: dict[Any, Callable[..., Any]] = {}  # tensors inside the kernel -> what an item is
    product: dict[str, Any] | None = None
    for block in _blocks(kernel.body.block.body):
        store, variables = block.body, [axis.var for axis in block.iter_vars]
        if not isinstance(store, tirx.BufferStore):
            return None
        if block.init is not None:
            product = _sum_of(block, values) if product is None else None
            if product is None:
                return None
            continue
        if len(variables) != len(store.indices) or any(
            not index.same_as(variable)
            for index, variable in zip(store.indices, variables, strict=True)
        ):
            return None
        values[store.buffer] = _function(variables, _inline(store.value, values))
    written = [tensor for tensor in kernel.params if tensor in values]
    if product is None:
        return None
    total = product.pop("total")
    if total in kernel.params:
        written.append(total)
        values[total] = lambda i, o: tirx.BufferLoad(total, [i, o])
    if len(written) != 1 or len(written[0].shape) != 2:
        return None
    (out,) = written

    def finish(i: Any, o: Any, value: Any) -> Any:
        def known(load: Any) -> Any:
            return value if load.source.same_as(total) else load

        return tvm_ffi.structural_map(values[out](i, o), (TensorLoad, known))

    return (
        None if _reads_elsewhere(values[out], total) else Product(**product, out=out, finish=finish)
    )


def _blocks(statement: Any) -> Iterator[Any]:
    """Yield the blocks of a kernel that has no schedule, in order."""
    if isinstance(statement, tirx.SeqStmt):
        for part in statement.seq:
            yield from _blocks(part)
    elif isinstance(statement, tirx.For):
        yield from _blocks(statement.body)
    elif isinstance(statement, s_tir.SBlockRealize):
        yield statement.block


def _function(variables: Sequence[Any], value: Any) -> Callable[..., Any]:
    """Return the function of these variables."""

    def at(*arguments: Any) -> Any:
        def argument(variable: Any) -> Any:
            for candidate, given in zip(variables, arguments, strict=True):
                if variable.same_as(candidate):
                    return given
            return variable

        return tvm_ffi.structural_map(value, (tvm.ir.Var, argument))

    return at


def _inline(value: Any, values: dict[Any, Callable[..., Any]]) -> Any:
    """Replace items of tensors inside the kernel by what they are."""

    def item(load: Any) -> Any:
        return values[load.source](*load.indices) if load.source in values else load

    return tvm_ffi.structural_map(value, (TensorLoad, item))


def _sum_of(block: Any, values: dict[Any, Callable[..., Any]]) -> dict[str, Any] | None:
    """Return the parts of total[i, o] += x[i, k] * weight(o, k), None for other sums."""
    store, axes = block.body, block.iter_vars
    if len(axes) != 3 or not isinstance(store.value, tirx.Add):
        return None
    i, o, k = (axis.var for axis in axes)
    factors = store.value.b
    if not isinstance(factors, tirx.Mul):
        return None
    x, weight = (_without_cast(factor) for factor in (factors.a, factors.b))
    if not isinstance(x, TensorLoad) or not _is_at(x, (i, k)) or x.source in values:
        return None
    if not isinstance(weight, TensorLoad) or not _is_at(weight, (o, k)):
        return None
    if not _is_at(tirx.BufferLoad(store.buffer, store.indices), (i, o)):
        return None
    return {
        "x": x.source,
        "in_features": int(axes[2].dom.extent),
        "weight_dtype": str(weight.source.dtype),
        "weight": _function((o, k), _inline(weight, values)),
        "total": store.buffer,
    }


def _without_cast(value: Any) -> Any:
    return value.value if isinstance(value, tirx.Cast) else value


def _is_at(load: Any, variables: Sequence[Any]) -> bool:
    return len(load.indices) == len(variables) and all(
        index.same_as(variable) for index, variable in zip(load.indices, variables, strict=True)
    )


def _loads(value: Any) -> list[Any]:
    """Return the items of tensors that a value is made of."""
    found: list[Any] = []
    tvm_ffi.structural_walk(value, (TensorLoad, lambda load: found.append(load)))
    return found


def _variables(value: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(value, (tvm.ir.Var, lambda variable: found.append(variable)))
    return found


def _reads_elsewhere(value: Callable[..., Any], total: Any) -> bool:
    """Return whether an item of the result depends on other sums than its own."""
    i, o = tirx.Var("i", "int64"), tirx.Var("o", "int64")
    return any(
        load.source.same_as(total) and not _is_at(load, (i, o)) for load in _loads(value(i, o))
    )


@dataclass(frozen=True)
class Operand:
    """Items of one tensor that a piece of weights of one output is made of: `count` in a row."""

    tensor: Any
    count: int
    lanes: int  # how many can be loaded at once
    first: Callable[[Any, Any], list[Any]]  # of (output, number of the piece): where they begin
    axis: int  # along which they lie

    def item(self, o: Any, piece: Any, position: Any) -> Any:
        """Return one of the items."""
        indices = self.first(o, piece)
        indices[self.axis] = indices[self.axis] + position
        return tirx.BufferLoad(self.tensor, indices)

    def end(self, piece: int) -> int:
        """Return where the items of a piece end."""
        start = self.first(tirx.const(0, "int64"), tirx.const(piece, "int64"))[self.axis]
        return int(_simplified(start)) + self.count


@dataclass(frozen=True)
class Code:
    """A weight as float16: (code - zero) * scale. code: uint32, below MAX_CODE."""

    code: Any
    zero: int
    scale: Any


@dataclass(frozen=True)
class Pieces:
    """Weights of one output, so many in a row at a time, and the items that are read for them."""

    length: int
    operands: tuple[Operand, ...]
    product: Product

    def weight(self, offset: Any, kept: Sequence[Any], slot: Any) -> Any:
        """Return a weight of a piece whose items are kept, one output's after the other's.

        kept: a tensor for each operand; slot: the output's number in them.
        """
        o, piece, place = (tirx.Var(name, "int64") for name in ("o", "piece", "place"))
        analyzer = tvm.sym.Analyzer()
        analyzer.bind(place, tvm.ir.Range(0, self.length))
        value = self.product.weight(o, piece * self.length + place)

        def known(load: Any) -> Any:
            for operand, tensor in zip(self.operands, kept, strict=True):
                if load.source.same_as(operand.tensor):
                    start = operand.first(o, piece)[operand.axis]
                    position = analyzer.simplify(load.indices[operand.axis] - start)
                    return tensor[slot * operand.count + position]
            return load

        weight = analyzer.simplify(tvm_ffi.structural_map(value, (TensorLoad, known)))
        return _function([place], weight)(offset)

    def code(self, offset: Any, kept: Sequence[Any], slot: Any) -> Code | None:
        """Return what a weight is made of, None where it is more than a code and a scale.

        A weight is the code less its zero, times the scale, rounded to float16.
        """
        weight = self.weight(offset, kept, slot)
        if not isinstance(weight, tirx.Cast) or not isinstance(weight.value, tirx.Mul):
            return None
        steps, scale = weight.value.a, _without_cast(weight.value.b)
        if not isinstance(steps, tirx.Sub) or not isinstance(steps.b, tirx.FloatImm):
            return None
        code, zero = _without_cast(steps.a), float(steps.b.value)
        dtypes = [str(value.ty.dtype) for value in (code, scale, weight)]
        if dtypes != ["uint32", "float16", "float16"] or _largest(code) >= MAX_CODE:
            return None
        if not zero.is_integer() or not 0 <= zero < MAX_CODE:
            return None
        return Code(code, int(zero), scale)


def find_pieces(product: Product, length: int, load_bytes: int) -> Pieces | None:
    """Return pieces of so many weights, None where they are no whole pieces: their items do not lie
    in a row, or they are taken out of them in another way in every piece, or the last has fewer.
    """
    o, piece = tirx.Var("o", "int64"), tirx.Var("piece", "int64")
    loads: dict[Any, list[Any]] = {}
    for offset in range(length):
        for load in _loads(product.weight(o, piece * length + offset)):
            loads.setdefault(load.source, []).append([_simplified(i) for i in load.indices])
    last = -(-product.in_features // length) - 1
    operands = []
    for tensor, places in loads.items():
        operand = _operand(tensor, places, (o, piece), load_bytes)
        if operand is None or operand.end(last) > int(tensor.shape[operand.axis]):
            return None
        operands.append(operand)
    if len(operands) > _MOST_OPERANDS:
        return None
    pieces = Pieces(length, tuple(operands), product)
    kept = [tirx.decl_buffer((operand.count,), operand.tensor.dtype) for operand in operands]
    place = tirx.Var("place", "int64")
    known = [place, *kept]
    used = _variables(pieces.weight(place, kept, 0))
    return pieces if all(any(v.same_as(k) for k in known) for v in used) else None


def _operand(
    tensor: Any, places: list[list[Any]], variables: tuple[Any, Any], load_bytes: int
) -> Operand | None:
    """Return where items lie, None unless it is in a row for every output and piece."""
    start = places[0]
    offsets = [
        tuple(_difference(index, first) for index, first in zip(place, start, strict=True))
        for place in places
    ]
    moving = {axis for offset in offsets for axis, step in enumerate(offset) if step != 0}
    if len(moving) > 1 or any(step is None for offset in offsets for step in offset):
        return None
    axis = moving.pop() if moving else len(start) - 1
    steps = {offset[axis] for offset in offsets}
    if steps != set(range(len(steps))):
        return None
    lanes = 1
    if axis == len(start) - 1:
        # Where every piece of every output begins at such a multiple.
        even = math.gcd(len(steps), int(tensor.shape[-1]), _factor(start[-1]))
        lanes = math.gcd(even, load_bytes // _SIZES[str(tensor.dtype)])

    def first(o: Any, piece: Any) -> list[Any]:
        return [_function(variables, index)(o, piece) for index in start]

    return Operand(tensor, len(steps), lanes, first, axis)


def _factor(index: Any) -> int:
    """Return a number that divides an index always."""
    found = tvm.sym.Analyzer().modular_set(index)
    return math.gcd(int(found.coeff), int(found.base)) or 1 << 16


def _largest(code: Any) -> int:
    """Return a bound of a code, which may have its bits in two words."""
    if isinstance(code, tirx.BitwiseOr):
        return _largest(code.a) + _largest(code.b)
    return int(tvm.sym.Analyzer().const_int_bound(code).max_value)


def _difference(index: Any, start: Any) -> int | None:
    """Return index - start, None where it is no constant."""
    difference = _simplified(index - start)
    return int(difference) if isinstance(difference, tirx.IntImm) else None


def _simplified(value: Any) -> Any:
    return tvm.sym.Analyzer().simplify(value)
