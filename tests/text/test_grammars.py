"""Grammars on every kind of tokenizer: the text that comes out is one of the grammar's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from small_tokenizers import byte_fallback, byte_level
from tokenizer_references import SENTENCEPIECE, load_qwen, load_rwkv, load_sentencepiece
from tokenizers import decoders, models

from mlc_llm.errors import RequestError
from mlc_llm.text.grammars.reader import GrammarReader
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.tokenizer import Tokenizer

KINDS = ["byte_level", "byte_fallback", "qwen", "rwkv", *SENTENCEPIECE]
TEXTS = [
    *("a", " a", "  two spaces", "\n", "hello hell", 'a "quoted" text', "{", '{"', '": "'),
    *("größe 🙂", "\t\n ", "<s>", "<|im_end|>", "</s> is text", "▁", "0123456789", "a\x00b"),
]


def schema_of(key: str) -> str:
    """Return a schema of objects with a text and, under `key`, a choice."""
    schema = {
        "type": "object",
        "properties": {"a b": {"type": "string", "maxLength": 3}, key: {"enum": [1, "x y"]}},
        "required": ["a b", key],
        "additionalProperties": False,
    }
    return json.dumps(schema)


def load(kind: str, directory: Path) -> Tokenizer:
    if kind == "byte_level":
        return Tokenizer(byte_level(), {})
    if kind == "byte_fallback":
        return Tokenizer(byte_fallback(), {})
    if kind in ("qwen", "rwkv"):
        return {"qwen": load_qwen, "rwkv": load_rwkv}[kind](directory)
    return load_sentencepiece(directory, kind)


class Model:
    """A tokenizer, its grammars, and answers made of noise."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        stops = sorted(tokenizer.vocabulary.special_ids)[:2]
        # The model's table has some rows that no token has.
        self.vocabulary = GrammarVocabulary(tokenizer, stops, tokenizer.vocab_size + 7)
        self.reader = GrammarReader(lambda: self.vocabulary)

    def knows(self, text: str) -> bool:
        """Say whether the vocabulary has tokens for a text."""
        tokens = self.vocabulary.encode(text)
        return b"".join(map(self.vocabulary.bytes_of, tokens)) == text.encode()

    def answer(self, kind: str, source: str, seed: int, *, continues_text: bool = False) -> str:
        """Return a text that a model without taste gives under a grammar."""
        matcher = self.reader.read(kind, source, continues_text)
        size = self.vocabulary.size
        words = np.zeros(-(-size // 32), np.uint32)
        rng = np.random.default_rng(seed)
        context = self.tokenizer.encode("hello") if continues_text else []
        stream = self.tokenizer.stream(context=context)
        text = ""
        for _ in range(300):
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:size]
            assert not bits[sorted(self.tokenizer.vocabulary.special_ids)].any()
            if bits[self.vocabulary.end_id] and rng.random() < 0.3:
                break
            bits[self.vocabulary.end_id] = 0
            if not bits.any():
                break
            token = int(rng.choice(np.flatnonzero(bits)))
            assert matcher.consume_token(token), matcher.get_error()
            text += stream.put(token)
            if matcher.is_stopped():
                break
        assert matcher.is_accepting(), text
        return text + stream.finish()


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    tokenizer = load(request.param, tmp_path_factory.mktemp("tokenizer"))
    return Model(tokenizer)


@pytest.fixture(scope="module")
def plain() -> Iterator[Model]:
    model = Model(Tokenizer(byte_level(), {}))
    yield model
    model.reader.close()


@pytest.mark.parametrize("continues_text", [False, True])
def test_answers_are_the_grammars_texts(model: Model, continues_text: bool) -> None:
    key, letter = ("größe", "é") if model.knows("größe é") else ("size", "e")
    for seed in range(3):
        text = model.answer("json_schema", schema_of(key), seed, continues_text=continues_text)
        value = json.loads(text)
        assert list(value) == ["a b", key] and value[key] in (1, "x y")
        assert len(value["a b"]) <= 3
        for pattern in ("[ab]{1,5}", " [ab]{2} x", f"({letter}|th|a b)*[.]"):
            text = model.answer("regex", pattern, seed, continues_text=continues_text)
            assert re.fullmatch(pattern, text), (pattern, text)
    model.reader.close()


def test_text_becomes_tokens_of_the_same_bytes(model: Model) -> None:
    for text in TEXTS:
        tokens = model.vocabulary.encode(text)
        assert not set(tokens) & set(model.tokenizer.vocabulary.special_ids)
        joined = b"".join(model.vocabulary.bytes_of(token) for token in tokens)
        # Where a byte has no token, its text ends before it.
        known = {model.vocabulary.bytes_of(token) for token in range(model.vocabulary.end_id)}
        if all(bytes([byte]) in known for byte in text.encode()):
            assert joined == text.encode()
        else:
            assert text.encode().startswith(joined)


def test_tokenizers_that_change_text_are_refused() -> None:
    inner = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    with pytest.raises(RequestError, match="changes the text"):
        GrammarVocabulary(Tokenizer(inner, {}), [], 2)


def test_special_tokens_begin_and_end_structures(plain: Model) -> None:
    tags = {
        "structures": [{"begin": "<|im_start|>go ", "schema": {"enum": [1]}, "end": "<|im_end|>"}],
        "triggers": ["<|im_start|>"],
    }
    matcher = plain.reader.read("structural_tag", json.dumps(tags), True)
    start = plain.tokenizer.token_to_id("<|im_start|>")
    end = plain.tokenizer.token_to_id("<|im_end|>")
    said = plain.vocabulary.encode("hello ")
    assert matcher.validate_tokens([*said, start]) == len(said) + 1
    body = plain.vocabulary.encode("go 1")
    assert matcher.validate_tokens([*said, start, *body, end, *said]) == 2 * len(said) + 6
    assert matcher.validate_tokens([*said, start, *said]) == len(said) + 1
    # Written out, the special token is text like any other.
    written = plain.vocabulary.encode("<|im_start|>hello")
    assert matcher.validate_tokens(written) == len(written)


def test_a_trigger_leaves_no_way_but_its_structures(plain: Model) -> None:
    tags = {
        "structures": [
            {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
            {"begin": "<f=b>", "schema": {"enum": ["x"]}, "end": ""},
            {"begin": "CALL ", "schema": True, "end": "!"},
        ],
        "triggers": ["<f=", "CALL"],
    }
    matcher = plain.reader.read("structural_tag", json.dumps(tags), True)

    def fitting(text: str) -> str:
        tokens = plain.vocabulary.encode(text)
        num_valid = matcher.validate_tokens(tokens)
        return b"".join(map(plain.vocabulary.bytes_of, tokens[:num_valid])).decode()

    for text in (
        "free text < f= CAL",
        'one <f=a>12</f> two <f=b>"x"<f=a>3</f>CALL [1, {"a": 2}]! end',
    ):
        assert fitting(text) == text
    assert fitting("so <f=c>") == "so <f="
    assert fitting("so <f=a>x") == "so <f=a>"
    assert fitting("so CALLED") == "so CALL"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {}}, "schema.not is a keyword that is not supported"),
        ({"properties": {"a": {"if": {}}}}, "schema.properties.a.if is a keyword"),
        ({"anyOf": [{}, {"uniqueItems": True}]}, "schema.anyOf[1].uniqueItems is a keyword"),
        ({"contains": {}}, "schema.contains is a keyword"),
        ({"nullable": True}, "schema.nullable is a keyword"),
        ({"x-guidance": {"lenient": True}}, "schema.x-guidance is a keyword"),
        ({"$anchor": "a"}, "schema.$anchor is a keyword"),
        ({"items": {"$id": "a"}}, "schema.items.$id is a keyword"),
        ({"items": [{}]}, "use prefixItems"),
        ({"type": "text"}, "schema.type must be of string, number"),
        ({"enum": []}, "schema.enum must be a list of values"),
        ({"enum": list(range(6000))}, "more than 5,000 enum values"),
        ({"minLength": -1}, "schema.minLength must be a whole number from 0"),
        ({"minItems": True}, "schema.minItems must be a whole number"),
        ({"minimum": "1"}, "schema.minimum must be a number, is '1'"),
        ({"exclusiveMinimum": True}, "schema.exclusiveMinimum must be a number"),
        ({"multipleOf": 0}, "schema.multipleOf must be a number above 0"),
        ({"required": "a"}, "schema.required must be a list of names"),
        ({"properties": []}, "schema.properties must map names"),
        ({"allOf": {}}, "schema.allOf must be a list of schemas"),
        ({"items": 3}, "schema.items must be a schema, is 3"),
        ({"pattern": 3}, "schema.pattern must be a text"),
        ({"pattern": "("}, "cannot be used"),
        ({"pattern": "a(?=b)"}, "look-around"),
        ({"format": "color"}, "schema.format 'color' is not supported; known are date-time"),
        ({"type": "integer", "format": "date"}, "says nothing of values of type 'integer'"),
        ({"$ref": "https://example.com/a"}, "schema.$ref must point into the schema"),
        ({"$ref": "#/$defs/a"}, "'#/$defs/a' points to no schema"),
        ({"$ref": "#/enum/0", "enum": [{}]}, "points to no schema"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "use draft 2020-12"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"minimum": 3, "maximum": 2, "type": "integer"}, "cannot be used"),
        (False, "the schema is false"),
        ([], "schema must be a schema"),
        ({"$ref": "#"}, "the loop of $ref '#' never ends"),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "never ends"),
        (
            {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
            "the loop of $ref '#/$defs/a' never ends",
        ),
        # Nothing must come to these, but what does would never get on.
        (
            {"$defs": {"a": {"$ref": "#/$defs/a"}}, "properties": {"b": {"$ref": "#/$defs/a"}}},
            "the loop of $ref '#/$defs/a' never ends",
        ),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/anyOf/1"}]}, "'#/anyOf/1' never ends"),
        (
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"a": {"$ref": "#/items"}},
                    "required": ["a"],
                },
            },
            "the loop of $ref '#/items' never ends",
        ),
        (
            {"type": "object", "required": ["a"], "additionalProperties": {"$ref": "#"}},
            "the loop of $ref '#' never ends",
        ),
        (
            {"type": "object", "minProperties": 1, "additionalProperties": {"$ref": "#"}},
            "the loop of $ref '#' never ends",
        ),
    ],
)
def test_what_is_not_enforced_is_refused_by_name(plain: Model, schema: object, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        plain.reader.read("json_schema", json.dumps(schema), False)
    assert words in str(caught.value) and caught.value.param == "response_format"


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"title": "t", "description": "d", "default": 1, "examples": [], "$comment": "c"},
        {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "urn:a", "type": "null"},
        {"type": "array", "uniqueItems": False, "maxItems": 1},
        {"definitions": {"a/b": {"type": "null"}}, "$ref": "#/definitions/a~1b"},
        {"$ref": "#/properties/a", "properties": {"a": {"type": "null"}}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
        {"anyOf": [{"type": "array", "minItems": 1, "items": {"$ref": "#"}}, {"type": "null"}]},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
        {"$defs": {"unused": {"$ref": "#/$defs/unused"}}, "type": "null"},
        {
            "discriminator": {"propertyName": "k"},
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": kind}}, "required": ["k"]}
                for kind in ("a", "b")
            ],
        },
    ],
)
def test_what_says_nothing_is_taken(plain: Model, schema: object) -> None:
    json.loads(plain.answer("json_schema", json.dumps(schema), seed=1))


def test_random_schemas_never_raise_anything_else(plain: Model) -> None:
    rng = np.random.default_rng(5)
    names = ["type", "$ref", "enum", "items", "anyOf", "properties", "required", "minItems"]
    names += ["pattern", "not", "const", "$defs", "additionalProperties", "allOf", "a"]
    scalars = [None, True, -1, 2, 0.5, "", "#", "#/$defs/a", "string", "object", "array", "(", []]

    def value(depth: int) -> object:
        roll = rng.random()
        if depth == 0 or roll < 0.3:
            return scalars[rng.integers(len(scalars))]
        if roll < 0.45:
            return [value(depth - 1) for _ in range(rng.integers(3))]
        return {names[rng.integers(len(names))]: value(depth - 1) for _ in range(rng.integers(4))}

    num_taken = 0
    for _ in range(400):
        try:
            plain.reader.read("json_schema", json.dumps(value(4)), False)
            num_taken += 1
        except RequestError as error:
            assert error.param == "response_format" and len(str(error)) < 1000
    assert num_taken > 20


def test_the_reader_goes_on_after_its_process_was_stopped(plain: Model) -> None:
    slow = {"type": "integer", "multipleOf": 999983}
    with pytest.raises(RequestError, match="takes too long to read"):
        plain.reader.read("json_schema", json.dumps(slow), False)
    rules = "\n".join(f"r{n}: r{n + 1} r{n + 1}" for n in range(3000))
    with pytest.raises(RequestError, match="nested too deeply"):
        plain.reader.read("lark", f'start: r0\n{rules}\nr3000: "a"', False)
    assert json.loads(plain.answer("json_schema", '{"enum": [5]}', seed=0)) == 5
