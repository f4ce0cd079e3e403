"""The HTTP application: the routes, and the guards before them, outermost last.

Which exception becomes which status is decided in `errors.py`.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import mlc_llm
from mlc_llm.errors import MlcError
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.errors import failure_of
from mlc_llm.serve.gate import Gate, Traffic
from mlc_llm.serve.guard import HostGuard, KeyGuard, SizeLimits
from mlc_llm.serve.openapi import add_schemas
from mlc_llm.serve.options import AppOptions
from mlc_llm.serve.routes import ANSWERS, BODIES, Routes


def create_app(models: ServedModels, options: AppOptions, traffic: Traffic) -> FastAPI:
    """Return the application; `traffic` counts what passes it. Raises OptionError."""
    app = FastAPI(
        title="mlc_llm",
        version=mlc_llm.__version__,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    timeout_s, has_debug = options.send_timeout_s, options.enable_debug
    Routes(models, traffic, timeout_s, has_debug=has_debug).add_to(app)
    add_schemas(app, BODIES, ANSWERS, has_key=options.api_key is not None)
    for kind in (MlcError, HTTPException):
        app.add_exception_handler(kind, _answer)
    # Each is put before those above it.
    app.add_middleware(SizeLimits, options.max_body_bytes)
    if options.api_key is not None:
        app.add_middleware(KeyGuard, options.api_key)
    if options.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allow_origins,
            allow_methods=options.allow_methods,
            allow_headers=options.allow_headers,
            allow_credentials=options.allow_credentials,
            expose_headers=["x-request-id", "retry-after"],
        )
    if options.allow_hosts is not None:
        app.add_middleware(HostGuard, options.allow_hosts)
    app.add_middleware(Gate, traffic)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    failure = failure_of(error)
    body = failure.body_bytes_for(request.scope["path"])
    return Response(body, failure.status, failure.headers, media_type="application/json")
