"""The one thread that runs an engine's steps, and the way to it from event loops.

Detokenization and HTTP stay on the loops: here are only tokens.

    loop   submit ──▶ commands ──▶ thread: commands, step, commands, step, ... asleep without work
           stream ◀── call_soon_threadsafe, once for each loop and step ◀── outputs
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mlc_llm.engine.grammar_cache import CompiledGrammar
from mlc_llm.engine.metrics import EngineMetrics
from mlc_llm.engine.request import FinishReason, Output, Request
from mlc_llm.engine.stream import Channel, RequestStream, deliver
from mlc_llm.errors import (
    EngineStopped,
    QueueFull,
    RequestError,
    RequestTimeout,
    StepFailed,
)

if TYPE_CHECKING:
    from mlc_llm.engine.engine import Engine

Result = TypeVar("Result")
WorkerState = Literal["running", "draining", "stopped", "dead"]

# Beside a busy event loop, a thread that returns from compiled code gets the interpreter back after
# this interval: measured 5.3 ms a step at Python's default of 5 ms, 0.4 ms at this one, while the
# loop's own work went on as fast (2 cores, steps of 4 ms).
_SWITCH_INTERVAL_S = 0.0002
# Steps that raise, without one between them that brought a token, after which the engine is dead.
_MAX_FAILURES = 3
_RETRY_AFTER_S = (1.0, 60.0)
_DEFAULT_RETRY_AFTER_S = 5.0
_SECONDS_BETWEEN_LOOKS = 0.01
_LAST_STEP_S = 5.0  # how long `drain` waits for the step that tells of aborts

_log = logging.getLogger(__name__)


class EngineWorker:
    """Owns the thread of an engine; everything here may be called from any thread.

    At most as many requests are unfinished as the engine runs at once and max_queued_requests
    more. A reader that leaves more than max_unread_outputs lying loses its request. A step of more
    than stuck_after_s seconds makes `is_stuck` true.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued_requests: int = 512,
        max_unread_outputs: int = 4096,
        request_timeout_s: float | None = None,
        stuck_after_s: float = 120.0,
    ) -> None:
        """Take an engine; request_timeout_s holds for requests that bring no limit themselves."""
        self.engine = engine
        self._max_requests = engine.max_num_sequence + max_queued_requests
        self._max_unread = max_unread_outputs
        self._timeout_s = request_timeout_s
        self._stuck_after_s = stuck_after_s
        self._commands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = threading.Lock()  # for the fields up to the blank line
        self._state: WorkerState = "stopped"
        self._live: dict[str, Channel] = {}
        self._calls: set[Future[Any]] = set()
        self._end_times: deque[float] = deque(maxlen=64)

        self._thread: threading.Thread | None = None
        self._num_failures = 0
        self._step_start_s: float | None = None

    @property
    def state(self) -> WorkerState:
        """running; draining: finishing, takes no more; stopped; dead: failed for good."""
        return self._state

    @property
    def is_stuck(self) -> bool:
        """Return whether the present step has taken longer than it may."""
        start = self._step_start_s
        return start is not None and time.monotonic() - start > self._stuck_after_s

    @property
    def metrics(self) -> EngineMetrics:
        """The engine's sums and histograms."""
        return self.engine.metrics

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def start(self) -> None:
        """Start the thread. Makes threads take turns more often, in the whole process."""
        if self._thread is not None:
            raise EngineStopped("the engine has been stopped or is running; make another one")
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
        self._state = "running"
        self._thread = threading.Thread(target=self._run, name="mlc_llm engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread after its present step; unfinished requests end with EngineStopped.

        A step that takes longer than timeout_s is left alone in its thread.
        """
        if self._thread is None:
            return
        with self._lock:
            if self._state != "dead":
                self._state = "stopped"
        self._commands.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.error("the engine's step does not end; its requests are given up")
            self._end_requests(EngineStopped("the engine was stopped in the middle of a step"))
            self._end_calls()

    async def submit(self, request: Request, timeout_s: float | None = None) -> RequestStream:
        """Queue a request; its outputs come to the running event loop.

        timeout_s: seconds until the stream raises RequestTimeout. Raises QueueFull, EngineStopped,
        ContextTooLong or RequestError.
        """
        self.engine.check(request)
        grammar = None
        if request.grammar is not None and self.engine.grammars is not None:
            self._check_running()
            grammar = await self.engine.grammars.compile_soon(request.grammar)
        loop = asyncio.get_running_loop()
        channel = Channel(request, loop)
        channel.stats.arrival_s = time.perf_counter()
        with self._lock:
            self._admit(channel)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if limit_s is not None:
            channel.timer = loop.call_later(limit_s, self._expire, channel, limit_s)
        self._commands.put(partial(self._add, channel, grammar))
        return RequestStream(channel, self.abort)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request within a step; its stream then says so. Unknown ids are fine."""
        self._commands.put(partial(self.engine.abort, request_id, reason))

    async def run(self, action: Callable[[Engine], Result]) -> Result:
        """Return what `action` returns, run by the engine's thread between two steps."""
        future: Future[Result] = Future()
        with self._lock:
            if self._state not in ("running", "draining"):
                raise EngineStopped(f"the engine is {self._state}")
            self._calls.add(future)
        self._commands.put(partial(self._call, action, future))
        return await asyncio.wrap_future(future)

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those there are; return whether all were finished.

        What is unfinished after timeout_s is aborted. The thread goes on until `stop`.
        """
        with self._lock:
            if self._state == "running":
                self._state = "draining"
        is_done = await self._wait_until_idle(timeout_s)
        if not is_done:
            for request_id in list(self._live):
                self.abort(request_id)
            await self._wait_until_idle(_LAST_STEP_S)
        return is_done

    async def _wait_until_idle(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._live and time.monotonic() < deadline:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
        return not self._live

    def _admit(self, channel: Channel) -> None:
        request_id = channel.request.request_id
        self._check_running()
        if request_id in self._live:
            raise RequestError(f"request id {request_id!r} is in use; choose another")
        if len(self._live) >= self._max_requests:
            self.metrics.num_rejections += 1
            after_s = self._seconds_until_room()
            raise QueueFull(
                f"{len(self._live)} requests are under way or wait, which is the limit; try again "
                f"in {after_s:.0f} s, or raise max_queued_requests",
                after_s,
            )
        self._live[request_id] = channel

    def _check_running(self) -> None:
        if self._state == "draining":
            raise EngineStopped("the engine is shutting down and takes no more requests")
        if self._state != "running":
            raise EngineStopped(f"the engine is {self._state} and takes no requests")

    def _seconds_until_room(self) -> float:
        """Estimate when half of those that wait will have left, at the pace of late."""
        now = time.monotonic()
        times = [end for end in self._end_times if now - end < _RETRY_AFTER_S[1]]
        if len(times) < 2:
            return _DEFAULT_RETRY_AFTER_S
        seconds_each = (now - times[0]) / len(times)
        num_waiting = max(len(self._live) - self.engine.max_num_sequence, 1)
        return min(max(seconds_each * num_waiting / 2, _RETRY_AFTER_S[0]), _RETRY_AFTER_S[1])

    def _expire(self, channel: Channel, timeout_s: float) -> None:
        """Tell the reader at once, even if the present step never ends."""
        channel.put(RequestTimeout(f"the request took longer than {timeout_s:g} s and was ended"))
        self.abort(channel.request.request_id)

    # From here on: the engine's thread.

    def _run(self) -> None:
        try:
            while self._run_commands():
                self._step()
        except BaseException as error:
            # The last line of defence: nobody else would hear of it, and readers would wait on.
            _log.critical("the engine has died", exc_info=error)
            with self._lock:
                self._state = "dead"
            self._end_requests(EngineStopped("the engine has died and must be started again"))
        else:
            stopped = EngineStopped("the engine was stopped before the request was finished")
            for request_id in self._end_requests(stopped):
                self.engine.abort(request_id)
        finally:
            self._end_calls()

    def _run_commands(self) -> bool:
        """Carry out what has been asked for, sleeping if there is no other work; False: stop."""
        while not self.engine.has_work or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _add(self, channel: Channel, grammar: CompiledGrammar | None) -> None:
        arrival_s = channel.stats.arrival_s
        try:
            channel.stats = self.engine.add(channel.request, grammar)
            channel.stats.arrival_s = arrival_s
        except RequestError as error:
            self._refuse(channel, error)
        except Exception as error:
            # One request must not end the others, whatever is wrong with it.
            _log.exception("a request could not be taken")
            self._refuse(channel, StepFailed(f"the request failed ({type(error).__name__})"))

    def _refuse(self, channel: Channel, error: RequestError) -> None:
        self.engine.abort(channel.request.request_id)
        self._forget(channel)  # before the reader, who may ask again under the same id, hears
        self._send([(channel, error)])

    def _call(self, action: Callable[[Engine], Result], future: Future[Result]) -> None:
        with self._lock:
            if future not in self._calls:
                return
            self._calls.remove(future)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(action(self.engine))
        except Exception as error:  # it is the caller's, who gets it
            future.set_exception(error)

    def _step(self) -> None:
        self._step_start_s = time.monotonic()
        try:
            outputs = self.engine.step()
        except (MemoryError, SystemError):
            raise
        except Exception as error:
            self._num_failures += 1
            if self._num_failures >= _MAX_FAILURES:
                raise
            _log.exception("a step failed, and its requests with it")
            self.metrics.num_failed_steps += 1
            name = type(error).__name__
            failed = StepFailed(f"the step that computed the request failed ({name}); try again")
            for request_id in self._end_requests(failed):
                self.engine.abort(request_id)
        else:
            self._dispatch(outputs)
        finally:
            self._step_start_s = None

    def _dispatch(self, outputs: Iterable[Output]) -> None:
        """Send outputs to their readers, and note which requests have ended."""
        items: list[tuple[Channel, Output | RequestError]] = []
        for output in outputs:
            channel = self._live.get(output.request_id)
            if channel is None:
                continue
            self._num_failures = 0
            items.append((channel, output))
            channel.num_sent += 1
            if output.finish_reason is not None:
                channel.unfinished.discard(output.index)
                if not channel.unfinished:
                    self._forget(channel)
            elif channel.num_sent - channel.num_read > self._max_unread and not channel.is_closed:
                items.append((channel, self._give_up(channel)))
        self._send(items)

    def _give_up(self, channel: Channel) -> RequestError:
        """Abort a request whose reader is too slow; return what to tell it."""
        self.abort(channel.request.request_id)
        return RequestError(
            f"more than {self._max_unread} tokens were waiting to be read, so the request was "
            "ended; read faster, or ask for fewer tokens"
        )

    def _send(self, items: list[tuple[Channel, Output | RequestError]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Channel, Output | RequestError]]] = {}
        for item in items:
            if not item[0].is_closed:
                by_loop.setdefault(item[0].loop, []).append(item)
        for loop, of_loop in by_loop.items():
            try:
                loop.call_soon_threadsafe(deliver, of_loop)
            except RuntimeError:  # the loop was closed, and nobody reads there any more
                for channel, _ in of_loop:
                    channel.is_closed = True
                    self.abort(channel.request.request_id)

    def _forget(self, channel: Channel) -> None:
        with self._lock:
            self._live.pop(channel.request.request_id, None)
            self._end_times.append(time.monotonic())

    def _end_requests(self, error: RequestError) -> list[str]:
        """Let every unfinished sequence end with an error; return the ids of their requests."""
        with self._lock:
            channels = list(self._live.values())
            self._live.clear()
        self._send(
            [
                (channel, _error_output(channel, index, error))
                for channel in channels
                for index in sorted(channel.unfinished)
            ]
        )
        return [channel.request.request_id for channel in channels]

    def _end_calls(self) -> None:
        with self._lock:
            calls = list(self._calls)
            self._calls.clear()
        for call in calls:
            if call.set_running_or_notify_cancel():
                call.set_exception(EngineStopped(f"the engine is {self._state}"))


def _error_output(channel: Channel, index: int, error: RequestError) -> Output:
    return Output(
        channel.request.request_id,
        index,
        finish_reason="error",
        error=error,
        stats=channel.stats,
    )
