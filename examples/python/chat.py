"""Chat with a model in this process: python examples/python/chat.py [MODEL]"""

import sys

from mlc_llm import MLCEngine


def main(model: str) -> None:
    """Answer one question, piece by piece."""
    with MLCEngine(model) as engine:
        stream = engine.chat.completions.create(
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=64,
            temperature=0.0,
            stream=True,
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
