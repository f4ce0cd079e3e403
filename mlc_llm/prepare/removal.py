"""Removing models from the cache: what goes with a name, who must not be disturbed, the removal.

Nothing outside the cache is ever touched: only what the inventory found in it can be removed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlc_llm.errors import ModelNotFound, StorageError
from mlc_llm.prepare.cache import discard, drop_lock, lock_at_once, size_of
from mlc_llm.prepare.inventory import CachedLibrary, CachedModel, Inventory, Leftover
from mlc_llm.prepare.processes import RunRecord, list_processes

# Returns the artifact a file of packed weights was made of, None where it does not say.
PackedOwner = Callable[[Path], str | None]


@dataclass(frozen=True)
class Piece:
    """One thing to remove: a line for people, its paths, and what is locked meanwhile."""

    label: str
    paths: tuple[Path, ...]
    size_bytes: int
    lock_target: Path


def find_models(inventory: Inventory, name: str, quantization: str | None) -> list[CachedModel]:
    """Return the models a name stands for, in all their forms or in one quantization.

    name: as `list` shows it, with or without HF://, the path of a model that was converted, or the
    name of a directory in the cache. Raises ModelNotFound, which names near ones.
    """
    found = [model for model in inventory.models if _answers_to(model, name)]
    if not found:
        raise ModelNotFound(f"{name!r} is not in the cache{_hint(inventory, name)}")
    if quantization is None:
        return found
    chosen = [model for model in found if model.quantization == quantization]
    if not chosen:
        there = ", ".join(sorted({model.quantization or "unknown" for model in found}))
        raise ModelNotFound(f"{name!r} is not in the cache as {quantization}, only as {there}")
    return chosen


def _answers_to(model: CachedModel, name: str) -> bool:
    wanted = name[5:] if name[:5].upper() == "HF://" else name
    wanted = wanted.rstrip("/")
    shown = model.name.removeprefix("HF://")
    if not wanted:
        return False
    repository, mark, revision = wanted.partition("@")
    is_file_of = shown.startswith(f"{repository}/") and shown.lower().endswith(
        f".gguf{mark}{revision}".lower()
    )
    is_directory = model.source is not None and name == model.path.name
    if wanted == shown or is_file_of or is_directory:
        return True
    try:
        path = Path(name).expanduser().resolve()
    except (OSError, ValueError, RuntimeError):
        return False
    return str(path) == model.source or path == model.path.resolve()


def _hint(inventory: Inventory, name: str) -> str:
    names = list(dict.fromkeys(model.name for model in inventory.models))
    if not names:
        return ", which is empty"
    lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    word = name.lower().removeprefix("hf://")
    close += [known for known in lower if word and word in known and known not in close]
    if not close:
        return "; `mlc_llm list` shows what is"
    return f"; did you mean {' or '.join(lower[known] for known in close[:3])}?"


def plan_removal(
    inventory: Inventory, models: Collection[CachedModel], packed_owner: PackedOwner
) -> list[Piece]:
    """Return all that goes with models: unfinished copies of them, libraries nobody else uses."""
    gone = {str(model.path.resolve()) for model in models}
    names = {model.name for model in models}
    pieces = [_piece_of_model(model) for model in models]
    # Conversions under way, or broken off: of a source that goes, or of a copy that does.
    targets = {model.lock_target for model in models}
    for leftover in inventory.leftovers:
        if leftover.source in gone or leftover.source in names or leftover.lock_target in targets:
            pieces.append(_piece_of_leftover(leftover))
    for library in inventory.libraries:
        users = set(library.users)
        if users & gone and not users - gone:
            pieces.append(_piece_of_library(library))
        elif users & gone:
            pieces += _packed_pieces(library, lambda owner: owner in gone, packed_owner)
    return pieces


def plan_cleaning(inventory: Inventory, packed_owner: PackedOwner) -> list[Piece]:
    """Return all that no model will use again.

    These are copies whose source has changed or gone, libraries of other releases or of models that
    are gone, packed weights of such models, and what broke off.
    """
    stale = [model for model in inventory.models if model.state == "stale"]
    gone = {str(model.path.resolve()) for model in stale}
    pieces = [_piece_of_model(model) for model in stale]
    pieces += [_piece_of_leftover(leftover) for leftover in inventory.leftovers]
    for library in inventory.libraries:
        if not library.is_current or not set(library.users) - gone:
            pieces.append(_piece_of_library(library))
        else:
            users = set(library.users) - gone
            pieces += _packed_pieces(library, lambda owner, u=users: owner not in u, packed_owner)  # type: ignore[misc]
    return pieces


def _piece_of_model(model: CachedModel) -> Piece:
    note = "" if model.state == "ready" else f", {model.state}"
    kind = f"{model.kind} {model.quantization}".strip()
    label = f"{model.name} ({kind}{note})"
    return Piece(label, model.parts, model.size_bytes, model.lock_target)


def _piece_of_leftover(leftover: Leftover) -> Piece:
    label = f"unfinished {leftover.lock_target.name}"
    return Piece(label, (leftover.path,), leftover.size_bytes, leftover.lock_target)


def _piece_of_library(library: CachedLibrary) -> Piece:
    return Piece(f"library {library.name}", (library.path,), library.size_bytes, library.path)


def _packed_pieces(
    library: CachedLibrary, is_wanted: Callable[[str | None], bool], packed_owner: PackedOwner
) -> list[Piece]:
    files = [file for file in library.path.glob("packed-*.bin") if is_wanted(packed_owner(file))]
    label = f"packed weights in library {library.name}"
    return [Piece(label, (file,), size_of(file), library.path) for file in files]


def check_unused(inventory: Inventory, pieces: Iterable[Piece]) -> None:
    """Raise StorageError if a process uses one of the pieces, or is making it."""
    running = list_processes(inventory.home)
    for piece in pieces:
        if (user := _user_of(piece, running)) is not None:
            raise StorageError(_in_use(piece, user))
        with lock_at_once(piece.lock_target):
            pass


def remove(inventory: Inventory, pieces: Iterable[Piece]) -> int:
    """Remove pieces, all or, where one is in use, none; return the bytes that were freed.

    Raises StorageError if a process uses a piece or is making it.
    """
    pieces = list(pieces)
    targets = sorted({piece.lock_target for piece in pieces})
    with ExitStack() as locks:
        for target in targets:
            locks.enter_context(lock_at_once(target))
        running = list_processes(inventory.home)
        for piece in pieces:
            if (user := _user_of(piece, running)) is not None:
                raise StorageError(_in_use(piece, user))
        for piece in pieces:
            for path in piece.paths:
                _require_inside(inventory, path)
                discard(path)
        for target in targets:
            if not target.exists():
                drop_lock(target)
    return sum(piece.size_bytes for piece in pieces)


def _user_of(piece: Piece, running: Iterable[RunRecord]) -> RunRecord | None:
    paths = [path for path in piece.paths if not path.name.startswith("packed-")]
    return next((r for r in running if any(r.uses(path) for path in paths)), None)


def _in_use(piece: Piece, user: RunRecord) -> str:
    where = f" at {user.url}" if user.url else ""
    program = "a Python program" if user.command == "python" else f"`mlc_llm {user.command}`"
    return f"{piece.label} is in use by {program} (process {user.pid}{where}); end that first"


def _require_inside(inventory: Inventory, path: Path) -> None:
    parent = path.parent.resolve()
    roots = [
        base.resolve()
        for base in (
            inventory.home.hub_directory,
            inventory.home.local_directory,
            inventory.home.demo_directory,
            inventory.home.library_directory,
        )
    ]
    if not any(root == parent or root in parent.parents for root in roots):
        raise StorageError(f"{path} lies outside the cache {inventory.home.root}; it stays")
