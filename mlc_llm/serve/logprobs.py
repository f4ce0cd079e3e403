"""Log-probabilities in OpenAI's two shapes: the list of chats, the columns of completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlc_llm.engine.request import TokenLogprobs
from mlc_llm.serve.generation import PlacedToken
from mlc_llm.serve.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from mlc_llm.serve.protocol.completions import CompletionLogprobs
from mlc_llm.text.token_bytes import TokenBytes

# JSON has no minus infinity; this is what OpenAI writes for "very unlikely".
_LEAST = -9999.0


def chat_logprobs(tokens: Iterable[PlacedToken], token_bytes: TokenBytes) -> ChatLogprobs:
    """Return the block of a chat's choice."""
    return ChatLogprobs(content=[_entry(token.logprobs, token_bytes) for token in tokens])


def _entry(found: TokenLogprobs, token_bytes: TokenBytes) -> TokenLogprob:
    raw = token_bytes.bytes_of(found.token_id)
    return TokenLogprob(
        token=_spell(raw),
        bytes=list(raw),
        logprob=max(found.logprob, _LEAST),
        top_logprobs=[_top_entry(*pair, token_bytes) for pair in found.top],
    )


def _top_entry(token_id: int, logprob: float, token_bytes: TokenBytes) -> TopLogprob:
    raw = token_bytes.bytes_of(token_id)
    return TopLogprob(token=_spell(raw), bytes=list(raw), logprob=max(logprob, _LEAST))


def _spell(raw: bytes, mark: str = "") -> str:
    r"""Return bytes as text, or as `\xf0\x9f` after a mark where they are no whole characters."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in raw)


class Columns:
    """Collects the columns of a completion's log-probabilities.

    num_top: how many likeliest tokens each place has; a place's own token is one more where it is
    not among them.
    """

    def __init__(self, num_top: int, token_bytes: TokenBytes) -> None:
        self._num_top = num_top
        self._token_bytes = token_bytes
        self._block = self._new()

    def _new(self) -> CompletionLogprobs:
        top_logprobs: list[dict[str, float] | None] | None = [] if self._num_top else None
        return CompletionLogprobs(
            text_offset=[], token_logprobs=[], tokens=[], top_logprobs=top_logprobs
        )

    def add_prompt(
        self, prompt: Sequence[int], starts: Sequence[int], found: Sequence[TokenLogprobs | None]
    ) -> None:
        """Add the tokens of a prompt, of which the first has no probability."""
        for token_id, start, entry in zip(prompt, starts, found, strict=True):
            self._add(token_id, start, entry)

    def add(self, tokens: Iterable[PlacedToken], offset: int) -> None:
        """Add tokens of an answer that begins at a character of the choice's text."""
        for token in tokens:
            self._add(token.logprobs.token_id, offset + token.start, token.logprobs)

    def _add(self, token_id: int, start: int, found: TokenLogprobs | None) -> None:
        self._block.tokens.append(self._name(token_id))
        self._block.text_offset.append(start)
        logprob = None if found is None else max(found.logprob, _LEAST)
        self._block.token_logprobs.append(logprob)
        if self._block.top_logprobs is None:
            return
        if found is None or logprob is None:
            self._block.top_logprobs.append(None)
            return
        # Likeliest first, so that of tokens spelled alike the likelier one stays.
        top: dict[str, float] = {}
        for other, value in found.top[: self._num_top]:
            top.setdefault(self._name(other), max(value, _LEAST))
        top.setdefault(self._name(token_id), logprob)
        self._block.top_logprobs.append(top)

    def _name(self, token_id: int) -> str:
        return _spell(self._token_bytes.bytes_of(token_id), "bytes:")

    def take(self) -> CompletionLogprobs:
        """Return what was added since the last time."""
        block, self._block = self._block, self._new()
        return block
