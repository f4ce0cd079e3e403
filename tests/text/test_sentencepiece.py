"""SentencePiece models: ids as the library gives them, settings followed, bad files."""

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizer_references import (
    DIRECTORY,
    SENTENCEPIECE,
    load_sentencepiece,
    load_with,
    read_reference,
)

from mlc_llm.errors import CorruptFile, MlcError, UnsupportedModel
from mlc_llm.text.formats.sentencepiece_file import (
    ModelType,
    PieceType,
    looks_like_sentencepiece,
    read_sentencepiece,
)
from mlc_llm.text.tokenizer import Tokenizer, detect_tokenizer_info

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_ids_equal_those_of_the_library(tmp_path: Path, name: str) -> None:
    tokenizer = load_sentencepiece(tmp_path, name)
    reference = read_reference(name)
    model = read_sentencepiece(tmp_path / "tokenizer.model")
    defined = {piece.text for piece in model.pieces if piece.type is PieceType.USER_DEFINED}
    # The known difference: a text that is nothing but one defined token of a BPE model gets no
    # space before it.
    has_rule = model.model_type is ModelType.BPE and model.add_dummy_prefix
    strips = model.remove_extra_whitespaces
    alone = {
        text
        for text in reference.texts
        if has_rule and (text.strip(" ") if strips else text) in defined
    }
    wrong = [
        text
        for text, ids in zip(reference.texts, reference.ids, strict=True)
        if tokenizer.encode(text) != ids and text not in alone
    ]
    assert not wrong
    assert len(reference.texts) > 180
    assert len(alone) < 5
    for text in alone:
        ids = reference.ids[reference.texts.index(text)]
        assert tokenizer.encode(text) == ids[1:]


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_text_equals_that_of_the_library(tmp_path: Path, name: str) -> None:
    tokenizer = load_sentencepiece(tmp_path, name)
    reference = read_reference(name)
    unknown = tokenizer.token_to_id("<unk>")
    removes = read_sentencepiece(tmp_path / "tokenizer.model").remove_extra_whitespaces
    num_compared = 0
    for ids, expected in zip(reference.ids, reference.decoded, strict=True):
        if unknown in ids:
            continue  # the library writes a sign for it, here it is a special token
        found = tokenizer.decode(ids)
        if removes:  # such models drop more than one space, but not always
            found, expected = found.lstrip(" "), expected.lstrip(" ")
        assert found == expected
        num_compared += 1
    assert num_compared > 30


def test_tokenizer_json_made_from_it_is_the_same_tokenizer(tmp_path: Path) -> None:
    made = load_sentencepiece(tmp_path / "made", "bpe_defined")
    name, content = made.to_file()
    again = load_with(tmp_path / "again", {name: content})
    for text in read_reference("bpe_defined").texts:
        assert again.encode(text) == made.encode(text)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bpe_bytes", ("byte_fallback", True, True)),
        ("bpe_no_prefix_defined", ("byte_fallback", False, False)),
        ("unigram_nfkc", ("byte_fallback", True, True)),
    ],
)
def test_tokenizer_info(tmp_path: Path, name: str, expected: tuple[str, bool, bool]) -> None:
    import json

    content = json.loads(load_sentencepiece(tmp_path, name).to_file()[1])
    assert tuple(detect_tokenizer_info(content).values()) == expected


def test_special_tokens_come_from_the_file(tmp_path: Path) -> None:
    tokenizer = load_sentencepiece(tmp_path, "bpe_bytes")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.derived_settings == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    assert tokenizer.bos_prefix == [1]
    assert tokenizer.encode("a", add_special_tokens=True) == [1, *tokenizer.encode("a")]
    assert tokenizer.encode("<s>")[0] == 1
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 2]) == "a b"


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"tokenizer_class": "BaichuanTokenizer"}, [], []),
        ({"tokenizer_class": "LlamaTokenizer"}, [1], []),
    ],
)
def test_settings_say_what_goes_around_a_text(
    tmp_path: Path, settings: dict[str, Any], first: list[int], last: list[int]
) -> None:
    tokenizer = load_sentencepiece(tmp_path, "bpe_bytes", **settings)
    ids = tokenizer.encode("a")
    assert tokenizer.encode("a", add_special_tokens=True) == [*first, *ids, *last]
    assert tokenizer.bos_prefix == first


def test_space_goes_before_every_stretch_of_text_or_the_first(tmp_path: Path) -> None:
    def pieces(name: str, **settings: Any) -> list[str | None]:
        tokenizer = load_sentencepiece(tmp_path / name, "bpe_bytes", **settings)
        return [tokenizer.id_to_token(token_id) for token_id in tokenizer.encode("x<s>x")]

    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    assert pieces("all") == [mark, "x", "<s>", mark, "x"]
    assert pieces("first", legacy=False) == [mark, "x", "<s>", "x"]
    assert pieces("none", add_prefix_space=False) == ["x", "<s>", "x"]


def field(number: int, value: bytes | int | float) -> bytes:
    """Return a field of a protocol buffer."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def make_model(
    pieces: list[tuple[str, float, int]],
    trainer: dict[int, int] | None = None,
    normalizer: dict[int, bytes | int] | None = None,
    extra: bytes = b"",
) -> bytes:
    """Return a file with pieces of text, score and type."""
    content = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
        for text, score, kind in pieces
    )
    content += field(2, b"".join(field(n, v) for n, v in (trainer or {3: 2}).items()))
    content += field(3, b"".join(field(n, v) for n, v in (normalizer or {4: 0}).items()))
    return content + extra


BASE = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
LETTERS = [(letter, -float(n), NORMAL) for n, letter in enumerate("\u2581abc", 1)]


def load(directory: Path, content: bytes, **settings: Any) -> Tokenizer:
    return load_with(directory, {"tokenizer.model": content}, **settings)


def test_fields_of_later_releases_are_skipped(tmp_path: Path) -> None:
    more = field(4, b"self test") + field(99, 7) + field(98, 1.5) + varint(97 << 3 | 1) + bytes(8)
    tokenizer = load(tmp_path, make_model([*BASE, *LETTERS], extra=more))
    assert tokenizer.encode("ab") == [3, 4, 5]
    assert tokenizer.vocab_size == 7


def test_a_special_token_may_be_missing(tmp_path: Path) -> None:
    # int32 of -1, as protocol buffers store it
    none = (1 << 64) - 1
    tokenizer = load(tmp_path, make_model([*BASE, *LETTERS], {3: 2, 41: none, 42: 2}))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.bos_prefix) == (None, "</s>", [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_model([*BASE, *LETTERS], {3: 3}), "cuts text by words; unigram and BPE"),
        (make_model([*BASE, *LETTERS], {3: 4}), "cuts text by chars"),
        (make_model([*BASE, *LETTERS], {3: 2, 24: 1}), "treat_whitespace_as_suffix"),
        (make_model([*BASE, *LETTERS], None, {5: 0}), "escape_whitespaces"),
        (make_model([*BASE, *LETTERS], extra=field(5, field(2, b"map"))), "denormalizer_spec"),
        (make_model([*BASE, *LETTERS, ("d", -1.0, UNUSED)], {3: 1}), "not to be used"),
    ],
)
def test_unsupported_models_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        load(tmp_path, content)


def test_classes_with_other_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"XLMRobertaTokenizer gives .* other ids"):
        load_sentencepiece(tmp_path, "unigram_nfkc", tokenizer_class="XLMRobertaTokenizerFast")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no vocabulary"),
        (b"\x0a", "inside a number"),
        (b"\x0a\x7fabc", "goes on to"),
        (b"\x0b", "wire type 3"),
        (b"\xff" * 12, "too long"),
        (make_model([]), "holds no vocabulary"),
        (make_model(LETTERS), "0 pieces for unknown text"),
        (make_model([*BASE, *LETTERS, ("u", 0.0, UNKNOWN)]), "2 pieces for unknown text"),
        (make_model([*BASE, *LETTERS, ("a", 0.0, NORMAL)]), r"piece 7 \('a'\) is there twice"),
        (make_model([*BASE, *LETTERS, ("", 0.0, NORMAL)]), "piece 7 is empty"),
        (make_model([*BASE, *LETTERS, ("x", float("nan"), NORMAL)]), "has score nan"),
        (make_model([*BASE, *LETTERS, ("x", 0.0, 9)]), "9 is not a valid PieceType"),
        (make_model([*BASE, *LETTERS], {3: 7}), "7 is not a valid ModelType"),
        (make_model([*BASE, *LETTERS], {3: 2, 41: 70}), "bos_token is piece 70"),
        (field(1, field(1, b"\xff")) + make_model(BASE), "utf-8"),
        (make_model([*BASE, *LETTERS], None, {2: b"no map"}), "damaged map of characters"),
    ],
)
def test_damaged_models_are_corrupt_files(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        load(tmp_path, content)


@pytest.mark.parametrize("name", ["bpe_defined", "unigram_bytes_defined"])
def test_random_damage_never_escapes(tmp_path: Path, name: str) -> None:
    whole = (DIRECTORY / f"{name}.model").read_bytes()
    assert looks_like_sentencepiece(whole)
    draw = random.Random(4)
    num_refused = 0
    for _ in range(150):
        content = bytearray(whole)
        if draw.random() < 0.4:
            del content[draw.randrange(len(content)) :]
        for _ in range(draw.randrange(1, 4) if content else 0):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        try:
            tokenizer = load(tmp_path, bytes(content))
        except MlcError:
            num_refused += 1
        else:
            tokenizer.decode(tokenizer.encode("some text"))
    assert num_refused > 50
