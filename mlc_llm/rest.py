"""`python -m mlc_llm.rest`: the server under the name and flags that older instructions use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mlc_llm serve` with the old flags' values and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mlc_llm.rest",
        description="Serve a model; `mlc_llm serve` is the same with more options.",
    )
    parser.add_argument("--model", required=True, help="as MODEL of `mlc_llm serve`")
    parser.add_argument("--lib-path", "--model-lib-path", metavar="FILE", help="compiled library")
    parser.add_argument("--device", default="auto", help="device to run on (auto)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", default="8000", help="port to listen on (8000)")
    given = parser.parse_args(arguments)

    from mlc_llm.cli.main import main as run

    words = ["serve", given.model, "--device", given.device]
    words += ["--host", given.host, "--port", given.port]
    if given.lib_path is not None:
        words += ["--model-lib", given.lib_path]
    return run(words)


if __name__ == "__main__":
    sys.exit(main())
