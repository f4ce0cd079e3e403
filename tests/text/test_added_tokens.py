"""Tokens that settings add: those the file lacks, flags, ids in gaps, and contradictions."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
from tokenizer_references import load_sentencepiece, load_with

from mlc_llm.errors import CorruptFile
from mlc_llm.text.tokenizer import Tokenizer

SIZE = small_tokenizers.byte_level().get_vocab_size()


def load(directory: Path, added: dict[str, Any], **settings: Any) -> Tokenizer:
    small_tokenizers.write_tokenizer(directory, added_tokens_decoder=added, **settings)
    return Tokenizer.load(directory)


def test_tokens_that_the_file_lacks_are_added(tmp_path: Path) -> None:
    tokenizer = load(
        tmp_path,
        {
            "1": {"content": "<|im_start|>", "special": True},
            str(SIZE): {"content": "<tool>", "special": False},
            str(SIZE + 1): {"content": "<|end|>", "special": True, "rstrip": True},
        },
    )
    ids = tokenizer.encode("x<tool>y<|end|>  z")
    assert (ids[1], ids[3], len(ids)) == (SIZE, SIZE + 1, 5)
    assert tokenizer.decode(ids) == "x<tool>yz"
    assert tokenizer.vocab_size == SIZE + 2
    assert tokenizer.origin is None  # copying the file would lose them
    name, content = tokenizer.to_file()
    again = load_with(tmp_path / "again", {name: content})
    assert again.encode("x<tool>y<|end|>  z") == ids


def test_a_file_that_lacks_nothing_is_left_alone(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, {"1": {"content": "<|im_start|>", "special": True}})
    assert tokenizer.origin == tmp_path / "tokenizer.json"


def test_ids_may_have_gaps(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, {str(SIZE + 50): {"content": "<far>", "special": True}})
    assert tokenizer.encode("a<far>")[-1] == SIZE + 50
    assert tokenizer.vocab_size == SIZE + 51


def test_a_token_of_the_vocabulary_is_matched_whole(tmp_path: Path) -> None:
    inner = small_tokenizers.byte_level()
    spelled = inner.token_to_id("hell")
    tokenizer = load(tmp_path, {str(spelled): {"content": "hell", "special": True}})
    assert tokenizer.encode("xhellx")[1] == spelled
    assert tokenizer.decode(tokenizer.encode("xhellx")) == "xx"


def test_the_file_goes_before_settings_that_contradict_it(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, {"1": "<|renamed|>", str(SIZE): "<|im_end|>"})
    assert tokenizer.encode("<|im_start|><|im_end|>") == [1, 2]
    assert tokenizer.token_to_id("<|renamed|>") is None


def test_a_token_that_is_added_twice_is_refused(tmp_path: Path) -> None:
    added = {str(SIZE): "<tool>", str(SIZE + 1): "<tool>"}
    with pytest.raises(CorruptFile, match=rf"'<tool>' twice, with ids {SIZE} and {SIZE + 1}"):
        load(tmp_path, added)


@pytest.mark.parametrize("added", [{"x": "<tool>"}, {"-1": "<tool>"}, {"7": 3}, {"7": ""}])
def test_entries_that_are_none_are_refused(tmp_path: Path, added: dict[str, Any]) -> None:
    with pytest.raises(CorruptFile, match="no id and token"):
        load(tmp_path, added)


def test_added_tokens_of_a_sentencepiece_model(tmp_path: Path) -> None:
    size = load_sentencepiece(tmp_path / "plain", "bpe_bytes").vocab_size
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    tokenizer = load_sentencepiece(
        tmp_path / "more",
        "bpe_bytes",
        pad_token="<pad>",
        added_tokens_decoder={
            "2": {"content": "</s>", "special": True, "rstrip": True},
            str(size + 2): {"content": "<|end|>", "special": True},
        },
    )
    assert tokenizer.encode("<pad><|end|>") == [size, size + 2]
    assert tokenizer.decode([size, *tokenizer.encode("a b")]) == "a b"
    mark = tokenizer.token_to_id("\N{LOWER ONE EIGHTH BLOCK}")
    assert tokenizer.encode("</s>  x")[:2] == [2, mark]
    assert len(tokenizer.encode("</s>  x")) == 3  # the spaces went with the token


def test_contradictions_of_added_tokens(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 9999}')
    with pytest.raises(CorruptFile, match=r"'<pad>' twice: here with id 9999.*with 9998"):
        load_sentencepiece(tmp_path, "bpe_bytes", added_tokens_decoder={"9998": "<pad>"})
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<pad>": "1"}')
    with pytest.raises(CorruptFile, match="must map to an id"):
        load_sentencepiece(tmp_path, "bpe_bytes")
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 5}')
    with pytest.raises(CorruptFile, match="both have id 5"):
        load_sentencepiece(tmp_path, "bpe_bytes")


def test_a_gap_in_a_unigram_vocabulary_is_refused(tmp_path: Path) -> None:
    size = load_sentencepiece(tmp_path, "unigram_nfkc").vocab_size
    added = {str(size): {"content": "<x>", "special": True}}
    tokenizer = load_sentencepiece(tmp_path, "unigram_nfkc", added_tokens_decoder=added)
    assert tokenizer.encode("<x>") == [size]
    with pytest.raises(CorruptFile, match=rf"'<x>' should have id {size + 1}"):
        load_sentencepiece(tmp_path, "unigram_nfkc", added_tokens_decoder={str(size + 1): "<x>"})
