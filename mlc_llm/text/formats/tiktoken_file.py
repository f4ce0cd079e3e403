"""Turns tiktoken's files of ranks, and Mistral's tekken.json, into the content of a tokenizer.json.

Neither kind of file says all: tiktoken's leaves out how text is cut and what special tokens there
are. `tiktoken.json` says so for the vocabularies of models.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.artifact import read_json_object
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.text.formats.byte_level import Recipe, byte_level_content, find_recipe, spell
from mlc_llm.text.formats.content import Added, Frame, all_merges

_KINDS_PATH = Path(__file__).with_name("tiktoken.json")
# The special tokens of tekken.json files that do not list them, from id 0.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
Content = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class _Kind:
    """A vocabulary of a model: how it is recognized, and what its file does not say."""

    name: str
    pre: str
    files: Sequence[str] = ()
    classes: Sequence[str] = ()
    num_ranks: Sequence[int] = ()
    first_special: int = 0
    special: Sequence[Any] = ()  # texts, and [text with {}, first, last] for several
    bos_token: str | None = None
    eos_token: str | None = None

    def added(self) -> list[Added]:
        """Return the special tokens."""
        texts: list[str] = []
        for entry in self.special:
            if isinstance(entry, str):
                texts.append(entry)
            else:
                template, first, last = entry
                texts += [template.format(number) for number in range(first, last + 1)]
        return [Added(self.first_special + number, text) for number, text in enumerate(texts)]


def looks_like_tiktoken(content: bytes) -> bool:
    """Say whether a file begins with a base64 text and a number, as files of ranks do."""
    line = content[:1024].split(b"\n", 1)[0].split()
    return len(line) == 2 and line[1].isdigit() and _decode(line[0]) is not None


def tiktoken_content(path: Path, settings: Mapping[str, Any]) -> Content:
    """Return the content of a tokenizer.json, and what is known of its special tokens.

    settings: of tokenizer_config.json; its class helps to tell the kind, its added tokens go before
    those known here. Raises UnsupportedModel for a vocabulary of an unknown model, CorruptFile.
    """
    ranks = _read_ranks(path)
    kind = _find_kind(path, len(ranks), str(settings.get("tokenizer_class") or ""))
    declared = settings.get("added_tokens_decoder")
    if not kind.special and not declared:
        raise UnsupportedModel(
            f"{path} is a vocabulary of {kind.name}, whose special tokens it does not name; put "
            "the model's tokenizer_config.json beside it, with its added_tokens_decoder"
        )
    added = [] if declared else kind.added()
    recipe = find_recipe(kind.pre)
    assert recipe is not None, kind.pre
    names = {"bos_token": kind.bos_token, "eos_token": kind.eos_token}
    found = {name: text for name, text in names.items() if text is not None}
    # tiktoken takes a word that has a rank as it is.
    recipe = dataclasses.replace(recipe, ignore_merges=True)
    return _content(path, ranks, recipe, added, found, settings)


def tekken_content(path: Path, settings: Mapping[str, Any]) -> Content:
    """Return the content of a tokenizer.json, and the special tokens, of a tekken.json.

    Its ranks begin behind the special tokens. Raises CorruptFile.
    """
    data = read_json_object(path)
    try:
        config = data["config"]
        num_special = int(config["default_num_special_tokens"])
        num_ranks = int(config["default_vocab_size"]) - num_special
        patterns = (str(config["pattern"]),)
        ranks = {
            base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"])
            for entry in data["vocab"][:num_ranks]
        }
        listed = data.get("special_tokens") or [
            {"rank": rank, "token_str": text} for rank, text in enumerate(_TEKKEN_SPECIAL)
        ]
        named = {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"{path} is not a vocabulary of Mistral ({error!r}); download the model again"
        ) from None
    _check_ranks(path, ranks)
    if num_special < 0 or any(not 0 <= rank < num_special for rank in named):
        raise CorruptFile(
            f"{path} says it has {num_special} special tokens and names others; fetch it again"
        )
    added = [Added(n, named.get(n, f"<SPECIAL_{n}>")) for n in range(num_special)]
    texts = {token.text for token in added}
    standard = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    found = {name: text for name, text in standard.items() if text in texts}
    recipe = Recipe((), patterns, ignore_merges=True)
    shifted = {token: rank + num_special for token, rank in ranks.items()}
    return _content(path, shifted, recipe, added, found, settings)


def _content(
    path: Path,
    id_of: Mapping[bytes, int],
    recipe: Recipe,
    added: Sequence[Added],
    found: Mapping[str, str],
    settings: Mapping[str, Any],
) -> Content:
    special = {token.text: token.id for token in added}
    if len(special) != len(added):
        raise CorruptFile(f"{path} has a special token twice; download the model again")
    if taken := set(special.values()) & set(id_of.values()):
        raise CorruptFile(f"{path}: id {min(taken)} is a special token's and another's")
    ranked = sorted((token for token in id_of if len(token) > 1), key=id_of.__getitem__)
    vocab = {spell(token): token_id for token, token_id in id_of.items()}
    merges = [(spell(left), spell(right)) for left, right in all_merges(ranked, id_of)]
    if clashing := vocab.keys() & special.keys():
        # Text that is spelled as a special token is that token, whatever merges would make.
        merges = [pair for pair in merges if not clashing & {*pair, "".join(pair)}]
    bos = special.get(found.get("bos_token", ""))
    first = [bos] if bos is not None and settings.get("add_bos_token", True) else []
    spelling = {token.id: token.text for token in added}
    content = byte_level_content(
        {**vocab, **special}, merges, recipe, Frame(added, first, spelling=spelling)
    )
    return content, {**found, "add_bos_token": bool(first)}


def _find_kind(path: Path, num_ranks: int, class_name: str) -> _Kind:
    data = json.loads(_KINDS_PATH.read_text(encoding="utf-8"))
    kinds = [_Kind(name, **fields) for name, fields in data.items()]
    signs: Iterator[list[_Kind]] = iter(
        [
            [kind for kind in kinds if class_name.removesuffix("Fast") in kind.classes],
            [kind for kind in kinds if path.name in kind.files],
            [kind for kind in kinds if num_ranks in kind.num_ranks],
        ]
    )
    for found in signs:
        if found:
            return found[0]
    raise UnsupportedModel(
        f"{path} has {num_ranks:,} ranks and does not say how text is cut; that is known for the "
        f"vocabularies of {', '.join(kind.name for kind in kinds)}: put the model's tokenizer.json "
        "beside it"
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        token, _, rank = line.strip().partition(b" ")
        content = _decode(token)
        if content is None or not rank.isdigit() or len(rank) > 9:
            raise CorruptFile(
                f"{path} line {number} is not a token and its rank: {line[:60]!r}; "
                "download the model again"
            )
        if content in ranks:
            raise CorruptFile(f"{path} line {number} has a token that was there before; {line!r}")
        ranks[content] = int(rank)
    _check_ranks(path, ranks)
    return ranks


def _check_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    if len(set(ranks.values())) != len(ranks) or any(rank < 0 for rank in ranks.values()):
        raise CorruptFile(f"{path} gives one rank to two tokens; download the model again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CorruptFile(
            f"{path} has no token for byte {missing[0]:#04x}; it is cut short, download it again"
        )


def _decode(token: bytes) -> bytes | None:
    try:
        return base64.b64decode(token, validate=True) or None
    except binascii.Error:
        return None
