"""BERT's tokenizer from `vocab.txt` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.text.tokenizer import Tokenizer

TOKENS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "##s", "un", "##believ"),
    *("##able", "!", ",", "cafe", "caf\u00e9", "\u4e2d", "\u6587", "##\u6587"),
)
IDS = {token: token_id for token_id, token in enumerate(TOKENS)}


def make(directory: Path, tokens: tuple[str, ...] = TOKENS, **settings: Any) -> Tokenizer:
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(directory)


def ids_of(*tokens: str) -> list[int]:
    return [IDS[token] for token in tokens]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello", ["hello"]),
        ("hellos, unbelievable!", ["hello", "##s", ",", "un", "##believ", "##able", "!"]),
        ("CAF\u00c9", ["cafe"]),
        ("\u4e2d\u6587", ["\u4e2d", "\u6587"]),
        ("hello nonsense\t hello\u0000", ["hello", "[UNK]", "hello"]),
        ("hello [MASK]!", ["hello", "[MASK]", "!"]),
        ("un" * 51, ["[UNK]"]),
        ("", []),
    ],
)
def test_words_are_cut_and_wrapped(tmp_path: Path, text: str, tokens: list[str]) -> None:
    tokenizer = make(tmp_path)
    assert tokenizer.encode(text) == ids_of(*tokens)
    wrapped = tokenizer.encode(text, add_special_tokens=True)
    assert wrapped == ids_of("[CLS]", *tokens, "[SEP]")
    assert tokenizer.encode_whole(text) == (wrapped, 1 if tokens else 2)


def test_settings_are_followed(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, do_lower_case=False, tokenize_chinese_chars=False)
    assert tokenizer.encode("Hello caf\u00e9") == ids_of("Hello", "caf\u00e9")
    assert tokenizer.encode("\u4e2d\u6587") == ids_of("\u4e2d", "##\u6587")
    assert make(tmp_path, strip_accents=False).encode("caf\u00e9") == ids_of("caf\u00e9")
    renamed = tuple({"[CLS]": "<s>", "[SEP]": "</s>"}.get(token, token) for token in TOKENS)
    other = make(tmp_path, renamed, cls_token={"content": "<s>"}, sep_token="</s>")
    assert other.encode("hello", add_special_tokens=True) == ids_of("[CLS]", "hello", "[SEP]")


def test_it_becomes_a_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, tokenizer_class="BertTokenizer")
    text = "Hellos unbelievable [MASK] caf\u00e9"
    expected = tokenizer.encode(text, add_special_tokens=True)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_file()[1])
    assert Tokenizer.load(tmp_path).encode(text, add_special_tokens=True) == expected
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.decode(ids_of("[CLS]", "un", "##believ", "##able", "[SEP]")) == "unbelievable"


def test_windows_line_ends_and_repeated_tokens(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join((*TOKENS, "hello", "")).encode())
    assert Tokenizer.load(tmp_path).encode("hello") == [len(TOKENS)]


def test_what_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'MPNetTokenizer' cannot be built"):
        make(tmp_path, tokenizer_class="MPNetTokenizer")
    with pytest.raises(CorruptFile, match=r"no token '\[SEP\]' \(sep_token\)"):
        make(tmp_path, tuple(token for token in TOKENS if token != "[SEP]"))
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptFile, match="not UTF-8"):
        Tokenizer.load(tmp_path)
