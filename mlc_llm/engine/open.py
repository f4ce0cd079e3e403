"""Opens an artifact and its library: checks that they belong together, plans memory, loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlc_llm.artifact import CHAT_CONFIG_NAME, ChatConfig, LibraryMetadata, read_chat_config
from mlc_llm.device import free_memory_bytes, parse_device
from mlc_llm.engine.capacity import MemoryPlan, plan_memory
from mlc_llm.engine.config import AUTO, EngineConfig
from mlc_llm.engine.engine import Engine
from mlc_llm.engine.grammar_cache import GrammarCache
from mlc_llm.errors import CorruptFile, LibraryMismatch, OptionError, UnsupportedModel
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.images.processing import ImageProcessing
from mlc_llm.images.reader import ImageReader
from mlc_llm.images.tiles import TileProcessing
from mlc_llm.runtime.gpu_memory import free_gpu_bytes
from mlc_llm.runtime.library import load_library
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.prompt import PromptBuilder, load_template
from mlc_llm.text.ranking import RankingPrompts
from mlc_llm.text.tokenizer import Tokenizer

# Settings that are part of the library; a session only checks them.
_COMPILED = (
    "context_window_size",
    "sliding_window_size",
    "prefill_chunk_size",
    "attention_sink_size",
    "max_batch_size",
)
# Numbers of the model that are part of the library's code.
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "position_embedding_base",
    "rope_scaling",
)


@dataclass
class OpenModel:
    """A model ready to serve: how its prompts are made, and the engine that continues them.

    ranking: how it is asked for scores, None where it is no reranker.
    """

    config: ChatConfig
    tokenizer: Tokenizer
    prompts: PromptBuilder
    engine: Engine
    plan: MemoryPlan
    ranking: RankingPrompts | None = None

    def close(self) -> None:
        """Free the model and end helper processes."""
        self.prompts.close()
        self.engine.close()


def open_model(
    artifact: Path,
    library: Path,
    engine_config: EngineConfig,
    *,
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> OpenModel:
    """Load an artifact and its library for an engine of some capacity.

    `overrides` are the settings the library is expected to have been compiled with. Raises the
    errors of the artifact, the library and the device, and OptionError.
    """
    from mlc_llm.runtime.model import CompiledRunner
    from mlc_llm.runtime.parameters import load_parameters

    if device != "auto":
        parse_device(device)  # what is no device of this machine is said before anything is read
    config = read_chat_config(artifact)
    template = load_template(artifact, config)
    if template is not None:
        template.start()  # ready when the tokenizer is
    tokenizer = Tokenizer.load(artifact)
    loaded = load_library(library, device, progress)
    metadata = loaded.metadata
    check_library(metadata, config, overrides or {}, str(library))
    images = _image_reader(metadata, config, tokenizer, artifact)
    is_reranker = config.rerank_metadata is not None
    if engine_config.model_task != AUTO:
        is_reranker = engine_config.model_task == "rerank"
    ranking = RankingPrompts(tokenizer) if is_reranker else None
    prompts = PromptBuilder.load(
        artifact,
        config,
        tokenizer,
        template,
        images,
        tool_parser=engine_config.tool_parser,
        reasoning_parser=engine_config.reasoning_parser,
    )
    free_bytes = free_gpu_bytes(loaded.device) if loaded.device.is_gpu else free_memory_bytes()
    parameters = load_parameters(artifact, loaded, progress)
    weights_bytes = sum(array.nbytes for array in parameters)
    plan = plan_memory(metadata, engine_config, weights_bytes, free_bytes)
    runner = CompiledRunner(loaded, parameters, plan.num_pages, plan.num_state_slots)
    vocab_size = config.active_vocab_size or metadata.vocab_size
    engine = Engine(
        runner,
        max_num_sequence=plan.max_num_sequence,
        max_sequence_len=plan.max_single_sequence_length,
        max_step_tokens=plan.prefill_chunk_size,
        max_idle_pages=plan.max_idle_pages,
        has_prefix_cache=engine_config.prefix_cache_mode == "radix",
        mixes_prompts=engine_config.prefill_mode == "hybrid",
        active_vocab_size=config.active_vocab_size,
        grammars=GrammarCache(
            partial(GrammarVocabulary, tokenizer, prompts.stop_token_ids, vocab_size)
        ),
    )
    return OpenModel(config, tokenizer, prompts, engine, plan, ranking)


def _image_reader(
    metadata: LibraryMetadata, config: ChatConfig, tokenizer: Tokenizer, artifact: Path
) -> ImageReader | None:
    """Return what reads images for a model, None for one that takes none.

    Raises CorruptFile and LibraryMismatch.
    """
    inputs = ImageInputs.from_json(metadata.images)
    if inputs is None:
        return None
    token = tokenizer.id_to_token(inputs.token_id)
    if token is None:
        raise CorruptFile(
            f"{artifact} has no token {inputs.token_id}, which stands for images; the tokenizer "
            "belongs to another model"
        )
    given = config.model_config.get("image_processing")
    where = str(artifact / CHAT_CONFIG_NAME)
    if inputs.tiling:
        tiles = TileProcessing() if given is None else TileProcessing.from_json(given, where)
        if tiles.num_crops >= inputs.max_views:
            raise LibraryMismatch(
                f"{where}: num_crops is {tiles.num_crops}, the library was compiled for "
                f"{inputs.max_views - 1}; compile it again with `mlc_llm compile`"
            )
        return ImageReader(inputs, tiles, token)
    processing = (
        ImageProcessing.usual(inputs.size)
        if given is None
        else ImageProcessing.from_json(given, inputs.size, where)
    )
    return ImageReader(inputs, processing, token)


def check_library(
    metadata: LibraryMetadata,
    config: ChatConfig,
    overrides: Mapping[str, Any],
    where: str,
    task: str = "chat",
) -> None:
    """Raise LibraryMismatch unless a library was compiled for this model, settings and task.

    Raises UnsupportedModel for a chat with a model that is for embeddings.
    """
    if task == "chat" and config.model_task == "embedding":
        raise UnsupportedModel(
            f"a {config.model_type} is a model for embeddings and cannot chat; let `mlc_llm serve` "
            "answer v1/embeddings with it"
        )
    if metadata.model_task != task:
        raise LibraryMismatch(
            f"{where} was compiled for the task {metadata.model_task}, not for {task}; compile it "
            f"again with `mlc_llm compile --overrides model_task={task}`"
        )
    for name in ("model_type", "quantization"):
        wanted, found = getattr(config, name), getattr(metadata, name)
        if wanted != found:
            raise LibraryMismatch(
                f"{where} was compiled for {name} {found}, the model has {wanted}; "
                "compile it again with `mlc_llm compile`"
            )
    for name in _SHAPE:
        wanted, found = config.model_config.get(name), metadata.model_config.get(name)
        # Artifacts leave out, or set to zero, what follows from other numbers.
        is_given = name in config.model_config and name in metadata.model_config
        if is_given and wanted != found and (wanted or name == "rope_scaling"):
            raise LibraryMismatch(
                f"{where} was compiled for another model: its {name} is {found}, this model's is "
                f"{wanted}; compile it again with `mlc_llm compile`"
            )
    for name, value in overrides.items():
        if name == "kv_cache_dtype":
            found = metadata.kv_cache.dtype if value != "auto" else value
        elif name in _COMPILED:
            found = getattr(metadata, name)
        else:
            known = ", ".join((*_COMPILED, "kv_cache_dtype"))
            raise OptionError(f"override {name!r} is not known; known: {known}")
        if found != value:
            raise OptionError(
                f"{where} was compiled with {name}={found}, the override says {value}; "
                "compile it again with the same --overrides"
            )
