"""The artifact: the directory where the compiler half and the engine half meet.

Knows the files `mlc-chat-config.json`, `tensor-cache.json` (older name `ndarray-cache.json`),
`params_shard_N.bin`, `chat_template.jinja` and the library metadata, in MLC LLM's formats.
Does not know models, quantization or TVM.
"""

from mlc_llm.artifact.chat_config import (
    CHAT_CONFIG_NAME,
    CHAT_TEMPLATE_NAME,
    ChatConfig,
    read_chat_config,
    write_chat_config,
)
from mlc_llm.artifact.files import read_json_object, write_atomically
from mlc_llm.artifact.library import KVCacheLayout, LibraryMetadata
from mlc_llm.artifact.tensors import (
    SHARD_LIMIT_BYTES,
    TENSOR_INDEX_NAMES,
    TensorIndex,
    TensorRecord,
    TensorSpec,
    find_tensor_index,
    numpy_dtype,
    read_tensor_index,
)

__all__ = [
    "CHAT_CONFIG_NAME",
    "CHAT_TEMPLATE_NAME",
    "SHARD_LIMIT_BYTES",
    "TENSOR_INDEX_NAMES",
    "ChatConfig",
    "KVCacheLayout",
    "LibraryMetadata",
    "TensorIndex",
    "TensorRecord",
    "TensorSpec",
    "find_tensor_index",
    "numpy_dtype",
    "read_chat_config",
    "read_json_object",
    "read_tensor_index",
    "write_atomically",
    "write_chat_config",
]
