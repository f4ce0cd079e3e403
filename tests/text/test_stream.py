"""Streams of text: whole characters, and nothing of a stop string."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import small_tokenizers

from mlc_llm.text.stream import TextStream
from mlc_llm.text.tokenizer import Tokenizer

LION, ACCENT = "\N{LION FACE}", "\N{LATIN SMALL LETTER E WITH ACUTE}"
TEXT = f"Once upon a time, there was a l{ACCENT}on {LION} in Sp{ACCENT}in."


@pytest.fixture(scope="module")
def tokenizer(stories260k: Path) -> Tokenizer:
    return Tokenizer.load(stories260k)


def read_all(stream: TextStream, tokens: list[int]) -> list[str]:
    """Return the piece of each token and, last, of the end; reads no further than a stop string."""
    pieces = []
    for token in tokens:
        pieces.append(stream.put(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def test_pieces_join_to_the_text_without_split_characters(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    pieces = read_all(TextStream(tokenizer, []), tokens)
    assert "".join(pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # The emoji is four byte tokens, three of which bring no text.
    assert pieces.count("") >= 3


def test_stop_string_is_never_shown_and_ends_the_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    stream = TextStream(tokenizer, ["was a", "zebra"])
    pieces = read_all(stream, tokens)
    assert stream.stopped
    assert stream.matched == "was a"
    assert "".join(pieces) == "Once upon a time, there "
    assert stream.finish() == ""
    assert len(pieces) < len(tokens)


def test_text_that_only_begins_a_stop_string_comes_later(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    stream = TextStream(tokenizer, ["time, thereafter"])
    pieces = read_all(stream, tokens)
    assert "".join(pieces) == TEXT
    assert not stream.stopped and stream.matched is None


def test_stop_string_of_part_of_a_token(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["pon"])
    assert "".join(read_all(stream, tokenizer.encode(TEXT))) == "Once u"


def test_stop_string_of_a_character_of_several_tokens(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [LION])
    text = "".join(read_all(stream, tokenizer.encode(TEXT)))
    assert text == TEXT.partition(LION)[0]


def test_unfinished_character_shows_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(f"a{LION}")[:-1]
    pieces = read_all(TextStream(tokenizer, []), tokens)
    assert set("".join(pieces)) == {"a", "\N{REPLACEMENT CHARACTER}"}
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[:-1])


def test_first_tokens_are_not_searched_for_stop_strings(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("one two one two")
    second = len(tokenizer.encode("one two"))
    stream = TextStream(tokenizer, ["two"], min_tokens=second)
    assert "".join(read_all(stream, tokens)) == "one two one "
    assert stream.stopped


def test_counts_tell_what_is_held_back(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["time, thereafter"])
    for token in tokenizer.encode("Once upon a time, there"):
        stream.put(token)
    assert stream.num_decoded - stream.num_passed == len("time, there")
    stream.finish()
    assert stream.num_decoded == stream.num_passed == len("Once upon a time, there")


def test_any_tokens_and_stop_strings_agree_with_the_whole_text(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(200):
        tokens = [draw.randrange(3, tokenizer.vocab_size) for _ in range(draw.randrange(1, 40))]
        whole = "".join(read_all(TextStream(tokenizer, []), tokens))
        first = draw.randrange(len(whole) + 1)
        stop = whole[first : first + draw.randrange(1, 6)] or "never"
        text = "".join(read_all(TextStream(tokenizer, [stop]), tokens))
        assert text == whole.partition(stop)[0]


def test_special_tokens_are_shown_where_they_are_wanted() -> None:
    tokenizer = Tokenizer(small_tokenizers.byte_level(), {})
    ids = [
        token for text in ("<|im_start|>", "he", "<|im_end|>") for token in tokenizer.encode(text)
    ]

    def text_of(*shown: int) -> str:
        stream = TextStream(tokenizer, [], shown=shown)
        return "".join([*(stream.put(token) for token in ids), stream.finish()])

    assert text_of() == "he"
    assert text_of(ids[0]) == "<|im_start|>he"
    assert text_of(*ids) == "<|im_start|>he<|im_end|>"
