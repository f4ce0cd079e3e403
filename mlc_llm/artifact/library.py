"""What a compiled library says of itself: its parameters, its KV pages, its limits."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from mlc_llm.artifact.tensors import TensorSpec, numpy_dtype
from mlc_llm.errors import CorruptFile


@dataclass(frozen=True)
class KVCacheLayout:
    """Shape of the KV pages a library works on; one tensor per layer.

    Each is (num_pages, 2, num_key_value_heads, page_size * token_items) of `dtype`; index 0 is K.
    The order inside a head's part of a page is the library's own. int8 pages hold a float32 scale
    for each token beside its codes.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    page_size: int
    dtype: str

    @property
    def token_items(self) -> int:
        """Items of `dtype` that K or V of one token takes in one head."""
        return self.head_dim + 4 if self.dtype == "int8" else self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """KV bytes one token takes in all layers."""
        item = numpy_dtype(self.dtype).itemsize
        return self.num_layers * 2 * self.num_key_value_heads * self.token_items * item

    def page_shape(self, num_pages: int) -> tuple[int, ...]:
        """Return the shape of one layer's tensor."""
        return (num_pages, 2, self.num_key_value_heads, self.page_size * self.token_items)


@dataclass(frozen=True)
class LibraryMetadata:
    """What a compiled library says of itself (its `_metadata` function, JSON)."""

    model_type: str
    quantization: str
    context_window_size: int
    sliding_window_size: int
    attention_sink_size: int
    prefill_chunk_size: int
    max_batch_size: int
    vocab_size: int
    params: list[TensorSpec]
    kv_cache: KVCacheLayout
    memory_usage: dict[str, int]
    target: dict[str, Any]
    isa: list[str]
    compiler_version: str
    format_version: int = 1
    tensor_parallel_shards: int = 1
    pipeline_parallel_stages: int = 1
    model_task: str = "chat"
    model_config: dict[str, Any] = field(default_factory=dict)
    embedding_metadata: dict[str, Any] | None = None
    states: list[TensorSpec] = field(default_factory=list)  # recurrent state: tensors of one slot
    images: dict[str, Any] | None = None  # what images the library takes, see `images.inputs`
    unused_modules: list[str] = field(default_factory=list)  # ends of paths, see Family
    lookup_tables: list[str] = field(default_factory=list)  # paths of modules read row by row

    def to_json(self) -> str:
        """Return the JSON text stored in the library."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str, where: str) -> LibraryMetadata:
        """Parse the JSON text; `where` names the library in errors. Raises CorruptFile."""
        try:
            data = json.loads(text)
            for name in {"params", "states"} & data.keys():
                data[name] = [TensorSpec(**{**p, "shape": tuple(p["shape"])}) for p in data[name]]
            return LibraryMetadata(**{**data, "kv_cache": KVCacheLayout(**data["kv_cache"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(
                f"{where} was not made by this release of mlc_llm ({error!r}); compile it again"
            ) from None
