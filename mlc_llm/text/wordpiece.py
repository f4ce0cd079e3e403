"""WordPiece tokenizers of repositories that have BERT's `vocab.txt` alone.

Knows BERT's way to split and wrap texts, and which settings change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mlc_llm.errors import CorruptFile, UnsupportedModel

VOCAB_NAME = "vocab.txt"
_CLASSES = ("", "BertTokenizer", "BertTokenizerFast")
# Setting -> the token where the settings name none.
_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
_REQUIRED = ("unk_token", "cls_token", "sep_token")
_MAX_WORD_LEN = 100  # longer words are unknown, as in BERT


def build_wordpiece(path: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Build BERT's tokenizer: a line of `vocab.txt` is a token, its number from 0 is the id.

    Devlin et al. 2019. settings: those of tokenizer_config.json. Raises CorruptFile for files that
    cannot be vocabularies, UnsupportedModel for the tokenizer of another family.
    """
    class_name = str(settings.get("tokenizer_class", ""))
    if class_name not in _CLASSES:
        raise UnsupportedModel(
            f"{path.parent} has no tokenizer.json, and its tokenizer class {class_name!r} cannot "
            f"be built from {VOCAB_NAME}; put the model's tokenizer.json there"
        )
    vocab = _read_vocab(path)
    special = {name: _text_of(settings.get(name), text) for name, text in _SPECIAL_TOKENS.items()}
    for name in _REQUIRED:
        if special[name] not in vocab:
            raise CorruptFile(
                f"{path} has no token {special[name]!r} ({name}); download the model again"
            )
    inner = tokenizers.Tokenizer(
        models.WordPiece(
            vocab, unk_token=special["unk_token"], max_input_chars_per_word=_MAX_WORD_LEN
        )
    )
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True) is not False,
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True) is not False,
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, last = special["cls_token"], special["sep_token"]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(token, vocab[token]) for token in (first, last)],
    )
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(
        [
            tokenizers.AddedToken(token, normalized=False)
            for token in special.values()
            if token in vocab
        ]
    )
    return inner


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise CorruptFile(f"{path} is not UTF-8 text; download the model again") from None
    if lines and not lines[-1]:
        lines.pop()
    tokens = [line.rstrip("\r") for line in lines]
    # A token that comes twice has its last number, as in BERT's own reader.
    return {token: token_id for token_id, token in enumerate(tokens)}


def _text_of(value: Any, default: str) -> str:
    """Return a special token given as a string or as an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else default
