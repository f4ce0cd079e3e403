"""The stack that TVM's parser is given: as the standard library tells it, with less work."""

from __future__ import annotations

import inspect
import sys

import tvm
from tvm.script import ir as I
from tvm.script import tirx as T
from tvm.script.parser.core import parser as macro_parser

from mlc_llm.kernels.call_stack import outer_frames, stack


def test_frames_are_those_of_inspect() -> None:
    def from_here() -> tuple[list[inspect.FrameInfo], list[inspect.FrameInfo]]:
        frame = sys._getframe()
        return outer_frames(frame), inspect.getouterframes(frame)

    found, expected = from_here()
    assert len(found) == len(expected) > 3
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.frame is theirs.frame
        assert (mine.filename, mine.lineno, mine.function) == (
            theirs.filename,
            theirs.lineno,
            theirs.function,
        )
    # In this file, where there is source, it is the line itself.
    assert found[1].code_context == ["    found, expected = from_here()\n"]


def test_a_stack_begins_with_its_caller() -> None:
    found = stack()
    assert found[0].function == "test_a_stack_begins_with_its_caller"
    assert found[0].frame is sys._getframe()


def test_code_without_source_has_no_line() -> None:
    names = {"outer_frames": outer_frames, "sys": sys}
    exec(compile("frames = outer_frames(sys._getframe())", "<made up>", "exec"), names)
    assert names["frames"][0].code_context is None


def test_the_parser_asks_here() -> None:
    assert macro_parser.inspect.getouterframes is outer_frames
    assert macro_parser.inspect.signature is inspect.signature
    assert inspect.stack is not stack  # for others nothing has changed


def test_kernels_of_a_class_wait_for_it() -> None:
    """The one thing that lines are for: a kernel in a module's class is parsed with it."""

    @I.ir_module
    class Module:
        @T.prim_func(s_tir=True)
        def double(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")):
            for i in range(4):
                with T.sblock("double"):
                    v = T.axis.spatial(4, i)
                    y[v] = x[v] * T.float32(2)

    assert isinstance(Module, tvm.IRModule)
    assert [str(name.name_hint) for name in Module.get_global_vars()] == ["double"]
