"""Tokenizer of a model directory: text to token ids and back, also token by token.

Knows the tokenizer files of Hugging Face and the `tokenizers` package; not chat templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mlc_llm.artifact import read_json_object
from mlc_llm.errors import CorruptFile, ModelNotFound, RequestError, UnsupportedModel
from mlc_llm.text.wordpiece import VOCAB_NAME, build_wordpiece

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
# Tokenizer classes whose vocab.json and merges.txt say all but how text is split into words.
_GPT2_CLASSES = ("", "GPT2Tokenizer", "GPT2TokenizerFast")
_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A character has at most 4 bytes, so after this many tokens an unfinished one never completes.
_MAX_HELD_TOKENS = 16
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


# Characters from which a text is worth the overhead of a batch.
_LONG_TEXT = 4096


class Tokenizer:
    """A model's tokenizer, with the settings of its `tokenizer_config.json`."""

    def __init__(self, inner: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
        # A stored limit or padding is meant for training batches; a prompt is taken as it is.
        inner.no_truncation()
        inner.no_padding()
        self.settings = settings
        self._inner = inner

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read the tokenizer of a model directory or artifact.

        Raises ModelNotFound where no tokenizer is, CorruptFile where it is damaged and
        UnsupportedModel for a format that has to be converted first.
        """
        settings = read_settings(directory)
        path = directory / TOKENIZER_NAME
        if path.is_file():
            return cls(_parse(path), settings)
        vocab, merges = directory / "vocab.json", directory / "merges.txt"
        if vocab.is_file() and merges.is_file():
            return cls(_build_byte_level(vocab, merges, settings), settings)
        if (directory / VOCAB_NAME).is_file():
            return cls(build_wordpiece(directory / VOCAB_NAME, settings), settings)
        for other in ("tokenizer.model", "tokenizer_model"):
            if (directory / other).is_file():
                raise UnsupportedModel(
                    f"{directory} has only {other}, which this release does not read; put the "
                    f"model's {TOKENIZER_NAME} beside it (the save_pretrained method of a "
                    "transformers tokenizer writes one) and try again"
                )
        raise ModelNotFound(
            f"{directory} has no tokenizer ({TOKENIZER_NAME}, vocab.json with merges.txt, or "
            f"{VOCAB_NAME}); download the whole model again"
        )

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id, added tokens included."""
        added = self._inner.get_added_tokens_decoder()
        return max(self._inner.get_vocab_size(), max(added, default=-1) + 1)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens the settings give, such as `bos_token`."""
        return special_tokens_of(self.settings)

    @property
    def bos_token(self) -> str | None:
        """The token a text begins with, if the model names one."""
        return _token_text(self.settings.get("bos_token"))

    @property
    def eos_token(self) -> str | None:
        """The token a text ends with, if the model names one."""
        return _token_text(self.settings.get("eos_token"))

    @property
    def bos_prefix(self) -> list[int]:
        """The ids to put before a plain text: the BOS id, or none if the model wants none."""
        bos_id = None if self.bos_token is None else self.token_to_id(self.bos_token)
        if bos_id is None:
            return []
        wanted = self.settings.get("add_bos_token")
        if not isinstance(wanted, bool):
            wanted = self.encode("", add_special_tokens=True)[:1] == [bos_id]
        return [bos_id] if wanted else []

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text. Raises RequestError if it is not valid Unicode."""
        ids: list[int] = self._encoding(text, add_special_tokens).ids
        return ids

    def encode_whole(self, text: str) -> tuple[list[int], int]:
        """Return the ids with special tokens, and how many of them were added after the text."""
        encoding = self._encoding(text, True)
        num_added = 0
        while num_added < len(encoding.ids) and encoding.special_tokens_mask[-1 - num_added]:
            num_added += 1
        return encoding.ids, num_added

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has half of a surrogate pair at character {error.start}; "
                "send valid Unicode"
            ) from None
        if len(text) < _LONG_TEXT:
            return self._inner.encode(text, add_special_tokens=add_special_tokens)
        # Unlike encode, lets other threads run meanwhile: megabytes take seconds.
        batch = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return batch[0]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids outside the vocabulary have none."""
        known = [token_id for token_id in ids if self.has_id(token_id)]
        return str(self._inner.decode(known, skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token given as the vocabulary spells it, or None."""
        token_id: int | None = self._inner.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, or None for an id that it has not."""
        if not 0 <= token_id < 1 << 32:
            return None
        token: str | None = self._inner.id_to_token(token_id)
        return token

    @property
    def is_byte_level(self) -> bool:
        """Whether the vocabulary spells bytes as characters, in GPT-2's way."""
        decoder = self._inner.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    def has_id(self, token_id: int) -> bool:
        """Say whether the vocabulary has a token of this id."""
        return self.id_to_token(token_id) is not None

    def stream(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> TokenStream:
        """Return a stream that turns ids into text one at a time.

        context: the ids before them, so that a text that goes on keeps the space it begins with.
        """
        return TokenStream(self, skip_special_tokens, context)

    def to_json(self) -> str:
        """Return the tokenizer as the text of one tokenizer.json."""
        return str(self._inner.to_str())


class TokenStream:
    """Text of a growing sequence of ids, in pieces that end between characters.

    The pieces joined are the decoding of all ids; what was spoken is never taken back. Works in
    bounded time and memory per id on any ids: `tokenizers.decoders.DecodeStream` does the same for
    well-formed text, but raises on byte sequences a model may produce and holds them unbounded.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, context: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # ids: ... spoken earlier ... | _context, the last piece | _held, not yet spoken
        # The context is decoded again with each id, since a decoder treats the first id its own
        # way (drops its space).
        self._context = [
            token_id for token_id in context[-_MAX_HELD_TOKENS:] if tokenizer.has_id(token_id)
        ]
        self._spoken = self._decode(self._context) if self._context else ""  # text of _context
        self._held: list[int] = []

    def put(self, token_id: int) -> str:
        """Take the next id; return the text it completes, which may be "" or come from several."""
        if not self._tokenizer.has_id(token_id):
            return ""
        self._held.append(token_id)
        piece = self._held_text()
        if len(self._held) < _MAX_HELD_TOKENS and (not piece or piece.endswith(_REPLACEMENT)):
            return ""
        if piece:
            self._context = self._held
            self._spoken = self._decode(self._context)
        self._held = []
        return piece

    def finish(self) -> str:
        """Return what is held back, an unfinished character as a replacement character."""
        piece = self._held_text()
        self._held = []
        return piece

    def _held_text(self) -> str:
        return self._decode([*self._context, *self._held])[len(self._spoken) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def detect_tokenizer_info(tokenizer_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `tokenizer_info` of a chat config from the content of a tokenizer.json."""
    decoder = list(_steps(tokenizer_json.get("decoder"), "decoders"))
    normalizer = list(_steps(tokenizer_json.get("normalizer"), "normalizers"))
    is_byte_level = any(step.get("type") == "ByteLevel" for step in decoder)
    return {
        "token_postproc_method": "byte_level" if is_byte_level else "byte_fallback",
        "prepend_space_in_encode": any(
            step.get("type") == "Prepend" and step.get("prepend") == "\N{LOWER ONE EIGHTH BLOCK}"
            for step in normalizer
        ),
        "strip_space_in_decode": any(
            step.get("type") == "Strip"
            and (step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0)
            for step in decoder
        ),
    }


def _steps(step: Any, children: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a decoder or normalizer, those inside a Sequence one by one."""
    if not isinstance(step, Mapping):
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for child in step.get(children) or []:
        yield from _steps(child, children)


def read_settings(directory: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, completed by special_tokens_map.json; {} if neither is."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", SETTINGS_NAME):
        if (directory / name).is_file():
            found = read_json_object(directory / name)
            settings.update({key: value for key, value in found.items() if value is not None})
    return settings


def special_tokens_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the named special tokens that settings give, such as `bos_token`."""
    named = ((name, _token_text(settings.get(name))) for name in _SPECIAL_TOKENS)
    return {name: text for name, text in named if text is not None}


def _token_text(value: Any) -> str | None:
    """Return the text of a token given as a string or as an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _parse(path: Path) -> tokenizers.Tokenizer:
    content = path.read_bytes()
    try:
        # From a text it would be copied twice more, and this is a large part of a start.
        return tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise CorruptFile(
            f"{path} is not a tokenizer ({error}); download or convert the model again"
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CorruptFile(f"{path} is not UTF-8 text; download the model again") from None


def _build_byte_level(
    vocab: Path, merges: Path, settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Build a byte-level BPE tokenizer from the two files older repositories have."""
    class_name = str(settings.get("tokenizer_class", ""))
    if class_name not in (*_GPT2_CLASSES, *_QWEN2_CLASSES):
        raise UnsupportedModel(
            f"{vocab.parent} has no {TOKENIZER_NAME}, and its tokenizer class {class_name!r} "
            "cannot be built from vocab.json and merges.txt; put the model's tokenizer.json there"
        )
    entries = read_json_object(vocab)
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in entries.values()):
        raise CorruptFile(f"{vocab} must map tokens to ids; download the model again")
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocab=entries, merges=_read_merges(merges)))
    except Exception as error:  # see _parse; e.g. a merge of tokens that are not in the vocabulary
        raise CorruptFile(
            f"{merges} does not fit {vocab.name} ({error}); download the model again"
        ) from None
    if class_name in _QWEN2_CLASSES:
        inner.normalizer = normalizers.NFC()
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        prefix_space = settings.get("add_prefix_space") is True
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    inner.decoder = decoders.ByteLevel()
    _add_tokens(inner, vocab.with_name("added_tokens.json"), settings)
    return inner


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise CorruptFile(f"{path} line {number} is not a pair of tokens: {line[:80]!r}")
        merges.append((left, right))
    return merges


def _add_tokens(inner: tokenizers.Tokenizer, added: Path, settings: Mapping[str, Any]) -> None:
    """Add the tokens that are matched whole, and check that they get the ids the model gave."""
    wanted = dict(read_json_object(added)) if added.is_file() else {}
    special = {text for name in _SPECIAL_TOKENS if (text := _token_text(settings.get(name)))}
    declared = settings.get("added_tokens_decoder")
    if isinstance(declared, Mapping):
        for token_id, token in declared.items():
            text = _token_text(token)
            if text is not None and str(token_id).isdigit():
                wanted[text] = int(token_id)
                if isinstance(token, Mapping) and token.get("special"):
                    special.add(text)
    for text in special:
        token_id = inner.token_to_id(text)
        if token_id is not None:
            wanted.setdefault(text, token_id)
    for text, token_id in sorted(wanted.items(), key=lambda item: str(item[1]).zfill(12)):
        inner.add_tokens([tokenizers.AddedToken(text, special=text in special, normalized=False)])
        if inner.token_to_id(text) != token_id:
            raise CorruptFile(
                f"{added.parent}: added token {text!r} should have id {token_id}, but the "
                f"vocabulary gives it {inner.token_to_id(text)}; download the model again"
            )
