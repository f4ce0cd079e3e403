"""Models that see, served over HTTP, and the parts of messages to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from image_models import ImageModels, data_url
from live_server import live_server

from mlc_llm.engine.config import EngineConfig
from mlc_llm.engine.open import OpenModel, open_model
from mlc_llm.engine.worker import EngineWorker
from mlc_llm.serve.app import create_app
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.options import AppOptions

GREEDY = {"temperature": 0, "max_tokens": 20}


def part(image: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image), **fields}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def open_case(models: ImageModels, name: str) -> OpenModel:
    return open_model(models.artifact(name), models.library(name), EngineConfig())


@contextmanager
def served_as(name: str, opened: OpenModel) -> Iterator[ServedModels]:
    """Yield a model under a name; its worker has not started."""
    worker = EngineWorker(opened.engine)
    yield ServedModels(ServedModel.of(name, opened, worker), None)
    worker.stop()


@contextmanager
def client_of(served: ServedModels) -> Iterator[httpx.Client]:
    """Serve a model; yield a client."""
    assert served.chat is not None
    traffic = Traffic()
    app = create_app(served, AppOptions(), traffic)
    with live_server(app, [served.chat.worker], traffic) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            yield client
