"""Fixtures that find the real models tests use."""

import os
from pathlib import Path
from typing import Any

import pytest

# Test processes side by side have more threads than cores; spinning ones would only be in the way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")

ROOT = Path(__file__).resolve().parents[1]
DEMO_GGUF = Path("model_weights", "demo", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """The directory of the 260K-parameter Llama."""
    return Path(__file__).parent / "stories260K"


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's GGUF file, for tests marked `weights`; skips where it was not fetched."""
    given = os.environ.get("MLC_LLM_TEST_DEMO_GGUF")
    home = Path(os.environ.get("MLC_LLM_HOME") or Path.home() / ".cache" / "mlc_llm")
    path = Path(given) if given else home / DEMO_GGUF
    if not path.is_file():
        pytest.skip(f"no demo model at {path}; `make demo-model` fetches it")
    return path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stored reference models, converted and compiled at most once in a run."""
    from tiny_models import TinyModels

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # all processes of this run have it
    return TinyModels(base / "tiny_models")


@pytest.fixture(scope="session")
def image_models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stored reference models that take images, converted and compiled at most once."""
    from image_models import ImageModels

    return ImageModels(tmp_path_factory.mktemp("image_models"))
