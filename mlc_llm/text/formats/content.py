"""The parts of a tokenizer.json that all converted vocabularies share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from mlc_llm.errors import CorruptFile

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space as this character
Piece = TypeVar("Piece", str, bytes)


@dataclass(frozen=True)
class Added:
    """A token that is matched whole in the text.

    A special one does not show in decoded text. A normalized one is matched in the text as the
    normalizer leaves it, the others before. lstrip, rstrip: spaces beside it go with it.
    """

    id: int
    text: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def entry(self) -> dict[str, Any]:
        """Return its entry in the "added_tokens" of a tokenizer.json."""
        values = dataclasses.asdict(self)
        return {"id": values.pop("id"), "content": values.pop("text"), **values}


@dataclass(frozen=True)
class Frame:
    """What stands around the model of a tokenizer.json: added tokens, and special ids at the ends.

    first, last: ids put before and after a text when special tokens are asked for.
    """

    added: Sequence[Added] = ()
    first: Sequence[int] = ()
    last: Sequence[int] = ()
    spelling: Mapping[int, str] = field(default_factory=dict)  # of the ids in first and last


def make_content(
    model: Mapping[str, Any],
    frame: Frame,
    *,
    normalizers: Sequence[Mapping[str, Any]] = (),
    pre_tokenizers: Sequence[Mapping[str, Any]] = (),
    decoders: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the content of a tokenizer.json. `model` is its "model", steps are run in order."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.entry() for token in sorted(frame.added, key=_id_of)],
        "normalizer": _sequence("normalizers", normalizers),
        "pre_tokenizer": _sequence("pretokenizers", pre_tokenizers),
        "post_processor": _post_processor(frame),
        "decoder": _sequence("decoders", decoders),
        "model": dict(model),
    }


def bpe_model(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **changes: Any
) -> dict[str, Any]:
    """Return the "model" of a tokenizer.json for byte pair encoding."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocab),
        "merges": [list(pair) for pair in merges],
        **changes,
    }


def all_merges(
    ranked: Sequence[Piece], id_of: Mapping[Piece, int]
) -> Iterator[tuple[Piece, Piece]]:
    """Yield every pair of pieces that makes each of the ranked ones, the best ranked first.

    SentencePiece and tiktoken merge the neighbours whose union ranks best; `tokenizers` merges the
    pair that comes first in a list. Both pick the same pair when the list is in that order.
    """
    for piece in ranked:
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found = [
            (id_of[left], id_of[right], left, right)
            for left, right in cuts
            if left in id_of and right in id_of
        ]
        for _, _, left, right in sorted(found):
            yield left, right


def build(content: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json's content; `path` names its origin in errors."""
    return parse(lambda: tokenizers.Tokenizer.from_buffer(json.dumps(content).encode()), path)


def parse(read: Callable[[], tokenizers.Tokenizer], path: Path) -> tokenizers.Tokenizer:
    """Return what `read` returns. Raises CorruptFile where `tokenizers` refuses the content."""
    try:
        with no_panics(str(path)):
            return read()
    except ValueError as error:
        raise CorruptFile(
            f"{path} is not a tokenizer ({error}); download or convert the model again"
        ) from None


@contextmanager
def no_panics(what: str) -> Iterator[None]:
    """Raise CorruptFile where code in Rust gives up, which Python would take for its own end."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CorruptFile(
            f"{what} is damaged: the tokenizers package fails on it ({error!s:.200}); download or "
            "convert the model again"
        ) from None


def _id_of(token: Added) -> int:
    return token.id


def _sequence(children: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return one step that stands for all, None for none."""
    if len(steps) < 2:
        return dict(steps[0]) if steps else None
    return {"type": "Sequence", children: [dict(step) for step in steps]}


def _post_processor(frame: Frame) -> dict[str, Any] | None:
    if not frame.first and not frame.last:
        return None

    def special(token_ids: Sequence[int], sequence: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": frame.spelling[token_id], "type_id": sequence}}
            for token_id in token_ids
        ]

    def one(name: str, sequence: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": sequence}}
        return [*special(frame.first, sequence), text, *special(frame.last, sequence)]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": [*one("A", 0), *one("B", 1)],
        "special_tokens": {
            frame.spelling[token_id]: {
                "id": frame.spelling[token_id],
                "ids": [token_id],
                "tokens": [frame.spelling[token_id]],
            }
            for token_id in {*frame.first, *frame.last}
        },
    }
