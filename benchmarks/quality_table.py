"""What each quantization costs in quality, and what it takes: the table of docs/quantization.md.

Compares next-token distributions of every scheme on a stored text with those of float16 weights
and exact activations: KL divergence, how often the likeliest token is the same, perplexity. The
demo model is taken where no other is named; its file holds 4-bit weights, so float16 stands for
exactly those, and `gguf` keeps them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import quality

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlc_llm.prepare.cache import CacheHome

PAGE = Path(__file__).parent.parent / "docs" / "quantization.md"
BEGIN, END = "<!-- begin: benchmarks/quality_table.py -->", "<!-- end -->"
REFERENCE = "q0f16"
SCHEMES = (
    *("q0f16", "q0bf16", "gguf", "q8f16_1", "e4m3_e4m3_f16", "e5m2_e5m2_f16"),
    *("fp8_e4m3fn_bf16_block_scale", "q4f32_1", "q4f16_1", "q4bf16_1", "q4f16_2", "q3f16_1"),
)


@dataclass(frozen=True)
class Row:
    """A line of the table: a scheme with the activations it has by default."""

    name: str
    size_bytes: int
    bits_per_parameter: float
    exact: quality.Quality
    usual: quality.Quality


def main() -> None:
    """Measure and print the table, or write it into the page."""
    from mlc_llm.prepare.cache import CacheHome

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="as for `mlc_llm chat`")
    parser.add_argument("--quantization", nargs="+", default=list(SCHEMES), metavar="NAME")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    home = CacheHome.from_environment(os.environ)
    rows = measure(arguments.model, arguments.quantization, home)
    table = format_table(rows)
    if arguments.write:
        PAGE.write_text(place_table(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")
    else:
        print(table)


def measure(model: str | None, names: Sequence[str], home: CacheHome) -> list[Row]:
    """Return a row for each scheme; models and libraries are made where they are not cached."""
    from mlc_llm.artifact import find_tensor_index, read_json_object
    from mlc_llm.text.tokenizer import Tokenizer

    text = quality.TEXT_PATH.read_text(encoding="utf-8")
    artifact = quality.prepare_model(model, REFERENCE, home)
    tokens = Tokenizer.load(artifact).encode(text)
    expected = quality.log_probabilities_of(artifact, quality.FLOAT_OPT, home, tokens)
    rows = []
    for name in names:
        artifact = quality.prepare_model(model, name, home)
        exact = _compare(artifact, quality.FLOAT_OPT, home, expected, tokens)
        usual = _compare(artifact, quality.INT8_OPT, home, expected, tokens)
        index = find_tensor_index(artifact)
        assert index is not None
        metadata = read_json_object(index)["metadata"]
        size, bits = int(metadata["ParamBytes"]), float(metadata["BitsPerParam"])
        rows.append(Row(name, size, bits, exact, usual))
        print(format_row(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _compare(
    artifact: Path,
    opt: str,
    home: CacheHome,
    expected: NDArray[np.float32],
    tokens: Sequence[int],
) -> quality.Quality:
    found = quality.log_probabilities_of(artifact, opt, home, tokens)
    return quality.compare(expected, found, tokens)


def format_table(rows: Sequence[Row]) -> str:
    """Return Markdown."""
    lines = [
        "| quantization | MiB | bits a parameter | KL, exact activations | KL "
        "| same likeliest token | perplexity |",
        "|---|---|---|---|---|---|---|",
        *map(format_row, rows),
    ]
    return "\n".join(lines)


def format_row(row: Row) -> str:
    """Return one line of the table."""
    return (
        f"| `{row.name}` | {row.size_bytes / 2**20:.1f} | {row.bits_per_parameter:.2f} "
        f"| {row.exact.mean_kl:.5f} | {row.usual.mean_kl:.5f} | {row.usual.same_top:.1%} "
        f"| {row.usual.int8_perplexity:.3f} |"
    )


def place_table(page: str, table: str) -> str:
    """Return the page with the table between its marks. Raises ValueError where they are not."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{PAGE} must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    main()
