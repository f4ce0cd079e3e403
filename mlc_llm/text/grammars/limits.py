"""What one grammar may use up. Shared with the process that tries grammars out."""

from __future__ import annotations

from llguidance import LLParserLimits

# Seconds of processor time that reading a grammar may take; the process that tries it then ends,
# and however busy the machine is, after so many by the clock.
TIME_LIMIT_S = 1.0
CLOCK_LIMIT_S = 10.0
MEMORY_LIMIT_BYTES = 512 << 20
# The process reads grammars on a stack much smaller than any other thread's, so that what passes
# there cannot overflow one here.
STACK_BYTES = 256 << 10
# The special token of that process's vocabulary, one behind the bytes.
END_ID = 256


def parser_limits() -> LLParserLimits:
    """Return llguidance's limits: a mask takes at most some tens of milliseconds with them."""
    return LLParserLimits(
        max_items_in_row=5_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=30_000,  # of 1 to 2 KB each
        max_grammar_size=200_000,
        verbose_errors=False,
    )
