"""What a GGUF file says of vectors and scores, as files of a sentence-transformers repository.

Knows the keys and tensors of such files. sentence_transformers.py reads the result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlc_llm.artifact import write_atomically
from mlc_llm.errors import UnsupportedModel
from mlc_llm.prepare.sentence_transformers import MODULES_NAME, SentenceSettings
from mlc_llm.weights.gguf_file import GGUFFile
from mlc_llm.weights.gguf_ranking import find_score_tokens

# llama.cpp's numbers of ways to make one vector of a text; 0 is none.
_POOLINGS = {1: "mean", 2: "cls", 3: "last"}


def read_gguf_settings(path: Path) -> SentenceSettings | None:
    """Return how vectors are made; None where a file is not for embeddings, or is a reranker.

    Vectors have the length 1, as llama.cpp makes them. Raises CorruptFile and UnsupportedModel.
    """
    file = GGUFFile(path)
    name = file.get("general.architecture", str)
    key = f"{name}.pooling_type"
    number = file.get(key, int, 0)
    if number == 0 or find_score_tokens(file) is not None:
        return None
    if number not in _POOLINGS:
        raise UnsupportedModel(
            f"{path} asks for pooling by the number {number} ({key}); this release pools by "
            f"{', '.join(_POOLINGS.values())}"
        )
    max_len = file.get(f"{name}.context_length", int)
    return SentenceSettings(_POOLINGS[number], is_normalized=True, max_len=max_len)


def write_sentence_files(path: Path, output: Path) -> None:
    """Write `modules.json` and the settings of modules, for models of embeddings and rerankers."""
    score_tokens = find_score_tokens(GGUFFile(path))
    if score_tokens is not None:
        yes, no = score_tokens
        modules = [("Transformer", ""), ("LogitScore", "1_LogitScore")]
        settings: dict[str, Any] = {"true_token_id": yes, "false_token_id": no}
    elif (found := read_gguf_settings(path)) is not None:
        modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
        settings = {"pooling_mode": "lasttoken" if found.pooling == "last" else found.pooling}
    else:
        return
    folder = output / modules[1][1]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", settings)
    _write(output / MODULES_NAME, [{"type": kind, "path": place} for kind, place in modules])


def _write(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
