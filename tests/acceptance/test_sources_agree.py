"""One model from three sources, a GGUF file, a Hugging Face directory and MLC LLM's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from demo_model import place_demo_model
from mlc_packer import pack_artifact
from program import Program
from safetensors.numpy import save_file

from mlc_llm.weights.open import open_source

pytestmark = [pytest.mark.cpu, pytest.mark.weights]

QUANTIZATION = "q8f16_1"
ASK = (
    *("--system", "You answer in one sentence.", "--prompt", "What is the moon made of?"),
    *("--temperature", "0", "--max-tokens", "24"),
)


def write_checkpoint(gguf: Path, tokenizer: Path, output: Path) -> None:
    """Write the weights of a GGUF file, dequantized, as a Hugging Face directory in float32."""
    source = open_source(gguf)
    output.mkdir()
    (output / "config.json").write_text(json.dumps(source.config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, output / name)
    tensors = {name: source.read(name).astype(np.float32) for name in source.names()}
    save_file(tensors, output / "model.safetensors")


def test_the_same_greedy_text(program: Program, demo_gguf: Path, tmp_path: Path) -> None:
    place_demo_model(program, demo_gguf)
    converted, checkpoint, packed = (tmp_path / name for name in ("gguf", "huggingface", "mlc"))
    for command in ("gen_config", "convert_weight"):
        program.must_run(command, demo_gguf, "--quantization", QUANTIZATION, "-o", converted)
    write_checkpoint(demo_gguf, converted, checkpoint)
    pack_artifact(checkpoint, packed, QUANTIZATION)
    texts = [
        program.must_run("chat", converted, *ASK),
        program.must_run("chat", checkpoint, "--quantization", QUANTIZATION, *ASK),
        program.must_run("chat", packed, *ASK),
    ]
    assert len(texts[0].split()) > 5
    assert texts[1] == texts[0]
    assert texts[2] == texts[0]
