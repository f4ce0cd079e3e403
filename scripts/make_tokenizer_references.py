"""Write tests/references/tokenizers: small tokenizer files and the ids their own libraries give.

Needs the packages sentencepiece, tiktoken and rwkv, which neither mlc_llm nor its tests import:

    python -m venv refs && refs/bin/pip install sentencepiece==0.2.3 tiktoken==0.14.0
    refs/bin/pip install --no-deps rwkv==0.8.32
    refs/bin/python scripts/make_tokenizer_references.py
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "tests" / "references" / "tokenizers"
CORPUS = json.loads((OUTPUT / "corpus.json").read_text(encoding="utf-8"))
SENTENCES: list[str] = CORPUS["sentences"]
WORDS = [word for sentence in SENTENCES for word in sentence.split()]
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = GPT4_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_texts() -> list[str]:
    """Return sentences, tricky texts and random mixtures of both."""
    draw = random.Random(1)
    tricky = CORPUS["tricky"]
    parts = [*tricky, *(word for sentence in SENTENCES for word in sentence.split(" "))]
    mixtures = [
        draw.choice(["", " ", "  ", "\n"]).join(draw.choices(parts, k=draw.randrange(2, 9)))
        for _ in range(120)
    ]
    return [*SENTENCES, "\n".join(SENTENCES), *tricky, *mixtures]


def train(sentences: list[str], **options: Any) -> bytes:
    """Return a trained SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 3),
        model_writer=model,
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


def write_sentencepiece(name: str, texts: list[str], options: Mapping[str, Any]) -> None:
    """Train a model; write it, and the ids of the texts."""
    content = train(SENTENCES, **options)
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    (OUTPUT / f"{name}.model").write_bytes(content)
    write_expected(name, texts, processor.encode, processor.decode)


def write_expected(
    name: str,
    texts: list[str],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
) -> None:
    """Write the ids of the texts, and what they decode to where that is another text."""
    ids = [encode(text) for text in texts]
    decoded = {n: decode(row) for n, row in enumerate(ids)}
    changed = {n: text for n, text in decoded.items() if text != texts[n]}
    write_json(f"{name}.json", {"ids": ids, "decoded": changed})


def write_json(name: str, content: Any) -> None:
    """Write a file, as small as may be."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    (OUTPUT / name).write_text(text + "\n")


def train_ranks(num_merges: int) -> dict[bytes, int]:
    """Return byte pairs merged by how often they come, as byte-level vocabularies are trained."""
    words = [list(bytes([byte]) for byte in f" {word}".encode()) for word in WORDS]
    words += [[b"\n", b"\n"], [b" "] * 4, [b" ", b" "], [b"a"] * 8] * 2
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _ in range(num_merges):
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[left + right] = len(ranks)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [left + right]
                at += 1
    return ranks


def write_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """Write ranks as tiktoken stores them."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path.write_text("".join(lines))


def write_tiktoken(texts: list[str]) -> None:
    """Write the ranks of one vocabulary, and what three ways to cut text make of them."""
    ranks = train_ranks(300)
    write_ranks(OUTPUT / "ranks.tiktoken", ranks)
    for name, split in (("gpt4", GPT4_SPLIT), ("qwen", QWEN_SPLIT), ("tekken", TEKKEN_SPLIT)):
        encoding = tiktoken.Encoding(name, pat_str=split, mergeable_ranks=ranks, special_tokens={})
        write_expected(f"tiktoken_{name}", texts, encoding.encode_ordinary, encoding.decode)


def write_rwkv(texts: list[str]) -> None:
    """Write a vocabulary as RWKV's authors do; tokens need no merges, so any bytes will do."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = {f" {word}"[:length] for word in WORDS for length in (3, 5, 20)}
    pieces = {word.encode() for word in words} | {b"\n\n", b"\r\n", b"'", b'"', "é".encode()}
    pieces |= {" 東京".encode()[:6], "😀".encode()[1:], "😀".encode()[:2], b"\\", b"aaaa"}
    tokens += sorted(pieces - set(tokens), key=lambda piece: (len(piece), piece))
    lines = []
    for number, token in enumerate(tokens, 1):
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{number} {literal} {len(token)}\n")
    path = OUTPUT / "rwkv_vocab_small.txt"
    path.write_text("".join(lines), encoding="utf-8")
    tokenizer = TRIE_TOKENIZER(str(path))
    write_expected("rwkv", texts, tokenizer.encode, tokenizer.decode)


def small_rules() -> str:
    """Return rules of normalization: lower letters, ligatures, a mark composed, one dropped."""
    rules = {chr(code): chr(code + 32) for code in range(65, 91)}
    rules |= {"ﬁ": "fi", "e\u0301": "é", "\u200b": "", "\t": " ", "\n": " ", "①": "1", "½": "1/2"}
    as_hex = (
        "\t".join(" ".join(f"{ord(character):X}" for character in side) for side in rule)
        for rule in rules.items()
    )
    return "\n".join(as_hex) + "\n"


def main() -> None:
    """Write everything."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    texts = make_texts()
    defined = [*texts, *CORPUS["with_defined"]]
    write_json("texts.json", {"plain": len(texts), "texts": defined})
    llama = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "vocab_size": 700,
    }
    symbols = {"user_defined_symbols": CORPUS["defined"]}
    no_prefix = {**llama, "add_dummy_prefix": False}
    unigram = {**llama, "model_type": "unigram", "vocab_size": 600}
    write_sentencepiece("bpe_bytes", texts, llama)
    write_sentencepiece("bpe_defined", defined, {**llama, **symbols})
    write_sentencepiece("bpe_no_prefix_defined", defined, {**no_prefix, **symbols})
    write_sentencepiece("unigram_bytes_defined", defined, {**unigram, **symbols})
    write_sentencepiece("unigram_nfkc", texts, {"model_type": "unigram", "vocab_size": 500})
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as rules:
        rules.write(small_rules())
        rules.flush()
        ruled = {"model_type": "bpe", "vocab_size": 500, "normalization_rule_tsv": rules.name}
        write_sentencepiece("bpe_rules_defined", defined, {**ruled, **symbols})
    write_tiktoken(texts)
    write_rwkv(texts)


if __name__ == "__main__":
    main()
