"""The tokenizer: files it reads, special tokens, and text that streams out whole."""

import json
import random
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small_tokenizers
import tokenizer_references
import tokenizers

from mlc_llm.artifact import read_json_object
from mlc_llm.errors import CorruptFile, ModelNotFound, RequestError, UnsupportedModel
from mlc_llm.text.tokenizer import Tokenizer, detect_tokenizer_info

TEXTS = ["hello", "", " two  spaces ", "Zürich 東京 😀👨‍👩‍👧 é", "a\n\tb\x00", "\ufffd kept \ufffd"]


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    inner = getattr(small_tokenizers, request.param)()
    return Tokenizer.load(small_tokenizers.write_tokenizer(tmp_path, inner))


def stream_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.put(token_id) for token_id in ids) + stream.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert stream_text(tokenizer, ids) == text


def test_stream_equals_decode_on_random_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    alphabet = "ab hello\n東é😀\u0301ß"
    for _ in range(200):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))
        ids = tokenizer.encode(text)
        assert stream_text(tokenizer, ids) == tokenizer.decode(ids) == text


def test_stream_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.put(token_id) for token_id in tokenizer.encode("a 東😀 b")]
    assert "".join(pieces) == "a 東😀 b"
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""


def test_stream_flushes_an_unfinished_character_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.put(token_id) for token_id in ids) == "a"
    assert stream.finish() == "\ufffd" * tokenizer.decode(ids).count("\ufffd") != ""
    assert stream.finish() == ""


@pytest.mark.parametrize("seed", range(5))
def test_stream_takes_any_ids(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    size = tokenizer.vocab_size
    odd = [-1, size, size + 7, 1 << 31, 1 << 32, 1 << 70]
    ids = [rng.choice(odd) if rng.random() < 0.1 else rng.randrange(size) for _ in range(500)]
    assert stream_text(tokenizer, ids) == tokenizer.decode(ids)


def test_stream_ignores_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    ids = tokenizer.encode("a b")
    pieces = [stream.put(token_id) for token_id in [ids[0], 10**9, -5, *ids[1:]]]
    assert "".join(pieces) + stream.finish() == "a b"
    assert tokenizer.decode([10**9, -5]) == ""


def test_stream_holds_a_bounded_number_of_tokens() -> None:
    inner = small_tokenizers.byte_level()
    stream = Tokenizer(inner, {}).stream()
    lone_byte = Tokenizer(inner, {}).encode("é")[1]
    spoken = [stream.put(lone_byte) for _ in range(1000)]
    assert spoken == ["\ufffd"] * 1000


def test_stream_leaves_out_special_tokens_unless_asked() -> None:
    tokenizer = Tokenizer(small_tokenizers.byte_level(), {})
    ids = tokenizer.encode("hi<|im_end|>x")
    assert stream_text(tokenizer, ids) == "hix"
    shown = tokenizer.stream(skip_special_tokens=False)
    assert "".join(shown.put(token_id) for token_id in ids) == "hi<|im_end|>x"


def test_space_after_many_textless_tokens_is_kept() -> None:
    tokenizer = Tokenizer(small_tokenizers.byte_fallback(), {})
    word = tokenizer.encode("a")
    ids = [*word, *[2] * 40, *tokenizer.encode("th")]
    assert stream_text(tokenizer, ids) == "a th"


def test_special_tokens_come_as_text_or_objects(tmp_path: Path) -> None:
    small_tokenizers.write_tokenizer(
        tmp_path, bos_token={"content": "<|im_start|>", "lstrip": False}, eos_token="<|im_end|>"
    )
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.special_tokens["pad_token"] == "<|endoftext|>"
    assert "unk_token" not in tokenizer.special_tokens
    assert tokenizer.token_to_id("<|im_end|>") == 2
    assert tokenizer.token_to_id("no such token") is None


@pytest.mark.parametrize(
    ("settings", "prefix"),
    [
        ({"bos_token": "<s>", "add_bos_token": True}, [1]),
        ({"bos_token": "<s>", "add_bos_token": False}, []),
        ({"bos_token": "<s>"}, []),
        ({"bos_token": "<no such token>", "add_bos_token": True}, []),
        ({"add_bos_token": True}, []),
    ],
)
def test_bos_prefix_follows_the_settings(
    tmp_path: Path, settings: dict[str, object], prefix: list[int]
) -> None:
    small_tokenizers.write_tokenizer(tmp_path, small_tokenizers.byte_fallback(), **settings)
    assert Tokenizer.load(tmp_path).bos_prefix == prefix


def test_bos_prefix_follows_the_post_processor(tmp_path: Path) -> None:
    inner = small_tokenizers.byte_fallback()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    small_tokenizers.write_tokenizer(tmp_path, inner, bos_token="<s>")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_prefix == [1]
    assert tokenizer.encode("a", add_special_tokens=True)[0] == 1
    assert tokenizer.encode("a")[0] != 1


def test_stored_truncation_does_not_cut_prompts(tmp_path: Path) -> None:
    inner = small_tokenizers.byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    small_tokenizers.write_tokenizer(tmp_path, inner)
    assert len(Tokenizer.load(tmp_path).encode("xyz" * 10)) == 30


def test_vocab_size_counts_up_to_the_highest_added_token(tmp_path: Path) -> None:
    inner = small_tokenizers.byte_level()
    content = json.loads(inner.to_str())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 900, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    highest = tokenizer.token_to_id("<far>")
    assert highest is not None and tokenizer.vocab_size == highest + 1


def test_long_texts_have_the_same_tokens_and_let_threads_run(tokenizer: Tokenizer) -> None:
    text = "Once upon a time, Ünïcödé 🙂 " * 20_000
    ticks: list[float] = []
    is_done = threading.Event()

    def tick() -> None:
        while not is_done.wait(0.005):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    ids = tokenizer.encode(text, add_special_tokens=True)
    duration_s = time.perf_counter() - start
    is_done.set()
    thread.join()
    inner = tokenizers.Tokenizer.from_buffer(tokenizer.to_file()[1])
    assert ids == inner.encode(text, add_special_tokens=True).ids
    longest_s = max(np.diff([start, *ticks]), default=duration_s)
    assert longest_s < max(duration_s / 2, 0.05)


def test_half_a_surrogate_pair_is_a_request_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate pair at character 2"):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("cut", [0, 1, 100, 2000, -1])
def test_damaged_tokenizer_is_a_corrupt_file(tmp_path: Path, cut: int) -> None:
    text = small_tokenizers.byte_level().to_str()
    path = tmp_path / "tokenizer.json"
    path.write_text(text[:cut], encoding="utf-8")
    with pytest.raises(CorruptFile, match=re.escape(str(path))):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "Magic"}}'])
def test_other_content_is_a_corrupt_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptFile, match="again"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["bpe_rules_defined", "unigram_bytes_defined"])
def test_random_damage_of_tokenizer_json_never_escapes(tmp_path: Path, name: str) -> None:
    whole = tokenizer_references.load_sentencepiece(tmp_path, name).to_file()[1]
    draw = random.Random(6)
    num_refused = 0
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        try:
            tokenizer = tokenizer_references.load_with(
                tmp_path / "damaged", {"tokenizer.json": bytes(content)}
            )
            tokenizer.decode(tokenizer.encode("some text"))
        except CorruptFile:
            num_refused += 1
    assert 20 < num_refused < 100


def test_damaged_settings_are_a_corrupt_file(tmp_path: Path) -> None:
    small_tokenizers.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CorruptFile, match="tokenizer_config"):
        Tokenizer.load(tmp_path)


def test_missing_and_foreign_tokenizers_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(CorruptFile, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def write_two_files(directory: Path, **settings: object) -> None:
    model = json.loads(small_tokenizers.byte_level().to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_two_file_tokenizer_is_built(tmp_path: Path, class_name: str) -> None:
    size = small_tokenizers.byte_level().get_vocab_size()
    added = {
        "1": {"content": "<|im_start|>", "special": True},
        "2": {"content": "<|im_end|>", "special": True},
        str(size): {"content": "<tool>", "special": False},
    }
    write_two_files(
        tmp_path,
        tokenizer_class=class_name,
        added_tokens_decoder=added,
        eos_token="<|endoftext|>",
    )
    tokenizer = Tokenizer.load(tmp_path)
    text = "hello 東京 <|im_start|>x<tool><|endoftext|>"
    ids = tokenizer.encode(text)
    whole = small_tokenizers.byte_level().encode("hello 東京 <|im_start|>x").ids
    assert ids == [*whole, size, 0]
    assert tokenizer.decode(ids) == "hello 東京 x<tool>"
    name, content = tokenizer.to_file()
    (tmp_path / name).write_bytes(content)
    assert Tokenizer.load(tmp_path).encode(text) == ids


def test_two_file_tokenizer_of_unknown_class_is_refused(tmp_path: Path) -> None:
    write_two_files(tmp_path, tokenizer_class="CLIPTokenizer")
    with pytest.raises(UnsupportedModel, match="CLIPTokenizer"):
        Tokenizer.load(tmp_path)


def test_two_file_tokenizer_checks_its_files(tmp_path: Path) -> None:
    write_two_files(tmp_path, added_tokens_decoder={"7": {"content": "<|im_start|>"}})
    with pytest.raises(CorruptFile, match=r"<\|im_start\|>.*id 7"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("h e\nqq zz\n")
    with pytest.raises(CorruptFile, match=r"merges\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("alone\n")
    with pytest.raises(CorruptFile, match="line 1"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    with pytest.raises(CorruptFile, match="tokens to ids"):
        Tokenizer.load(tmp_path)


def test_stories_tokenizer(stories260k: Path) -> None:
    tokenizer = Tokenizer.load(stories260k)
    assert (tokenizer.vocab_size, tokenizer.bos_token, tokenizer.bos_prefix) == (512, "<s>", [1])
    expected = (stories260k / "expected.txt").read_text(encoding="utf-8")
    assert stream_text(tokenizer, tokenizer.encode(expected)) == expected
    assert detect_tokenizer_info(read_json_object(stories260k / "tokenizer.json")) == {
        "token_postproc_method": "byte_fallback",
        "prepend_space_in_encode": True,
        "strip_space_in_decode": True,
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"decoder": {"type": "ByteLevel"}}, ("byte_level", False, False)),
        (
            {"decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}},
            ("byte_level", False, False),
        ),
        ({"decoder": {"type": "ByteFallback"}}, ("byte_fallback", False, False)),
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, ("byte_fallback", True, False)),
        (
            {"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0}},
            ("byte_fallback", False, True),
        ),
        (
            {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}},
            ("byte_fallback", False, False),
        ),
        ({"decoder": None, "normalizer": None}, ("byte_fallback", False, False)),
    ],
)
def test_tokenizer_info(content: dict[str, object], expected: tuple[str, bool, bool]) -> None:
    assert tuple(detect_tokenizer_info(content).values()) == expected
