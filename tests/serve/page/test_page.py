"""The chat page in a real browser, on a server that answers as each test wants."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from .browser import Browser
from .site import PAGE, Site

IS_IDLE = "document.querySelector('#stop').hidden && document.querySelector('#log').children.length"


def text_of(browser: Browser, selector: str) -> list[str]:
    """Return the text of all elements that match."""
    texts: list[str] = browser.evaluate(
        f"[...document.querySelectorAll({selector!r})].map(found => found.textContent)"
    )
    return texts


def open_page(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    browser.wait_for("document.querySelector('#model').options.length || "
                     "document.querySelector('.error')")  # fmt: skip


def say(browser: Browser, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    browser.type(text)
    browser.press("Enter")
    browser.wait_for(IS_IDLE)


def test_a_question_is_answered(browser: Browser) -> None:
    with Site(["Hel", "lö ", "🦙!"], delay_s=0.02) as site:
        open_page(browser, site)
        assert text_of(browser, "#model option") == ["small-model"]
        say(browser, "Hi there")
        assert text_of(browser, "article .text") == ["Hi there", "Hellö 🦙!"]
        say(browser, "And?")
    assert site.bodies[0] == {
        "model": "small-model",
        "messages": [{"role": "user", "content": "Hi there"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [m["role"] for m in site.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert site.bodies[1]["messages"][1]["content"] == "Hellö 🦙!"
    [stats, _] = text_of(browser, "article.assistant .stats")
    assert re.fullmatch(
        r"2 tokens · \d+\.\d tokens/s · first after 0\.\d\d s · prompt of 9", stats
    ), stats
    assert browser.messages == []


def test_an_answer_shows_while_it_arrives(browser: Browser) -> None:
    with Site(["one "] * 40, delay_s=0.05) as site:
        open_page(browser, site)
        browser.type("Count")
        browser.press("Enter")
        browser.wait_for("document.querySelector('.assistant .text').textContent.length > 8")
        assert browser.evaluate("document.querySelector('#stop').hidden") is False
        assert browser.evaluate("document.querySelector('#log').ariaBusy") == "true"
        first = browser.evaluate("document.querySelector('.assistant .text').textContent.length")
        browser.wait_for(f"document.querySelector('.assistant .text').textContent.length > {first}")
        browser.press("Escape")
        browser.wait_for(IS_IDLE)
        assert site.was_left.wait(5)
        [_, answer] = text_of(browser, "article .text")
        assert answer.startswith("one ") and len(answer) < 160
        assert text_of(browser, ".assistant .stats")[0].endswith("stopped")
        # What there is of the answer is part of the conversation.
        site.pieces, site.delay_s = ["ok"], 0
        say(browser, "Go on")
    assert site.bodies[1]["messages"][1] == {"role": "assistant", "content": answer}


def test_the_stop_button_before_any_text_gives_the_question_back(browser: Browser) -> None:
    with Site(delay_s=1) as site:
        open_page(browser, site)
        browser.type("Wait")
        browser.press("Enter")
        browser.wait_for("!document.querySelector('#stop').hidden")
        browser.click("#stop")
        browser.wait_for("document.querySelector('#stop').hidden")
        assert text_of(browser, "article") == []
        assert browser.evaluate("document.querySelector('#input').value") == "Wait"


def test_enter_sends_and_shift_enter_does_not(browser: Browser) -> None:
    with Site() as site:
        open_page(browser, site)
        browser.press("Enter")
        browser.type("one")
        browser.press("Enter", shift=True)
        say(browser, "two")
        assert text_of(browser, ".user .text") == ["one\ntwo"]
    assert [body["messages"][0]["content"] for body in site.bodies] == ["one\ntwo"]


MARKDOWN = """\
A **bold** word, `x < 1`, <b>tags</b> <img src=x onerror="document.title='hacked'"> and **not
bold**.

```python
if x:
    print("**")
```
Then `one` **two**:
```
open end"""


def test_markdown_is_shown_and_html_is_text(browser: Browser) -> None:
    with Site([MARKDOWN[i : i + 7] for i in range(0, len(MARKDOWN), 7)]) as site:
        open_page(browser, site)
        say(browser, "<i>Show</i>")
        assert text_of(browser, "pre code") == ['if x:\n    print("**")', "open end"]
        assert text_of(browser, "strong") == ["bold", "two"]
        assert text_of(browser, ".text > code") == ["x < 1", "one"]
        assert text_of(browser, ".user .text") == ["<i>Show</i>"]
        [answer] = text_of(browser, ".assistant .text")
        assert '<b>tags</b> <img src=x onerror="document' in answer
        assert text_of(browser, "#log img, #log b, #log i") == []
        assert browser.evaluate("document.title") == "small-model - mlc_llm"
        # All is kept in the conversation as it came.
        say(browser, "Again")
    assert site.bodies[1]["messages"][1]["content"] == MARKDOWN


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"failure": (400, "The prompt is too long.")}, "The prompt is too long."),
        ({"failure": (503, "")}, "The server answered 503 Service Unavailable."),
        ({"failure": (200, "The step failed."), "pieces": []}, "The step failed."),
        ({"pieces": []}, "The model ended its answer at once, without any text."),
    ],
)
def test_errors_are_shown_and_the_question_is_given_back(
    browser: Browser, changes: dict[str, Any], words: str
) -> None:
    with Site(**changes) as site:
        open_page(browser, site)
        say(browser, "Question")
        assert text_of(browser, ".error") == [words]
        assert text_of(browser, "article") == []
        assert browser.evaluate("document.querySelector('#input').value") == "Question"
        site.failure, site.pieces = None, ["fine"]
        say(browser, "")
        assert text_of(browser, "article .text") == ["Question", "fine"]
        assert text_of(browser, ".error") == []
    assert [len(body["messages"]) for body in site.bodies] == [1, 1]


def test_text_before_an_error_is_kept(browser: Browser) -> None:
    with Site(["partly"], failure=(200, "The step failed.")) as site:
        open_page(browser, site)
        say(browser, "Question")
        assert text_of(browser, "article .text") == ["Question", "partly"]
        assert text_of(browser, ".error") == ["The step failed."]


def test_a_server_that_has_gone_is_explained(browser: Browser) -> None:
    with Site() as site:
        open_page(browser, site)
        site.close()
        say(browser, "Hello?")
        [error] = text_of(browser, ".error")
    assert error == "The server cannot be reached. Is it still running?"


def fill(browser: Browser, name: str, value: str) -> None:
    browser.evaluate(f"document.querySelector('#settings [name={name}]').select()")
    browser.type(value)


def test_settings_go_with_every_request_and_survive_a_reload(browser: Browser) -> None:
    values = {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "12",
        "seed": "7",
        "api_key": "sesame",
    }
    with Site(api_key="sesame", finish_reason="length") as site:
        open_page(browser, site)
        [error] = text_of(browser, ".error")
        assert error == "There is no API key. Enter the API key under Settings."
        browser.click("#open-settings")
        for name, value in values.items():
            fill(browser, name, value)
        browser.press("Escape")
        browser.wait_for("document.querySelector('#model').options.length")
        assert text_of(browser, ".error") == []
        browser.click("#input")
        say(browser, "Hi")
        assert text_of(browser, ".stats")[1].endswith("ended at the token limit")
        browser.reload()
        browser.wait_for("document.querySelector('#model').options.length")
        assert text_of(browser, "article .text") == ["Hi", "Hello!"]
        say(browser, "Bye")
        browser.click("#new-chat")
        assert text_of(browser, "article") == []
        say(browser, "New")
    for body in site.bodies:
        numbers = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 12, "seed": 7}
        assert {name: body[name] for name in numbers} == numbers
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [len(body["messages"]) for body in site.bodies] == [2, 4, 2]
    assert browser.evaluate("localStorage.length + document.cookie.length") == 0


def test_a_reload_in_the_middle_keeps_what_there_is(browser: Browser) -> None:
    with Site(["one "] * 40, delay_s=0.05) as site:
        open_page(browser, site)
        browser.type("Count")
        browser.press("Enter")
        browser.wait_for("document.querySelector('.assistant .text').textContent")
        browser.reload()
        browser.wait_for("document.querySelectorAll('article').length === 2")
        assert text_of(browser, "article .text")[1].startswith("one")
        site.pieces, site.delay_s = ["ok"], 1
        browser.click("#new-chat")
        browser.type("Wait")
        browser.press("Enter")
        browser.wait_for("!document.querySelector('#stop').hidden")
        browser.reload()
        browser.wait_for("document.querySelector('#input').value === 'Wait'")
        assert text_of(browser, "article") == []


def test_a_new_chat_forgets_the_answer_under_way(browser: Browser) -> None:
    with Site(["one "] * 40, delay_s=0.05) as site:
        open_page(browser, site)
        browser.type("Count")
        browser.press("Enter")
        browser.wait_for("document.querySelector('.assistant .text').textContent")
        browser.click("#new-chat")
        browser.wait_for("document.querySelector('#stop').hidden")
        assert site.was_left.wait(5)
        assert text_of(browser, "article, .error") == []
        assert browser.evaluate("document.querySelector('#input').value") == ""


def test_damaged_storage_is_thrown_away(browser: Browser) -> None:
    with Site() as site:
        open_page(browser, site)
        for kept in ("{", "null", '{"messages": 5}', '{"values": {"no_such": "1"}}'):
            # Set while the page unloads, after it has saved its own.
            browser.evaluate(
                "addEventListener('pagehide', () => "
                f"sessionStorage.setItem('mlc_llm.chat', {kept!r}))"
            )
            browser.reload()
            browser.wait_for("document.querySelector('#model').options.length")
            say(browser, "Hi")
            assert text_of(browser, "article .text")[-2:] == ["Hi", "Hello!"]
            browser.click("#new-chat")
    assert not any("Uncaught" in message for message in browser.messages)


def test_one_of_several_models_is_chosen(browser: Browser) -> None:
    with Site(models=["one", "two"]) as site:
        open_page(browser, site)
        assert browser.evaluate("document.querySelector('#model').disabled") is False
        browser.evaluate("document.querySelector('#model').value = 'two'")
        browser.evaluate("document.querySelector('#input').focus()")
        say(browser, "Hi")
    assert site.bodies[0]["model"] == "two"


def test_without_usage_pieces_are_counted(browser: Browser) -> None:
    with Site(usage=None) as site:
        open_page(browser, site)
        say(browser, "Hi")
        assert re.match(r"2 tokens · .* first after", text_of(browser, ".stats")[1])


def test_every_control_has_a_name(browser: Browser) -> None:
    nameless = (
        "[...document.querySelectorAll('button, input, textarea, select')].filter(control =>"
        " !control.ariaLabel && !control.labels?.length && !control.textContent.trim()).length"
    )
    with Site() as site:
        open_page(browser, site)
        assert browser.evaluate("document.querySelectorAll('button').length") > 3
        assert browser.evaluate(nameless) == 0
        assert browser.evaluate("document.activeElement.id") == "input"


def test_dark_is_dark(browser: Browser) -> None:
    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    with Site() as site:
        open_page(browser, site)
        assert min(browser.evaluate(shade)) > 200
        browser.prefer_dark()
        time.sleep(0.05)
        assert max(browser.evaluate(shade)) < 60
        browser.prefer_dark(False)


def test_files_name_no_other_place_and_hold_no_inline_code() -> None:
    html = (PAGE / "index.html").read_text()
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == [
        "page/icon.svg",
        "page/chat.css",
        "page/chat.js",
    ]
    assert not re.search(r"\son\w+=|style=|<style|<script(?![^>]*src)", html)
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import", text), path
    script = (PAGE / "chat.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
