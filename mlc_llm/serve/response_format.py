"""From `response_format` to the grammar that the engine holds answers to."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.errors import OptionError
from mlc_llm.serve.errors import field_error
from mlc_llm.serve.protocol.response_format import (
    ChoiceFormat,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
    Schema,
    StructuralTagFormat,
    TextFormat,
)
from mlc_llm.text.grammars.schema import check_size


def grammar_of(response_format: ResponseFormat | None) -> GrammarSpec | None:
    """Return the grammar of a response format, None where any text will do.

    Only sizes are checked here; what is in it is looked at when it is compiled. Raises
    RequestError.
    """
    if response_format is None or isinstance(response_format, TextFormat):
        return None
    if isinstance(response_format, JsonObjectFormat):
        schema = response_format.schema_
        if schema is None:
            return GrammarSpec("json_object")
        return GrammarSpec("json_schema", schema if isinstance(schema, str) else _write(schema))
    if isinstance(response_format, JsonSchemaFormat):
        return GrammarSpec("json_schema", _write(response_format.json_schema.schema_))
    if isinstance(response_format, GrammarFormat):
        grammar = response_format.grammar
        return GrammarSpec("ebnf" if "::=" in grammar else "lark", grammar)
    if isinstance(response_format, RegexFormat):
        return GrammarSpec("regex", response_format.regex)
    if isinstance(response_format, ChoiceFormat):
        return GrammarSpec("choice", json.dumps(response_format.choice, ensure_ascii=False))
    assert isinstance(response_format, StructuralTagFormat)
    structures = [
        {"begin": part.begin, "schema": part.schema_, "end": part.end}
        for part in response_format.structures
    ]
    for structure in structures:
        check_size(structure["schema"])
    tags = {"structures": structures, "triggers": response_format.triggers}
    return GrammarSpec("structural_tag", json.dumps(tags, ensure_ascii=False))


def read_grammar(text: str) -> GrammarSpec | None:
    """Return the grammar of a format that a person wrote: the name of one, or JSON.

    Raises OptionError for what is no format, RequestError as `grammar_of` does.
    """
    value: Any = {"type": text}
    try:
        if text.startswith("{"):
            value = json.loads(text)
        response_format: ResponseFormat = TypeAdapter(ResponseFormat).validate_python(value)
    except (ValueError, RecursionError) as error:
        reason = field_error(error, value) if isinstance(error, ValidationError) else error
        raise OptionError(
            f"response_format is neither text, json_object nor such a format in JSON: {reason}"
        ) from None
    return grammar_of(response_format)


def _write(schema: Schema) -> str:
    check_size(schema)  # first: writing what is huge would hold up the event loop
    return json.dumps(schema, ensure_ascii=False)
