"""Ask a model many things at once: python examples/python/many_requests.py MODEL"""

import asyncio
import sys

from mlc_llm import AsyncMLCEngine
from mlc_llm.serve import EngineConfig

QUESTIONS = ("Name a colour.", "Name an animal.", "Name a city.", "Name a fruit.")


async def main(model: str) -> None:
    """Answer all questions in the same steps of the engine, then say how fast it was."""
    config = EngineConfig(max_num_sequence=len(QUESTIONS))
    async with AsyncMLCEngine(model, engine_config=config) as engine:
        answers = await asyncio.gather(
            *(
                engine.chat.completions.create(
                    messages=[{"role": "user", "content": question}], max_tokens=24, seed=1
                )
                for question in QUESTIONS
            )
        )
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(question, answer.choices[0].message.content)
        metrics = await engine.metrics()
        print(f"{metrics['decode_tokens_per_s']:.0f} tokens/s")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
