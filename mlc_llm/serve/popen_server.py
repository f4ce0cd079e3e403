"""A server as a child process, for tests and programs that want one while they run."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from mlc_llm.errors import EngineStopped, OptionError

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_DRAIN = 20.0
_STDERR = 2  # the file descriptor; sys.stderr of a notebook has none


class PopenServer:
    """Runs `mlc_llm serve`; used as a context manager, or by `start` and `terminate`.

    with PopenServer("HF://user/repo", port=8082) as server:
        client = openai.OpenAI(base_url=server.openai_v1_base_url, api_key="none")
    """

    def __init__(
        self,
        model: str,
        device: str = "auto",
        *,
        model_lib: str | Path | None = None,
        mode: str = "local",
        host: str = "127.0.0.1",
        port: int = 8082,
        arguments: Iterable[str] = (),
        start_timeout_s: float = 120.0,
    ) -> None:
        """Say what to serve; `arguments` are further ones of `mlc_llm serve`."""
        if not 1 <= port <= 65535:
            raise OptionError(f"port must be from 1 to 65535, is {port!r}")
        self.host, self.port = host, port
        self.start_timeout_s = start_timeout_s
        self._command = [sys.executable, "-m", "mlc_llm", "serve", model, "--device", device]
        self._command += ["--mode", mode, "--host", host, "--port", str(port)]
        if model_lib is not None:
            self._command += ["--model-lib", str(model_lib)]
        self._command += arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """Where the server listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def openai_v1_base_url(self) -> str:
        """What OpenAI clients take as `base_url`."""
        return f"{self.base_url}/v1"

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises OptionError where the port is taken, and EngineStopped where the server ends or does
        not answer in time; what it printed says why.
        """
        if self._process is not None:
            return
        if self._is_port_taken():
            raise OptionError(f"another program listens on {self.base_url}; choose another port")
        # What the server prints is news of it, not output of the program that started it.
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=_STDERR)
        deadline = time.monotonic() + self.start_timeout_s
        try:
            while not self._is_healthy():
                code = self._process.poll()
                if code is not None:
                    raise EngineStopped(
                        f"the server ended with exit code {code} before it listened; its last "
                        "lines on stderr say why"
                    )
                if time.monotonic() > deadline:
                    raise EngineStopped(
                        f"the server did not answer on {self.base_url} within "
                        f"{self.start_timeout_s:g} s; raise start_timeout_s"
                    )
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except BaseException:
            self.terminate()
            raise

    def terminate(self) -> None:
        """Let the server finish what it answers and end it; calling it again does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_SECONDS_TO_DRAIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> PopenServer:
        """Start the server."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the server."""
        self.terminate()

    def _is_port_taken(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=1.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
