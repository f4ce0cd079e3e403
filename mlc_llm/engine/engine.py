"""The step loop: schedule, forward, sample, commit.

Only what every model and every request needs. Rarer things live elsewhere and are called from here.
"""

from __future__ import annotations

import logging
import time

import numpy as np
from numpy.typing import NDArray

from mlc_llm.engine.grammar_cache import CompiledGrammar, GrammarCache
from mlc_llm.engine.grammar_masks import MaskThreads
from mlc_llm.engine.images import ImageRows
from mlc_llm.engine.metrics import EngineLoad, EngineMetrics, RequestStats
from mlc_llm.engine.prefix_cache import PrefixCache
from mlc_llm.engine.request import FinishReason, Output, Request, TokenLogprobs
from mlc_llm.engine.sampler import Sampled, Sampler, SequenceSampler, token_logprobs
from mlc_llm.engine.scheduler import Plan, Scheduler, Work
from mlc_llm.engine.sequence import RequestState, Sequence
from mlc_llm.engine.state_cache import StateCache
from mlc_llm.engine.step_budget import StepBudget
from mlc_llm.engine.step_builder import StepBuilder
from mlc_llm.errors import ContextTooLong, MlcError, RequestError, StepFailed
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.runner import ModelRunner

_log = logging.getLogger(__name__)
# The logit of ids that no tokenizer knows.
_NEVER = np.float32(-1e30)
# Steps that fail in a row before it is the engine that has failed.
_MAX_FAILURES = 3


class Engine:
    """Serves requests on a runner, from one thread at a time; `check` may be called from any."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_num_sequence: int | None = None,
        max_sequence_len: int | None = None,
        max_step_tokens: int | None = None,
        has_prefix_cache: bool = True,
        max_idle_pages: int | None = None,
        mixes_prompts: bool = True,
        active_vocab_size: int = 0,
        grammars: GrammarCache | None = None,
    ) -> None:
        """Take a runner; limits that are left out are those of its library and pages.

        active_vocab_size: ids from here on are padding of the embedding table; 0 for none.
        grammars: those of this model's tokenizer, without which requests must not have any.
        """
        metadata = runner.metadata
        page_size = metadata.kv_cache.page_size
        self.max_num_sequence = min(max_num_sequence or 128, metadata.max_batch_size)
        self.max_sequence_len = min(
            max_sequence_len or metadata.context_window_size,
            metadata.context_window_size,
            runner.num_pages * page_size,
        )
        self.vocab_size = active_vocab_size or metadata.vocab_size
        self.metrics = EngineMetrics(self.load)
        self._runner = runner
        self._pool = PagePool(runner.num_pages, page_size, max_idle_pages)
        self._cache = PrefixCache(self._pool) if has_prefix_cache else None
        self._state_cache = None
        if metadata.states:
            num_snapshots = runner.num_state_slots - self.max_num_sequence
            self._state_cache = StateCache(
                self._cache, page_size, self.max_num_sequence, num_snapshots
            )
        images = ImageInputs.from_json(metadata.images)
        self._images = None if images is None else ImageRows(runner, images)
        chunk = min(max_step_tokens or metadata.prefill_chunk_size, metadata.prefill_chunk_size)
        self._scheduler = Scheduler(
            self._pool,
            self._cache,
            max_num_sequence=self.max_num_sequence,
            max_step_tokens=chunk,
            max_step_rows=metadata.max_batch_size,
            mixes_prompts=mixes_prompts,
            states=self._state_cache,
        )
        if self._images is not None:
            self._scheduler.limit_images = self._images.limit
        max_pages = -(-self.max_sequence_len // page_size)
        self._builder = StepBuilder(self.max_num_sequence, max_pages, page_size)
        self._budget = StepBudget(chunk)
        self._sampler = Sampler(runner)
        self.grammars = grammars
        self._masks = MaskThreads()
        self._states: dict[str, RequestState] = {}
        self._arrivals = 0
        self._num_failures = 0
        self._image_s = 0.0  # of the last step, for reading an image
        self._ready: list[Output] = []

    @property
    def has_work(self) -> bool:
        """Return whether `step` has something to do."""
        return bool(self._states or self._ready)

    def load(self) -> EngineLoad:
        """Return what is at work now; any thread may ask."""
        scheduler, pool = self._scheduler, self._pool
        return EngineLoad(
            len(scheduler.running), len(scheduler.waiting), pool.num_used, pool.num_pages
        )

    def check(self, request: Request) -> None:
        """Raise what is wrong with a request: ContextTooLong or RequestError."""
        length = len(request.prompt)
        if length == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if length >= self.max_sequence_len:
            raise ContextTooLong(
                # Clients such as litellm know this kind of error by OpenAI's words for it.
                f"the prompt has {length:,} tokens, and this model's maximum context length is "
                f"{self.max_sequence_len:,} tokens with the answer; shorten it, or raise "
                "context_window_size with --overrides"
            )
        if min(request.prompt) < 0 or max(request.prompt) >= self.vocab_size:
            bad = next(token for token in request.prompt if not 0 <= token < self.vocab_size)
            raise RequestError(f"token {bad} is outside the vocabulary of {self.vocab_size} tokens")
        if request.n < 1:
            raise RequestError(f"n must be at least 1, is {request.n}", "n")
        request.params.check_vocabulary(self.vocab_size)
        if self._images is not None:
            self._images.check(request)
        elif request.images:
            raise RequestError("this model takes no images; send text only", "messages")
        if request.grammar is not None and self.grammars is None:
            raise RequestError("this engine was made without grammars", "response_format")

    def add(self, request: Request, grammar: CompiledGrammar | None = None) -> RequestStats:
        """Queue a request and return its statistics, which `step` keeps up to date.

        grammar: the request's, compiled here where it is left out. Raises what `check` raises, and
        RequestError for an id that is in use.
        """
        self.check(request)
        if request.request_id in self._states:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another")
        if request.grammar is not None and grammar is None and self.grammars is not None:
            grammar = self.grammars.compile(request.grammar)
        stats = RequestStats(prompt_tokens=len(request.prompt), arrival_s=time.perf_counter())
        state = RequestState(request, self._arrivals, stats, num_unfinished=request.n)
        self._arrivals += 1
        if request.prompt_logprobs is not None:
            state.prompt_logprobs = [None]
        prompt = list(request.prompt)
        for index in range(request.n):
            sampler = SequenceSampler(
                request.params, prompt, index, request.stop_token_ids, self.vocab_size, grammar
            )
            state.sequences.append(Sequence(state, index, list(prompt), len(prompt), sampler))
        state.forks = state.sequences[1:]
        self._states[request.request_id] = state
        self._scheduler.add(state.sequences[0])
        return stats

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request now; `step` then says so once more. Unknown ids are fine.

        reason: "stop" where the text has met a stop string, which the engine cannot see.
        """
        state = self._states.get(request_id)
        if state is not None:
            for sequence in state.sequences:
                self._finish(sequence, reason, self._ready)

    def step(self) -> list[Output]:
        """Run one step and return what it brought; requests that fail end with an error.

        Raises when one step after another fails: then it is not the requests.
        """
        outputs, self._ready = self._ready, []
        start = time.perf_counter()
        plan = self._scheduler.schedule(self._budget.prompt_tokens)
        for sequence in plan.preempted:
            self._builder.release(sequence)
        if not plan.works:
            return outputs
        self._note_start(plan, start)
        try:
            logits, forward_s = self._forward(plan)
            rows = self._commit(plan, logits)
            sampled = self._sample(logits, rows)
        except Exception as error:
            # The last line of defence: whatever it was, only this step's requests pay for it.
            _log.exception("a step failed, and its requests with it")
            self._fail(plan, error, outputs)
            self._num_failures += 1
            if self._num_failures < _MAX_FAILURES:
                return outputs
            self._ready = outputs
            raise
        self._num_failures = 0
        now = time.perf_counter()
        for (sequence, _), choice in zip(rows, sampled, strict=True):
            self._accept(sequence, choice, now, outputs)
        work_s = now - start - self._image_s
        self._budget.record(plan.num_decode_tokens, plan.num_prompt_tokens, work_s)
        self.metrics.note_step(
            time.perf_counter() - start,
            forward_s + self._sampler.library_s,
            plan.num_prompt_tokens,
            plan.num_decode_tokens,
        )
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forget the pages of earlier prompts; requests under way keep theirs."""
        if self._cache is not None:
            self._cache.clear()

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        self._scheduler.check_integrity()
        live = {state for state in self._states.values() if state.num_unfinished > 0}
        assert len(live) == len(self._states), "a finished request is still known"
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            assert sequence.state in live and not sequence.is_finished

    def close(self) -> None:
        """Free the model."""
        self._masks.close()
        if self.grammars is not None:
            self.grammars.close()
        self._runner.close()

    def _note_start(self, plan: Plan, now: float) -> None:
        for work in plan.works:
            stats = work.sequence.state.stats
            if stats.start_s is None:
                stats.cached_tokens = work.sequence.num_computed
                self.metrics.note_start(stats, now)

    def _forward(self, plan: Plan) -> tuple[NDArray[np.float32], float]:
        """Return the logits of all rows that the plan wants, and the seconds they took."""
        step = self._builder.build(plan.works)
        start = time.perf_counter()
        if self._images is not None:
            step = self._images.place(step, plan.works, self._scheduler.running)
            self._image_s = time.perf_counter() - start
        if plan.copies:
            sources, targets = zip(*plan.copies, strict=True)
            self._runner.copy_pages(sources, targets)
        if self._state_cache is not None and (copies := self._state_cache.take_copies()):
            self._runner.copy_states(*zip(*copies, strict=True))
        self._masks.start(plan.works)
        logits: NDArray[np.float32] = self._runner.forward(step)
        duration_s = time.perf_counter() - start
        if self.vocab_size < logits.shape[1]:
            logits[:, self.vocab_size :] = _NEVER
        return logits, duration_s

    def _commit(self, plan: Plan, logits: NDArray[np.float32]) -> list[tuple[Sequence, int]]:
        """Return the sequences whose next token is to be chosen, and the row of its logits."""
        rows: list[tuple[Sequence, int]] = []
        end = 0
        for work in plan.works:
            sequence = work.sequence
            first, end = end, end + work.num_rows
            if sequence.wants_prompt_logprobs:
                self._read_prompt_logprobs(work, logits[first:end])
            self._scheduler.commit(work)
            if sequence.num_left == 0:
                rows.append((sequence, end - 1))
                rows += [(fork, end - 1) for fork in self._start_forks(sequence)]
        return rows

    def _read_prompt_logprobs(self, work: Work, logits: NDArray[np.float32]) -> None:
        sequence, state = work.sequence, work.sequence.state
        assert state.prompt_logprobs is not None
        for place, row in enumerate(logits, sequence.num_computed + 1):
            # After a preemption the first ones come again.
            if place == len(state.prompt_logprobs) < sequence.num_prompt_tokens:
                num_top = state.request.prompt_logprobs or 0
                state.prompt_logprobs.append(token_logprobs(row, sequence.tokens[place], num_top))

    def _start_forks(self, sequence: Sequence) -> list[Sequence]:
        """Start what shares the prompt just computed; what finds no room waits in the queue."""
        forks, sequence.state.forks = sequence.state.forks, []
        started = []
        for fork in forks:
            if self._scheduler.has_room:
                self._scheduler.start_fork(sequence, fork)
                started.append(fork)
            else:
                self._scheduler.add(fork)
        return started

    def _sample(
        self, logits: NDArray[np.float32], rows: list[tuple[Sequence, int]]
    ) -> list[Sampled]:
        if not rows:
            return []
        if (indices := [row for _, row in rows]) != list(range(len(logits))):
            logits = logits[indices]
        return self._sampler.sample(logits, [sequence.sampler for sequence, _ in rows])

    def _accept(
        self, sequence: Sequence, choice: Sampled, now: float, outputs: list[Output]
    ) -> None:
        """Append a sequence's next token and those its grammar forces after it, or end it."""
        request = sequence.state.request
        if choice.error is not None:
            self._finish(sequence, "error", outputs, choice.error)
            return
        if choice.is_end or choice.token_id in request.stop_token_ids:
            self._finish(sequence, "stop", outputs)
            return
        self._append(sequence, choice.token_id, choice.logprobs, now, outputs)
        grammar = sequence.sampler.grammar
        # Probabilities come from the logits of a step of its own.
        if grammar is None or request.params.logprobs is not None:
            return
        while grammar.forced and not sequence.is_finished:
            if grammar.forced[0] in request.stop_token_ids:
                self._finish(sequence, "stop", outputs)
            else:
                self._append(sequence, grammar.forced[0], None, now, outputs)

    def _append(
        self,
        sequence: Sequence,
        token: int,
        logprobs: TokenLogprobs | None,
        now: float,
        outputs: list[Output],
    ) -> None:
        """Append a token; end the sequence where that completes it."""
        state, request, sampler = sequence.state, sequence.state.request, sequence.sampler
        sequence.tokens.append(token)
        sampler.append(token)
        self.metrics.note_token(state.stats, now)
        output = Output(request.request_id, sequence.index, token, logprobs, stats=state.stats)
        self._emit(state, output, outputs)
        is_full = len(sequence.tokens) >= self.max_sequence_len
        if sampler.grammar is not None and sampler.grammar.is_finished:
            output.finish_reason = "stop"
        elif is_full or sequence.num_generated == request.params.max_tokens:
            output.finish_reason = "length"
        if output.finish_reason is not None:
            self._end(sequence, output.finish_reason)

    def _emit(self, state: RequestState, output: Output, outputs: list[Output]) -> None:
        if output.index == 0 and state.prompt_logprobs is not None:
            output.prompt_logprobs, state.prompt_logprobs = state.prompt_logprobs, None
        outputs.append(output)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        outputs: list[Output],
        error: MlcError | None = None,
    ) -> None:
        """End a sequence without a further token."""
        if not sequence.is_finished:
            state = sequence.state
            output = Output(
                state.request.request_id,
                sequence.index,
                finish_reason=reason,
                error=error,
                stats=state.stats,
            )
            self._emit(state, output, outputs)
            self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Give back what a sequence holds; with its last sequence the request ends."""
        state = sequence.state
        sequence.is_finished = True
        self._scheduler.remove(sequence)
        self._builder.release(sequence)
        state.num_unfinished -= 1
        state.stats.finish_reason = reason
        if state.num_unfinished == 0:
            del self._states[state.request.request_id]
            self.metrics.add(state.stats)

    def _fail(self, plan: Plan, error: Exception, outputs: list[Output]) -> None:
        """End the requests of a step that failed; other requests go on."""
        self.metrics.num_failed_steps += 1
        failed = {work.sequence.state for work in plan.works}
        for state in failed:
            reason = StepFailed(
                f"the step that computed the request failed ({type(error).__name__}); try again"
            )
            for sequence in state.sequences:
                self._finish(sequence, "error", outputs, reason)
