"""Rebuild tokenizer files from the vocabulary a GGUF file carries.

Knows what the metadata `tokenizer.ggml.*` means. How text is cut before BPE is not stored in GGUF,
only a name for it, which text/formats/byte_level.py looks up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.artifact import write_atomically
from mlc_llm.errors import CorruptFile, StorageError, UnsupportedModel
from mlc_llm.text.formats.byte_level import byte_level_content, find_recipe, recipe_names
from mlc_llm.text.formats.content import SPACE_MARK, Added, Frame
from mlc_llm.text.formats.rwkv import RWKVVocabulary, check_tokens
from mlc_llm.text.formats.sentencepiece import model_content
from mlc_llm.text.formats.sentencepiece_file import (
    ModelType,
    Piece,
    PieceType,
    SentencePieceModel,
)
from mlc_llm.text.vocabulary import TOKENIZER_NAME
from mlc_llm.text.wordpiece import VOCAB_NAME
from mlc_llm.weights.gguf_file import GGUFFile

_MATCHED_WHOLE = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)
_ESCAPES = {"n": b"\n", "r": b"\r", "t": b"\t", "\\": b"\\", "'": b"'", '"': b'"'}
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|(.))|([^\\]+)", re.DOTALL)
# Special tokens: name in tokenizer_config.json -> in GGUF, where one is misspelled.
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
    "cls_token": "cls",
    "mask_token": "mask",
}


@dataclass(frozen=True)
class _Vocabulary:
    """The `tokenizer.ggml.*` metadata, checked for agreement."""

    file: GGUFFile
    tokens: list[str]
    types: list[PieceType]

    @property
    def pre(self) -> str:
        """The name of the pre-tokenizer."""
        return str(self.file.get("tokenizer.ggml.pre", str, "default"))

    def flag(self, key: str, default: bool) -> bool:
        """Return a yes or no."""
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

    def ends(self, add_bos: bool, add_eos: bool) -> tuple[list[int], list[int]]:
        """Return the ids put before and after a text, by what the file says or else by default."""
        bos, eos = self.token_id("bos"), self.token_id("eos")
        first = [bos] if self.flag("add_bos_token", add_bos) and bos is not None else []
        last = [eos] if self.flag("add_eos_token", add_eos) and eos is not None else []
        return first, last


@dataclass(frozen=True)
class _Rebuilt:
    """The file of a vocabulary, and what its tokenizer_config.json says beside special tokens."""

    name: str
    content: str | bytes
    settings: dict[str, Any]


def write_tokenizer(path: Path, output: Path) -> list[str]:
    """Write the vocabulary, `tokenizer_config.json` and `generation_config.json` to `output`.

    Returns the file names. Raises UnsupportedModel for kinds of tokenizer we cannot rebuild (the
    message names it), CorruptFile where the metadata contradicts itself, StorageError.
    """
    vocabulary = _read_vocabulary(GGUFFile(path))
    kind = vocabulary.file.get("tokenizer.ggml.model", str)
    if kind not in _KINDS:
        raise UnsupportedModel(
            f"{path} has a tokenizer of kind {kind!r:.40}; {', '.join(_KINDS)} are supported: "
            "use the original Hugging Face directory"
        )
    rebuilt = _KINDS[kind](vocabulary)
    contents: dict[str, str | bytes] = {
        rebuilt.name: rebuilt.content,
        "tokenizer_config.json": _to_json(_tokenizer_config(vocabulary, rebuilt.settings)),
        "generation_config.json": _to_json(_generation_config(vocabulary)),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(output / name, content)
    except OSError as error:
        raise StorageError(f"cannot write the tokenizer to {output}: {error}") from None
    return list(contents)


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _read_vocabulary(file: GGUFFile) -> _Vocabulary:
    tokens = file.get("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise CorruptFile(f"{file.path} carries no vocabulary (tokenizer.ggml.tokens)")
    numbers = file.get("tokenizer.ggml.token_type", list) or [PieceType.NORMAL] * len(tokens)
    if len(numbers) != len(tokens):
        raise CorruptFile(
            f"{file.path}: {len(tokens)} tokens but {len(numbers)} token types; fetch it again"
        )
    try:
        types = [PieceType(number) for number in numbers]
    except ValueError as error:
        raise CorruptFile(f"{file.path}: tokenizer.ggml.token_type: {error}") from None
    return _Vocabulary(file, tokens, types)


def _byte_level(vocabulary: _Vocabulary) -> _Rebuilt:
    file, ids = vocabulary.file, vocabulary.ids()
    recipe = find_recipe(vocabulary.pre)
    if recipe is None:
        raise UnsupportedModel(
            f"{file.path} wants pre-tokenizer {vocabulary.pre!r:.40}, which is not known; "
            f"known: {', '.join(recipe_names())}"
        )
    merges = file.get("tokenizer.ggml.merges", list)
    if not merges:
        raise CorruptFile(f"{file.path} carries no merges (tokenizer.ggml.merges)")
    first, last = vocabulary.ends(recipe.add_bos, False)
    added = [
        Added(number, vocabulary.tokens[number], special=kind is not PieceType.USER_DEFINED)
        for number, kind in enumerate(vocabulary.types)
        if kind in _MATCHED_WHOLE and vocabulary.tokens[number]
    ]
    content = byte_level_content(
        ids,
        [_split_merge(merge, ids, file.path) for merge in merges],
        recipe,
        Frame(added, first, last, dict(enumerate(vocabulary.tokens))),
        add_prefix_space=vocabulary.flag("add_space_prefix", False),
    )
    return _Rebuilt(TOKENIZER_NAME, _to_json(content), _end_settings(first, last))


def _split_merge(merge: Any, ids: dict[str, int], path: Path) -> tuple[str, str]:
    # A part may itself begin with a space, so the separator is looked for behind it.
    at = merge.find(" ", 1) if isinstance(merge, str) else -1
    left, right = (merge[:at], merge[at + 1 :]) if at > 0 else ("", "")
    if left not in ids or right not in ids or left + right not in ids:
        raise CorruptFile(f"{path}: merge {merge!r:.60} does not fit the vocabulary")
    return left, right


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> _Rebuilt:
    return _sentencepiece(vocabulary, ModelType.BPE, *vocabulary.ends(True, False))


def _sentencepiece_unigram(vocabulary: _Vocabulary) -> _Rebuilt:
    return _sentencepiece(vocabulary, ModelType.UNIGRAM, *vocabulary.ends(False, True))


def _sentencepiece(
    vocabulary: _Vocabulary, model_type: ModelType, first: list[int], last: list[int]
) -> _Rebuilt:
    file = vocabulary.file
    vocabulary.ids()
    scores = file.get("tokenizer.ggml.scores", list)
    if not scores or len(scores) != len(vocabulary.tokens):
        raise CorruptFile(f"{file.path}: tokenizer.ggml.scores does not fit the vocabulary")
    if not all(isinstance(score, (int, float)) and abs(score) < 1e30 for score in scores):
        raise CorruptFile(f"{file.path}: tokenizer.ggml.scores holds something else than numbers")
    types = list(vocabulary.types)
    unknown = vocabulary.token_id("unknown")
    if unknown is not None and PieceType.UNKNOWN not in types:
        types[unknown] = PieceType.UNKNOWN
    charsmap = file.get("tokenizer.ggml.precompiled_charsmap", list, [])
    if not all(isinstance(byte, int) and -128 <= byte < 256 for byte in charsmap):
        raise CorruptFile(f"{file.path}: tokenizer.ggml.precompiled_charsmap holds no bytes")
    model = SentencePieceModel(
        [Piece(*piece) for piece in zip(vocabulary.tokens, scores, types, strict=True)],
        model_type,
        byte_fallback=PieceType.BYTE in types,
        charsmap=bytes(byte & 0xFF for byte in charsmap),
        add_dummy_prefix=vocabulary.flag("add_space_prefix", True),
        remove_extra_whitespaces=vocabulary.flag("remove_extra_whitespaces", False),
    )
    content = model_content(model, file.path, first=first, last=last)
    return _Rebuilt(TOKENIZER_NAME, _to_json(content), _end_settings(first, last))


def _wordpiece(vocabulary: _Vocabulary) -> _Rebuilt:
    """Write BERT's vocab.txt. GGUF marks where words begin, that file where they go on.

    Whether text is lowered is not stored; a vocabulary without capitals says it is.
    """
    lines = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if token.startswith(SPACE_MARK):
            lines.append(token.removeprefix(SPACE_MARK))
        elif kind is PieceType.NORMAL and not (token.startswith("[") and token.endswith("]")):
            lines.append("##" + token)
        else:
            lines.append(token)
    if any("\n" in line or "\r" in line for line in lines) or len(set(lines)) != len(lines):
        raise CorruptFile(f"{vocabulary.file.path}: the vocabulary cannot be one of WordPiece")
    is_lower = not any(token.lower() != token for token in lines if not token.startswith("["))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": is_lower}
    return _Rebuilt(VOCAB_NAME, "\n".join(lines) + "\n", settings)


def _rwkv(vocabulary: _Vocabulary) -> _Rebuilt:
    path = vocabulary.file.path
    tokens = {
        number: _unescape(token, path)
        for number, (token, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.types, strict=True)
        )
        if kind is PieceType.NORMAL
    }
    check_tokens(tokens, str(path))
    special = {
        str(number): {"content": vocabulary.tokens[number], "special": True}
        for number, kind in enumerate(vocabulary.types)
        if kind in (PieceType.CONTROL, PieceType.UNKNOWN) and vocabulary.tokens[number]
    }
    name, content = RWKVVocabulary(tokens).to_file()
    return _Rebuilt(name, content, {"added_tokens_decoder": special, "add_bos_token": False})


def _unescape(token: str, path: Path) -> bytes:
    """Return the bytes of a token spelled as Python spells them."""
    parts, end = [], 0
    for match in _ESCAPE.finditer(token):
        code, letter, plain = match.groups()
        if match.start() != end or (letter is not None and letter not in _ESCAPES):
            break
        end = match.end()
        parts.append(
            bytes.fromhex(code) if code else _ESCAPES[letter] if letter else plain.encode()
        )
    if end != len(token):
        raise CorruptFile(
            f"{path}: token {token[:60]!r} has an escape that is none; fetch it again"
        )
    return b"".join(parts)


_KINDS: dict[str, Callable[[_Vocabulary], _Rebuilt]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece_bpe,
    "t5": _sentencepiece_unigram,
    "bert": _wordpiece,
    "rwkv": _rwkv,
}


def _end_settings(first: list[int], last: list[int]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(first),
        "add_eos_token": bool(last),
    }


def _tokenizer_config(vocabulary: _Vocabulary, settings: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False, **settings}
    for name, key in _SPECIAL.items():
        token_id = vocabulary.token_id(key)
        if token_id is not None:
            config[name] = vocabulary.tokens[token_id]
    template = vocabulary.file.get("tokenizer.chat_template", str)
    # Some files name a template that llama.cpp knows instead of holding one.
    if template is not None and "{" in template:
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
