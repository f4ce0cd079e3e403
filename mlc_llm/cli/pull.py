"""`mlc_llm pull`: bring a model into the cache, and on request convert and compile it there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlc_llm.cli.hub_names import hub_name, is_path
from mlc_llm.cli.open_model import (
    DEMO_NAME,
    OptOption,
    OverridesOption,
    find_artifact,
    find_library,
    optimization_level,
)
from mlc_llm.cli.options import CHAT_OVERRIDES, DeviceOption, parse_overrides, read_caches
from mlc_llm.cli.progress import show_progress
from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.prepare.caches import Caches
    from mlc_llm.prepare.progress import Progress


def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="user/repo, with or without HF://, and with /FILE.gguf or @REVISION after it; its "
            "address on huggingface.co; or demo. With --convert or --compile also a local model.",
            show_default=False,
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit, as after @ in MODEL."),
    ] = None,
    convert: Annotated[bool, typer.Option("--convert", help="Convert the weights too.")] = False,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile", help="Convert, compile and pack the weights: a chat then starts at once."
        ),
    ] = False,
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantization to convert to (if left out, that of a GGUF file, else q4f16_1); "
            "means --convert.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    opt: OptOption = None,
    overrides: OverridesOption = "",
) -> None:
    """Download a model, or what has changed of it; an interrupted download is continued.

    Only the files that make the model are fetched. The place of the result is printed on stdout.
    """
    values = parse_overrides(overrides, CHAT_OVERRIDES)
    level = optimization_level(opt, values.pop("opt", None), None)
    if not compile_ and (values or level != "O2" or opt is not None or device != "auto"):
        raise OptionError("--device, --opt and --overrides are for --compile; add it, or leave out")
    is_converted = convert or compile_ or quantization is not None
    name = _name_of(model, revision)
    caches = read_caches()
    _check_early(caches, quantization, device, level, is_converted=is_converted)
    with show_progress() as progress:
        path = _fetch(name, caches, progress, is_converted=is_converted)
        if is_converted:
            known = None if name == DEMO_NAME else name
            path = find_artifact(known, quantization, caches, progress)
        if compile_:
            library = find_library(
                path,
                device=device,
                opt=level,
                overrides=values,
                caches=caches,
                progress=progress,
            )
            _pack(path, library, progress)
    print(path)


def _check_early(
    caches: Caches, quantization: str | None, device: str, opt: str, *, is_converted: bool
) -> None:
    """Raise for what would be refused only after a download."""
    from mlc_llm.compiler.target import describe_any_target
    from mlc_llm.device import parse_device
    from mlc_llm.prepare.cache import CachePolicy
    from mlc_llm.quantization.schemes import get_scheme

    if quantization is not None:
        get_scheme(quantization)
    parse_device(device)
    describe_any_target(device, opt)
    variables = {"MLC_DOWNLOAD_CACHE_POLICY": caches.download_policy}
    if is_converted:
        variables["MLC_JIT_POLICY"] = caches.jit_policy
    for variable, policy in variables.items():
        if policy is CachePolicy.OFF:
            raise OptionError(f"{variable} is OFF, so nothing would be kept; set it to ON")


def _name_of(model: str, revision: str | None) -> str:
    """Return a model as other commands take it, `demo` for the demo model. Raises OptionError."""
    name = hub_name(model)
    if name is None:
        if revision is not None:
            raise OptionError(f"--revision is for repositories on the hub, {model!r} is none")
        if model != DEMO_NAME and not is_path(model):
            raise OptionError(
                f"{model!r} names neither a repository, such as user/repo, nor a local model"
            )
        return model
    if revision is None:
        return name
    bare, mark, given = name.partition("@")
    if mark and given != revision:
        raise OptionError(f"{model!r} and --revision {revision} name two revisions; use one")
    return f"{bare}@{revision}"


def _fetch(name: str, caches: Caches, progress: Progress, *, is_converted: bool) -> Path:
    """Bring a model up to date in the cache; a local one stays where it is."""
    from mlc_llm.prepare.demo import install_demo_model
    from mlc_llm.prepare.download import fetch, is_repo, parse_repo

    if is_repo(name):
        return fetch(
            parse_repo(name),
            home=caches.home,
            policy=caches.download_policy,
            progress=progress,
            access=caches.hub,
            is_update=True,
        )
    if name == DEMO_NAME:
        return install_demo_model(caches.home, caches.download_policy, progress)
    if not is_converted:
        raise OptionError(
            f"{name!r} is on this machine, there is nothing to download; --convert or --compile "
            "makes it ready"
        )
    return Path(name)


def _pack(artifact: Path, library: Path, progress: Any) -> None:
    """Let the library pack the weights, as the first chat would."""
    from mlc_llm.runtime.library import load_library
    from mlc_llm.runtime.parameters import load_parameters

    load_parameters(artifact, load_library(library), progress.message)
