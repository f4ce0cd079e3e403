"""Byte-level vocabularies: bytes spelled as characters, and text cut by regular expressions.

How text is cut is stored nowhere but in programs, so `pretokenizers.json` holds it: recipes with
the names that GGUF files and converters give them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.text.formats.content import Frame, bpe_model, make_content

_RECIPES_PATH = Path(__file__).with_name("pretokenizers.json")


@dataclass(frozen=True)
class Recipe:
    """How text is cut into words before merging, and what goes with it.

    patterns: each cuts what the ones before left. ignore_merges: a word that is in the vocabulary
    is taken whole. add_bos: prompts begin with the BOS token where a file does not say.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


@functools.cache
def read_recipes() -> tuple[Recipe, ...]:
    """Return all recipes."""
    data: dict[str, dict[str, Any]] = json.loads(_RECIPES_PATH.read_text(encoding="utf-8"))
    return tuple(
        Recipe(**{**fields, "names": tuple(fields["names"]), "patterns": tuple(fields["patterns"])})
        for fields in data.values()
    )


def find_recipe(name: str) -> Recipe | None:
    """Return the recipe that goes by a name, or None."""
    return next((recipe for recipe in read_recipes() if name in recipe.names), None)


def recipe_names() -> list[str]:
    """Return every name of every recipe."""
    return [name for recipe in read_recipes() for name in recipe.names]


@functools.cache
def character_of_byte() -> tuple[str, ...]:
    """Return GPT-2's table: bytes that print stand for themselves, the others come from 256 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printing else next(others)) for byte in range(256))


@functools.cache
def byte_of_character() -> Mapping[str, int]:
    """Return the same table the other way."""
    return {character: byte for byte, character in enumerate(character_of_byte())}


def spell(content: bytes) -> str:
    """Return bytes as a byte-level vocabulary spells them."""
    table = character_of_byte()
    return "".join(table[byte] for byte in content)


def byte_level_content(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    recipe: Recipe,
    frame: Frame,
    *,
    add_prefix_space: bool = False,
) -> dict[str, Any]:
    """Return the content of a tokenizer.json for a byte-level vocabulary."""
    return make_content(
        bpe_model(vocab, merges, ignore_merges=recipe.ignore_merges),
        frame,
        normalizers=[{"type": "NFC"}] if recipe.nfc else [],
        pre_tokenizers=[
            *_splits(recipe.patterns),
            {
                "type": "ByteLevel",
                "add_prefix_space": add_prefix_space,
                "trim_offsets": True,
                "use_regex": False,
            },
        ],
        decoders=[
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        ],
    )


def _splits(patterns: Iterable[str]) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
