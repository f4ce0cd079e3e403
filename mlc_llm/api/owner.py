"""Who owns an engine's models, and when they end: by `terminate`, with the last user, at exit."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

from mlc_llm.errors import EngineStopped
from mlc_llm.serve.catalog import ServedModels


class Owner:
    """Holds the models of one engine for those who answer requests with them.

    A process made by a fork has the object but none of its threads; there it only says so.
    """

    def __init__(self, models: ServedModels, close: Callable[[], None]) -> None:
        """Take models; `close` ends them and is called once, in this process only."""
        self._models = models
        self._process_id = os.getpid()
        self._end = weakref.finalize(self, _close_in, self._process_id, close)

    @property
    def models(self) -> ServedModels:
        """The models. Raises EngineStopped after `close`, and after a fork."""
        check_process(self._process_id)
        if not self._end.alive:
            raise EngineStopped("the engine has been terminated; make another one")
        return self._models

    def close(self) -> None:
        """End the models; calling it again does nothing."""
        self._end()


def check_process(process_id: int) -> None:
    """Raise EngineStopped unless this is the process in which threads were started."""
    if os.getpid() != process_id:
        raise EngineStopped(
            "the engine belongs to the process that made it and does not survive a fork; make one "
            "in this process, or let multiprocessing use the start method 'spawn'"
        )


def _close_in(process_id: int, close: Callable[[], None]) -> None:
    if os.getpid() == process_id:
        close()
