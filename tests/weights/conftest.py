"""Fixtures for checkpoints on disk."""

import json
import os
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 for safetensors)
import numpy as np
import pytest
from safetensors.numpy import save_file

DEMO_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def demo_gguf():
    """Return the path of the demo model's GGUF file; skip where it has not been fetched."""
    home = Path(os.environ.get("MLC_LLM_HOME") or Path.home() / ".cache" / "mlc_llm")
    path = Path(
        os.environ.get("MLC_LLM_TEST_DEMO_GGUF") or home / "model_weights" / "demo" / DEMO_NAME
    )
    if not path.is_file():
        pytest.skip(f"no demo model at {path}; `make demo` fetches it")
    return path


@pytest.fixture
def tensors():
    """Return a few named float32 tensors."""
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (4, 6), "b.weight": (3,), "c.weight": (2, 3, 5)}
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


@pytest.fixture
def hf_dir(tmp_path, tensors):
    """Return a Hugging Face directory with the `tensors` in one file."""
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, directory / "model.safetensors")
    return directory
