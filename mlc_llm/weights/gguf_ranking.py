"""Rerankers in GGUF files, of Qwen3-Reranker's kind: the head's rows of two answers stand alone.

llama.cpp scores by these rows; we by the same rows of the head that the model was trained with.
"""

from __future__ import annotations

import numpy as np

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.weights.gguf_file import GGUFFile

ANSWERS_NAME = "cls.output.weight"
_RANK = 4  # llama.cpp's number among ways of pooling
_ANSWERS = ["yes", "no"]
# Cosine of rows that are the same but for their encodings; of other rows it is near 0.
_SAME = 0.9


def find_score_tokens(file: GGUFFile) -> tuple[int, int] | None:
    """Return the tokens for yes and no of a reranker, None for other models.

    Raises UnsupportedModel for rerankers of another kind, CorruptFile where a token is not there.
    """
    name = file.get("general.architecture", str)
    if file.get(f"{name}.pooling_type", int, 0) != _RANK:
        return None
    answers = file.get(f"{name}.classifier.output_labels", list)
    if name != "qwen3" or answers not in (None, _ANSWERS):
        labels = "" if answers is None else f" that answers {answers!r:.60}"
        raise UnsupportedModel(
            f"{file.path} is a reranker of architecture {name}{labels}; only those are supported "
            "that, like Qwen3-Reranker, answer 'yes' and 'no'"
        )
    tokens = file.get("tokenizer.ggml.tokens", list, [])
    if any(answer not in tokens for answer in _ANSWERS):
        raise CorruptFile(f"{file.path} is a reranker without a token 'yes' or 'no'")
    return tokens.index("yes"), tokens.index("no")


def check_reranker(file: GGUFFile) -> None:
    """Raise UnsupportedModel for a reranker whose answers are not rows of its embeddings."""
    answers, embeddings = file.tensors.get(ANSWERS_NAME), file.tensors.get("token_embd.weight")
    score_tokens = find_score_tokens(file)
    if score_tokens is None or answers is None or "output.weight" in file.tensors:
        return
    assert embeddings is not None  # the caller has looked
    if answers.shape != (len(score_tokens), embeddings.shape[1]) or (
        max(score_tokens) >= embeddings.shape[0]
    ):
        raise CorruptFile(f"{file.path} has answers {ANSWERS_NAME} of shape {list(answers.shape)}")
    for number, token in enumerate(score_tokens):
        found = file.read_tensor(answers.part(number)).astype(np.float64)
        expected = file.read_tensor(embeddings.part(token)).astype(np.float64)
        size = np.linalg.norm(found) * np.linalg.norm(expected)
        if not found @ expected > _SAME * size:
            raise UnsupportedModel(
                f"{file.path} is a reranker whose head is no table of its embeddings and is left "
                "out but for two rows, which is not supported; use the original Hugging Face "
                "directory"
            )
