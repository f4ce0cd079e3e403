"""Byte-level vocabularies in two files: vocab.json has the tokens, merges.txt how they are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlc_llm.artifact import read_json_object
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.text.formats.byte_level import byte_level_content, find_recipe
from mlc_llm.text.formats.content import Frame

VOCAB_NAME, MERGES_NAME = "vocab.json", "merges.txt"
# The files say all but how text is cut into words; the class of the tokenizer tells that.
_RECIPE_OF_CLASS = {
    "": "gpt-2",
    "GPT2Tokenizer": "gpt-2",
    "CodeGenTokenizer": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
}


def two_files_content(vocab: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer.json. Raises UnsupportedModel and CorruptFile.

    vocab: the path of vocab.json, beside which merges.txt is. settings: of tokenizer_config.json.
    """
    class_name = str(settings.get("tokenizer_class") or "")
    name = _RECIPE_OF_CLASS.get(class_name.removesuffix("Fast"))
    recipe = None if name is None else find_recipe(name)
    if recipe is None:
        raise UnsupportedModel(
            f"{vocab.parent} has no tokenizer.json, and its tokenizer class {class_name!r} cannot "
            f"be built from {VOCAB_NAME} and {MERGES_NAME}; put the model's tokenizer.json there"
        )
    entries = read_json_object(vocab)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in entries.values()):
        raise CorruptFile(f"{vocab} must map tokens to ids; download the model again")
    merges = _read_merges(vocab.with_name(MERGES_NAME))
    for number, (left, right) in enumerate(merges):
        if not {left, right, left + right} <= entries.keys():
            raise CorruptFile(
                f"{vocab.with_name(MERGES_NAME)} does not fit {VOCAB_NAME}: pair {number}, "
                f"{left[:40]!r} {right[:40]!r}, is not of its tokens; download the model again"
            )
    return byte_level_content(
        entries,
        merges,
        recipe,
        Frame(),
        add_prefix_space=settings.get("add_prefix_space") is True,
    )


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CorruptFile(f"{path} is not UTF-8 text; download the model again") from None
    merges = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise CorruptFile(f"{path} line {number} is not a pair of tokens: {line[:80]!r}")
        merges.append((left, right))
    return merges
