"""A Progress that remembers what it was told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Stage:
    """One stage as it was told."""

    name: str
    total: int | None
    unit: str
    done: int = 0
    steps: int = 0
    is_finished: bool = False


@dataclass
class RecordedProgress:
    """Implements prepare.progress.Progress."""

    stages: list[Stage] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.stages.append(Stage(stage, total, unit))

    def advance(self, n: int) -> None:
        self.stages[-1].done += n
        self.stages[-1].steps += 1

    def finish(self) -> None:
        self.stages[-1].is_finished = True

    def message(self, text: str) -> None:
        self.messages.append(text)
