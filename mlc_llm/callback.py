"""What older programs hand to `ChatModule.generate` to see text as it comes."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from typing import TextIO


class DeltaCallback:
    """Gets new text every `callback_interval` tokens; subclasses say what becomes of it."""

    def __init__(self, callback_interval: int = 2) -> None:
        self.callback_interval = max(1, int(callback_interval))

    def delta_callback(self, delta_message: str) -> None:
        """Receive the text that came since the last call."""
        raise NotImplementedError

    def stopped_callback(self) -> None:
        """Learn that the answer is complete."""
        raise NotImplementedError


class StreamToStdout(DeltaCallback):
    """Prints text as it comes, and a line break at the end."""

    def __init__(self, callback_interval: int = 2, stream: TextIO | None = None) -> None:
        super().__init__(callback_interval)
        self._stream = stream

    def delta_callback(self, delta_message: str) -> None:
        """Print the text."""
        print(delta_message, end="", flush=True, file=self._stream or sys.stdout)

    def stopped_callback(self) -> None:
        """Print a line break."""
        print(flush=True, file=self._stream or sys.stdout)


class StreamIterator(DeltaCallback):
    """Is iterated over by one thread while another one generates."""

    def __init__(self, callback_interval: int = 2, timeout: float | None = None) -> None:
        """timeout: seconds to wait for text before `queue.Empty` is raised; None waits."""
        super().__init__(callback_interval)
        self.timeout = timeout
        self._texts: queue.Queue[str | None] = queue.Queue()

    def delta_callback(self, delta_message: str) -> None:
        """Hand over the text."""
        self._texts.put(delta_message)

    def stopped_callback(self) -> None:
        """End the iteration."""
        self._texts.put(None)

    def __iter__(self) -> Iterator[str]:
        """Return the iterator over pieces of text."""
        return self

    def __next__(self) -> str:
        """Return the next piece of text."""
        text = self._texts.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text
