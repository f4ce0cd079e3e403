"""What is read from the files of sentence-transformers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.prepare.sentence_transformers import (
    SentenceSettings,
    embedding_metadata,
    read_sentence_settings,
)

PREFIX = "sentence_transformers.models."


def write(
    directory: Path,
    pooling: dict[str, Any],
    kinds: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
    limits: Any = None,
) -> Path:
    folders = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"idx": index, "name": str(index), "path": folders.get(kind, kind), "type": PREFIX + kind}
        for index, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if limits is not None:
        (directory / "sentence_bert_config.json").write_text(json.dumps(limits))
    return directory


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 384}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_pooling(tmp_path: Path, pooling: dict[str, Any], expected: str) -> None:
    settings = read_sentence_settings(write(tmp_path, pooling))
    assert settings == SentenceSettings(expected, True, None)


def test_length_and_normalisation(tmp_path: Path) -> None:
    assert read_sentence_settings(tmp_path) is None
    mean = {"pooling_mode_mean_tokens": True}
    kinds = ("Transformer", "Pooling")
    found = read_sentence_settings(write(tmp_path, mean, kinds, {"max_seq_length": 256}))
    assert found == SentenceSettings("mean", False, 256)
    write(tmp_path, mean, kinds, {"max_seq_length": None})
    assert read_sentence_settings(tmp_path) == SentenceSettings("mean", False, None)


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling by max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls and mean"),
        ({}, "pooling by nothing"),
        ({"pooling_mode": "weightedmean"}, "pooling by weightedmean"),
    ],
)
def test_other_pooling_is_refused(tmp_path: Path, pooling: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        read_sentence_settings(write(tmp_path, pooling))


def test_modules_that_cannot_be_honoured(tmp_path: Path) -> None:
    mean = {"pooling_mode_mean_tokens": True}
    with pytest.raises(UnsupportedModel, match="module 'Dense'"):
        read_sentence_settings(write(tmp_path, mean, ("Transformer", "Pooling", "Dense")))
    with pytest.raises(CorruptFile, match="no module for pooling"):
        read_sentence_settings(write(tmp_path, mean, ("Transformer",)))
    for content in ("{}", "[1]", "[", '[{"type": "a.Pooling"}]'):
        (tmp_path / "modules.json").write_text(content)
        with pytest.raises(CorruptFile, match=r"modules\.json (is not a list|names no)"):
            read_sentence_settings(tmp_path)
    for folder in ("../other", "/etc"):
        module = {"type": PREFIX + "Pooling", "path": folder}
        (tmp_path / "modules.json").write_text(json.dumps([module]))
        with pytest.raises(CorruptFile, match="outside the model"):
            read_sentence_settings(tmp_path)
    for length in (0, "9", True):
        write(tmp_path, mean, limits={"max_seq_length": length})
        with pytest.raises(CorruptFile, match="max_seq_length must be"):
            read_sentence_settings(tmp_path)


def test_the_model_goes_before_its_family() -> None:
    default = {"model_type": "encoder", "pooling_strategy": "cls", "normalize": True}
    assert embedding_metadata(default, None) == default
    found = embedding_metadata(default, SentenceSettings("mean", False, None))
    assert found == {"model_type": "encoder", "pooling_strategy": "mean", "normalize": False}
    found = embedding_metadata(None, SentenceSettings("last", True, None))
    assert found == {"model_type": "decoder", "pooling_strategy": "last", "normalize": True}
