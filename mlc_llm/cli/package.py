"""`mlc_llm package`: lay out models and libraries for a page or an app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlc_llm.cli.options import read_caches
from mlc_llm.cli.progress import show_progress
from mlc_llm.cli.terminal import say
from mlc_llm.errors import OptionError


def package(
    package_config: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="What to package: a device, webgpu, android or iphone, and a list of models.",
        ),
    ] = Path("mlc-package-config.json"),
    mlc_llm_source_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Refused: nothing here is built from MLC LLM's sources."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to write.")
    ] = Path("dist"),
) -> None:
    """Lay out models, libraries and mlc-app-config.json for a web page or a phone's app.

    What is there already and unchanged is not made again. The list's place is printed on stdout.
    """
    if mlc_llm_source_dir is not None:
        raise OptionError(
            f"--mlc-llm-source-dir {mlc_llm_source_dir}: libraries are made by what is installed, "
            "no sources are needed; leave it out"
        )
    from mlc_llm.prepare.package import package_models
    from mlc_llm.prepare.package_config import read_package_config

    config = read_package_config(package_config)
    caches = read_caches()
    with show_progress() as progress:
        path = package_models(config, output, caches, progress)
    if config.device != "webgpu":
        say(
            f"An app for {config.device} links lib/ with TVM's runtime, which its SDK builds; this "
            "release has none for phones"
        )
    print(path)
