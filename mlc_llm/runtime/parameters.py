"""Parameters in the layout of a library: packed once by its `pack_params`, then mapped.

The packed file lies beside a JIT library. It is one header line of JSON and aligned raw arrays,
and names the weights and the library it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import TensorIndex, find_tensor_index, numpy_dtype, read_tensor_index
from mlc_llm.errors import ModelNotFound, UnsupportedModel
from mlc_llm.runtime.library import Library
from mlc_llm.runtime.memory import as_aligned, as_array, as_tensor

_HEADER_BYTES = 1 << 20
_ALIGNMENT = 64
_FORMAT = 1


def load_parameters(
    artifact: Path, library: Library, progress: Callable[[str], None]
) -> list[NDArray[Any]]:
    """Return the library's packed parameters, from its cache file or packed now.

    For a GPU, which takes them as they are stored, they are views of the artifact's files.
    Raises ModelNotFound, CorruptFile or ParameterMismatch.
    """
    if library.device.is_gpu:
        return list(_portable(artifact, library))
    cache = _cache_path(artifact, library)
    if cache is not None:
        mapped = _map_packed(cache)
        if mapped is not None:
            return mapped
    progress("pack weights for this CPU")
    packed = pack_parameters(library, _portable(artifact, library))
    if cache is None or not _write_packed(cache, packed, artifact):
        return packed
    # Mapped pages can be shared and dropped by the system; the copies above are freed.
    mapped = _map_packed(cache)
    return packed if mapped is None else mapped


def _cache_path(artifact: Path, library: Library) -> Path | None:
    """Return where packed weights are kept: beside JIT libraries, nowhere for files of users."""
    if not library.path.is_dir():
        return None
    index = find_tensor_index(artifact)
    if index is None:
        raise ModelNotFound(f"{artifact} has no weights; run `mlc_llm convert_weight` first")
    digest = hashlib.sha256(index.read_bytes())
    digest.update(library.metadata.to_json().encode())
    status = [(path.name, path.stat().st_size) for path in sorted(library.path.glob("*.o"))]
    shards = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(artifact.glob("params_shard_*.bin"))
    ]
    digest.update(json.dumps([_FORMAT, status, shards]).encode())
    return library.path / f"packed-{digest.hexdigest()[:24]}.bin"


def _portable(artifact: Path, library: Library) -> Iterator[NDArray[Any]]:
    """Yield parameters as the artifact stores them, checked, in the library's order."""
    index = read_tensor_index(artifact)
    unused = tuple(library.metadata.unused_modules)
    used = {
        name: record
        for name, record in index.records.items()
        if not name.rpartition(".")[0].endswith(unused)
    }
    TensorIndex(used, index.shard_md5).check(library.metadata.params, str(artifact))
    index.verify_checksums()
    for spec in library.metadata.params:
        yield index.read(spec.name).view(np.ndarray)


def pack_parameters(library: Library, portable: Iterable[NDArray[Any]]) -> list[NDArray[Any]]:
    """Bring parameters as artifacts store them, in the library's order, into its own layout.

    A parameter whose layouts are the same comes back as it is, without a copy.
    """
    if library.device.is_gpu:
        return list(portable)
    import tvm_ffi

    tensors = [as_tensor(as_aligned(array)) for array in portable]
    # Nothing of this machine's pool is reused, so its memory goes back when the arrays do.
    machine = library.open_machine(is_pooled=False)
    packed = machine["pack_params"](tvm_ffi.Array(tensors))
    return [as_array(tensor) for tensor in packed]


def packed_artifact(path: Path) -> str | None:
    """Return the artifact a file of packed parameters was made of, None where it does not say."""
    try:
        with path.open("rb") as stream:
            return str(json.loads(stream.read(_HEADER_BYTES))["artifact"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_packed(path: Path, arrays: list[NDArray[Any]], artifact: Path) -> bool:
    """Write arrays to a cache file, whole or not at all; False where that is not possible.

    Other models may share the library: their files stay, unless the models are gone.
    """
    records: list[tuple[list[int], str, int]] = []
    offset = _HEADER_BYTES
    for array in arrays:
        records.append((list(array.shape), array.dtype.name, offset))
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    owner = str(artifact.resolve())
    content = {"format": _FORMAT, "artifact": owner, "size": offset, "arrays": records}
    header = json.dumps(content).encode()
    if len(header) >= _HEADER_BYTES:
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(header.ljust(_HEADER_BYTES))
            for array, (_, _, start) in zip(arrays, records, strict=True):
                stream.seek(start)
                stream.write(array.reshape(-1).view(np.uint8).data)
            stream.truncate(offset)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    for stale in path.parent.glob("packed-*.bin"):
        other = packed_artifact(stale)
        if stale != path and (other in (None, owner) or not Path(str(other)).exists()):
            stale.unlink(missing_ok=True)
    return True


def _map_packed(path: Path) -> list[NDArray[Any]] | None:
    """Return mapped arrays, or None where the file is absent, truncated or not ours."""
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.read(_HEADER_BYTES))
            if header["format"] != _FORMAT or header["size"] != path.stat().st_size:
                return None
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return [_array_in(mapped, *record) for record in header["arrays"]]
    except (OSError, ValueError, KeyError, TypeError, UnsupportedModel):
        return None


def _array_in(mapped: mmap.mmap, shape: list[int], dtype_name: str, offset: int) -> NDArray[Any]:
    count = int(np.prod(shape, dtype=np.int64))
    array: NDArray[Any] = np.frombuffer(mapped, numpy_dtype(dtype_name), count, offset)
    return array.reshape(shape)
