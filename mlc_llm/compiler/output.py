"""A compiled library and the forms it is written in: objects, an archive, linked, for browsers.

The suffix of the file says which. How a browser's library is linked is in `browser/`.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlc_llm.artifact import LibraryMetadata, write_atomically
from mlc_llm.compiler.browser.link import link_wasm
from mlc_llm.compiler.cuda_code import pack_machine_code
from mlc_llm.compiler.linkers import find_linker
from mlc_llm.compiler.target import check_form, host_of
from mlc_llm.errors import CompileError

METADATA_NAME = "metadata.json"
_MIB = 1 << 20


@dataclass(frozen=True)
class CompiledModel:
    """A compiled library in memory, and what it says of itself.

    step_entries: the functions that run a step. system_prefix: what names of functions begin with,
    and of files that are packed with other models' then.
    """

    metadata: LibraryMetadata
    executable: Any
    step_entries: tuple[str, ...]
    image_entry: str | None = None
    system_prefix: str = ""

    def save(self, path: Path, cache: Path, progress: Callable[[str], None]) -> None:
        """Write the library in the form that the suffix of `path` says.

        cache: where what browsers' libraries are linked with is kept. Raises OptionError,
        LinkerNotFound or CompileError.
        """
        check_form(path, self.metadata.target)
        if path.suffix == ".tar":
            self.pack(path)
        elif path.suffix == ".wasm":
            with tempfile.TemporaryDirectory(prefix="mlc-llm-wasm-") as directory:
                link_wasm(self._write_objects(Path(directory)), path, cache, progress)
        else:
            self.link(path)

    def save_objects(self, directory: Path) -> None:
        """Write object files and `metadata.json`; needs no linker."""
        directory.mkdir(parents=True, exist_ok=True)
        self._write_objects(directory)
        write_atomically(directory / METADATA_NAME, self.metadata.to_json())

    def pack(self, path: Path) -> None:
        """Write an archive of object files for a linker that others call."""
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with tempfile.TemporaryDirectory(prefix="mlc-llm-tar-") as directory:
                with tarfile.open(temporary, "w") as archive:
                    for file in self._write_objects(Path(directory)):
                        archive.add(file, arcname=file.name)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def link(self, path: Path) -> None:
        """Write a shared library, whole or not at all. Raises LinkerNotFound, CompileError."""
        linker = find_linker(host_of(self.metadata.target)["mtriple"], path)
        temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
        try:
            self._export(temporary, cc=linker)
            temporary.replace(path)
        except RuntimeError as error:
            raise CompileError(f"linking {path} with {linker} failed: {error}") from None
        finally:
            temporary.unlink(missing_ok=True)

    def memory_bytes(self) -> int:
        """Return what the model takes in all, with one conversation as long as it may be."""
        usage, kv = self.metadata.memory_usage, self.metadata.kv_cache
        stored = [*self.metadata.params, *self.metadata.states]
        return (
            sum(spec.size_bytes for spec in stored)
            + max(usage.get(entry, 0) for entry in self.step_entries)
            + usage.get(self.image_entry or "", 0)
            + kv.bytes_per_token * self.metadata.context_window_size
        )

    def memory_plan(self) -> str:
        """Return the bytes of parameters, temporaries, KV and states for people to read."""
        parameters = sum(spec.size_bytes for spec in self.metadata.params)
        usage = self.metadata.memory_usage
        temporary = max(usage.get(entry, 0) for entry in self.step_entries)
        kv_token = self.metadata.kv_cache.bytes_per_token
        context = self.metadata.context_window_size
        state = sum(spec.size_bytes for spec in self.metadata.states)
        lines = [
            f"parameters        {_mib(parameters)}",
            f"temporary         {_mib(temporary)}  "
            f"(prefill chunk of {self.metadata.prefill_chunk_size} tokens)",
        ]
        if kv_token:
            lines.append(f"KV cache          {kv_token / 1024:10.1f} KiB a token")
        if self.image_entry in usage:
            of_image = usage[self.image_entry]
            lines.append(f"reading an image  {_mib(of_image)}")
        if state:
            lines.append(f"recurrent state   {_mib(state)}  a sequence")
        lines.append(
            f"in all            {_mib(self.memory_bytes())}  (context of {context} tokens)"
        )
        return "\n".join(lines)

    def _write_objects(self, directory: Path) -> list[Path]:
        written: list[Path] = []

        def copy(_: str, files: list[str], **__: Any) -> None:
            for name in files:
                own = Path(name).name.removeprefix(self.system_prefix)
                written.append(directory / f"{self.system_prefix}{own}")
                shutil.copy(name, written[-1])

        self._export(directory / "library.o", fcompile=copy)
        return written

    def _export(self, path: Path, **how: Any) -> None:
        target = self.metadata.target
        if target["kind"] == "cuda":
            how["fpack_imports"] = partial(pack_machine_code, target["arch"])
        self.executable.export_library(str(path), **how)


def _mib(size: int) -> str:
    return f"{size / _MIB:10.1f} MiB"
