"""Slots of recurrent state: one for each sequence that runs, and snapshots for later prompts.

Knows numbers and nodes of the prefix cache. The tensors belong to the runner, which makes the
copies that are planned here before its next step.

A recurrent state cannot be cut back as pages can, so a prompt goes on only from a length at which
a snapshot was taken. These are page boundaries, where a node of the prefix cache says which tokens
came before:

    prompt  ├─────── shared with an earlier one ──────┬──── new ────┬─ rest ─┤── answer ──
    kept at                                  where they part   last boundary    newest boundary

(Pan et al. 2024, Marconi, section 4.1: where prompts part, others will part as well.) A step of a
prompt ends at such a place. An answer has one snapshot, which moves along as it grows.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

from mlc_llm.engine.prefix_cache import PrefixCache, PrefixNode
from mlc_llm.engine.sequence import Sequence


@dataclass
class _Snapshot:
    """A kept state. `owner`: whose newest boundary it is, while nobody else has gone on from it."""

    slot: int
    owner: Sequence | None


class StateCache:
    """Gives out `num_sequences` + `num_snapshots` slots; replaces snapshots oldest use first."""

    def __init__(
        self, cache: PrefixCache | None, page_size: int, num_sequences: int, num_snapshots: int
    ) -> None:
        assert num_snapshots >= 0, "the runner has fewer slots than sequences"
        self._cache, self._page_size = cache, page_size
        self._num_slots = num_sequences + num_snapshots
        self._max_snapshots = 0 if cache is None else num_snapshots
        self._free = list(range(self._num_slots - 1, -1, -1))
        self._snapshots: dict[PrefixNode, _Snapshot] = {}  # least recently used first
        self._copies: list[tuple[int, int]] = []
        if cache is not None:
            cache.on_lost = self._forget

    @property
    def num_snapshots(self) -> int:
        """Snapshots there are now."""
        return len(self._snapshots)

    def usable(self, pages: list[int], node: PrefixNode) -> tuple[list[int], PrefixNode]:
        """Cut pages that match a prompt, and their node, back to where a snapshot is."""
        count = len(pages)
        while count > 0 and node not in self._snapshots:
            assert node.parent is not None
            node, count = node.parent, count - 1
        return pages[:count], node

    def start(self, sequence: Sequence, num_known: int) -> None:
        """Give a sequence a slot with the state after its computed tokens, none or a snapshot's.

        num_known: tokens of its beginning that the prefix cache knows, with or without a snapshot.
        """
        sequence.state_slot = self._free.pop()
        if sequence.num_computed > 0:
            assert sequence.node is not None
            snapshot = self._use(sequence.node)
            snapshot.owner = None
            self._copies.append((snapshot.slot, sequence.state_slot))
        if self._max_snapshots and sequence.node is not None:
            last = (len(sequence.tokens) - 1) // self._page_size * self._page_size
            sequence.state_stops = (num_known, last)

    def start_fork(self, parent: Sequence, fork: Sequence) -> None:
        """Give a fork a slot with the state of its parent."""
        assert parent.state_slot is not None
        fork.state_slot = self._free.pop()
        self._copies.append((parent.state_slot, fork.state_slot))

    def limit(self, sequence: Sequence, count: int) -> int:
        """Return how many of the next `count` tokens of a prompt go into one step."""
        ends = [stop - sequence.num_computed for stop in sequence.state_stops]
        return min([count, *(end for end in ends if end > 0)])

    def commit(self, sequence: Sequence) -> None:
        """Keep the state after a step where its place is worth it and in the prefix cache."""
        length, node = sequence.num_computed, sequence.node
        if not self._max_snapshots or node is None or node.page is None:
            return
        if length != sequence.num_cached_pages * self._page_size:
            return
        if length in sequence.state_stops:
            self._keep(sequence, node, None)
        elif sequence.num_left == 0:
            self._keep(sequence, node, sequence)

    def release(self, sequence: Sequence) -> None:
        """Take the slot back; snapshots stay."""
        if sequence.state_slot is not None:
            self._free.append(sequence.state_slot)
        newest = sequence.snapshot and self._snapshots.get(sequence.snapshot)
        if newest and newest.owner is sequence:
            newest.owner = None
        sequence.state_slot, sequence.state_stops, sequence.snapshot = None, (), None

    def take_copies(self) -> list[tuple[int, int]]:
        """Return (source, target) slots to copy before the next step, in this order."""
        copies, self._copies = self._copies, []
        return copies

    def _keep(self, sequence: Sequence, node: PrefixNode, owner: Sequence | None) -> None:
        """Take a snapshot for a node; that of the owner's last one moves here."""
        if node in self._snapshots:
            self._use(node)
            return
        assert sequence.state_slot is not None
        slot = self._take_slot(owner)
        self._snapshots[node] = _Snapshot(slot, owner)
        self._copies.append((sequence.state_slot, slot))
        if owner is not None:
            owner.snapshot = node

    def _take_slot(self, owner: Sequence | None) -> int:
        newest = None if owner is None else owner.snapshot
        if newest is not None:
            found = self._snapshots.get(newest)
            if found is not None and found.owner is owner:
                return self._snapshots.pop(newest).slot
        if len(self._snapshots) < self._max_snapshots:
            return self._free.pop()
        return self._snapshots.pop(next(iter(self._snapshots))).slot

    def _use(self, node: PrefixNode) -> _Snapshot:
        snapshot = self._snapshots[node] = self._snapshots.pop(node)
        return snapshot

    def _forget(self, node: PrefixNode) -> None:
        snapshot = self._snapshots.pop(node, None)
        if snapshot is not None:
            self._free.append(snapshot.slot)

    def check_integrity(self, running: List[Sequence]) -> None:
        """Assert that every slot is free, a sequence's or a snapshot's, once."""
        used = [sequence.state_slot for sequence in running]
        assert None not in used, "a sequence runs without a state"
        kept = [snapshot.slot for snapshot in self._snapshots.values()]
        slots = [*self._free, *(slot for slot in used if slot is not None), *kept]
        assert sorted(slots) == list(range(self._num_slots)), "a slot is lost or counted twice"
        assert len(kept) <= self._max_snapshots
        for node, snapshot in self._snapshots.items():
            assert self._cache is not None and self._cache.is_attached(node)
            assert snapshot.owner is None or snapshot.owner.snapshot is node
