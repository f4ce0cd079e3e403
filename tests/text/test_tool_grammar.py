"""Grammars of calls for every format: what they let through is what its parser reads as calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_tokenizers import CHATML_TOKENS, byte_level

from mlc_llm.text.events import CallEnd, CallStart
from mlc_llm.text.grammars.reader import GrammarReader
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.tokenizer import Tokenizer
from mlc_llm.text.tool_calls.grammar import MAX_CALLS, call_grammar
from mlc_llm.text.tool_calls.registry import format_names, get_format
from mlc_llm.text.tool_calls.tools import Tool, ToolUse, WrittenCall

SHAPES = {name: get_format(name).shape for name in format_names()}
SPECIAL = [*dict.fromkeys(text for shape in SHAPES.values() for text in shape.special)]
# So many that their ids are no bytes, as in real vocabularies.
FILLING = tuple(f"<|reserved_{number}|>" for number in range(300))
TOKENIZER = Tokenizer(byte_level((*CHATML_TOKENS, *FILLING, *SPECIAL)), {"eos_token": "<|im_end|>"})
READER = GrammarReader(lambda: GrammarVocabulary(TOKENIZER, [2], TOKENIZER.vocab_size))
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
STRICT = Tool("get_weather", None, CITY, strict=True)
LOOSE = Tool("add", None, {"type": "object", "properties": {"a": {"type": "integer"}}})
TOOLS = (STRICT, LOOSE)

GOOD = WrittenCall("get_weather", '{"city": "Paris"}')
BAD = WrittenCall("get_weather", '{"town": "Paris"}')
SUM = WrittenCall("add", '{"a": 1}')
ODD_SUM = WrittenCall("add", '{"a": "one"}')
UNKNOWN = WrittenCall("rm_rf", "{}")


@pytest.fixture(scope="module", autouse=True)
def end_reader() -> object:
    yield
    READER.close()


def matcher(
    name: str, use: ToolUse, *, has_tokens: bool = True, content: dict[str, Any] | None = None
) -> Callable[[str], bool]:
    """Return what says whether a whole answer matches the grammar."""
    shape = SHAPES[name]
    ids = {text: TOKENIZER.token_to_id(text) or 0 for text in shape.special if has_tokens}
    source = call_grammar(shape, use, ids, content)
    assert source is not None
    grammar = READER.read("lark", source, True)

    def matches(text: str) -> bool:
        copy = grammar.deep_copy()
        tokens = TOKENIZER.encode(text) if has_tokens else [*map(_byte_token, text.encode())]
        return bool(copy.try_consume_tokens(tokens) == len(tokens) and copy.is_accepting())

    return matches


def _byte_token(byte: int) -> int:
    return next(n for n in range(TOKENIZER.vocab_size) if TOKENIZER.bytes_of(n) == bytes([byte]))


@pytest.mark.parametrize("name", format_names())
def test_required_lets_calls_through_and_nothing_else(name: str) -> None:
    matches = matcher(name, ToolUse(TOOLS, "required"))
    write = SHAPES[name].write
    for calls in ([GOOD], [SUM]):
        assert matches(write(calls))
        parser = get_format(name).open_parser({tool.name: {} for tool in TOOLS}, holds_calls=True)
        events = parser.feed(write(calls)) + parser.finish()
        assert [event.name for event in events if isinstance(event, CallStart)] == [calls[0].name]
    for calls in ([BAD], [ODD_SUM], [UNKNOWN]):
        assert not matches(write(calls))
    assert not matches("") and not matches("Paris") and not matches("Well. " + write([GOOD]))
    assert matches(write([GOOD, SUM])) and not matches(write([GOOD, BAD]))
    assert matches(write([GOOD] * MAX_CALLS))
    assert not matches(write([GOOD] * (MAX_CALLS + 1)))


@pytest.mark.parametrize("name", format_names())
def test_one_call_where_one_is_asked_for(name: str) -> None:
    write = SHAPES[name].write
    one = matcher(name, ToolUse(TOOLS, "required", parallel=False))
    assert one(write([SUM])) and not one(write([SUM, SUM]))
    named = matcher(name, ToolUse(TOOLS, "required", name="add"))
    assert named(write([SUM])) and not named(write([GOOD])) and not named(write([SUM, SUM]))


@pytest.mark.parametrize("name", format_names())
def test_strict_tools_bind_free_answers(name: str) -> None:
    matches = matcher(name, ToolUse(TOOLS, "auto"))
    write, text = SHAPES[name].write, "It is [sunny] {now}. "
    if name == "gpt_oss":
        text = f"<|channel|>final<|message|>{text}"
    assert matches(text)
    assert matches(write([GOOD]))
    assert matches(write([ODD_SUM]))  # not strict
    assert not matches(write([BAD]))
    assert not matches(write([UNKNOWN]))
    if SHAPES[name].trigger:
        assert matches(text + write([GOOD]) + text)
        assert not matches(text + write([BAD]))
        assert not matches(text + SHAPES[name].trigger + " is how a call begins")
    assert call_grammar(SHAPES[name], ToolUse((LOOSE,)), {}) is None
    assert call_grammar(SHAPES[name], ToolUse(TOOLS, "none"), {}) is None
    assert call_grammar(SHAPES[name], ToolUse(), {}) is None


def test_thoughts_on_a_channel_come_before_the_call() -> None:
    call = SHAPES["gpt_oss"].write([GOOD])
    thought = "<|channel|>analysis<|message|>Well: {}<|end|><|start|>assistant"
    required = matcher("gpt_oss", ToolUse(TOOLS, "required"))
    assert required(thought + call)
    assert not required("<|channel|>final<|message|>No.") and not required(thought)
    free = matcher("gpt_oss", ToolUse(TOOLS, "auto"))
    assert free(thought + call) and free(f"{thought}<|channel|>final<|message|>No.")
    assert not free(thought + SHAPES["gpt_oss"].write([BAD]))


@pytest.mark.parametrize("name", ["hermes", "llama", "json", "mistral", "gpt_oss"])
def test_answer_is_calls_or_json_where_content_has_a_schema(name: str) -> None:
    matches = matcher(name, ToolUse((LOOSE, STRICT)), content=CITY)
    write, head = SHAPES[name].write, "<|channel|>final<|message|>" if name == "gpt_oss" else ""
    assert matches(write([GOOD])) and matches(head + '{"city": "Paris"}')
    assert not matches(write([BAD])) and not matches(head + '{"town": "Paris"}')
    assert not matches(head + "Paris")
    alone = matcher(name, ToolUse(), content=CITY)
    assert alone(head + '{"city": "Paris"}') and not alone(write([GOOD]))


def test_references_of_several_schemas_do_not_mix() -> None:
    def listing(kind: str) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/T"}},
            "required": ["x"],
            "$defs": {"T": {"type": kind}},
        }

    tool = Tool("f", None, listing("integer"), strict=True)
    matches = matcher("json", ToolUse((tool,)), content=listing("boolean"))
    assert matches('{"name": "f", "arguments": {"x": 1}}') and matches('{"x": true}')
    assert not matches('{"name": "f", "arguments": {"x": true}}') and not matches('{"x": 1}')


@pytest.mark.parametrize("name", ["hermes", "phi", "mistral"])
def test_vocabularies_may_spell_marks_in_letters(name: str) -> None:
    write = SHAPES[name].write
    matches = matcher(name, ToolUse(TOOLS, "required"), has_tokens=False)
    assert matches(write([GOOD, SUM])) and not matches(write([BAD]))
    free = matcher(name, ToolUse(TOOLS, "auto"), has_tokens=False)
    assert free("Well. " + write([GOOD])) and not free("Well. " + write([BAD]))


def test_functions_without_parameters_take_none() -> None:
    matches = matcher("json", ToolUse((Tool("now"),), "required"))
    assert matches('{"name": "now", "arguments": {}}')
    assert not matches('{"name": "now", "arguments": {"a": 1}}')


def test_what_a_grammar_lets_through_is_read_to_its_end() -> None:
    for name in format_names():
        calls = [GOOD, SUM]
        parser = get_format(name).open_parser({tool.name: {} for tool in TOOLS})
        events = parser.feed(SHAPES[name].write(calls)) + parser.finish()
        assert sum(isinstance(event, CallEnd) for event in events) == len(calls), name
