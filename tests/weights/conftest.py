"""Fixtures for checkpoints on disk."""

import json

import numpy as np
import pytest
from make_checkpoint import Model
from safetensors.numpy import save_file


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


@pytest.fixture
def model(tmp_path):
    """Return a checkpoint together with a plan for it."""
    return Model(tmp_path / "hf")


@pytest.fixture
def small_shards(monkeypatch):
    """Make shards hold two of the model's matrices."""
    monkeypatch.setattr("mlc_llm.weights.shards.SHARD_LIMIT_BYTES", 5000)
