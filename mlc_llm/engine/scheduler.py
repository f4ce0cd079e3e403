"""Who computes how many tokens in the next step, and on which pages. There is no tensor in it.

Only what every request needs. Rarer things live elsewhere and are called from here.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from mlc_llm.engine.prefix_cache import PrefixCache
from mlc_llm.engine.sequence import Sequence
from mlc_llm.engine.state_cache import StateCache
from mlc_llm.runtime.pages import PagePool


@dataclass
class Work:
    """The next `count` tokens of a sequence; `num_rows` of the last ones need their logits."""

    sequence: Sequence
    count: int
    num_rows: int


@dataclass
class Plan:
    """One step. copies: (source, target) pages to copy before it."""

    works: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_decode_tokens: int = 0
    num_prompt_tokens: int = 0


class Scheduler:
    """First come, first served within a priority; sequences that generate go before prompts.

    A step has at most max_step_tokens tokens, and one for each sequence that generates in any case
    (more where tokens are decided already and there is room),
    and max_step_rows rows of logits. When pages run out,
    the sequence that came last gives up its pages and computes its tokens again later. Without
    mixes_prompts, steps of prompts and steps of generation alternate.
    """

    def __init__(
        self,
        pool: PagePool,
        cache: PrefixCache | None,
        *,
        max_num_sequence: int,
        max_step_tokens: int,
        max_step_rows: int,
        mixes_prompts: bool = True,
        states: StateCache | None = None,
    ) -> None:
        self._pool, self._cache, self._states = pool, cache, states
        self._max_num_sequence = max_num_sequence
        self._max_step_tokens = max_step_tokens
        self._max_step_rows = max_step_rows
        self._mixes_prompts = mixes_prompts
        self._is_prompts_turn = True
        # How many tokens of a prompt with images may join a step, see `ImageRows.limit`.
        self.limit_images: Callable[[list[Work], Sequence, int], int] = lambda _, __, count: count
        self.waiting: list[Sequence] = []  # both in the order of service
        self.running: list[Sequence] = []

    @property
    def has_room(self) -> bool:
        """Return whether one more sequence may run."""
        return len(self.running) < self._max_num_sequence

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in the queue."""
        insort(self.waiting, sequence, key=_order)

    def start_fork(self, parent: Sequence, fork: Sequence) -> None:
        """Let `fork` run on the pages of `parent`, with as many tokens computed. Needs has_room."""
        self._pool.share(parent.pages)
        fork.pages = list(parent.pages)
        fork.num_computed = parent.num_computed
        fork.node, fork.num_cached_pages = parent.node, parent.num_cached_pages
        if self._states is not None:
            self._states.start_fork(parent, fork)
        insort(self.running, fork, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; whole pages stay in the prefix cache."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self, budget: Callable[[int, int], int]) -> Plan:
        """Plan a step: every sequence that generates, and pieces of prompts.

        budget: from the numbers of sequences that generate and of prompts that wait to the most
        tokens that pieces may have.
        """
        plan = Plan()
        if self._mixes_prompts or not self._is_prompts_turn:
            self._plan_decodes(plan)
        num_decodes = len(plan.works)
        if num_decodes == 0 or self._mixes_prompts:
            num_prompts = len(self.running) - num_decodes + len(self.waiting)
            # Prompts go on even where more sequences generate than a step has room for.
            room = max(self._max_step_tokens - plan.num_decode_tokens, 1)
            self._plan_prompts(plan, min(room, budget(num_decodes, num_prompts)))
        if not plan.works:
            self._plan_decodes(plan)
        self._is_prompts_turn = plan.num_prompt_tokens == 0
        return plan

    def commit(self, work: Work) -> None:
        """Take note that a plan's work has been done; whole pages enter the prefix cache."""
        sequence = work.sequence
        sequence.num_computed += work.count
        size = self._pool.page_size
        while sequence.node is not None:
            start = sequence.num_cached_pages * size
            if start + size > sequence.num_computed or self._cache is None:
                break
            page = sequence.pages[sequence.num_cached_pages]
            keys = sequence.cache_keys(start, start + size)
            sequence.node = self._cache.insert(sequence.node, keys, page)
            sequence.num_cached_pages += 1
        if self._states is not None:
            self._states.commit(sequence)

    def _plan_decodes(self, plan: Plan) -> None:
        waiting = [sequence for sequence in self.running if sequence.is_generating]
        spare = self._max_step_tokens - len(waiting)
        for sequence in waiting:
            if sequence in plan.preempted:
                continue
            count = min(sequence.num_left, max(spare, 0) + 1)
            spare -= count - 1
            while not self._grow(sequence, count, plan):
                victim = self.running[-1]
                self._preempt(victim, plan)
                if victim is sequence:
                    break
            else:
                plan.works.append(Work(sequence, count, int(count == sequence.num_left)))
                plan.num_decode_tokens += count

    def _plan_prompts(self, plan: Plan, room: int) -> None:
        for sequence in list(self.running):
            if not sequence.is_generating and sequence not in plan.preempted:
                room -= self._plan_prompt(sequence, plan, room)
        while room > 0 and self.waiting and self.has_room and self._admit(self.waiting[0]):
            sequence = self.waiting.pop(0)
            insort(self.running, sequence, key=_order)
            room -= self._plan_prompt(sequence, plan, room)

    def _plan_prompt(self, sequence: Sequence, plan: Plan, room: int) -> int:
        """Plan as many tokens of a prompt as there is room for; return how many."""
        count = min(sequence.num_left, room)
        rows = self._max_step_rows - sum(work.num_rows for work in plan.works)
        if sequence.wants_prompt_logprobs:
            count = min(count, rows)
        if count <= 0 or rows <= 0:
            return 0
        if self._states is not None:
            count = self._states.limit(sequence, count)
        if sequence.state.request.images:
            count = self.limit_images(plan.works, sequence, count)
            if count == 0:
                return 0
        # Where others work, a prompt waits for their pages; alone it must go on.
        while not self._grow(sequence, count, plan):
            if plan.works or self.running[-1] is sequence:
                return 0
            self._preempt(self.running[-1], plan)
        is_last = count == sequence.num_left
        num_rows = count if sequence.wants_prompt_logprobs else int(is_last)
        plan.works.append(Work(sequence, count, num_rows))
        plan.num_prompt_tokens += count
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the pages of its beginning, if there are some for the rest."""
        # One page for each that runs, so that the newcomer is not preempted at once.
        reserve = len(self.running)
        if reserve and self._pool.num_available <= reserve:
            return False
        salt = sequence.state.request.cache_salt
        pages: list[int] = []
        node, num_known = None, 0
        if self._cache is not None:
            if sequence.wants_prompt_logprobs:
                node = self._cache.root(salt)
            else:
                # The last token is computed in any case: its logits choose the next one.
                keys = sequence.cache_keys(0, len(sequence.tokens) - 1)
                pages, node = self._cache.match(keys, salt)
                num_known = len(pages)
                if self._states is not None:
                    pages, node = self._states.usable(pages, node)
        size = self._pool.page_size
        needed = -(-(len(sequence.tokens) + 1) // size) - len(pages)
        idle = sum(not self._pool.is_used(page) for page in pages)
        if reserve and needed + reserve > self._pool.num_available - idle:
            return False
        self._pool.share(pages)
        sequence.pages, sequence.num_computed = pages, len(pages) * size
        sequence.node, sequence.num_cached_pages = node, len(pages)
        if self._states is not None:
            self._states.start(sequence, num_known * size)
        return True

    def _grow(self, sequence: Sequence, count: int, plan: Plan) -> bool:
        """Get pages to write the next tokens to; return False where there are not enough."""
        size = self._pool.page_size
        needed = -(-(sequence.num_computed + count) // size) - len(sequence.pages)
        # A fork that shares a page which is not full writes to a copy of it.
        copies = sequence.num_computed % size > 0 and self._pool.is_shared(sequence.pages[-1])
        if needed + copies > self._pool.num_available:
            return False
        if copies:
            source = sequence.pages.pop()
            target = self._pool.take(1)
            plan.copies.append((source, target[0]))
            self._pool.give_back([source])
            sequence.pages += target
        if needed > 0:
            sequence.pages += self._pool.take(needed)
        return True

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.state.stats.num_preemptions += 1
        plan.preempted.append(sequence)
        insort(self.waiting, sequence, key=_order)

    def _release(self, sequence: Sequence) -> None:
        self._pool.give_back(sequence.pages)
        sequence.pages, sequence.num_computed = [], 0
        sequence.node, sequence.num_cached_pages = None, 0
        if self._states is not None:
            self._states.release(sequence)

    def check_integrity(self) -> None:
        """Assert that pages and the users that sequences are agree."""
        self._pool.check_integrity([sequence.pages for sequence in self.running])
        if self._cache is not None:
            self._cache.check_integrity()
        if self._states is not None:
            self._states.check_integrity(self.running)
        for sequences in (self.running, self.waiting):
            orders = [sequence.order for sequence in sequences]
            assert orders == sorted(set(orders)), "a queue is out of order"
        assert not any(sequence.pages for sequence in self.waiting)
        size = self._pool.page_size
        for sequence in self.running:
            assert -(-sequence.num_computed // size) <= len(sequence.pages)
            assert 0 < sequence.num_left <= len(sequence.tokens)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
