"""Every keyword of JSON Schema is enforced, without effect, or refused: nothing is ignored.

What is enforced is read from docs/structured_output.md, which keywords there are from the published
meta-schemas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema_specifications import REGISTRY
from random_schemas import random_schemas
from schema_judge import find_error

from mlc_llm.errors import RequestError
from mlc_llm.text.grammars.schema import ANNOTATIONS, FORMATS, check_schema

NUM_SCHEMAS, SEED = 500, 1  # those of acceptance/test_structured_output.py
PAGE = Path(__file__).resolve().parents[2] / "docs" / "structured_output.md"
META_SCHEMAS = (
    *(
        f"https://json-schema.org/draft/{draft}/{name}"
        for draft, names in (
            ("2020-12", ("core", "applicator", "unevaluated", "validation", "format-annotation")),
            ("2020-12", ("meta-data", "content")),
            ("2019-09", ("core", "applicator", "validation", "format", "meta-data", "content")),
        )
        for name in ("schema", *(f"meta/{name}" for name in names))
    ),
    "http://json-schema.org/draft-07/schema#",
)
AT_THE_TOP = {"$schema", "$id"}  # taken there, since they say nothing of values


def claims() -> tuple[set[str], set[str]]:
    """Return the keywords and the formats that the page says are enforced."""
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| any value |") : text.index("`title`, `description`")]
    formats = re.search(r"`format`: ([a-z0-9, -]+)", table)
    assert formats is not None
    return set(re.findall(r"`([^`]+)`", table)), set(formats[1].strip().split(", "))


def annotations() -> set[str]:
    """Return the keywords that the page says have no effect."""
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("`title`, `description`")
    return set(re.findall(r"`([^`]+)`", text[start : text.index("have no effect", start)]))


def published() -> set[str]:
    """Return all keywords of drafts 7 to 2020-12."""
    return {name for uri in META_SCHEMAS for name in REGISTRY.contents(uri).get("properties", {})}


REFUSED = sorted(published() - claims()[0] - annotations() - AT_THE_TOP)


def keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keywords of a schema and of those in it."""
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        yield name, value
        parts: Any = ()
        if name in ("properties", "patternProperties", "$defs", "definitions"):
            parts = value.values()
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            parts = value
        elif name in ("items", "additionalProperties"):
            parts = (value,)
        for part in parts:
            yield from keywords(part)


def test_what_is_claimed_is_in_the_random_schemas() -> None:
    found: dict[str, int] = {}
    formats: dict[str, int] = {}
    for schema in random_schemas(NUM_SCHEMAS, seed=SEED):
        mine = list(keywords(schema))
        for name in {name for name, _ in mine}:
            found[name] = found.get(name, 0) + 1
        for form in {value for name, value in mine if name == "format"}:
            formats[form] = formats.get(form, 0) + 1
    enforced, enforced_formats = claims()
    assert {name for name in enforced | annotations() if found.get(name, 0) < 5} == set()
    assert {form for form in enforced_formats if formats.get(form, 0) < 3} == set()
    assert set(formats) == enforced_formats == set(FORMATS)
    assert annotations() == ANNOTATIONS
    assert set(found) <= enforced | annotations() | AT_THE_TOP


FORMAT_SAMPLES = {
    "date-time": ("2024-02-29T23:59:60.5+01:30", "2023-02-29T00:00:00Z"),
    "time": ("10:00:00Z", "10:00:00"),
    "date": ("2024-12-31", "2024-13-01"),
    "duration": ("P1Y2M3DT4H5M6S", "P1H"),
    "email": ("a@b", "a"),
    "hostname": ("a-b.example", "a-.example"),
    "ipv4": ("1.2.3.4", "1.2.3.256"),
    "ipv6": ("::1", "1:2"),
    "uri": ("https://example.com/a?b=[1]#c", "example com"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000", "123e4567"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_judge_knows_every_format(form: str) -> None:
    right, wrong = FORMAT_SAMPLES[form]
    schema = {"type": "string", "format": form}
    assert find_error(schema, right) is None and find_error(schema, wrong) is not None


def test_there_are_keywords_to_refuse() -> None:
    assert {"not", "if", "contains", "uniqueItems", "$dynamicRef", "dependencies"} <= set(REFUSED)
    assert {"$recursiveRef", "contentEncoding", "unevaluatedItems"} <= set(REFUSED)
    assert claims()[0] <= published()  # the page names no keyword that there is not


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(
    ("place", "wrap"),
    [
        ("schema", lambda part: part),
        ("schema.properties.a", lambda part: {"type": "object", "properties": {"a": part}}),
        ("schema.anyOf[1].items", lambda part: {"anyOf": [{}, {"type": "array", "items": part}]}),
        ("schema.$defs.d", lambda part: {"type": "null", "$defs": {"d": part}}),
    ],
    ids=["top", "property", "item", "definition"],
)
def test_what_is_not_claimed_is_refused_by_name(name: str, place: str, wrap: Any) -> None:
    values: list[Any] = [True, {}, [], "a", 1]
    for value in values:
        with pytest.raises(RequestError) as caught:
            check_schema(wrap({name: value}))
        assert str(caught.value) == f"{place}.{name} is a keyword that is not supported"


@pytest.mark.parametrize("name", sorted(AT_THE_TOP))
def test_what_names_a_schema_is_refused_inside_of_it(name: str) -> None:
    value = "https://json-schema.org/draft/2020-12/schema"
    assert check_schema({name: value, "type": "null"}) == {"type": "null"}
    with pytest.raises(RequestError, match="is a keyword that is not supported"):
        check_schema({"items": {name: value}})
