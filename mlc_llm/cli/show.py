"""`mlc_llm show`: what a model is and needs, from its configuration alone."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlc_llm.cli.hub_names import hub_name
from mlc_llm.cli.open_model import DEMO_NAME
from mlc_llm.cli.options import read_caches
from mlc_llm.cli.progress import format_size
from mlc_llm.errors import ModelNotFound, OptionError

if TYPE_CHECKING:
    from mlc_llm.artifact import LibraryMetadata
    from mlc_llm.images.inputs import ImageInputs
    from mlc_llm.prepare.describe import Description
    from mlc_llm.prepare.inventory import Inventory

# Lengths of conversations for which the memory is told, beside the longest.
_LENGTHS = (2048, 8192, 32768, 131072)
_PLENTY_BYTES = 1 << 60


@dataclass(frozen=True)
class Need:
    """Memory for one conversation of some length, in bytes; `fits` into what is free here now."""

    context: int
    kv_bytes: int
    total_bytes: int
    fits: bool


def show(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory, .gguf file, a name as `list` shows it, demo, or any repository on the "
            "hub, of which only configuration and headers are read.",
            show_default=False,
        ),
    ],
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantization to reckon with, for a model that is not converted yet; if left out, "
            "the one that `chat` takes.",
        ),
    ] = None,
    template: Annotated[
        bool, typer.Option("--template", help="Print the chat template, nothing else.")
    ] = False,
    licence: Annotated[
        bool, typer.Option("--license", help="Print the licence, nothing else.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show what a model is, what memory it needs, and whether it works here.

    No weights are downloaded or read.
    """
    if template + licence + as_json > 1:
        raise OptionError("--template, --license and --json exclude one another; use one")
    with ExitStack() as cleanup:
        description, inventory, is_here = _find(model, quantization, cleanup)
        if template:
            print(_require(description.template, model, "chat template"))
        elif licence:
            from mlc_llm.prepare.describe import read_licence

            print(_require(read_licence(description), model, "licence"))
        else:
            facts = _collect(model, description, inventory, is_here=is_here)
            if as_json:
                print(json.dumps(facts, indent=2))
            else:
                _print_facts(facts)


def _require(text: str | None, model: str, what: str) -> str:
    if text is None:
        raise ModelNotFound(f"the files of {model} name no {what}")
    return text.rstrip("\n")


def _find(
    model: str, quantization: str | None, cleanup: ExitStack
) -> tuple[Description, Inventory, bool]:
    """Describe a model wherever it is; `is_here`: on this machine, as a whole."""
    from mlc_llm.prepare.cache import CachePolicy
    from mlc_llm.prepare.demo import DEMO_QUANTIZATION, DEMO_REPOSITORY, find_demo_model
    from mlc_llm.prepare.describe import describe_model
    from mlc_llm.prepare.download import find_download, find_licence, parse_repo
    from mlc_llm.prepare.inventory import take_inventory
    from mlc_llm.prepare.preview import preview_repository

    caches = read_caches()
    inventory = take_inventory(caches.home)
    name = hub_name(model)
    if model == DEMO_NAME and not Path(model).exists():
        path = find_demo_model(caches.home)
        if path is not None:
            described = describe_model(path, quantization, "apache-2.0", DEMO_QUANTIZATION)
            return described, inventory, True
        name = DEMO_REPOSITORY
    if name is None:
        return describe_model(_local_path(model, inventory), quantization), inventory, True
    ref = parse_repo(name)
    found = find_download(ref, caches.home)
    if found is not None:
        licence = find_licence(ref, caches.home)
        return describe_model(found, quantization, licence), inventory, True
    if caches.download_policy is CachePolicy.READONLY:
        raise ModelNotFound(
            f"{name} is not in the cache, and MLC_DOWNLOAD_CACHE_POLICY=READONLY forbids asking "
            "the hub for it"
        )
    directory = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mlc_llm-"))
    preview = preview_repository(ref, Path(directory), caches.hub)
    return describe_model(preview.path, quantization, preview.licence), inventory, False


def _local_path(model: str, inventory: Inventory) -> Path:
    """Return where a local model is: a path, or the name of a copy in the cache."""
    path = Path(model).expanduser()
    if path.exists():
        is_file_of_model = path.is_file() and path.suffix == ".json"
        return path.parent if is_file_of_model else path
    for cached in inventory.models:
        if model in (cached.path.name, cached.name):
            return cached.path
    raise ModelNotFound(
        f"{model!r} is neither a path, nor a repository such as user/repo, nor in the cache"
    )


def _collect(
    model: str, description: Description, inventory: Inventory, *, is_here: bool
) -> dict[str, Any]:
    """Return all there is to say; the keys are those of --json."""
    config = description.config
    num_parameters = description.num_stored
    needs: list[Need] = []
    weights_bytes = images = None
    if config is not None:
        from mlc_llm.compiler.outline import count_parameters, outline_library
        from mlc_llm.images.inputs import ImageInputs

        num_parameters = count_parameters(config)
        metadata = _with_known_workspace(outline_library(config), description, inventory)
        weights_bytes = sum(spec.size_bytes for spec in metadata.params)
        needs = _needs(metadata, weights_bytes)
        images = _image_facts(ImageInputs.from_json(metadata.images))
    key = str(description.path.resolve())
    copies = sorted(copy.quantization for copy in inventory.models if copy.source == key)
    return {
        "name": model,
        "kind": description.kind,
        "is_here": is_here,
        "path": str(description.path) if is_here else None,
        "architecture": description.architecture,
        "family": None if config is None else config.model_type,
        "problem": description.problem,
        "num_parameters": num_parameters,
        "stored_as": description.stored_as,
        "size_bytes": description.size_bytes,
        "quantization": None if config is None else config.quantization,
        "converted_copies": copies,
        "context_window_size": description.context_window_size,
        "sliding_window_size": None
        if config is None or config.sliding_window_size < 1
        else config.sliding_window_size,
        "vocab_size": None if config is None else config.vocab_size,
        "images": images,
        "weights_bytes": weights_bytes,
        "memory": [dataclasses.asdict(need) for need in needs],
        "chat_template_chars": None if description.template is None else len(description.template),
        "licence": description.licence
        or (None if description.licence_file is None else description.licence_file.name),
        "files": [{"name": name, "size_bytes": size} for name, size in description.files],
    }


def _with_known_workspace(
    metadata: LibraryMetadata, description: Description, inventory: Inventory
) -> LibraryMetadata:
    """Take the temporary memory from a library compiled for this model, if there is one."""
    from mlc_llm.artifact import LibraryMetadata
    from mlc_llm.prepare.jit import METADATA_NAME

    key = str(description.path.resolve())
    users = {
        str(copy.path.resolve())
        for copy in inventory.models
        if copy.quantization == metadata.quantization and key in (copy.source, str(copy.path))
    }
    for library in inventory.libraries:
        if library.is_current and users & set(library.users):
            path = library.path / METADATA_NAME
            known = LibraryMetadata.from_json(path.read_text(encoding="utf-8"), str(path))
            return dataclasses.replace(metadata, memory_usage=known.memory_usage)
    return metadata


def _needs(metadata: LibraryMetadata, weights_bytes: int) -> list[Need]:
    """Plan the memory as an engine for one conversation would, at several lengths."""
    from mlc_llm.device import free_memory_bytes
    from mlc_llm.engine.capacity import plan_memory
    from mlc_llm.engine.config import DEFAULT_MEMORY_UTILIZATION, EngineConfig

    longest = metadata.context_window_size
    usable = free_memory_bytes() * DEFAULT_MEMORY_UTILIZATION
    needs = []
    for length in (*(length for length in _LENGTHS if length < longest), longest):
        config = EngineConfig(mode="interactive", max_single_sequence_length=max(length, 2))
        plan = plan_memory(metadata, config, weights_bytes, _PLENTY_BYTES)
        total = plan.total_bytes
        needs.append(Need(length, plan.kv_bytes, total, total <= usable))
    return needs


def _print_facts(facts: dict[str, Any]) -> None:
    family, problem = facts["family"], facts["problem"]
    works = f"yes, as {family}" if problem is None else f"no: {problem}"
    window = facts["sliding_window_size"]
    rows = [
        ("model", facts["name"]),
        ("kind", facts["kind"] + ("" if facts["is_here"] else ", on the hub, not downloaded")),
        ("path", facts["path"]),
        ("architecture", facts["architecture"]),
        ("works here", works),
        ("parameters", _count(facts["num_parameters"])),
        ("stored as", f"{facts['stored_as'] or 'unknown'}, {format_size(facts['size_bytes'])}"),
        ("converted to", ", ".join(facts["converted_copies"]) or None),
        ("context", _tokens(facts["context_window_size"])),
        ("window", _tokens(window)),
        ("vocabulary", _tokens(facts["vocab_size"])),
        ("images", _images_note(facts["images"])),
        ("template", _template_note(facts["chat_template_chars"])),
        ("licence", facts["licence"] or "not named"),
    ]
    for name, value in rows:
        if value is not None:
            print(f"{name:<13} {value}")
    if facts["memory"]:
        print()
        _print_needs(facts)
    print("\nfiles")
    for file in facts["files"]:
        print(f"  {format_size(file['size_bytes']):>10}  {file['name']}")


def _print_needs(facts: dict[str, Any]) -> None:
    from mlc_llm.cli.table import print_table

    weights = format_size(facts["weights_bytes"])
    print(f"memory in {facts['quantization']}: weights {weights}, and for one conversation")
    print_table(
        ["TOKENS", "KV CACHE", "IN ALL", "NOW"],
        [
            [
                f"{need['context']:,}",
                format_size(need["kv_bytes"]),
                format_size(need["total_bytes"]),
                "fits" if need["fits"] else "too much",
            ]
            for need in facts["memory"]
        ],
        right=("TOKENS", "KV CACHE", "IN ALL"),
    )


def _count(number: int | None) -> str | None:
    if number is None:
        return None
    for limit, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:,}"


def _tokens(number: int | None) -> str | None:
    return None if number is None or number < 1 else f"{number:,} tokens"


def _image_facts(images: ImageInputs | None) -> dict[str, int] | None:
    if images is None:
        return None
    tiles = {"max_tiles": images.max_views - 1} if images.tiling else {}
    return {"size": images.size, "num_rows": images.max_rows, **tiles}


def _images_note(images: dict[str, int] | None) -> str | None:
    if images is None:
        return None
    if count := images.get("max_tiles"):
        size = f"{images['size']} x {images['size']} pixels"
        return f"up to {count} tiles of {size}, up to {images['num_rows']:,} tokens"
    return f"{images['size']} x {images['size']} pixels, {images['num_rows']} tokens each"


def _template_note(num_chars: int | None) -> str:
    if num_chars is None:
        return "none"
    return f"its own, {num_chars:,} characters (--template prints it)"
