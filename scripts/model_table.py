#!/usr/bin/env python3
"""Write docs/models.md from the registry and the stored references; a test checks it was done.

Run it after adding a family, a reference or a quantization: python scripts/model_table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlc_llm.errors import UnsupportedModel
from mlc_llm.models.base import Family
from mlc_llm.models.registry import FAMILIES, find_family
from mlc_llm.quantization.schemes import SCHEMES
from mlc_llm.weights.gguf_architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
# Where references are, and what the models in them are for.
REFERENCES = (
    ("chat", ROOT / "tests" / "references"),
    ("chat", ROOT / "tests" / "image_references"),
    ("embedding", ROOT / "tests" / "encoder_references"),
)
# Families whose GGUF files have the architecture of another, and are told apart by their content.
_STORED_AS = {
    "deepseek_v3": "deepseek2",
    "glm": "chatglm",
    "granitemoeshared": "granitemoe",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi-msft": "phi2",
}

_HEAD = """\
# Models

This page is made by `scripts/model_table.py` from the registry of families and the references that
are stored with the tests; do not edit it.

A reference is a tiny checkpoint with random weights, and the logits or vectors that another program
computed for it; tests compare ours with them (`tests/models/test_parity.py`). *Computed by* names
the program. Transformers lacks some families; of these, another of its models that computes the
same was taken, and its checkpoint rewritten as theirs are (*as*), or the package of their authors.
A family marked *renamed* is another one with names of its own: its checkpoints become the same
artifact (`tests/models/test_renamed_references.py`). One without a reference is not proven that
way. *GGUF* names the architectures of GGUF files that are read; all others come as safetensors or
PyTorch files.

| family | for | architectures | references | computed by | GGUF |
|---|---|---|---|---|---|
"""


class Reference(NamedTuple):
    """A stored reference, and what computed it."""

    name: str
    computed_by: str


def render_page() -> str:
    """Return the whole page."""
    references = _references_by_family()
    rows = [_row(family, references.get(family.name, [])) for family in _sorted_families()]
    schemes = ", ".join(f"`{name}`" for name in SCHEMES)
    text = f"{_HEAD}{''.join(rows)}\n{len(rows)} families, {_count(references)} references.\n"
    return f"{text}\nQuantizations: {schemes}.\n"


def _sorted_families() -> list[Family]:
    return [FAMILIES[name] for name in sorted(FAMILIES)]


def _row(family: Family, references: list[Reference]) -> str:
    names = [
        name for name, item in ARCHITECTURES.items() if item.class_name in family.architectures
    ]
    if (other := _STORED_AS.get(family.name)) is not None and other not in names:
        names.append(other)
    cells = (
        f"`{family.name}`",
        family.task,
        ", ".join(f"`{name}`" for name in family.architectures),
        ", ".join(f"`{reference.name}`" for reference in references) or _renamed(family) or "none",
        ", ".join(dict.fromkeys(reference.computed_by for reference in references)),
        ", ".join(f"`{name}`" for name in names),
    )
    return f"| {' | '.join(cells)} |\n"


def _renamed(family: Family) -> str:
    path = ROOT / "tests" / "references" / "renamed.json"
    found = json.loads(path.read_text(encoding="utf-8")).get(family.name)
    return f"`{found['case']}`, renamed" if found else ""


def _count(references: dict[str, list[Reference]]) -> int:
    return sum(len(names) for names in references.values())


def _references_by_family() -> dict[str, list[Reference]]:
    found: dict[str, list[Reference]] = {}
    for reference, task, config in _stored_references():
        try:
            family = find_family(config, task=task)
        except UnsupportedModel:
            continue  # stored before its family is there
        found.setdefault(family.name, []).append(reference)
    return found


def _stored_references() -> Iterator[tuple[Reference, str, dict[str, object]]]:
    """Yield each reference, its task and its config.json, in the order they were described."""
    for task, directory in REFERENCES:
        for case in json.loads((directory / "cases.json").read_text(encoding="utf-8")):
            path = directory / case["name"] / "config.json"
            if path.is_file():
                reference = Reference(case["name"], _computed_by(case))
                yield reference, task, json.loads(path.read_text(encoding="utf-8"))


def _computed_by(case: dict[str, str]) -> str:
    """Return what computed a reference, from its description in `cases.json`."""
    if package := case.get("package"):
        return f"`{package}`"
    other = case.get("transformers_type")
    return f"transformers, as `{other}`" if other else "transformers"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
