"""Streams of every kind of tokenizer: whole characters only, and together the whole decoding."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import small_tokenizers
from tokenizer_references import load_qwen, load_rwkv, load_sentencepiece, load_with

from mlc_llm.text.tokenizer import Tokenizer

MARK = "\N{REPLACEMENT CHARACTER}"
ALPHABET = [
    *(
        *"abc  \n",
        "東",
        "é",
        "e\u0301",
        "ä\u0323\u0302",
        "😀",
        "👨\u200d👩\u200d👧",
        "🇨🇭",
        "한",
        "ü",
    ),
    *("ﾊﾞ", "\u0000"),
]
KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "byte_level": lambda _: Tokenizer(small_tokenizers.byte_level(), {}),
    "byte_fallback": lambda _: Tokenizer(small_tokenizers.byte_fallback(), {}),
    "sentencepiece_bpe": lambda path: load_sentencepiece(path, "bpe_defined"),
    "sentencepiece_unigram": lambda path: load_sentencepiece(path, "unigram_bytes_defined"),
    "sentencepiece_no_prefix": lambda path: load_sentencepiece(path, "bpe_no_prefix_defined"),
    "tiktoken": load_qwen,
    "rwkv": load_rwkv,
    "wordpiece": lambda path: load_with(
        path, {"vocab.txt": "\n".join(["[UNK]", "[CLS]", "[SEP]", "a", "b", "##b", "##c", "東"])}
    ),
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return KINDS[request.param](tmp_path)


def pieces_of(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    stream = tokenizer.stream(context=context or [])
    return [*(stream.put(token_id) for token_id in ids), stream.finish()]


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice(ALPHABET) for _ in range(draw.randrange(30)))


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_valid_text_are_whole_and_join_to_it(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        ids = tokenizer.encode(random_text(draw))
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any(MARK in piece for piece in pieces)
        assert pieces[-1] == ""


def test_text_comes_back_from_vocabularies_that_hold_every_byte(tmp_path: Path) -> None:
    draw = random.Random(9)
    texts = [random_text(draw) for _ in range(100)]
    for name, make in KINDS.items():
        if name in ("wordpiece", "tiktoken"):  # these change texts before cutting them
            continue
        tokenizer = make(tmp_path / name)
        for text in texts:
            assert tokenizer.decode(tokenizer.encode(text)) == text, name


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_any_ids_join_to_their_decoding(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    size = tokenizer.vocab_size
    for _ in range(100):
        # Random ids have many bytes that are no characters; texts in between have whole ones.
        ids: list[int] = []
        while len(ids) < 20:
            if draw.random() < 0.5:
                ids += tokenizer.encode(random_text(draw))
            ids += [draw.randrange(-1, size + 2) for _ in range(draw.randrange(5))]
        if tokenizer.vocabulary.decodes_bytes:
            assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_bytes_that_are_no_characters_do_not_spoil_those_around(tokenizer: Tokenizer) -> None:
    if not tokenizer.vocabulary.decodes_bytes:
        return
    lion = tokenizer.encode("a😀")
    lone = next(n for n in range(tokenizer.vocab_size) if tokenizer.bytes_of(n) == b"\xf0")
    assert tokenizer.decode([*lion, lone, *lion[-1:]]).startswith(f"a😀{MARK}")
    assert pieces_of(tokenizer, [*lion, lone])[-1] == MARK
    assert "".join(pieces_of(tokenizer, [*lion, lone])) == f"a😀{MARK}"


def test_decoding_equals_that_of_the_tokenizers_package(tmp_path: Path) -> None:
    import tokenizers

    draw = random.Random(11)
    for name, make in KINDS.items():
        tokenizer = make(tmp_path / name)
        if name == "rwkv":
            continue
        inner = tokenizers.Tokenizer.from_buffer(tokenizer.to_file()[1])
        for _ in range(50):
            ids = tokenizer.encode(random_text(draw))
            assert tokenizer.decode(ids) == inner.decode(ids), name
            assert tokenizer.decode(ids, False) == inner.decode(ids, skip_special_tokens=False)


def test_a_text_that_goes_on_keeps_its_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b a b")
    half = len(ids) // 2
    first, rest = tokenizer.decode(ids[:half]), "".join(
        pieces_of(tokenizer, ids[half:], ids[:half])
    )  # fmt: skip
    assert first + rest == tokenizer.decode(ids)


def test_a_character_begun_in_the_context_is_finished(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("b😀")
    if len(ids) < 3 or not tokenizer.vocabulary.decodes_bytes:
        return
    assert "".join(pieces_of(tokenizer, ids[-1:], ids[:-1])) == "😀"
