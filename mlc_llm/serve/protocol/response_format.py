"""`response_format`: which texts an answer may be. What grammars mean is not known here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr

from mlc_llm.serve.protocol.base import RequestBody

MAX_CHOICES = 1_000
_MAX_STRUCTURES = 256

Schema = dict[str, Any] | StrictBool
Text = Annotated[StrictStr, Field(min_length=1)]


class TextFormat(RequestBody):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(RequestBody):
    """A JSON object; beyond OpenAI's, one that a schema describes, as JSON or as its text."""

    type: Literal["json_object"]
    schema_: Schema | StrictStr | None = Field(None, alias="schema")


class JsonSchema(RequestBody):
    """A JSON Schema by name. It is enforced whatever `strict` says; name and description are not
    shown to the model."""

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    schema_: Schema = Field(alias="schema")
    strict: StrictBool | None = None


class JsonSchemaFormat(RequestBody):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class GrammarFormat(RequestBody):
    """A text of a grammar, in Lark's notation or, with `root ::=`, in GBNF."""

    type: Literal["grammar"]
    grammar: Text


class RegexFormat(RequestBody):
    """A text that an expression matches, from its first to its last character."""

    type: Literal["regex"]
    regex: Text


class ChoiceFormat(RequestBody):
    """One of some texts."""

    type: Literal["choice"]
    choice: Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]


class Structure(RequestBody):
    """A part of an answer: a text, JSON that the schema describes, a text."""

    begin: Text
    schema_: Schema = Field(alias="schema")
    end: StrictStr


class StructuralTagFormat(RequestBody):
    """Any text, in which each trigger begins one of the structures whose `begin` it begins."""

    type: Literal["structural_tag"]
    structures: Annotated[list[Structure], Field(min_length=1, max_length=_MAX_STRUCTURES)]
    triggers: Annotated[list[Text], Field(min_length=1, max_length=_MAX_STRUCTURES)]


ResponseFormat = Annotated[
    TextFormat
    | JsonObjectFormat
    | JsonSchemaFormat
    | GrammarFormat
    | RegexFormat
    | ChoiceFormat
    | StructuralTagFormat,
    Field(discriminator="type"),
]
