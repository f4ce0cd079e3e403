"""Turns a SentencePiece model (`tokenizer.model`) into the content of a tokenizer.json.

Kudo and Richardson 2018 describe the algorithms; ids equal those of the sentencepiece library.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.text.formats.content import (
    SPACE_MARK,
    Added,
    Frame,
    all_merges,
    bpe_model,
    make_content,
)
from mlc_llm.text.formats.sentencepiece_file import (
    ModelType,
    Piece,
    PieceType,
    SentencePieceModel,
    read_sentencepiece,
)

# Classes of transformers that give the pieces of the file other ids.
_REORDERING_CLASSES = (
    *("Barthez", "Camembert", "CPM", "DebertaV2", "Fairseq", "Fnet", "M2M100", "MBart", "MBart50"),
    *("Marian", "Nllb", "Pegasus", "PLBart", "Speech2Text", "XGLM", "XLMProphetNet", "XLMRoberta"),
)
# Classes that put the token of the beginning before a text only where they are told to.
_CLASSES_WITHOUT_BOS = ("T5", "Baichuan", "ChatGLM", "Albert", "XLNet")
# What sentencepiece 0.2.3 weighs a defined piece of a unigram model with (-0.1 until 0.2.1): it is
# better than any other piece.
_DEFINED_SCORE = 0.0


def sentencepiece_content(
    path: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a tokenizer.json, and what the file adds to the settings.

    settings: of tokenizer_config.json; `add_bos_token`, `add_eos_token`, `add_prefix_space` and
    `legacy` are followed. Raises CorruptFile and UnsupportedModel.
    """
    class_name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    base_class = class_name.removesuffix("Tokenizer")
    if base_class in _REORDERING_CLASSES:
        raise UnsupportedModel(
            f"{path}: {class_name} gives the pieces of this file other ids; put the model's "
            "tokenizer.json beside it (save_pretrained of a transformers tokenizer writes one)"
        )
    model = read_sentencepiece(path)
    _check_supported(model, path)
    if settings.get("add_prefix_space") is False:
        model.add_dummy_prefix = False
    found = _special_pieces(model, path)
    wants_bos = settings.get("add_bos_token", base_class not in _CLASSES_WITHOUT_BOS)
    wants_eos = settings.get("add_eos_token", False)
    content = model_content(
        model,
        path,
        first=[model.bos_id] if wants_bos and "bos_token" in found else [],
        last=[model.eos_id] if wants_eos and "eos_token" in found else [],
        has_first_prefix_only=settings.get("legacy") is False,
    )
    return content, {
        **found,
        "add_bos_token": bool(wants_bos and "bos_token" in found),
        "add_eos_token": bool(wants_eos and "eos_token" in found),
    }


def model_content(
    model: SentencePieceModel,
    path: Path,
    *,
    first: Sequence[int],
    last: Sequence[int],
    has_first_prefix_only: bool = False,
) -> dict[str, Any]:
    """Return the content of a tokenizer.json for a unigram or BPE model.

    first, last: ids of pieces to put around a text. has_first_prefix_only: the dummy prefix goes
    before a text alone, not also behind each special token. `path` names the origin in errors.
    """
    spelling = {token_id: model.pieces[token_id].text for token_id in (*first, *last)}
    return make_content(
        _unigram(model.pieces, model.byte_fallback, path)
        if _is_unigram(model)
        else _bpe(model.pieces, model.byte_fallback, path),
        Frame(_added_pieces(model), first, last, spelling),
        normalizers=_normalizers(model, has_first_prefix_only, path),
        pre_tokenizers=_pre_tokenizers(model, has_first_prefix_only),
        decoders=_decoders(model),
    )


def _check_supported(model: SentencePieceModel, path: Path) -> None:
    refused = None
    if model.model_type not in (ModelType.BPE, ModelType.UNIGRAM):
        refused = f"cuts text by {model.model_type.name.lower()}s; unigram and BPE are supported"
    elif model.whitespace_as_suffix:
        refused = "writes spaces behind words (treat_whitespace_as_suffix)"
    elif not model.escape_whitespaces:
        refused = "leaves spaces as they are (escape_whitespaces)"
    elif model.has_denormalizer:
        refused = "changes the text it decodes (denormalizer_spec)"
    elif model.model_type is ModelType.UNIGRAM and any(
        piece.type is PieceType.UNUSED for piece in model.pieces
    ):
        refused = "is a unigram model with pieces that are not to be used"
    if refused:
        raise UnsupportedModel(f"{path} {refused}; put the model's tokenizer.json beside it")


def _special_pieces(model: SentencePieceModel, path: Path) -> dict[str, str]:
    """Return the special tokens the file names, in the words of tokenizer_config.json."""
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "pad_token": model.pad_id}
    unknown = [n for n, piece in enumerate(model.pieces) if piece.type is PieceType.UNKNOWN]
    if len(unknown) != 1:
        raise CorruptFile(
            f"{path} has {len(unknown)} pieces for unknown text, there must be one; "
            "download the model again"
        )
    named["unk_token"] = unknown[0]
    for name, token_id in named.items():
        if token_id >= len(model.pieces):
            raise CorruptFile(
                f"{path}: {name} is piece {token_id}, there are {len(model.pieces):,}; "
                "download the model again"
            )
    return {
        name: model.pieces[token_id].text
        for name, token_id in named.items()
        if token_id >= 0 and model.pieces[token_id].type is not PieceType.NORMAL
    }


def _ids_of(pieces: Sequence[Piece], path: Path) -> dict[str, int]:
    """Return the id of each piece. Raises CorruptFile if one is empty or there twice."""
    ids: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if not piece.text or piece.text in ids:
            what = "is empty" if not piece.text else f"({piece.text[:40]!r}) is there twice"
            raise CorruptFile(f"{path}: piece {number} {what}; download the model again")
        ids[piece.text] = number
    return ids


def _added_pieces(model: SentencePieceModel) -> list[Added]:
    """Return the tokens to match whole: special ones in the text, defined ones as normalized."""
    special = {PieceType.UNKNOWN: True, PieceType.CONTROL: True}
    # A unigram model weighs defined pieces against others, see _unigram.
    kinds = special | ({} if _is_unigram(model) else {PieceType.USER_DEFINED: False})
    return [
        Added(number, piece.text, special=kinds[piece.type], normalized=not kinds[piece.type])
        for number, piece in enumerate(model.pieces)
        if piece.type in kinds
    ]


def _is_unigram(model: SentencePieceModel) -> bool:
    return model.model_type is ModelType.UNIGRAM


def _bpe(pieces: Sequence[Piece], byte_fallback: bool, path: Path) -> dict[str, Any]:
    ids = _ids_of(pieces, path)
    unknown = _find_unknown(pieces)
    ranked = sorted(
        (piece for piece in pieces if piece.type is PieceType.NORMAL and len(piece.text) > 1),
        key=lambda piece: (-piece.score, ids[piece.text]),
    )
    return bpe_model(
        ids,
        list(all_merges([piece.text for piece in ranked], ids)),
        unk_token=None if unknown is None else pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _find_unknown(pieces: Sequence[Piece]) -> int | None:
    return next((n for n, piece in enumerate(pieces) if piece.type is PieceType.UNKNOWN), None)


def _unigram(pieces: Sequence[Piece], byte_fallback: bool, path: Path) -> dict[str, Any]:
    _ids_of(pieces, path)
    normal = [piece.score for piece in pieces if piece.type is PieceType.NORMAL] or [0.0]
    lowest = min(normal)

    def score(piece: Piece) -> float:
        if piece.type is PieceType.USER_DEFINED:
            return _DEFINED_SCORE
        # The lowest score of all is what unknown text hangs on, so the others must not move it.
        return piece.score if piece.type is PieceType.NORMAL else lowest

    return {
        "type": "Unigram",
        "unk_id": _find_unknown(pieces),
        "vocab": [[piece.text, score(piece)] for piece in pieces],
        "byte_fallback": byte_fallback,
    }


def _normalizers(
    model: SentencePieceModel, has_first_prefix_only: bool, path: Path
) -> list[dict[str, Any]]:
    """Return the steps of sentencepiece's normalizer, in its order."""
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        check_charsmap(model.charsmap, path)
        charsmap = base64.b64encode(model.charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        steps.append(_replace({"Regex": rf"\A +|[ {SPACE_MARK}]+\z"}, ""))
        steps.append(_replace({"Regex": " {2,}"}, " "))
    defined = [piece.text for piece in model.pieces if piece.type is PieceType.USER_DEFINED]
    # Defined tokens stay as they are: other characters stand for those that would not.
    stand_ins = dict(zip(_changed_by(steps, defined), map(chr, range(0xF0000, 0xFFFFE))))  # noqa: B905
    steps = [*(_replace({"String": text}, mark) for text, mark in stand_ins.items()), *steps]
    if model.add_dummy_prefix and not has_first_prefix_only:
        matched = [] if _is_unigram(model) else [stand_ins.get(text, text) for text in defined]
        steps.append(_prefix(matched))
    steps.append(_replace({"String": " "}, SPACE_MARK))
    return [*steps, *(_replace({"String": mark}, text) for text, mark in stand_ins.items())]


def _changed_by(steps: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[str]:
    """Return the texts that normalizers change, the longest first."""
    if not steps or not texts:
        return []
    model = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
    content = make_content(model, Frame(), normalizers=steps)
    normalizer = tokenizers.Tokenizer.from_buffer(json.dumps(content).encode()).normalizer
    assert normalizer is not None
    changed = (text for text in texts if normalizer.normalize_str(text) != text)
    return sorted(changed, key=len, reverse=True)


def check_charsmap(charsmap: bytes, path: Path) -> None:
    """Raise CorruptFile unless every way through a map of characters stays inside it.

    It is the size of a double-array trie, the trie (darts-clone), and texts that end with a zero.
    """
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap[4 : 4 + size], "<u4") if size % 4 == 0 else np.empty(0, "<u4")
    texts = np.frombuffer(charsmap[4 + size :], np.uint8)
    is_value = units >> 31 == 1
    nodes = units[~is_value]
    offsets = (nodes >> 10) << ((nodes & (1 << 9)) >> 6)
    reached = (np.flatnonzero(~is_value) ^ offsets) | 0xFF
    values = units[is_value] & 0x7FFFFFFF
    is_whole = len(units) > 0 and len(units) * 4 == size and len(texts) > 0 and texts[-1] == 0
    if is_whole and (reached < len(units)).all() and (values < len(texts)).all():
        starts_character = (texts[values] & 0xC0) != 0x80
        if starts_character.all() and _is_utf8(charsmap[4 + size :]):
            return
    raise CorruptFile(
        f"{path} has a damaged map of characters (precompiled_charsmap); download the model again"
    )


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _prefix(defined: Sequence[str]) -> dict[str, Any]:
    if not defined:
        return {"type": "Prepend", "prepend": SPACE_MARK}
    # Tokens to match go through the normalizer too, and must come out as they are; so a text that
    # is nothing but one of them gets no space, unlike in sentencepiece.
    alone = "|".join(re.escape(text) for text in sorted(defined, key=len, reverse=True))
    return _replace({"Regex": rf"\A(?=[\s\S])(?!(?:{alone})\z)"}, SPACE_MARK)


def _pre_tokenizers(model: SentencePieceModel, has_first_prefix_only: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.add_dummy_prefix and has_first_prefix_only:
        steps.append(
            {
                "type": "Metaspace",
                "replacement": SPACE_MARK,
                "prepend_scheme": "first",
                "split": False,
            }
        )
    if model.byte_fallback and _is_unigram(model):
        # So that a byte token spelled out in a text is text.
        pattern = {"Regex": "<(?=0x[0-9A-F]{2}>)"}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    return steps


def _decoders(model: SentencePieceModel) -> list[dict[str, Any]]:
    strips = model.add_dummy_prefix or model.remove_extra_whitespaces
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return [
        _replace({"String": SPACE_MARK}, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([strip] if strips else []),
    ]


def _replace(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": dict(pattern), "content": content}
