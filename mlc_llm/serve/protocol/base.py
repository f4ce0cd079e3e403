"""What the types of requests and answers share: strict numbers, unknown fields, left-out fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    StrictStr,
    model_serializer,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mlc_llm.errors import RequestError

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_LEN = 1024  # characters
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIAS = 1024  # as SamplingParams allows
_MAX_NAME_LEN = 80


class RequestBody(BaseModel):
    """A part of a request: fields it does not have are refused by name."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Answer(BaseModel):
    """A part of an answer: a field that was not set and is None is left out when written."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        given = self.model_fields_set
        return {name: value for name, value in values.items() if value is not None or name in given}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # The description is that of the fields, not of the function that writes them.
        fields = {key: value for key, value in schema.items() if key != "serialization"}
        return handler(fields)


def _read_stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _read_token_keys(value: Any) -> Any:
    """Return a mapping whose keys are token ids; JSON has them as text."""
    if not isinstance(value, dict):
        return value
    bias = {}
    for key, number in value.items():
        digits = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
        is_id = isinstance(digits, str) and digits.isascii() and digits.isdigit()
        if not is_id or len(digits) > 10 or int(digits) > MAX_INT32:
            raise RequestError(
                f"logit_bias has the key {str(key)[:_MAX_NAME_LEN]!r}; keys are token ids",
                "logit_bias",
            )
        bias[int(digits)] = number
    return bias


def _be_false(value: Any) -> Any:
    if value is not False:
        raise ValueError("Input should be false")
    return value


def whole(low: int, high: int = MAX_INT32) -> Any:
    """Return the annotation of a whole number within bounds; truth values are none."""
    return Field(strict=True, ge=low, le=high)


def number(low: float, high: float) -> Any:
    """Return the annotation of a finite number within bounds; truth values are none."""
    return Field(strict=True, ge=low, le=high, allow_inf_nan=False)


# In Python, 0 equals false.
OnlyFalse = Annotated[Literal[False], BeforeValidator(_be_false)]
Int = Annotated[int, Field(strict=True, ge=0, le=MAX_INT32)]
StopString = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_LEN)]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_read_stop, json_schema_input_type=StopString | list[StopString]),
]
Bias = Annotated[float, number(-100, 100)]
LogitBias = Annotated[
    dict[int, Bias], Field(max_length=MAX_LOGIT_BIAS), BeforeValidator(_read_token_keys)
]
