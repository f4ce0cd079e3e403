"""`mlc_llm list`: what is in the cache."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlc_llm.cli.options import read_caches
from mlc_llm.cli.progress import format_size
from mlc_llm.cli.terminal import say

if TYPE_CHECKING:
    from mlc_llm.prepare.inventory import CachedModel, Inventory


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """List the models in the cache: downloads, copies converted here, libraries.

    A model that was converted has a line for the download and one for each quantization made of it.
    """
    from mlc_llm.prepare.inventory import take_inventory

    inventory = take_inventory(read_caches().home)
    if as_json:
        print(json.dumps(_to_json(inventory), indent=2))
        return
    if inventory.models:
        _print_models(inventory.models)
    else:
        say(f"no models in {inventory.home.root}; `mlc_llm pull MODEL` fetches one")
    _print_rest(inventory)


def _print_models(models: list[CachedModel]) -> None:
    from mlc_llm.cli.table import format_age, print_table

    headers = ["NAME", "KIND", "QUANT", "SIZE", "USED", "LIBS", "STATE"]
    rows = [
        [
            model.name,
            model.kind,
            model.quantization or "-",
            format_size(model.size_bytes),
            format_age(model.last_used),
            str(len(model.libraries)),
            model.state,
        ]
        for model in models
    ]
    if all(model.state == "ready" for model in models):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    print_table(headers, rows, right=("SIZE", "LIBS"))


def _print_rest(inventory: Inventory) -> None:
    """Tell what else takes space, and how to get it back."""
    libraries, leftovers = inventory.libraries, inventory.leftovers
    if libraries:
        size = format_size(sum(library.size_bytes for library in libraries))
        noun = "library" if len(libraries) == 1 else "libraries"
        say(f"{len(libraries)} {noun}, packed weights included: {size}")
    stale = [library for library in libraries if not library.is_current or not library.users]
    stale_bytes = sum(library.size_bytes for library in stale)
    stale_bytes += sum(m.size_bytes for m in inventory.models if m.state == "stale")
    stale_bytes += sum(leftover.size_bytes for leftover in leftovers)
    if stale_bytes:
        say(f"{format_size(stale_bytes)} are of no more use; `mlc_llm rm --stale` frees them")


def _to_json(inventory: Inventory) -> dict[str, Any]:
    return {
        "directory": str(inventory.home.root),
        "models": [
            {
                "name": model.name,
                "kind": model.kind,
                "quantization": model.quantization or None,
                "size_bytes": model.size_bytes,
                "state": model.state,
                "last_used": model.last_used,
                "path": str(model.path),
                "source": model.source,
                "libraries": list(model.libraries),
            }
            for model in inventory.models
        ],
        "libraries": [
            {
                "name": library.name,
                "size_bytes": library.size_bytes,
                "is_current": library.is_current,
                "last_used": library.last_used,
                "path": str(library.path),
                "users": list(library.users),
            }
            for library in inventory.libraries
        ],
        "unfinished": [
            {"path": str(leftover.path), "size_bytes": leftover.size_bytes}
            for leftover in inventory.leftovers
        ],
    }
