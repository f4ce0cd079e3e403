"""Engines on fake runners."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import Parts, make_parts

from mlc_llm.api import AsyncMLCEngine, MLCEngine


@pytest.fixture
def parts() -> Iterator[Parts]:
    """The parts of an engine, ended after the test if the engine has not done so."""
    parts = make_parts()
    yield parts
    if not parts.closings:
        parts.close()


@pytest.fixture
def async_engine(parts: Parts) -> AsyncMLCEngine:
    return AsyncMLCEngine.from_models(parts.models, parts.close)


@pytest.fixture
def engine(parts: Parts) -> Iterator[MLCEngine]:
    with MLCEngine.from_models(parts.models, parts.close) as engine:
        yield engine
