"""What a request cost, and the sums over all requests as Prometheus text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RequestStats:
    """Counts and seconds of one request; `finish_reason` is "stop", "length" or "abort"."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: str = "abort"

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Return the rate over prompt tokens that were computed; None where there were none."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_s if self.prefill_s > 0 and computed > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Return the rate over tokens after the first; None for less than two."""
        later = self.completion_tokens - 1
        return later / self.decode_s if self.decode_s > 0 and later > 0 else None


@dataclass
class EngineMetrics:
    """Sums over all requests of an engine."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def add(self, stats: RequestStats) -> None:
        """Count a request that has ended."""
        self.requests += 1
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        self.completion_tokens += stats.completion_tokens
        self.prefill_s += stats.prefill_s
        self.decode_s += stats.decode_s

    def prometheus_text(self) -> str:
        """Return the sums in Prometheus' text format."""
        lines = []
        for name, help_text, value in (
            ("requests_total", "Requests that have ended.", self.requests),
            ("prompt_tokens_total", "Prompt tokens, cached ones included.", self.prompt_tokens),
            ("cached_tokens_total", "Prompt tokens found in the cache.", self.cached_tokens),
            ("generation_tokens_total", "Tokens generated.", self.completion_tokens),
            ("prefill_seconds_total", "Time spent on prompts.", self.prefill_s),
            ("decode_seconds_total", "Time spent on generated tokens.", self.decode_s),
        ):
            lines.append(f"# HELP mlc_llm_{name} {help_text}")
            lines.append(f"# TYPE mlc_llm_{name} counter")
            lines.append(f"mlc_llm_{name} {value}")
        return "\n".join(lines) + "\n"
