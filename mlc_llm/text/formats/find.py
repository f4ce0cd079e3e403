"""Finds a directory's tokenizer among the files it may be in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from mlc_llm.errors import CorruptFile, ModelNotFound
from mlc_llm.text.formats import FILE_PATTERNS
from mlc_llm.text.formats.added import added_tokens, build_with, build_with_added, lacking_tokens
from mlc_llm.text.formats.content import parse
from mlc_llm.text.formats.rwkv import (
    END_OF_TEXT,
    MSGPACK_NAME,
    TEXT_PATTERN,
    RWKVVocabulary,
    read_vocabulary,
)
from mlc_llm.text.formats.sentencepiece import sentencepiece_content
from mlc_llm.text.formats.tiktoken_file import (
    looks_like_tiktoken,
    tekken_content,
    tiktoken_content,
)
from mlc_llm.text.formats.two_files import MERGES_NAME, VOCAB_NAME, two_files_content
from mlc_llm.text.vocabulary import TOKENIZER_NAME, HuggingFaceVocabulary, Vocabulary
from mlc_llm.text.wordpiece import VOCAB_NAME as WORDPIECE_NAME
from mlc_llm.text.wordpiece import build_wordpiece


@dataclass(frozen=True)
class Found:
    """A vocabulary, the file it was in, and what that adds to the settings.

    is_whole: the file says all there is to it, so that copying it keeps the tokenizer.
    """

    vocabulary: Vocabulary
    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = False


def find_vocabulary(directory: Path, settings: Mapping[str, Any]) -> Found:
    """Read the tokenizer of a directory, with the settings of its tokenizer_config.json.

    Raises ModelNotFound where no tokenizer is, CorruptFile where it is damaged and UnsupportedModel
    for kinds of vocabulary that we do not know.
    """
    for pattern in FILE_PATTERNS:
        for path in sorted(directory.glob(pattern)):
            if path.is_file() and (path.name != VOCAB_NAME or _has_merges(directory)):
                return _read(path, settings)
    raise ModelNotFound(
        f"{directory} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json with "
        "merges.txt, *.tiktoken, tekken.json, a vocabulary of RWKV, or vocab.txt); "
        "download the whole model again"
    )


def _has_merges(directory: Path) -> bool:
    return (directory / MERGES_NAME).is_file()


def _read(path: Path, settings: Mapping[str, Any]) -> Found:
    if path.name == TOKENIZER_NAME:
        return _read_tokenizer_json(path, settings)
    if path.name == VOCAB_NAME:
        return _made(path, two_files_content(path, settings), settings, {})
    if path.name == "tekken.json":
        return _made(path, *_with(settings, tekken_content(path, settings)))
    if path.name == MSGPACK_NAME or path.match(TEXT_PATTERN):
        return _read_rwkv(path, settings)
    if path.name == WORDPIECE_NAME:
        return Found(HuggingFaceVocabulary(build_wordpiece(path, settings)), path)
    if path.name != "tokenizer.model" or looks_like_tiktoken(_head(path)):
        return _made(path, *_with(settings, tiktoken_content(path, settings)))
    return _made(path, *_with(settings, sentencepiece_content(path, settings)))


def _with(
    settings: Mapping[str, Any], found: tuple[dict[str, Any], dict[str, Any]]
) -> tuple[dict[str, Any], Mapping[str, Any], dict[str, Any]]:
    """Return a content, all settings, and those that only the file has."""
    content, derived = found
    return content, {**derived, **settings}, derived


def _made(
    path: Path, content: dict[str, Any], settings: Mapping[str, Any], derived: dict[str, Any]
) -> Found:
    inner = build_with_added(content, settings, path)
    return Found(HuggingFaceVocabulary(inner), path, derived)


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(1024)


def _read_tokenizer_json(path: Path, settings: Mapping[str, Any]) -> Found:
    content = path.read_bytes()
    # From a text it would be copied twice more, and this is a large part of a start.
    inner = parse(lambda: tokenizers.Tokenizer.from_buffer(content), path)
    lacking = lacking_tokens(inner, settings, path.parent)
    if lacking:
        inner = build_with(json.loads(inner.to_str()), lacking, path)
    return Found(HuggingFaceVocabulary(inner), path, is_whole=not lacking)


def _read_rwkv(path: Path, settings: Mapping[str, Any]) -> Found:
    tokens = read_vocabulary(path)
    special = {token.text: token.id for token in added_tokens(settings, path.parent)}
    if 0 not in tokens and 0 not in special.values():
        special[END_OF_TEXT] = 0
    clashing = [n for text, n in special.items() if tokens.get(n, text.encode()) != text.encode()]
    if clashing:
        raise CorruptFile(f"{path}: id {clashing[0]} is an added token's and another's")
    end = next((text for text, token_id in special.items() if token_id == 0), None)
    derived = {} if end is None else {"eos_token": end}
    return Found(
        RWKVVocabulary(tokens, special),
        path,
        {**derived, "add_bos_token": False},
        is_whole=path.name == MSGPACK_NAME,
    )
