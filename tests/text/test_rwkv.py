"""RWKV's vocabulary: the longest token that fits, in both kinds of file."""

import random
from pathlib import Path

import pytest
from tokenizer_references import DIRECTORY, load_rwkv, load_with, read_reference

from mlc_llm.errors import CorruptFile, MlcError
from mlc_llm.text.formats.rwkv import END_OF_TEXT, RWKVVocabulary, read_vocabulary

LINES = (DIRECTORY / "rwkv_vocab_small.txt").read_text(encoding="utf-8")


def test_ids_equal_those_of_its_authors(tmp_path: Path) -> None:
    tokenizer = load_rwkv(tmp_path)
    reference = read_reference("rwkv")
    for text, ids in zip(reference.texts, reference.ids, strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert len(reference.texts) > 180


def test_mlc_file_holds_the_same(tmp_path: Path) -> None:
    tokenizer = load_rwkv(tmp_path)
    name, content = tokenizer.to_file()
    assert name == "tokenizer_model"
    again = load_with(tmp_path / "mlc", {name: content})
    for text in read_reference("rwkv").texts:
        assert again.encode(text) == tokenizer.encode(text)
    assert again.origin == tmp_path / "mlc" / "tokenizer_model"
    assert again.to_file()[1] == content


def test_shorter_encodings_of_messagepack_are_read(tmp_path: Path) -> None:
    tokens = {n + 1: bytes([n]) for n in range(256)} | {300: b"ab" * 200, 70_000: "é".encode()}
    content = b"\xde" + len(tokens).to_bytes(2, "big")
    for token_id, token in tokens.items():
        if token_id < 128:
            content += bytes([token_id])
        elif token_id < 256:
            content += b"\xcc" + bytes([token_id])
        elif token_id < 1 << 16:
            content += b"\xcd" + token_id.to_bytes(2, "big")
        else:
            content += b"\xcf" + token_id.to_bytes(8, "big")
        if len(token) < 2 and token_id % 2:
            content += bytes([0xA0 + len(token)]) + token  # a text instead of bytes
        elif len(token) < 256:
            content += b"\xc4" + bytes([len(token)]) + token
        else:
            content += b"\xc5" + len(token).to_bytes(2, "big") + token
    (tmp_path / "tokenizer_model").write_bytes(content)
    assert read_vocabulary(tmp_path / "tokenizer_model") == tokens


def test_end_of_text_has_id_0_and_no_text(tmp_path: Path) -> None:
    tokenizer = load_rwkv(tmp_path)
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.encode(f"a{END_OF_TEXT}b") == [98, 0, 99]
    assert tokenizer.decode([98, 0, 99]) == "ab"
    assert tokenizer.decode([98, 0, 99], skip_special_tokens=False) == f"a{END_OF_TEXT}b"
    assert tokenizer.bos_prefix == []
    assert tokenizer.encode("a", add_special_tokens=True) == [98]
    assert tokenizer.encode_whole("a") == ([98], 0)


def test_added_tokens_of_the_settings(tmp_path: Path) -> None:
    added = {"0": {"content": "<s>", "special": True}}
    tokenizer = load_rwkv(tmp_path, added_tokens_decoder=added, eos_token="<s>")
    assert tokenizer.encode("a<s>") == [98, 0]
    assert tokenizer.token_to_id(END_OF_TEXT) is None
    with pytest.raises(CorruptFile, match="id 5 is an added token's and another's"):
        load_rwkv(tmp_path, added_tokens_decoder={"5": "<s>"})


def test_tokens_that_are_no_text_have_a_spelling(tmp_path: Path) -> None:
    tokenizer = load_rwkv(tmp_path)
    assert tokenizer.id_to_token(1 + 0xE9) == "\\xe9"
    assert tokenizer.bytes_of(1 + 0xE9) == b"\xe9"
    assert tokenizer.id_to_token(10**6) is None
    assert tokenizer.bytes_of(10**6) == b""


def test_a_long_text_takes_time_in_proportion(tmp_path: Path) -> None:
    vocabulary = RWKVVocabulary(read_vocabulary(DIRECTORY / "rwkv_vocab_small.txt"))
    text = read_reference("rwkv").texts[14] * 200
    ids, _ = vocabulary.encode(text, False)
    assert vocabulary.decode(ids, True) == text
    assert len(ids) < len(text.encode())


def with_lines(*lines: str) -> bytes:
    return (LINES + "\n".join(lines) + "\n").encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rwkv_vocab_x.txt", b"", "no token for byte 0x00"),
        ("rwkv_vocab_x.txt", with_lines("900 'abc' 4"), "not an id, a token and its length"),
        ("rwkv_vocab_x.txt", with_lines("900 5 1"), "not an id, a token and its length"),
        ("rwkv_vocab_x.txt", with_lines("900 'abc"), "not a vocabulary of RWKV"),
        ("rwkv_vocab_x.txt", with_lines("x 'abc' 3"), "invalid literal"),
        ("rwkv_vocab_x.txt", with_lines("-1 'abc' 3"), "has id -1"),
        ("rwkv_vocab_x.txt", with_lines("99999999999 'abc' 3"), "has id 99999999999"),
        ("rwkv_vocab_x.txt", with_lines("900 __import__('os') 2"), "malformed"),
        ("rwkv_vocab_x.txt", with_lines("900 'a' 1"), "token twice"),
        ("rwkv_vocab_x.txt", with_lines("900 '' 0"), "an empty one"),
        ("rwkv_vocab_x.txt", b"\xff\xfe", "not a vocabulary of RWKV"),
        ("tokenizer_model", b"", "inside a value"),
        ("tokenizer_model", b"\x90", "should be a map"),
        ("tokenizer_model", b"\x81\xc0\xc4\x00", "should be an id"),
        ("tokenizer_model", b"\x81\x01\x01", "should be bytes"),
        ("tokenizer_model", b"\xdf\xff\xff\xff\xff\x01", "inside a value"),
        ("tokenizer_model", b"\x80\x80", "goes on after its end"),
        ("tokenizer_model", b"\x80", "no token for byte 0x00"),
    ],
)
def test_damaged_files_are_corrupt(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        load_with(tmp_path, {name: content})


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    whole = load_rwkv(tmp_path / "whole").to_file()[1]
    draw = random.Random(2)
    num_refused = 0
    for _ in range(200):
        content = bytearray(whole)
        if draw.random() < 0.4:
            del content[draw.randrange(len(content)) :]
        for _ in range(draw.randrange(1, 4) if content else 0):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        try:
            tokenizer = load_with(tmp_path / "damaged", {"tokenizer_model": bytes(content)})
        except MlcError:
            num_refused += 1
        else:
            tokenizer.decode(tokenizer.encode("some text"))
    assert num_refused > 60
