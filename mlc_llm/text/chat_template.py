"""Chat templates in Jinja, rendered in a child process that time, memory and output limits bind.

A template comes with the model, so it is foreign code: the sandbox keeps it from objects it must
not touch, the limits keep it from using up the machine. Does not know token ids.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlc_llm.artifact import CHAT_TEMPLATE_NAME
from mlc_llm.errors import CorruptFile, RequestError, TemplateError
from mlc_llm.text.settings import SETTINGS_NAME

DEFAULT_TIMEOUT_S = 5.0
DEFAULT_MAX_OUTPUT_CHARS = 8 << 20
DEFAULT_MEMORY_LIMIT_BYTES = 512 << 20
# Starting Python is not the template's doing, and may take long on a busy machine.
_START_TIMEOUT_S = 60.0
_WORKER_PATH = Path(__file__).with_name("template_worker.py")
_ADVICE = "use a named template instead: `mlc_llm gen_config --conv-template NAME`"


class ChatTemplate:
    """One Jinja chat template, ready to render messages; safe to call from several threads."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_output_chars: int = DEFAULT_MAX_OUTPUT_CHARS,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    ) -> None:
        """Keep the template; `variables` are what it may use beside messages, as `bos_token`."""
        self.source = source
        self._variables = dict(variables or {})
        self._timeout_s = timeout_s
        self._max_output_chars = max_output_chars
        self._memory_limit_bytes = memory_limit_bytes
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Launch the child process without waiting for it, so that it is ready when needed.

        Raises TemplateError if the system cannot start it.
        """
        with self._lock:
            self._running_worker()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the prompt text. `kwargs` are further variables of the template.

        Raises TemplateError if the template is broken, refuses the messages or exceeds a limit,
        RequestError if the messages cannot be sent as JSON.
        """
        variables = {
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }
        request = {
            "source": self.source,
            "variables": variables,
            "max_output_chars": self._max_output_chars,
            "timeout_s": self._timeout_s,
        }
        try:
            body = json.dumps(request).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages cannot be written as JSON: {error}") from None
        with self._lock:
            try:
                reply = self._running_worker().ask(body, self._timeout_s)
            finally:
                self._drop_ended_worker()
        if "text" in reply:
            return str(reply["text"])
        if "refusal" in reply:
            raise TemplateError(
                f"the model's chat template refuses the messages: {reply['refusal']}"
            )
        reason = str(reply.get("error")).rstrip(".")
        raise TemplateError(f"the model's chat template failed: {reason}; {_ADVICE}")

    def close(self) -> None:
        """End the child process; a later call would start another."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    def _running_worker(self) -> _Worker:
        self._drop_ended_worker()
        if self._worker is None:
            self._worker = _Worker(self._memory_limit_bytes)
        return self._worker

    def _drop_ended_worker(self) -> None:
        if self._worker is not None and self._worker.has_ended():
            self._worker.close()
            self._worker = None


class _Worker:
    """The child process and the two pipes to it."""

    def __init__(self, memory_limit_bytes: int) -> None:
        command = [sys.executable, "-I", "-S", str(_WORKER_PATH), str(memory_limit_bytes)]
        try:
            self._process = subprocess.Popen(
                [*command, *_find_packages("jinja2", "markupsafe")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Signals of the terminal are for the parent alone.
                start_new_session=True,
            )
        except OSError as error:
            raise TemplateError(
                f"cannot start the process that renders chat templates: {error}"
            ) from None
        self._is_ready = False
        self.close = weakref.finalize(self, _end_process, self._process)

    def has_ended(self) -> bool:
        """Say whether the process is gone, by itself or killed."""
        return not self.close.alive or self._process.poll() is not None

    def ask(self, body: bytes, timeout_s: float) -> dict[str, Any]:
        """Send a request and return the reply; whatever interrupts this ends the process."""
        try:
            if not self._is_ready:
                self._exchange(b"", _START_TIMEOUT_S, "the process for it did not start in")
                self._is_ready = True
            frame = len(body).to_bytes(4, "big") + body
            return self._exchange(frame, timeout_s, "it was still running after")
        except BaseException:
            self.close()
            raise

    def _exchange(self, frame: bytes, timeout_s: float, overdue: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        body = None
        with _killed_after(self._process, timeout_s) as expired:
            try:
                self._process.stdin.write(frame)
                self._process.stdin.flush()
                body = _read_frame(self._process.stdout)
            except OSError:  # a broken pipe: the process is gone
                pass
        if expired.is_set():
            raise TemplateError(
                f"the model's chat template was stopped: {overdue} {timeout_s:g} s; {_ADVICE}"
            )
        if body is None:
            raise TemplateError(
                "the model's chat template failed: the process rendering it ended with code "
                f"{self._process.wait()}; {_ADVICE}"
            )
        reply: dict[str, Any] = json.loads(body)
        return reply


@contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill the process if the block takes longer, which also ends any wait on its pipes."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()
        timer.join()


def _read_frame(stream: IO[bytes]) -> bytes | None:
    """Return the next frame's content, or None if the stream ends before it does."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "big")
    body = stream.read(size)
    return body if len(body) == size else None


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, wait for it, close its pipes. It holds nothing worth a farewell."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        try:
            stream.close()
        except OSError:  # what was still to be written has no reader any more
            continue


def _find_packages(*names: str) -> list[str]:
    """Return the directories the packages are in, without importing them."""
    directories = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            directories.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(directories))


def find_chat_template(
    directory: Path, settings: Mapping[str, Any], *, with_tools: bool = False
) -> str | None:
    """Return the Jinja source a model directory brings, or None.

    The file chat_template.jinja goes before the `chat_template` of tokenizer_config.json, given as
    `settings`: a string, or a list of named ones of which "default" is taken, or "tool_use" with
    tools. Raises CorruptFile if it is something else.
    """
    path = directory / CHAT_TEMPLATE_NAME
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CorruptFile(f"{path} is not UTF-8 text; fetch or make it again") from None
    given = settings.get("chat_template")
    if given is None or isinstance(given, str):
        return given
    try:
        named = {str(item["name"]): str(item["template"]) for item in given}
    except (TypeError, KeyError):
        raise CorruptFile(
            f"chat_template in {directory / SETTINGS_NAME} is neither a text nor a list of named "
            "templates; download the model again"
        ) from None
    wanted = "tool_use" if with_tools and "tool_use" in named else "default"
    if named and wanted not in named:
        raise CorruptFile(
            f"{directory / SETTINGS_NAME} has chat templates {', '.join(named)} but no "
            f"{wanted!r}; put the one to use into {path}"
        )
    return named.get(wanted)
