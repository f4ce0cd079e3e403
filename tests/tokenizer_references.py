"""Small tokenizer files, and the ids that the libraries they are made for give to many texts.

`scripts/make_tokenizer_references.py` wrote them.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.text.tokenizer import Tokenizer

DIRECTORY = Path(__file__).with_name("references") / "tokenizers"
SENTENCEPIECE = sorted(path.stem for path in DIRECTORY.glob("*.model"))


@dataclass(frozen=True)
class Reference:
    """Texts, their ids, and what these decode to."""

    texts: list[str]
    ids: list[list[int]]
    decoded: list[str]


def read_reference(name: str) -> Reference:
    """Return what is stored under a name."""
    stored = json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    texts = json.loads((DIRECTORY / "texts.json").read_text(encoding="utf-8"))["texts"]
    texts = texts[: len(stored["ids"])]
    changed = stored["decoded"]
    decoded = [changed.get(str(number), text) for number, text in enumerate(texts)]
    return Reference(texts, stored["ids"], decoded)


def load_with(directory: Path, files: dict[str, str | bytes | Path], **settings: Any) -> Tokenizer:
    """Write files, given by content or copied from a path, and settings; load the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Tokenizer.load(directory)


def load_sentencepiece(directory: Path, name: str, **settings: Any) -> Tokenizer:
    """Load one of SENTENCEPIECE as a model directory has it."""
    return load_with(directory, {"tokenizer.model": DIRECTORY / f"{name}.model"}, **settings)


def load_qwen(directory: Path, **settings: Any) -> Tokenizer:
    """Load the small file of ranks as one of the first Qwen; special tokens follow the ranks."""
    num_ranks = len((DIRECTORY / "ranks.tiktoken").read_bytes().splitlines())
    texts = ["<|endoftext|>", "<|im_end|>"]
    added = {str(num_ranks + n): {"content": text, "special": True} for n, text in enumerate(texts)}
    values = {"tokenizer_class": "QWenTokenizer", "added_tokens_decoder": added, **settings}
    return load_with(directory, {"qwen.tiktoken": DIRECTORY / "ranks.tiktoken"}, **values)


def load_rwkv(directory: Path, **settings: Any) -> Tokenizer:
    """Load the small vocabulary of RWKV."""
    path = DIRECTORY / "rwkv_vocab_small.txt"
    return load_with(directory, {"rwkv_vocab_v20230424.txt": path}, **settings)
