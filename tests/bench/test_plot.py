"""The picture: which panels there are, and that a missing matplotlib is explained."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mlc_llm.bench.plot import check_plot, draw, plan_panels
from mlc_llm.errors import OptionError

from .fakes import make_decode, make_prefill, make_report


def test_without_matplotlib_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="run `pip install matplotlib`"):
        check_plot(Path("out.png"))


def test_only_png_is_written() -> None:
    with pytest.raises(OptionError, match=r"only \.png files"):
        check_plot(Path("out.pdf"))


def shape_of(*measurements) -> list[tuple[str, str, dict[str, list[int]]]]:  # type: ignore[no-untyped-def]
    """Return the panels with the places of their points only."""
    return [
        (title, x_label, {label: [x for x, _ in line] for label, line in lines.items()})
        for title, x_label, lines in plan_panels(measurements)
    ]


def test_one_decode_and_one_prefill_are_two_panels() -> None:
    assert shape_of(make_decode(), make_prefill()) == [
        ("prefill", "tokens of the prompt", {"": [100]}),
        ("decode", "sequences", {"context 32": [1]}),
    ]


def test_batches_at_contexts_are_shown_over_both() -> None:
    decodes = [make_decode(batch, context) for context in (4096, 32) for batch in (1, 4)]
    assert shape_of(*decodes) == [
        ("decode", "sequences", {"context 4,096": [1, 4], "context 32": [1, 4]}),
        ("decode", "tokens of context", {"batch 1": [32, 4096], "batch 4": [32, 4096]}),
    ]


def test_a_context_sweep_and_a_prefill_alone_are_one_panel_each() -> None:
    assert shape_of(make_decode(context=64), make_decode(context=32)) == [
        ("decode", "tokens of context", {"batch 1": [32, 64]})
    ]
    assert shape_of(make_prefill(9), make_prefill(5)) == [
        ("prefill", "tokens of the prompt", {"": [5, 9]})
    ]


def test_a_png_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    draw(make_report(make_prefill(), make_decode(), make_decode(context=64)), path)
    assert path.read_bytes().startswith(b"\x89PNG")
