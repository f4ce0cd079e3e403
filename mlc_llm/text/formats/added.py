"""Tokens that settings add to a vocabulary: `added_tokens_decoder`, and added_tokens.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mlc_llm.artifact import read_json_object
from mlc_llm.errors import CorruptFile
from mlc_llm.text.formats.content import Added, build
from mlc_llm.text.settings import SETTINGS_NAME, special_tokens_of, token_text

ADDED_NAME = "added_tokens.json"
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def declared_tokens(settings: Mapping[str, Any], directory: Path) -> list[Added]:
    """Return the tokens of `added_tokens_decoder`. Raises CorruptFile for one that is there twice.

    directory: where the settings are, for errors.
    """
    declared = settings.get("added_tokens_decoder")
    tokens: dict[str, Added] = {}
    for key, value in declared.items() if isinstance(declared, Mapping) else ():
        text = token_text(value)
        if not text or not str(key).isdecimal():
            raise CorruptFile(
                f"{directory / SETTINGS_NAME}: added_tokens_decoder has {key!r:.20}: "
                f"{value!r:.80}; that is no id and token, correct it"
            )
        if text in tokens:
            raise CorruptFile(
                f"{directory / SETTINGS_NAME} adds the token {text!r} twice, with ids "
                f"{tokens[text].id} and {key}; remove one of the entries"
            )
        flags = value if isinstance(value, Mapping) else {}
        chosen = {name: flags.get(name) is True for name in _FLAGS}
        tokens[text] = Added(int(key), text, **chosen)
    return list(tokens.values())


def added_tokens(settings: Mapping[str, Any], directory: Path) -> list[Added]:
    """Return the declared tokens, and those of added_tokens.json. Raises CorruptFile."""
    tokens = {token.text: token for token in declared_tokens(settings, directory)}
    path = directory / ADDED_NAME
    special = _special_texts(settings)
    for text, token_id in (read_json_object(path) if path.is_file() else {}).items():
        if not text or isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CorruptFile(f"{path} has {text!r:.40}: {token_id!r:.40}; it must map to an id")
        known = tokens.setdefault(text, Added(token_id, text, special=text in special))
        if known.id != token_id:
            raise CorruptFile(
                f"{path} adds the token {text!r} twice: here with id {token_id}, in "
                f"{SETTINGS_NAME} with {known.id}; correct one of them"
            )
    return list(tokens.values())


def build_with_added(
    content: dict[str, Any], settings: Mapping[str, Any], path: Path
) -> tokenizers.Tokenizer:
    """Return the tokenizer of a content made from `path`, with what its settings add.

    The special tokens the settings name are matched whole too. Raises CorruptFile where an added
    token has another's id.
    """
    tokens = {token.text: token for token in added_tokens(settings, path.parent)}
    vocab = content["model"]["vocab"]
    if isinstance(vocab, dict):
        for text in _special_texts(settings):
            if text in vocab:
                tokens.setdefault(text, Added(vocab[text], text))
    return build_with(content, list(tokens.values()), path)


def build_with(
    content: dict[str, Any], tokens: Sequence[Added], path: Path
) -> tokenizers.Tokenizer:
    """Return the tokenizer of a content and further added tokens, which get the ids they have."""
    entries = {entry["content"]: entry for entry in content["added_tokens"]}
    vocab = content["model"]["vocab"]
    for token in tokens:
        if token.text in entries:
            entry = entries[token.text]
            if entry["id"] == token.id:  # what only the settings know
                entry.update(lstrip=token.lstrip, rstrip=token.rstrip)
            continue
        entries[token.text] = token.entry()
        if isinstance(vocab, dict):
            # In the vocabulary itself it keeps its id, whatever ids are free before it.
            vocab.setdefault(token.text, token.id)
    content["added_tokens"] = sorted(entries.values(), key=lambda entry: int(entry["id"]))
    if isinstance(vocab, dict):
        _check_ids(vocab, path)
    inner = build(content, path)
    for token in tokens:
        found = inner.token_to_id(token.text)
        if found != token.id:
            raise CorruptFile(
                f"{path.parent}: added token {token.text!r} should have id {token.id}, but the "
                f"vocabulary gives it {found}; download the model again"
            )
    return inner


def lacking_tokens(
    inner: tokenizers.Tokenizer, settings: Mapping[str, Any], directory: Path
) -> list[Added]:
    """Return the declared tokens that a tokenizer does not match whole, if their ids are free.

    What a tokenizer.json says of an id goes before what the settings say.
    """
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    return [
        token
        for token in declared_tokens(settings, directory)
        if token.text not in known
        and inner.id_to_token(token.id) in (None, token.text)
        and inner.token_to_id(token.text) in (None, token.id)
    ]


def _special_texts(settings: Mapping[str, Any]) -> set[str]:
    """Return the special tokens that settings name."""
    others = settings.get("additional_special_tokens")
    listed = [token_text(item) for item in others] if isinstance(others, list) else []
    return {*special_tokens_of(settings).values(), *(text for text in listed if text)}


def _check_ids(vocab: Mapping[str, int], path: Path) -> None:
    seen: dict[int, str] = {}
    for text, token_id in vocab.items():
        if token_id in seen:
            raise CorruptFile(
                f"{path.parent}: tokens {seen[token_id][:40]!r} and {text[:40]!r} both have id "
                f"{token_id}; download the model again"
            )
        seen[token_id] = text
