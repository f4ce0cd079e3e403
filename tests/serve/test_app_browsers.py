"""What web pages may do: nothing from elsewhere unless asked for, and never by another's name."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from served import Served, served

from mlc_llm.errors import OptionError
from mlc_llm.serve.options import LOOPBACK_HOSTS, AppOptions

EVIL = "https://evil.example"
FRIEND = "https://friend.example"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.fixture(scope="module")
def closed() -> Iterator[Served]:
    with served(options=AppOptions(allow_hosts=LOOPBACK_HOSTS)) as running:
        yield running


def cors_headers(response: httpx.Response) -> dict[str, str]:
    return {
        name: value
        for name, value in response.headers.items()
        if name.startswith("access-control-")
    }


def test_no_page_is_let_in_by_default(closed: Served) -> None:
    headers = {"origin": EVIL}
    preflight = closed.client.options("/v1/chat/completions", headers={**headers, **PREFLIGHT})
    assert preflight.status_code == 405
    assert not cors_headers(preflight)
    assert not cors_headers(closed.client.get("/v1/models", headers=headers))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_what_pages_may_send_unasked_is_refused(closed: Served, kind: str | None) -> None:
    headers = {"origin": EVIL} if kind is None else {"origin": EVIL, "content-type": kind}
    content = '{"prompt": "hello", "max_tokens": 1}'
    response = closed.client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert closed.runner.steps == []


@pytest.mark.parametrize("path", ["/", "/v1/models", "/health", "/metrics", "/docs"])
def test_a_name_that_was_made_to_point_here_is_refused(closed: Served, path: str) -> None:
    response = closed.client.get(path, headers={"host": "evil.example:8000"})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden"


def test_pages_that_are_named_may_ask() -> None:
    options = AppOptions(allow_origins=(FRIEND,), api_key="sk-1")
    with served(options=options) as running:
        preflight = running.client.options(
            "/v1/chat/completions", headers={"origin": FRIEND, **PREFLIGHT}
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == FRIEND
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        # The page can read why it was refused.
        refused = running.client.get("/v1/models", headers={"origin": FRIEND})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == FRIEND
        evil = running.client.options("/v1/models", headers={"origin": EVIL, **PREFLIGHT})
        assert evil.status_code == 400
        assert "access-control-allow-origin" not in evil.headers
        # A question that is no preflight needs the key.
        assert running.client.options("/v1/models").status_code == 401


def test_credentials_are_for_named_pages_only() -> None:
    with pytest.raises(OptionError, match="name the origins"):
        AppOptions(allow_origins=("*",), allow_credentials=True)
    with pytest.raises(OptionError, match="needs --allow-origins"):
        AppOptions(allow_credentials=True)
