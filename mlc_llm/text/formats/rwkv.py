"""RWKV's world vocabulary: bytes, of which the longest token that fits is always taken.

Reads the text file of its authors (`rwkv_vocab_v20230424.txt`) and MLC LLM's `tokenizer_model`,
the same in MessagePack; writes the latter.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlc_llm.errors import CorruptFile

MSGPACK_NAME = "tokenizer_model"
TEXT_PATTERN = "rwkv_vocab*.txt"
END_OF_TEXT = "<|endoftext|>"  # id 0, which no file names
_MAX_TOKENS = 1 << 24


class RWKVVocabulary:
    """Tokens by their bytes; see `Vocabulary` in vocabulary.py for the methods."""

    decodes_bytes = True
    drops_first_space = False

    def __init__(
        self, tokens: Mapping[int, bytes], special: Mapping[str, int] | None = None
    ) -> None:
        """Keep the bytes by id, and the ids of special texts, which are matched whole."""
        self._tokens = dict(tokens)
        self._special = {END_OF_TEXT: 0} if special is None else dict(special)
        self.special_ids = frozenset(self._special.values())
        self._spelling = {
            n: token.decode("utf-8", "backslashreplace") for n, token in tokens.items()
        }
        self._spelling.update({token_id: text for text, token_id in self._special.items()})
        self._ids_by_spelling = {text: token_id for token_id, text in self._spelling.items()}
        self._ids = {token: token_id for token_id, token in self._tokens.items()}
        # First two bytes of a text -> lengths of tokens that may be there, the longest first.
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        self._split = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self._spelling, default=-1) + 1

    def encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], int]:
        """Return the ids and the number of special ones put behind the text, which is none."""
        ids: list[int] = []
        at = 0
        for match in self._split.finditer(text):
            ids += self._encode_bytes(text[at : match.start()].encode())
            ids.append(self._special[match[0]])
            at = match.end()
        return ids + self._encode_bytes(text[at:].encode()), 0

    def _encode_bytes(self, content: bytes) -> list[int]:
        ids, lengths, found = self._ids, self._lengths, []
        at, end = 0, len(content)
        while at < end:
            for length in lengths.get(content[at : at + 2], ()):
                token_id = ids.get(content[at : at + length])
                if token_id is not None:
                    break
            else:
                length, token_id = 1, ids[content[at : at + 1]]
            found.append(token_id)
            at += length
        return found

    def id_of(self, token: str) -> int | None:
        """Return the id of a token as `spelling_of` gives it, or None."""
        return self._ids_by_spelling.get(token)

    def spelling_of(self, token_id: int) -> str | None:
        """Return a token as text, bytes that are none as escapes; None for an unknown id."""
        return self._spelling.get(token_id)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token that is there; a special one has its text."""
        if token_id in self.special_ids:
            return self._spelling[token_id].encode()
        return self._tokens[token_id]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of known ids."""
        kept = (n for n in ids if not (skip_special_tokens and n in self.special_ids))
        return b"".join(self.bytes_of(token_id) for token_id in kept).decode("utf-8", "replace")

    def to_file(self) -> tuple[str, bytes]:
        """Return name and content of the file that `read_msgpack` reads."""
        return MSGPACK_NAME, _pack(self._tokens)


def read_vocabulary(path: Path) -> dict[int, bytes]:
    """Read either file. Raises CorruptFile where it is damaged."""
    content = path.read_bytes()
    try:
        tokens = _unpack(content) if path.name == MSGPACK_NAME else dict(_read_lines(content))
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise CorruptFile(
            f"{path} is not a vocabulary of RWKV ({error}); download the model again"
        ) from None
    check_tokens(tokens, str(path))
    return tokens


def check_tokens(tokens: Mapping[int, bytes], where: str) -> None:
    """Raise CorruptFile unless every byte is a token and none is there twice."""
    known = set(tokens.values())
    missing = [byte for byte in range(256) if bytes([byte]) not in known]
    if missing:
        raise CorruptFile(
            f"{where} has no token for byte {missing[0]:#04x}; it is cut short, download it again"
        )
    if len(known) != len(tokens) or b"" in known:
        raise CorruptFile(f"{where} has a token twice or an empty one; download the model again")


def _read_lines(content: bytes) -> list[tuple[int, bytes]]:
    """Return id and bytes of each line: an id, a Python literal of text or bytes, its length."""
    tokens = []
    for number, line in enumerate(content.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        token_id, _, rest = line.strip().partition(" ")
        literal, _, size = rest.rpartition(" ")
        value = ast.literal_eval(literal.strip())
        token = value.encode("utf-8") if isinstance(value, str) else value
        if not isinstance(token, bytes) or len(token) != int(size):
            raise ValueError(f"line {number} is not an id, a token and its length: {line[:60]!r}")
        tokens.append((_check_id(int(token_id)), token))
    return tokens


def _check_id(token_id: int) -> int:
    if not 0 <= token_id < _MAX_TOKENS:
        raise ValueError(f"a token has id {token_id}")
    return token_id


def _pack(tokens: Mapping[int, bytes]) -> bytes:
    """Return a MessagePack map of unsigned integers to byte strings."""
    parts = [b"\xdf" + len(tokens).to_bytes(4, "big")]
    for token_id, token in tokens.items():
        parts.append(b"\xce" + token_id.to_bytes(4, "big"))
        parts.append(b"\xc6" + len(token).to_bytes(4, "big") + token)
    return b"".join(parts)


def _unpack(content: bytes) -> dict[int, bytes]:
    """Return a MessagePack map of integers to byte or text strings, in any of its encodings."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        if at + size > len(content):
            raise ValueError(f"it ends at byte {len(content)}, inside a value")
        at += size
        return content[at - size : at]

    def number(size: int) -> int:
        return int.from_bytes(take(size), "big")

    def header(kinds: Mapping[int, int], fixed: range, what: str) -> int:
        """Return the number in a header: in its low bits, or in as many bytes as its kind says."""
        kind = number(1)
        if kind in fixed:
            return kind - fixed.start
        if kind not in kinds:
            raise ValueError(f"byte {at - 1} is {kind:#04x}, there should be {what}")
        return number(kinds[kind])

    tokens = {}
    for _ in range(header({0xDE: 2, 0xDF: 4}, range(0x80, 0x90), "a map")):
        token_id = header({0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}, range(0x80), "an id")
        sizes = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
        tokens[_check_id(token_id)] = take(header(sizes, range(0xA0, 0xC0), "bytes"))
    if at != len(content):
        raise ValueError(f"it goes on after its end, byte {at}")
    return tokens
