"""A headless Chromium, driven over a pair of pipes by the Chrome DevTools Protocol.

Knows processes, keys and JavaScript expressions; does not know the page.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
# Chromium reads commands from file descriptor 3 and writes to 4; ours are moved out of their way.
_FIRST_FREE_DESCRIPTOR = 10
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--window-size=900,800",
)
_KEYS = {"Enter": ("\r", 13), "Escape": ("", 27)}
_SHIFT = 8


class BrowserError(Exception):
    """Chromium refused a command, failed in a script, or did not answer in time."""


def find_browser() -> str | None:
    """Return the program of an installed Chromium, None where there is none."""
    return next((path for path in map(shutil.which, _NAMES) if path is not None), None)


class Browser:
    """One browser with one page. `messages` has what pages wrote on the console."""

    def __init__(self, program: str, profile: Path, timeout_s: float = 15.0) -> None:
        self.messages: list[str] = []
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._buffer = b""
        self._password: str | None = None
        child_in, self._commands = _pipe()
        self._answers, child_out = _pipe()
        null = os.open(os.devnull, os.O_RDWR)
        self._pid = os.posix_spawn(
            program,
            [program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            {**os.environ, "HOME": str(profile)},
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, null, standard) for standard in (0, 1, 2)),
                (os.POSIX_SPAWN_DUP2, child_in, 3),
                (os.POSIX_SPAWN_DUP2, child_out, 4),
            ],
            setpgroup=0,
        )
        for descriptor in (child_in, child_out, null):
            os.close(descriptor)
        targets = self._call("Target.getTargets", session="")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self._call("Target.attachToTarget", session="", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Load a page and wait until it has been read; sessionStorage stays as it is."""
        self._call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def reload(self) -> None:
        """Load the same page again."""
        self.evaluate("window.isOld = true")
        self._call("Page.reload")
        self.wait_for("!window.isOld && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; promises are awaited."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise BrowserError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Return once an expression is true; a page that is being replaced counts as false."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            try:
                if self.evaluate(f"Boolean({expression})"):
                    return
            except BrowserError as error:
                if "context" not in str(error).lower() and "navigated" not in str(error):
                    raise
            time.sleep(0.02)
        raise BrowserError(f"never became true: {expression}; console: {self.messages}")

    def type(self, text: str) -> None:
        """Put text where the cursor is."""
        self._call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release Enter or Escape."""
        text, code = _KEYS[key]
        common: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        common["modifiers"] = _SHIFT if shift else 0
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self._call("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """Click in the middle of the element."""
        x, y = self.evaluate(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def prefer_dark(self, is_dark: bool = True) -> None:
        """Tell pages that the user likes dark colours, or light ones."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    @contextmanager
    def password(self, password: str) -> Iterator[None]:
        """Answer the browser's own question for a password, once, within the block."""
        self._call("Fetch.enable", handleAuthRequests=True)
        self._password = password
        yield
        self._call("Fetch.disable")

    def screenshot(self, path: Path) -> None:
        """Write a PNG of what can be seen."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """End the browser and all its processes."""
        os.close(self._commands)
        os.close(self._answers)
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        number = self._send(method, session, **parameters)
        deadline = time.monotonic() + self._timeout_s
        while True:
            answer = self._read(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> int:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        return number

    def _note(self, event: dict[str, Any]) -> None:
        details = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            entry = details["entry"]
            self.messages.append(f"{entry['text']} {entry.get('url', '')}".strip())
        elif event.get("method") == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(details["exceptionDetails"])[:500])
        elif event.get("method") == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", requestId=details["requestId"])
        elif event.get("method") == "Fetch.authRequired":
            password, self._password = self._password, None
            answer = {"response": "CancelAuth"}
            if password is not None:
                answer = {"response": "ProvideCredentials", "username": "x", "password": password}
            self._send(
                "Fetch.continueWithAuth",
                requestId=details["requestId"],
                authChallengeResponse=answer,
            )

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise BrowserError(f"no answer within {self._timeout_s} s")
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise BrowserError("the browser ended")
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


def _pipe() -> tuple[int, int]:
    ends = []
    for low in os.pipe():
        ends.append(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_DESCRIPTOR))
        os.close(low)
    return ends[0], ends[1]
