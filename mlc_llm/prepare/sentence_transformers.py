"""What a sentence-transformers repository says of vectors and scores: `modules.json`, its modules.

Knows those files. What a family does where there are none is said in its file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlc_llm.artifact import read_json_object
from mlc_llm.errors import CorruptFile, UnsupportedModel

MODULES_NAME = "modules.json"
LIMITS_NAME = "sentence_bert_config.json"
_SCORE = "LogitScore"
# Older files have a switch for each way of pooling; newer ones name it as pooling_mode.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_NAMES = {"lasttoken": "last"}
_SUPPORTED = ("cls", "mean", "last")


@dataclass(frozen=True)
class SentenceSettings:
    """How vectors are made of token states. max_len: tokens of the longest text, None if unsaid."""

    pooling: str
    is_normalized: bool
    max_len: int | None


def read_sentence_settings(directory: Path) -> SentenceSettings | None:
    """Read a repository's settings; None where it has no `modules.json`, or is a reranker.

    Raises CorruptFile, and UnsupportedModel for modules and ways of pooling we do not have.
    """
    path = directory / MODULES_NAME
    if not path.is_file() or read_score_tokens(directory) is not None:
        return None
    pooling, is_normalized, max_len = None, False, None
    for kind, folder in _read_modules(path):
        if kind == "Transformer":
            max_len = _read_max_len(directory / folder / LIMITS_NAME)
        elif kind == "Pooling":
            pooling = _read_pooling(directory / folder / "config.json")
        elif kind == "Normalize":
            is_normalized = True
        else:
            raise UnsupportedModel(
                f"{path} has a module {kind!r:.80} after pooling; only Transformer, Pooling and "
                "Normalize are supported"
            )
    if pooling is None:
        raise CorruptFile(f"{path} names no module for pooling; download the model again")
    return SentenceSettings(pooling, is_normalized, max_len)


def read_score_tokens(directory: Path) -> tuple[int, int] | None:
    """Return the tokens for yes and no between which a reranker chooses; None for other models.

    Raises CorruptFile, and UnsupportedModel for a score that is not made of two tokens.
    """
    path = directory / MODULES_NAME
    folders = dict(_read_modules(path)) if path.is_file() else {}
    if _SCORE not in folders:
        return None
    settings = directory / folders[_SCORE] / "config.json"
    config = read_json_object(settings)
    yes, no = config.get("true_token_id"), config.get("false_token_id")
    if type(yes) is not int or type(no) is not int:
        raise UnsupportedModel(
            f"{settings} scores by true_token_id {yes!r:.40} and false_token_id {no!r:.40}; only "
            "rerankers that choose between two tokens are supported"
        )
    return yes, no


def _read_modules(path: Path) -> list[tuple[str, str]]:
    """Return the modules in order: the last part of their type, and their folder."""
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        found = [
            (str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFile(
            f"{path} is not a list of modules ({error!r:.100}); download the model again"
        ) from None
    for _, folder in found:
        if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise CorruptFile(f"{path} has a module outside the model: {folder!r:.80}")
    return found


def _read_pooling(path: Path) -> str:
    config = read_json_object(path)
    found = [name for switch, name in _SWITCHES.items() if config.get(switch) is True]
    named = config.get("pooling_mode")
    if isinstance(named, str):
        found = [_NAMES.get(named, named)]
    if len(found) != 1 or found[0] not in _SUPPORTED:
        raise UnsupportedModel(
            f"{path} asks for pooling by {' and '.join(found) or 'nothing'}; this release pools by "
            f"one of {', '.join(_SUPPORTED)}"
        )
    return found[0]


def _read_max_len(path: Path) -> int | None:
    if not path.is_file():
        return None
    value = read_json_object(path).get("max_seq_length")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CorruptFile(f"{path}: max_seq_length must be a number of tokens, it is {value!r:.80}")
    return value


def embedding_metadata(
    default: Mapping[str, Any] | None, settings: SentenceSettings | None
) -> dict[str, Any]:
    """Return `embedding_metadata` of an artifact: what the model says, else the family's default.

    default: of a family made for embeddings; the others are decoders.
    """
    values = dict(default or {"model_type": "decoder"})
    if settings is not None:
        values["pooling_strategy"] = settings.pooling
        values["normalize"] = settings.is_normalized
    return values
