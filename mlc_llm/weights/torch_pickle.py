"""An interpreter for the pickles of PyTorch checkpoints that builds tensors and nothing else.

It knows the instructions such files consist of and a handful of names. Every other name is refused
when it is mentioned, so nothing of a file is ever imported or called. Python's own `pickle` is not
used: it imports what a file names, and takes memory for what a file claims.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.weights.stored import MAX_DIMENSIONS, MAX_EXTENT, STORED_DTYPES, count_values

MAX_PICKLE_BYTES = 32 << 20
_MAX_INSTRUCTIONS = 4_000_000
_MAX_NUMBER_BYTES = 32

_STORAGE_DTYPES = {
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Double": "float64",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}


@dataclass(frozen=True)
class StorageRef:
    """Values one after another in the file, under a key; `dtype` None is bytes of any dtype."""

    key: str
    dtype: str | None
    num_items: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor on a storage; offset and strides count values."""

    storage: StorageRef
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _StorageType:
    dtype: str | None


@dataclass(frozen=True)
class _TensorType:
    dtype: str


@dataclass(frozen=True)
class _Function:
    name: str


class _Mark:
    """The only object of its class lies on the stack where a sequence begins."""


_MARK = _Mark()

_NAMES: dict[str, Any] = {
    **{f"torch.{name}Storage": _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
    "torch.storage.UntypedStorage": _StorageType(None),
    **{f"torch.{dtype}": _TensorType(dtype) for dtype in STORED_DTYPES},
    **{
        name: _Function(name)
        for name in (
            "collections.OrderedDict",
            "torch.Size",
            "torch._utils._rebuild_tensor",
            "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_tensor_v3",
            "torch._utils._rebuild_parameter",
        )
    },
}


class TorchPickle:
    """Reads one pickle from `data`, from `position` on; afterwards `position` is behind it."""

    def __init__(self, data: bytes | memoryview, where: str, position: int = 0) -> None:
        """Prepare to read. `where` names the file in errors."""
        self._data, self._where, self.position = data, where, position
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Return the object. Raises CorruptFile, and UnsupportedModel naming what is refused."""
        for _ in range(_MAX_INSTRUCTIONS):
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                return self._pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise self._damaged(f"unknown instruction 0x{code:02x}")
            instruction(self)
        raise UnsupportedModel(f"{self._where} has a pickle of more than 4 million instructions")

    def _damaged(self, problem: str) -> CorruptFile:
        return CorruptFile(
            f"{self._where} is damaged: {problem} at byte {self.position:,} of its pickle; "
            "fetch it again"
        )

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self._data):
            raise self._damaged("it ends")
        taken = bytes(self._data[self.position : end])
        self.position = end
        return taken

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._damaged("nothing on the stack")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise self._damaged(f"no {kind.__name__} on the stack")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise self._damaged("no mark on the stack")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _text(self, code: str) -> None:
        size = self._number(code)
        try:
            self._push(self._take(size).decode())
        except UnicodeDecodeError:
            raise self._damaged("no UTF-8") from None

    def _bytes(self, code: str) -> None:
        self._push(self._take(self._number(code)))

    def _long(self, code: str) -> None:
        size = self._number(code)
        if not 0 <= size <= _MAX_NUMBER_BYTES:
            raise self._damaged(f"a number of {size:,} bytes")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def _tuple(self, size: int) -> None:
        items = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(items)))

    def _put(self, index: int) -> None:
        self._memo[index] = self._top(object)

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self._damaged(f"no object {index}")
        self._push(self._memo[index])

    def _append(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise self._damaged("a key without value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set_item(target, key, value)

    def _set_item(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        # Others could be expensive to hash, and no checkpoint has them.
        if type(key) not in (str, int):
            raise self._damaged(f"a key that is a {type(key).__name__}")
        target[key] = value

    def _line(self) -> str:
        begin = self.position
        while self._take(1) != b"\n":
            if self.position - begin > 256:
                raise self._damaged("a name without end")
        try:
            return bytes(self._data[begin : self.position - 1]).decode()
        except UnicodeDecodeError:
            raise self._damaged("no UTF-8") from None

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._push(self._find(module, name))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self._damaged("a name that is no text")
        self._push(self._find(module, name))

    def _find(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in _NAMES:
            raise UnsupportedModel(
                f"{self._where} asks for {full!r:.200}, which no tensor needs; it was not run. "
                "Only plain tensors are read from PyTorch files: use a copy with safetensors"
            )
        return _NAMES[full]

    def _build(self) -> None:
        state = self._pop()
        # torch.nn.Module.state_dict() hangs version numbers on its dictionary.
        if not isinstance(state, dict) or not isinstance(self._top(object), dict):
            raise self._refused("sets attributes of an object")

    def _refused(self, action: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._where} {action}, which no tensor needs; it was not done. "
            "Only plain tensors are read from PyTorch files: use a copy with safetensors"
        )

    def _persistent(self) -> None:
        reference = self._pop()
        match reference:
            case ("storage", _StorageType(dtype), str(key), str(), int(count), *rest) if (
                0 <= count <= MAX_EXTENT
            ):
                if any(item is not None for item in rest):
                    raise self._refused("has views of storages (PyTorch before 0.4)")
                self._push(StorageRef(key, dtype, count))
            case _:
                raise self._damaged("a reference to no storage")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            raise self._refused(f"calls a {type(function).__name__}")
        self._push(self._call(function.name.rpartition(".")[2], arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        match name, arguments:
            case "OrderedDict", ():
                return {}
            case "OrderedDict", (list(pairs),):
                made: dict[Any, Any] = {}
                for pair in pairs:
                    if not isinstance(pair, list | tuple) or len(pair) != 2:
                        raise self._damaged("an OrderedDict of no pairs")
                    self._set_item(made, pair[0], pair[1])
                return made
            case "Size", (tuple(extents),):
                return extents
            case "_rebuild_parameter", (TensorRef() as tensor, *_):
                return tensor
            case "_rebuild_tensor" | "_rebuild_tensor_v2", (
                StorageRef() as storage,
                offset,
                shape,
                strides,
                *_,
            ) if storage.dtype is not None:
                return self._tensor(storage, storage.dtype, offset, shape, strides)
            case "_rebuild_tensor_v3", (
                StorageRef() as storage,
                offset,
                shape,
                strides,
                _,
                _,
                _TensorType(dtype),
                *_,
            ):
                return self._tensor(storage, dtype, offset, shape, strides)
        raise self._damaged(f"{name} with arguments it does not have")

    def _tensor(
        self, storage: StorageRef, dtype: str, offset: Any, shape: Any, strides: Any
    ) -> TensorRef:
        """Check that a tensor stays inside its storage and repeats nothing of it."""
        if not _is_counts((offset,)) or not _is_counts(shape) or not _is_counts(strides):
            raise self._damaged("a tensor with a strange shape")
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise self._damaged("a tensor with a strange shape")
        available = storage.num_items
        if storage.dtype is None:
            available //= STORED_DTYPES[dtype].itemsize
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        count = count_values(shape)
        if count and (last >= available or count > available):
            raise self._damaged(f"a tensor of {list(shape)} values in a storage of {available:,}")
        return TensorRef(storage, dtype, shape, strides, offset)


def _is_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(
        type(v) is int and 0 <= v <= MAX_EXTENT for v in values
    )


def _pop_top(p: TorchPickle) -> None:
    if not p._stack:
        raise p._damaged("nothing on the stack")
    p._stack.pop()


_INSTRUCTIONS: dict[int, Callable[[TorchPickle], object]] = {
    0x80: lambda p: _check_protocol(p),  # PROTO
    0x95: lambda p: p._take(8),  # FRAME
    ord("("): lambda p: p._push(_MARK),  # MARK
    ord("0"): _pop_top,  # POP
    ord("1"): lambda p: p._pop_to_mark(),  # POP_MARK
    ord("2"): lambda p: p._push(p._top(object)),  # DUP
    ord("}"): lambda p: p._push({}),  # EMPTY_DICT
    ord("]"): lambda p: p._push([]),  # EMPTY_LIST
    ord(")"): lambda p: p._push(()),  # EMPTY_TUPLE
    ord("t"): lambda p: p._push(tuple(p._pop_to_mark())),  # TUPLE
    0x85: lambda p: p._tuple(1),  # TUPLE1
    0x86: lambda p: p._tuple(2),  # TUPLE2
    0x87: lambda p: p._tuple(3),  # TUPLE3
    ord("a"): lambda p: p._append([p._pop()]),  # APPEND
    ord("e"): lambda p: p._append(p._pop_to_mark()),  # APPENDS
    ord("s"): lambda p: p._set_items([p._pop(), p._pop()][::-1]),  # SETITEM
    ord("u"): lambda p: p._set_items(p._pop_to_mark()),  # SETITEMS
    ord("N"): lambda p: p._push(None),  # NONE
    0x88: lambda p: p._push(True),  # NEWTRUE
    0x89: lambda p: p._push(False),  # NEWFALSE
    ord("J"): lambda p: p._push(p._number("<i")),  # BININT
    ord("K"): lambda p: p._push(p._number("<B")),  # BININT1
    ord("M"): lambda p: p._push(p._number("<H")),  # BININT2
    0x8A: lambda p: p._long("<B"),  # LONG1
    0x8B: lambda p: p._long("<i"),  # LONG4
    ord("G"): lambda p: p._push(p._number(">d")),  # BINFLOAT
    ord("X"): lambda p: p._text("<I"),  # BINUNICODE
    0x8C: lambda p: p._text("<B"),  # SHORT_BINUNICODE
    0x8D: lambda p: p._text("<Q"),  # BINUNICODE8
    ord("U"): lambda p: p._text("<B"),  # SHORT_BINSTRING
    ord("T"): lambda p: p._text("<I"),  # BINSTRING
    ord("C"): lambda p: p._bytes("<B"),  # SHORT_BINBYTES
    ord("B"): lambda p: p._bytes("<I"),  # BINBYTES
    0x8E: lambda p: p._bytes("<Q"),  # BINBYTES8
    ord("h"): lambda p: p._get(p._number("<B")),  # BINGET
    ord("j"): lambda p: p._get(p._number("<I")),  # LONG_BINGET
    ord("q"): lambda p: p._put(p._number("<B")),  # BINPUT
    ord("r"): lambda p: p._put(p._number("<I")),  # LONG_BINPUT
    0x94: lambda p: p._put(len(p._memo)),  # MEMOIZE
    ord("c"): lambda p: p._global(),  # GLOBAL
    0x93: lambda p: p._stack_global(),  # STACK_GLOBAL
    ord("Q"): lambda p: p._persistent(),  # BINPERSID
    ord("R"): lambda p: p._reduce(),  # REDUCE
    ord("b"): lambda p: p._build(),  # BUILD
}


def _check_protocol(p: TorchPickle) -> None:
    version = p._number("<B")
    if not 2 <= version <= 5:
        raise p._damaged(f"pickle protocol {version}")
