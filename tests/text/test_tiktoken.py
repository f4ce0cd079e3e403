"""tiktoken's files of ranks and Mistral's tekken.json: ids as tiktoken gives them, bad files."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_references import DIRECTORY, load_qwen, load_with, read_reference

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.text.formats import tiktoken_file

RANKS = (DIRECTORY / "ranks.tiktoken").read_bytes()
NUM_RANKS = len(RANKS.splitlines())
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tekken(**changes: Any) -> dict[str, Any]:
    """Return a tekken.json with the ranks behind 30 special tokens."""
    tokens = [base64.b64decode(line.split()[0]) for line in RANKS.splitlines()]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    beyond = {"rank": NUM_RANKS, "token_bytes": base64.b64encode(b"beyond").decode()}
    config = {
        "pattern": TEKKEN_SPLIT,
        "num_vocab_tokens": len(vocab) + 1,
        "default_vocab_size": len(vocab) + 30,
        "default_num_special_tokens": 30,
        "version": "v3",
    }
    return {"config": config, "vocab": [*vocab, beyond], **changes}


def test_ids_of_qwen_equal_those_of_tiktoken(tmp_path: Path) -> None:
    tokenizer = load_qwen(tmp_path)
    reference = read_reference("tiktoken_qwen")
    for text, ids in zip(reference.texts, reference.ids, strict=True):
        if "\u0308" in text or "\u0301" in text:
            continue  # Qwen composes marks before it cuts
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.encode("a<|im_end|>")[-1] == NUM_RANKS + 1
    assert tokenizer.decode([NUM_RANKS, *tokenizer.encode("a")]) == "a"


def test_ids_of_glm_equal_those_of_tiktoken(tmp_path: Path) -> None:
    added = {str(NUM_RANKS): {"content": "[gMASK]", "special": True}}
    files: dict[str, Any] = {"tokenizer.model": RANKS}
    tokenizer = load_with(
        tmp_path, files, tokenizer_class="ChatGLM4Tokenizer", added_tokens_decoder=added
    )
    reference = read_reference("tiktoken_gpt4")
    for text, ids in zip(reference.texts, reference.ids, strict=True):
        assert tokenizer.encode(text) == ids
    assert tokenizer.encode("[gMASK]") == [NUM_RANKS]


def test_ids_of_tekken_equal_those_of_tiktoken(tmp_path: Path) -> None:
    tokenizer = load_with(tmp_path, {"tekken.json": json.dumps(make_tekken())})
    reference = read_reference("tiktoken_tekken")
    for text, ids in zip(reference.texts, reference.ids, strict=True):
        assert tokenizer.encode(text) == [token_id + 30 for token_id in ids]
    assert tokenizer.vocab_size == NUM_RANKS + 30
    assert tokenizer.encode("[INST]x[/INST]</s>")[::2] == [3, 4]
    assert tokenizer.token_to_id("<SPECIAL_29>") == 29
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.bos_prefix) == ("<s>", "</s>", [1])
    assert tokenizer.encode("x", add_special_tokens=True)[0] == 1


def test_tekken_names_its_special_tokens(tmp_path: Path) -> None:
    named = [{"rank": 0, "token_str": "<unk>"}, {"rank": 7, "token_str": "[THINK]"}]
    content = json.dumps(make_tekken(special_tokens=named))
    tokenizer = load_with(tmp_path, {"tekken.json": content})
    assert tokenizer.encode("[THINK]") == [7]
    assert tokenizer.token_to_id("<SPECIAL_1>") == 1
    assert tokenizer.bos_token is None


def test_special_token_that_is_also_spelled_by_ranks(tmp_path: Path) -> None:
    """The text of a special token is that token, and what merged to it before is left out."""
    lines = [*RANKS.splitlines(), *(base64.b64encode(t) + b" 0" for t in (b"<u", b"<unk>"))]
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
        for rank, token in enumerate(tokens)
    ]
    content = make_tekken(vocab=vocab)
    content["config"]["default_vocab_size"] = len(vocab) + 30
    tokenizer = load_with(tmp_path, {"tekken.json": json.dumps(content)})
    assert tokenizer.encode("<unk>") == [0]
    assert tokenizer.decode(tokenizer.encode("<un k>")) == "<un k>"


@pytest.mark.parametrize("name", ["Qwen", "Llama 3", "cl100k", "o200k", "GPT-2"])
def test_special_tokens_of_known_vocabularies(name: str) -> None:
    kinds = json.loads(Path(tiktoken_file.__file__).with_name("tiktoken.json").read_text())
    kind = tiktoken_file._Kind(name, **kinds[name])
    ids = {token.text: token.id for token in kind.added()}
    known = {
        "Qwen": {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|extra_204|>": 151850},
        "Llama 3": {"<|begin_of_text|>": 128000, "<|start_header_id|>": 128006,
                    "<|eot_id|>": 128009, "<|reserved_special_token_247|>": 128255},
        "cl100k": {"<|endoftext|>": 100257, "<|fim_suffix|>": 100260},
        "o200k": {"<|endoftext|>": 199999},
        "GPT-2": {"<|endoftext|>": 50256},
    }  # fmt: skip
    assert {text: ids[text] for text in known[name]} == known[name]


def test_every_known_vocabulary_can_be_cut() -> None:
    kinds = json.loads(Path(tiktoken_file.__file__).with_name("tiktoken.json").read_text())
    assert all(tiktoken_file.find_recipe(kind["pre"]) is not None for kind in kinds.values())


def test_llama_is_told_by_the_number_of_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {
        "Small": {"num_ranks": [NUM_RANKS], "pre": "llama-bpe", "first_special": NUM_RANKS,
                  "special": ["<|begin|>", ["<|more_{}|>", 0, 2]], "bos_token": "<|begin|>"}
    }  # fmt: skip
    (tmp_path / "kinds.json").write_text(json.dumps(kinds))
    monkeypatch.setattr(tiktoken_file, "_KINDS_PATH", tmp_path / "kinds.json")
    tokenizer = load_with(tmp_path / "model", {"tokenizer.model": RANKS})
    assert tokenizer.bos_prefix == [NUM_RANKS]
    assert tokenizer.encode("<|more_2|>") == [NUM_RANKS + 3]
    reference = read_reference("tiktoken_gpt4")
    assert [tokenizer.encode(text) for text in reference.texts] == reference.ids


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.tiktoken", RANKS, UnsupportedModel, "556 ranks.*known for the vocabularies of Qwen"),
        ("arcade100k.tiktoken", RANKS, UnsupportedModel, "StableLM 2, whose special tokens"),
        ("qwen.tiktoken", b"IQ== 0\n", CorruptFile, "no token for byte 0x00"),
        ("qwen.tiktoken", b"IQ== zero\n", CorruptFile, "line 1 is not a token and its rank"),
        ("qwen.tiktoken", b"IQ\n", CorruptFile, "line 1 is not a token and its rank"),
        ("qwen.tiktoken", b"IQ== 0\nIQ== 1\n", CorruptFile, "line 2 has a token that was there"),
        ("qwen.tiktoken", RANKS + b"aGVsbG8gaGVsbG8= 3\n", CorruptFile, "one rank to two tokens"),
        ("qwen.tiktoken", RANKS[: len(RANKS) // 4], CorruptFile, "line|byte"),
        ("tekken.json", b"{}", CorruptFile, "not a vocabulary of Mistral"),
        ("tekken.json", b"{", CorruptFile, "not valid JSON"),
        ("tekken.json", json.dumps(make_tekken(vocab=[{"rank": 0, "token_bytes": "?"}])).encode(),
         CorruptFile, "not a vocabulary of Mistral"),
        ("tekken.json", json.dumps(make_tekken(vocab=make_tekken()["vocab"][:99])).encode(),
         CorruptFile, "no token for byte"),
        ("tekken.json", json.dumps(make_tekken(special_tokens=[{"rank": 30, "token_str": "x"}]))
         .encode(), CorruptFile, "30 special tokens and names others"),
    ],
)  # fmt: skip
def test_bad_files(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_with(tmp_path, {name: content})


def test_pattern_that_is_no_pattern_is_a_corrupt_file(tmp_path: Path) -> None:
    content = make_tekken()
    content["config"]["pattern"] = "(["
    with pytest.raises(CorruptFile, match="is not a tokenizer"):
        load_with(tmp_path, {"tekken.json": json.dumps(content)})
