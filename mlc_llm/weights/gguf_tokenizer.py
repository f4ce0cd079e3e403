"""Rebuild Hugging Face tokenizer files from the vocabulary a GGUF file carries.

Knows byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`) vocabularies. How text is cut before
BPE is not stored in GGUF, only a name for it: `pretokenizers.json` says what the names mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlc_llm.artifact import write_atomically
from mlc_llm.errors import CorruptFile, StorageError, UnsupportedModel
from mlc_llm.weights.gguf_file import GGUFFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"  # SentencePiece writes a space as this character


@dataclass(frozen=True)
class _Vocabulary:
    """The `tokenizer.ggml.*` metadata, checked for agreement."""

    file: GGUFFile
    tokens: list[str]
    types: list[int]

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.file.get(f"tokenizer.ggml.{key}", bool, default))

    def token_id(self, key: str) -> int | None:
        """Return a special token's id, checked to be in the vocabulary, or None."""
        token_id = self.file.get(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is None or token_id == 0xFFFFFFFF:
            return None
        if not 0 <= token_id < len(self.tokens):
            raise CorruptFile(
                f"{self.file.path}: {key} token is {token_id}, "
                f"the vocabulary has {len(self.tokens)} tokens"
            )
        return int(token_id)

    def ids(self) -> dict[str, int]:
        """Return the id of each token. Raises CorruptFile if a token occurs twice."""
        ids = {token: number for number, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            raise CorruptFile(f"{self.file.path}: the vocabulary holds a token twice")
        return ids


def write_tokenizer(path: Path, output: Path) -> list[str]:
    """Write `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` to `output`.

    Returns the file names. Raises UnsupportedModel for kinds of tokenizer we cannot rebuild (the
    message names it), CorruptFile where the metadata contradicts itself, StorageError.
    """
    vocabulary = _read_vocabulary(GGUFFile(path))
    kind = vocabulary.file.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level_tokenizer(vocabulary)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece_tokenizer(vocabulary)
    else:
        raise UnsupportedModel(
            f"{path} has a tokenizer of kind {kind!r:.40}; gpt2 and llama are supported: "
            "use the original Hugging Face directory"
        )
    contents = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _tokenizer_config(vocabulary, add_bos),
        "generation_config.json": _generation_config(vocabulary),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(
                output / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            )
    except OSError as error:
        raise StorageError(f"cannot write the tokenizer to {output}: {error}") from None
    return list(contents)


def _read_vocabulary(file: GGUFFile) -> _Vocabulary:
    tokens = file.get("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise CorruptFile(f"{file.path} carries no vocabulary (tokenizer.ggml.tokens)")
    types = file.get("tokenizer.ggml.token_type", list) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CorruptFile(
            f"{file.path}: {len(tokens)} tokens but {len(types)} token types; fetch it again"
        )
    # User-defined tokens are matched in the text itself, where a space is a space.
    if file.get("tokenizer.ggml.model", str) == "llama":
        known = set(tokens)
        for number, kind in enumerate(types):
            spelled = tokens[number].replace(_SPACE, " ")
            if kind == _USER_DEFINED and spelled not in known:
                tokens[number] = spelled
    return _Vocabulary(file, tokens, types)


def _byte_level_tokenizer(vocabulary: _Vocabulary) -> tuple[dict[str, Any], bool]:
    """Return the content of tokenizer.json, and whether prompts begin with the BOS token."""
    file, ids = vocabulary.file, vocabulary.ids()
    name = file.get("tokenizer.ggml.pre", str, "default")
    recipe = _find_recipe(name)
    if recipe is None:
        raise UnsupportedModel(
            f"{file.path} wants pre-tokenizer {name!r:.40}, which is not known; "
            f"known: {', '.join(_recipe_names())}"
        )
    merges = file.get("tokenizer.ggml.merges", list)
    if not merges:
        raise CorruptFile(f"{file.path} carries no merges (tokenizer.ggml.merges)")
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in recipe["patterns"]
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": vocabulary.flag("add_space_prefix", False),
        "trim_offsets": True,
        "use_regex": False,
    }
    model = {
        "ignore_merges": recipe.get("ignore_merges", False),
        "merges": [_split_merge(merge, ids, file.path) for merge in merges],
    }
    add_bos = vocabulary.flag("add_bos_token", recipe.get("add_bos", False))
    content = _tokenizer_json(vocabulary, model, add_bos)
    content["normalizer"] = {"type": "NFC"} if recipe.get("nfc") else None
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, byte_level]}
    content["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    return content, add_bos


def _recipes() -> dict[str, dict[str, Any]]:
    text = files("mlc_llm.weights").joinpath("pretokenizers.json").read_text(encoding="utf-8")
    recipes: dict[str, dict[str, Any]] = json.loads(text)
    return recipes


def _find_recipe(name: str) -> dict[str, Any] | None:
    return next((recipe for recipe in _recipes().values() if name in recipe["names"]), None)


def _recipe_names() -> list[str]:
    return [name for recipe in _recipes().values() for name in recipe["names"]]


def _split_merge(merge: Any, ids: dict[str, int], path: Path) -> list[str]:
    # A part may itself begin with a space, so the separator is looked for behind it.
    at = merge.find(" ", 1) if isinstance(merge, str) else -1
    left, right = (merge[:at], merge[at + 1 :]) if at > 0 else ("", "")
    if left not in ids or right not in ids or left + right not in ids:
        raise CorruptFile(f"{path}: merge {merge!r:.60} does not fit the vocabulary")
    return [left, right]


def _sentencepiece_tokenizer(vocabulary: _Vocabulary) -> tuple[dict[str, Any], bool]:
    """Return the content of tokenizer.json, and whether prompts begin with the BOS token."""
    file = vocabulary.file
    scores = file.get("tokenizer.ggml.scores", list)
    if not scores or len(scores) != len(vocabulary.tokens):
        raise CorruptFile(f"{file.path}: tokenizer.ggml.scores does not fit the vocabulary")
    if not all(isinstance(score, (int, float)) for score in scores):
        raise CorruptFile(f"{file.path}: tokenizer.ggml.scores holds something else than numbers")
    unknown = vocabulary.token_id("unknown")
    if unknown is None:
        unknown = vocabulary.types.index(_UNKNOWN) if _UNKNOWN in vocabulary.types else None
    model = {
        "byte_fallback": _BYTE in vocabulary.types,
        "fuse_unk": True,
        "unk_token": None if unknown is None else vocabulary.tokens[unknown],
        "merges": list(_merges_from_scores(vocabulary, scores)),
    }
    add_bos = vocabulary.flag("add_bos_token", True)
    has_prefix = vocabulary.flag("add_space_prefix", True)
    content = _tokenizer_json(vocabulary, model, add_bos)
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if has_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    content["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, replace]}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *strip,
        ],
    }
    return content, add_bos


def _merges_from_scores(vocabulary: _Vocabulary, scores: list[float]) -> Iterator[list[str]]:
    """Yield the pairs that make each normal token, the best scored token first.

    SentencePiece merges the neighbours whose union has the best score; BPE merges the pair that
    comes first in this list. Both pick the same pair when the list is in order of that score.
    """
    ids = vocabulary.ids()
    normal = [
        (-score, number, token)
        for number, (token, score, kind) in enumerate(
            zip(vocabulary.tokens, scores, vocabulary.types, strict=True)
        )
        if kind == _NORMAL and len(token) > 1
    ]
    for _, _, token in sorted(normal):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = [(ids[left], ids[right]) for left, right in pairs if left in ids and right in ids]
        for left_id, right_id in sorted(found):
            yield [vocabulary.tokens[left_id], vocabulary.tokens[right_id]]


def _tokenizer_json(
    vocabulary: _Vocabulary, model: dict[str, Any], add_bos: bool
) -> dict[str, Any]:
    """Return what both kinds share; `model` overrides fields of the BPE model."""
    added = [
        {
            "id": number,
            "content": vocabulary.tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for number, kind in enumerate(vocabulary.types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and vocabulary.tokens[number]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary, add_bos),
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary.ids(),
            **model,
        },
    }


def _post_processor(vocabulary: _Vocabulary, add_bos: bool) -> dict[str, Any] | None:
    bos, eos = vocabulary.token_id("bos"), vocabulary.token_id("eos")
    first = [bos] if add_bos and bos is not None else []
    last = [eos] if vocabulary.flag("add_eos_token", False) and eos is not None else []
    if not first and not last:
        return None

    def special(token_ids: list[int], sequence: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": vocabulary.tokens[token_id], "type_id": sequence}}
            for token_id in token_ids
        ]

    def one(name: str, sequence: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": sequence}}
        return [*special(first, sequence), text, *special(last, sequence)]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": [*one("A", 0), *one("B", 1)],
        "special_tokens": {
            vocabulary.tokens[token_id]: {
                "id": vocabulary.tokens[token_id],
                "ids": [token_id],
                "tokens": [vocabulary.tokens[token_id]],
            }
            for token_id in {*first, *last}
        },
    }


def _tokenizer_config(vocabulary: _Vocabulary, add_bos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": vocabulary.flag("add_eos_token", False),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = vocabulary.token_id(key)
        if token_id is not None:
            config[f"{name}_token"] = vocabulary.tokens[token_id]
    template = vocabulary.file.get("tokenizer.chat_template", str)
    if template is not None:
        config["chat_template"] = template
    return config


def _generation_config(vocabulary: _Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {}
    bos, padding = vocabulary.token_id("bos"), vocabulary.token_id("padding")
    stops = [vocabulary.token_id(key) for key in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if bos is not None:
        config["bos_token_id"] = bos
    if eos:
        config["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    if padding is not None:
        config["pad_token_id"] = padding
    return config
