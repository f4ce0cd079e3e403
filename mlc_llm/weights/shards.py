"""Write `params_shard_N.bin` files and their index, resumably and never half.

Everything is written into the directory `.convert` of the output first, shard after shard, each
whole or not at all, with a journal of what is finished. `publish` then moves the shards out and
writes the index last, so that a directory with an index always holds all of its shards.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import (
    SHARD_LIMIT_BYTES,
    TENSOR_INDEX_NAMES,
    TensorSpec,
    write_atomically,
)
from mlc_llm.errors import StorageError

WORK_NAME = ".convert"
JOURNAL_NAME = "journal.json"

_SHARD_NAME = re.compile(r"^params_shard_\d+\.bin$")
_STALE_NAMES = (*TENSOR_INDEX_NAMES, "tensor-cache-b16.json")
_PIECE_BYTES = 8 << 20


def lay_out(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Distribute tensors over shards, by the rule MLC LLM uses.

    A tensor that does not fit the shard being filled goes to a shard of its own if it takes at
    least half of the limit; otherwise it begins the next shard.
    """
    shards: list[list[TensorSpec]] = []
    filling: list[TensorSpec] = []
    filled = 0
    for spec in specs:
        if filled + spec.size_bytes >= limit:
            if spec.size_bytes * 2 >= limit:
                shards.append([spec])
                continue
            if filling:
                shards.append(filling)
            filling, filled = [], 0
        filling.append(spec)
        filled += spec.size_bytes
    return [*shards, filling] if filling else shards


class ShardWriter:
    """Collects tensors in any order and writes each shard when all of its tensors are there.

    Tensors are held until then: at most one shard that is being filled, when they come in order.
    """

    def __init__(self, output: Path, specs: Sequence[TensorSpec], fingerprint: str) -> None:
        """Prepare `output`; shards an interrupted run with the same fingerprint left are kept.

        Raises StorageError if the directory cannot be made or the disk has no room for the rest.
        """
        self._output, self._work = output, output / WORK_NAME
        self._shards = lay_out(specs, SHARD_LIMIT_BYTES)
        self._names = [f"params_shard_{number}.bin" for number in range(len(self._shards))]
        self._shard_of = {
            spec.name: number for number, shard in enumerate(self._shards) for spec in shard
        }
        self._arrays: dict[str, NDArray[Any]] = {}
        self._fingerprint = fingerprint
        self._md5: dict[str, str] = {}
        with _storage_errors(output):
            self._work.mkdir(parents=True, exist_ok=True)
            self._md5 = self._finished_before()
            for path in self._work.iterdir():
                if path.name not in self._md5:
                    path.unlink()
            self._write_journal()
            self._check_room()

    def has(self, name: str) -> bool:
        """Tell whether a tensor lies in a finished shard."""
        return self._names[self._shard_of[name]] in self._md5

    def add(self, spec: TensorSpec, array: NDArray[Any]) -> None:
        """Take a tensor; write its shard if that completes it. Raises StorageError."""
        if self.has(spec.name):
            return
        self._arrays[spec.name] = array
        number = self._shard_of[spec.name]
        if all(other.name in self._arrays for other in self._shards[number]):
            arrays = [self._arrays.pop(other.name) for other in self._shards[number]]
            with _storage_errors(self._output):
                self._write_shard(self._names[number], arrays)

    def publish(self, metadata: dict[str, Any]) -> None:
        """Move the shards into the output and write the index. Raises StorageError."""
        assert len(self._md5) == len(self._shards), "a tensor was never added"
        index = json.dumps({"metadata": metadata, "records": self._index_records()}, indent=1)
        with _storage_errors(self._output):
            for name in _STALE_NAMES:
                (self._output / name).unlink(missing_ok=True)
            for path in self._output.iterdir():
                if _SHARD_NAME.match(path.name) and path.name not in self._md5:
                    path.unlink()
            for name in self._names:
                # One that is not here was moved out by a run interrupted at this very place.
                if (self._work / name).exists():
                    os.replace(self._work / name, self._output / name)
            write_atomically(self._output / TENSOR_INDEX_NAMES[0], index + "\n")
            shutil.rmtree(self._work)

    def _write_shard(self, name: str, arrays: Sequence[NDArray[Any]]) -> None:
        """Write arrays one after the other, whole or not at all, and enter the shard's MD5."""
        path = self._work / name
        temporary = path.with_suffix(".tmp")
        try:
            self._md5[name] = _write_arrays(temporary, arrays)
            # The journal first: a shard that is seen is never one that the next run writes again.
            self._write_journal()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _index_records(self) -> list[dict[str, Any]]:
        shards = []
        for name, shard in zip(self._names, self._shards, strict=True):
            records, offset = [], 0
            for spec in shard:
                records.append(
                    {
                        "name": spec.name,
                        "shape": list(spec.shape),
                        "dtype": spec.dtype,
                        # float32 stays float32; "f32-to-bf16" would halve its precision.
                        "format": "raw",
                        "nbytes": spec.size_bytes,
                        "byteOffset": offset,
                    }
                )
                offset += spec.size_bytes
            shards.append(
                {
                    "dataPath": name,
                    "format": "raw-shard",
                    "nbytes": offset,
                    "md5sum": self._md5[name],
                    "records": records,
                }
            )
        return shards

    def _write_journal(self) -> None:
        journal = {"fingerprint": self._fingerprint, "shards": self._md5}
        write_atomically(self._work / JOURNAL_NAME, json.dumps(journal))

    def _finished_before(self) -> dict[str, str]:
        """Return the MD5 of shards an interrupted run finished and that are still as it left them.

        They lie in the work directory, or in the output if that run was already publishing.
        """
        try:
            journal = json.loads((self._work / JOURNAL_NAME).read_bytes())
            if journal["fingerprint"] != self._fingerprint:
                return {}
            finished = {str(name): str(md5) for name, md5 in journal["shards"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {
            name: finished[name]
            for name in self._names
            if name in finished and self._is_as_written(name, finished[name])
        }

    def _is_as_written(self, name: str, md5: str) -> bool:
        path = self._work / name
        if not path.exists():
            path = self._output / name
        return path.is_file() and _md5_of_file(path) == md5

    def _check_room(self) -> None:
        needed = sum(
            spec.size_bytes
            for name, shard in zip(self._names, self._shards, strict=True)
            for spec in shard
            if name not in self._md5
        )
        free = shutil.disk_usage(self._output).free
        if needed > free:
            raise StorageError(
                f"{self._output} needs {needed / 1e6:,.0f} MB more, the disk has "
                f"{free / 1e6:,.0f} MB free; make room or choose another output"
            )


def _write_arrays(path: Path, arrays: Sequence[NDArray[Any]]) -> str:
    """Write arrays one after the other; return the MD5 of the file."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("wb") as stream:
        for array in arrays:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for start in range(0, len(raw), _PIECE_BYTES):
                piece = raw[start : start + _PIECE_BYTES].data
                digest.update(piece)
                stream.write(piece)
    return digest.hexdigest()


def _md5_of_file(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_PIECE_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _storage_errors(output: Path) -> Iterator[None]:
    """Turn errors of the file system into StorageError."""
    try:
        yield
    except OSError as error:
        advice = "check that the directory can be written"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room and run it again: finished shards are kept and will be reused"
        reason = error.strerror or error
        raise StorageError(f"cannot write to {output}: {reason}; {advice}") from error
