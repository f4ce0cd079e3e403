"""The chat page as the real server sends it, answered by the engine on a fake runner."""

from __future__ import annotations

import time

import pytest
from served import served

from mlc_llm.serve.options import AppOptions

from .browser import Browser
from .test_page import fill, say, text_of

SOON_S = 5.0


def open_page(browser: Browser, url: str) -> None:
    browser.open(f"{url}/")
    browser.wait_for("document.querySelector('#model').options.length")


def test_a_chat_with_the_engine(browser: Browser) -> None:
    with served() as server:
        open_page(browser, server.url)
        browser.click("#open-settings")
        fill(browser, "max_tokens", "20")
        browser.press("Escape")
        browser.click("#input")
        say(browser, "Tell me a story, please, and let it be a long one.")
        say(browser, "Go on")
        [first, second] = text_of(browser, ".assistant .text")
        assert len(first) == len(second) == 20 and first.isalpha()
        [stats, later] = text_of(browser, ".assistant .stats")
        assert stats.startswith("20 tokens · ") and stats.endswith("ended at the token limit")
        # The second turn finds the first one in the prefix cache.
        assert "cached)" in later
        assert text_of(browser, "#model option") == ["fake"]
    assert browser.messages == []


def test_stop_ends_the_work_of_the_engine(browser: Browser) -> None:
    with served(step_s=0.02) as server:
        open_page(browser, server.url)
        browser.type("Count")
        browser.press("Enter")
        browser.wait_for("document.querySelector('.assistant .text').textContent.length > 3")
        assert server.metric("num_requests_running") == 1
        browser.press("Escape")
        deadline = time.monotonic() + SOON_S
        while server.metric("request_success_total", finished_reason="abort") == 0:
            assert time.monotonic() < deadline
        assert server.metric("num_requests_running") == 0
        assert text_of(browser, ".assistant .stats")[0].endswith("stopped")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("temperature", "5", "temperature"), ("system", "long " * 600, "tokens")],
)
def test_refusals_are_shown_in_the_words_of_the_server(
    browser: Browser, name: str, value: str, words: str
) -> None:
    with served() as server:
        open_page(browser, server.url)
        browser.click("#open-settings")
        fill(browser, name, value)
        browser.press("Escape")
        browser.click("#input")
        say(browser, "Hi")
        [error] = text_of(browser, ".error")
        assert words in error
        assert browser.evaluate("document.querySelector('#input').value") == "Hi"


def test_a_failed_step_is_shown_and_the_next_one_works(browser: Browser) -> None:
    with served() as server:
        open_page(browser, server.url)
        server.runner.error = RuntimeError("the device fell off")
        say(browser, "Hi")
        assert len(text_of(browser, ".error")) == 1
        say(browser, "")
        assert text_of(browser, ".error") == []
        assert text_of(browser, ".user .text") == ["Hi"]


def test_with_an_api_key_the_browser_asks_for_it(browser: Browser) -> None:
    with served(options=AppOptions(api_key="sesame")) as server:
        with browser.password("wrong"):
            browser.open(f"{server.url}/")
        assert text_of(browser, "#composer") == []
        with browser.password("sesame"):
            open_page(browser, server.url)
        say(browser, "Hi")
        assert text_of(browser, ".user .text") == ["Hi"]
        # A key among the settings is used instead of the browser's.
        browser.click("#open-settings")
        fill(browser, "api_key", "wrong")
        browser.press("Escape")
        browser.wait_for("document.querySelector('.error')")
        assert "the API key is wrong" in text_of(browser, ".error")[0]
