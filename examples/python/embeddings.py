"""Find the text that is most like another: python examples/python/embeddings.py MODEL"""

import sys

import numpy as np

from mlc_llm import MLCEngine

TEXTS = ("Once upon a time there was a dog.", "She ate an apple.", "One day, a cat ran away.")


def main(model: str) -> None:
    """Embed the texts with a model and compare them with a question."""
    with MLCEngine(model, embedding_model=model) as engine:
        answer = engine.embeddings.create(input=["A story about a dog", *TEXTS])
    question, *vectors = np.asarray([item.embedding for item in answer.data])
    for text, vector in zip(TEXTS, vectors, strict=True):
        print(f"{question @ vector:.3f}  {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
