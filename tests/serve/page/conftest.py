"""The browser of the page's tests: started once, since that takes most of their time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .browser import Browser, find_browser


@pytest.fixture(scope="package")
def one_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed; `apt-get install chromium` gets one")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(one_browser: Browser) -> Browser:
    """The browser, its messages forgotten; pages of other ports have a storage of their own."""
    one_browser.messages.clear()
    return one_browser
