"""Tokenizer of a model directory: text to token ids and back, also token by token.

Knows what a text must be and which special tokens a model names; formats/ knows files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mlc_llm.errors import RequestError
from mlc_llm.text.formats.find import find_vocabulary
from mlc_llm.text.settings import read_settings, special_tokens_of, token_text
from mlc_llm.text.token_stream import TokenStream, decode_bytes, open_stream
from mlc_llm.text.vocabulary import (
    TOKENIZER_NAME,
    HuggingFaceVocabulary,
    Vocabulary,
    each_step,
)

__all__ = ["TOKENIZER_NAME", "Tokenizer", "detect_tokenizer_info"]


class Tokenizer:
    """A model's tokenizer, with the settings of its `tokenizer_config.json`."""

    def __init__(
        self,
        vocabulary: Vocabulary | tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        origin: Path | None = None,
        derived_settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the parts.

        origin: the file that holds all of the vocabulary, if there is one. derived_settings: those
        that are in no file of settings, but told by the vocabulary's.
        """
        if isinstance(vocabulary, tokenizers.Tokenizer):
            vocabulary = HuggingFaceVocabulary(vocabulary)
        self.settings = settings
        self.vocabulary: Vocabulary = vocabulary
        self.origin = origin
        self.derived_settings = dict(derived_settings or {})

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read the tokenizer of a model directory or artifact.

        Raises ModelNotFound where no tokenizer is, CorruptFile where it is damaged and
        UnsupportedModel for kinds of vocabulary that we do not know.
        """
        settings = read_settings(directory)
        found = find_vocabulary(directory, settings)
        derived = {name: value for name, value in found.settings.items() if name not in settings}
        origin = found.path if found.is_whole else None
        return cls(found.vocabulary, {**settings, **derived}, origin, derived)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id, added tokens included."""
        return self.vocabulary.size

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens the settings give, such as `bos_token`."""
        return special_tokens_of(self.settings)

    @property
    def bos_token(self) -> str | None:
        """The token a text begins with, if the model names one."""
        return token_text(self.settings.get("bos_token"))

    @property
    def eos_token(self) -> str | None:
        """The token a text ends with, if the model names one."""
        return token_text(self.settings.get("eos_token"))

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
        _check_text(text)
        return self.vocabulary.encode(text, add_special_tokens)[0]

    def encode_whole(self, text: str) -> tuple[list[int], int]:
        """Return the ids with special tokens, and how many of them were added after the text."""
        _check_text(text)
        return self.vocabulary.encode(text, True)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids outside the vocabulary have none.

        Bytes that are no characters become replacement characters, as few as may be.
        """
        known = [token_id for token_id in ids if self.has_id(token_id)]
        if self.vocabulary.decodes_bytes:
            return decode_bytes(self.vocabulary, known, skip_special_tokens)
        return self.vocabulary.decode(known, skip_special_tokens)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token, b"" for an id that the vocabulary does not have."""
        return self.vocabulary.bytes_of(token_id) if self.has_id(token_id) else b""

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token given as the vocabulary spells it, or None."""
        return self.vocabulary.id_of(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, or None for an id that it has not."""
        if not 0 <= token_id < 1 << 32:
            return None
        return self.vocabulary.spelling_of(token_id)

    def has_id(self, token_id: int) -> bool:
        """Say whether the vocabulary has a token of this id."""
        return self.id_to_token(token_id) is not None

    def stream(
        self,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
        shown: Collection[int] = (),
    ) -> CheckedStream:
        """Return a stream that turns ids into text one at a time.

        context: the ids before them, so that a text that goes on keeps the space it begins with.
        shown: special tokens that are not skipped.
        """
        known = [token_id for token_id in context if self.has_id(token_id)]
        return CheckedStream(self, open_stream(self.vocabulary, skip_special_tokens, known, shown))

    def to_file(self) -> tuple[str, bytes]:
        """Return name and content of a file from which `load` makes the same vocabulary."""
        return self.vocabulary.to_file()


class CheckedStream:
    """A stream of text that takes any ids; those outside the vocabulary bring nothing."""

    def __init__(self, tokenizer: Tokenizer, inner: TokenStream) -> None:
        self._has_id = tokenizer.has_id
        self._inner = inner

    def put(self, token_id: int) -> str:
        """Take the next id; return the text it completes, which may be "" or come from several."""
        return self._inner.put(token_id) if self._has_id(token_id) else ""

    def finish(self) -> str:
        """Return what is held back, an unfinished character as a replacement character."""
        return self._inner.finish()


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has half of a surrogate pair at character {error.start}; send valid Unicode"
        ) from None


def detect_tokenizer_info(tokenizer_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `tokenizer_info` of a chat config from the content of a tokenizer.json."""
    decoder = list(each_step(tokenizer_json.get("decoder"), "decoders"))
    normalizer = list(each_step(tokenizer_json.get("normalizer"), "normalizers"))
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
