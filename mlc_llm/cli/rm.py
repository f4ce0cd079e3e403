"""`mlc_llm rm`: remove models from the cache, with all that was made of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mlc_llm.cli.options import read_caches
from mlc_llm.cli.progress import format_size
from mlc_llm.cli.terminal import say
from mlc_llm.errors import OptionError, StorageError

if TYPE_CHECKING:
    from mlc_llm.prepare.inventory import Inventory
    from mlc_llm.prepare.removal import Piece


def rm(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME...",
            help="Models as `list` shows them; or the path of a model whose converted copies go.",
            show_default=False,
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Remove only the copies in this quantization."),
    ] = None,
    stale: Annotated[
        bool,
        typer.Option(
            "--stale",
            help="Remove what is of no use: copies whose source has changed or gone, libraries "
            "of other releases or of no model, what broke off.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove models from the cache: downloads, converted copies, libraries nobody else uses.

    Nothing outside the cache is touched, and nothing a running process uses.
    """
    if stale == bool(names):
        raise OptionError("name the models to remove, or give --stale; `mlc_llm list` shows both")
    if stale and quantization is not None:
        raise OptionError("--quantization goes with names, not with --stale")
    from mlc_llm.prepare.inventory import take_inventory
    from mlc_llm.prepare.removal import check_unused, find_models, plan_cleaning, plan_removal
    from mlc_llm.runtime.parameters import packed_artifact

    inventory = take_inventory(read_caches().home)
    if stale:
        pieces = plan_cleaning(inventory, packed_artifact)
        if not pieces:
            say("there is nothing to remove")
            return
    else:
        found = [m for name in names or [] for m in find_models(inventory, name, quantization)]
        models = list({model.parts: model for model in found}.values())
        pieces = plan_removal(inventory, models, packed_artifact)
        check_unused(inventory, pieces)
    for piece in pieces:
        say(f"{format_size(piece.size_bytes):>10}  {piece.label}")
    if not yes and not _confirm(sum(piece.size_bytes for piece in pieces)):
        say("nothing was removed")
        return
    _remove(inventory, pieces, one_by_one=stale)


def _confirm(size_bytes: int) -> bool:
    """Ask on the terminal. Raises OptionError where nobody could answer."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise OptionError("there is no terminal to ask on; add --yes to remove this")
    return typer.confirm(f"Remove {format_size(size_bytes)}?", err=True)


def _remove(inventory: Inventory, pieces: list[Piece], *, one_by_one: bool) -> None:
    """Remove all pieces or none; one by one, those in use are told and stay."""
    from mlc_llm.prepare.removal import remove

    if not one_by_one:
        print(f"freed {format_size(remove(inventory, pieces))}")
        return
    freed = 0
    for piece in pieces:
        try:
            freed += remove(inventory, [piece])
        except StorageError as error:
            say(f"kept: {error}")
    print(f"freed {format_size(freed)}")
