"""The page at /docs shows what /openapi.json says, with nothing but this server."""

from __future__ import annotations

import httpx
from served import served

from mlc_llm.serve.options import AppOptions

from .browser import Browser
from .test_page import text_of


def test_the_page_shows_every_route_and_object(browser: Browser) -> None:
    with served() as server:
        browser.open(f"{server.url}/docs#CompletionRequest")
        browser.wait_for("document.querySelector('#status').hidden")
        api = httpx.get(f"{server.url}/openapi.json").json()
        routes = [
            f"{method.upper()} {path}"
            for path, methods in api["paths"].items()
            for method in methods
        ]
        ids = browser.evaluate(
            "[...document.querySelectorAll('#operations details')].map(d => d.id)"
        )
        assert ids == routes
        objects = browser.evaluate(
            "[...document.querySelectorAll('#schemas details')].map(d => d.id)"
        )
        assert objects == list(api["components"]["schemas"])
        assert text_of(browser, "#base") == [f"{server.url}/v1"]
        # What the address names is unfolded, nothing else.
        assert browser.evaluate(
            "[...document.querySelectorAll('details[open]')].map(d => d.id)"
        ) == ["CompletionRequest"]
        fields = text_of(browser, "#CompletionRequest td:first-child")
        assert "prompt (required)" in fields and "temperature" in fields
        types = dict(
            zip(fields, text_of(browser, "#CompletionRequest td:nth-child(2)"), strict=True)
        )
        assert types["temperature"] == "number from 0 to 2 | null"
        assert types["stream_options"].endswith("StreamOptions | null")
        # A link to another object unfolds that.
        browser.evaluate("document.querySelector('#CompletionRequest a').click()")
        browser.wait_for("document.querySelectorAll('details[open]').length === 2")
        links = browser.evaluate(
            "[...document.querySelectorAll('a[href^=\"#\"]')]"
            ".map(a => a.getAttribute('href').slice(1)).filter(id => !document.getElementById(id))"
        )
        assert links == []
    assert browser.messages == []


def test_the_page_works_with_an_api_key(browser: Browser) -> None:
    with served(options=AppOptions(api_key="sesame")) as server:
        with browser.password("sesame"):
            browser.open(f"{server.url}/docs")
            browser.wait_for("document.querySelector('#status').hidden")
        assert "mlc_llm" in text_of(browser, "#title")[0]
