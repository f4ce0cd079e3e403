"""System libraries: object files of several models that are linked into one program.

TVM registers their functions under a prefix, by which the program asks for each model's. Does not
import TVM.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlc_llm.errors import OptionError

# Devices whose programs are linked with their models.
STATIC_DEVICES = ("android", "iphone")
_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def prefix_of(*names: str) -> str:
    """Return a prefix of functions, made of names such as a model's and a quantization's."""
    return re.sub(r"\W", "_", "".join(f"{name}_" for name in names), flags=re.ASCII)


def find_system_prefix(
    asked: str, device: str, output: Path, model_type: str, quantization: str
) -> str | None:
    """Return the prefix that `--system-lib-prefix` means, None for no system library.

    asked: "auto" for what the device implies. Raises OptionError.
    """
    if asked == "auto":
        is_static = device in STATIC_DEVICES and output.suffix == ".tar"
        return prefix_of(model_type, quantization) if is_static else None
    if not _PREFIX.fullmatch(asked):
        raise OptionError(
            f"--system-lib-prefix {asked!r} is no beginning of a function's name; use letters, "
            "digits and underscores, as in llama_q4f16_1_"
        )
    if output.suffix != ".tar":
        raise OptionError(
            f"--system-lib-prefix {asked}: only object files, a .tar, are linked into a program "
            f"with others; functions of {output.name} are found without a prefix, leave it out"
        )
    return asked
