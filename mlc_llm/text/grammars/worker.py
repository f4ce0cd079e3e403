"""Child process that reads grammars first, so that a hostile one can be stopped from outside.

Run by path with `python -I -S`, never imported; speaks as child.py does. Whatever happens to it,
deep recursion or endless work, happens to nobody else.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

# Isolated mode leaves out user directories and PYTHONPATH; the parent says where its packages are.
sys.path.extend(sys.argv[2:])

from llguidance import LLMatcher, LLTokenizer, grammar_from

from mlc_llm.text.child import serve
from mlc_llm.text.grammars.limits import END_ID, STACK_BYTES, parser_limits


class Bytes:
    """A vocabulary of the bytes, and an end."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = END_ID
    special_token_ids = (END_ID,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<|end|>")

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens of a text."""
        return list(text.encode() if isinstance(text, str) else text)


_BYTES: Any = Bytes()
TOKENIZER = LLTokenizer(_BYTES)


def read(request: dict[str, Any]) -> dict[str, Any]:
    """Return what it cost, {"cpu_s": ...}, with "lark", what EBNF turned into, or an "error"."""
    reply: dict[str, Any] = {}
    start = time.process_time()
    thread = threading.Thread(target=_read, args=(request, reply))
    thread.start()
    thread.join()
    reply["cpu_s"] = time.process_time() - start
    return reply


def _read(request: dict[str, Any], reply: dict[str, Any]) -> None:
    grammar = request["grammar"]
    if request["is_ebnf"]:
        try:
            reply["lark"] = grammar = grammar_from("ebnf", grammar)
        except ValueError as error:
            reply["error"] = str(error)
            return
    # The most of the work is not that of reading, but of building a lexer.
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        reply["error"] = matcher.get_error()


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    serve(read, int(sys.argv[1]), {"ready": True})
