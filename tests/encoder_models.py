"""The stored reference models that make vectors of texts, converted and compiled at most once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import FLOAT_OPT

from mlc_llm.artifact import read_chat_config
from mlc_llm.compiler.compile import CompileOptions, compile_model
from mlc_llm.engine.embedding import EmbeddingModel, open_embedding_model
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.resolve import convert_weights, write_chat_config_for

REFERENCES = Path(__file__).parent / "encoder_references"
CASES = [case["name"] for case in json.loads((REFERENCES / "cases.json").read_text())]


class TinyEncoders:
    """Artifacts and open models by case, quantization and options."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[tuple[str, ...], EmbeddingModel] = {}

    def artifact(self, name: str, quantization: str = "q0f32") -> Path:
        """Return a directory of weights, tokenizer and chat config."""
        output = self._root / name / quantization
        if not output.exists():
            source = REFERENCES / name
            write_chat_config_for(source, output, quantization=quantization)
            convert_weights(source, output, quantization=quantization, progress=NullProgress())
        return output

    def model(
        self, name: str, quantization: str = "q0f32", opt: str = FLOAT_OPT, device: str = "cpu"
    ) -> EmbeddingModel:
        """Return a model of token ids, on a device."""
        key = (name, quantization, opt, device)
        if key not in self._models:
            artifact = self.artifact(name, quantization)
            options = CompileOptions(device, opt, {"model_task": "embedding"})
            library = self._root / f"library-{len(self._models)}"
            compile_model(read_chat_config(artifact), options, lambda _: None).save_objects(library)
            self._models[key] = open_embedding_model(artifact, library, name=name, device=device)
        return self._models[key]

    def close(self) -> None:
        """Free all models."""
        for model in self._models.values():
            model.close()


def read_inputs(name: str) -> list[tuple[list[int], NDArray[np.float32]]]:
    """Return the stored inputs and their states (n, hidden)."""
    with np.load(REFERENCES / name / "reference.npz") as arrays:
        count = len(arrays.files) // 2
        return [(arrays[f"token_ids_{i}"].tolist(), arrays[f"states_{i}"]) for i in range(count)]


def embed(model: EmbeddingModel, inputs: Sequence[list[int]]) -> NDArray[np.float32]:
    """Return a vector for each input."""
    return asyncio.run(model.embed(inputs))


def pooled(name: str, states: NDArray[Any]) -> NDArray[Any]:
    """Return the vector that a case's model makes of the states (n, hidden) of an input."""
    vector = {
        "bert_mean": lambda: states.mean(axis=0),
        "bert_cls_odd_sizes": lambda: states[0],
        "qwen3_embedding": lambda: states[-1],
    }[name]()
    return vector / np.linalg.norm(vector)
