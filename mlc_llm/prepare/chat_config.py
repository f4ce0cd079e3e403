"""`mlc-chat-config.json`, tokenizer files and chat template of an artifact, from a model's own.

Knows Hugging Face's configuration files and which of their values the engine needs. Does not know
weights or what a family does with its configuration.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mlc_llm.artifact import (
    CHAT_TEMPLATE_NAME,
    ChatConfig,
    read_json_object,
    write_atomically,
    write_chat_config,
)
from mlc_llm.errors import CorruptFile, OptionError, StorageError, UnsupportedModel
from mlc_llm.prepare.cache import storage_errors
from mlc_llm.prepare.sentence_transformers import (
    embedding_metadata,
    read_score_tokens,
    read_sentence_settings,
)
from mlc_llm.text.chat_template import find_chat_template
from mlc_llm.text.conversation import Conversation, detect_conversation, get_conversation
from mlc_llm.text.formats import FILE_PATTERNS
from mlc_llm.text.ranking import NO, YES, RankingPrompts
from mlc_llm.text.settings import SETTINGS_NAME
from mlc_llm.text.tokenizer import TOKENIZER_NAME, Tokenizer, detect_tokenizer_info

if TYPE_CHECKING:
    from mlc_llm.models.base import Family
    from mlc_llm.models.config import DecoderConfig

AUTO = "auto"
# Beside the files a vocabulary may be in.
_TOKENIZER_FILES = ("merges.txt", "added_tokens.json", "special_tokens_map.json")
# Sampling value: (lowest, highest, what it must be, for the message)
_SAMPLING: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, math.inf, "0 or more"),
    "top_p": (1e-9, 1.0, "above 0 and at most 1"),
    "presence_penalty": (-2.0, 2.0, "from -2 to 2"),
    "frequency_penalty": (-2.0, 2.0, "from -2 to 2"),
    "repetition_penalty": (1e-9, math.inf, "above 0"),
}


def generate_chat_config(
    source_dir: Path,
    output: Path,
    *,
    family: Family,
    model_config: DecoderConfig,
    quantization: str,
    conv_template: str = AUTO,
    layer_formats: Mapping[str, str] = MappingProxyType({}),
) -> ChatConfig:
    """Write all of an artifact but its weights into `output`, the chat config last; return it.

    source_dir: Hugging Face's config.json and tokenizer files. With conv_template "auto" the
    model's own Jinja template goes along, and beside it, for readers without Jinja, the named
    template most like it; a name puts that template in place of both.
    Raises OptionError for a bad template name, ModelError for bad files, StorageError.
    """
    tokenizer = Tokenizer.load(source_dir)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise CorruptFile(
            f"the tokenizer in {source_dir} has {tokenizer.vocab_size:,} tokens, the model only "
            f"{model_config.vocab_size:,}; use the tokenizer that came with these weights"
        )
    _check_added_once(source_dir / TOKENIZER_NAME)
    values = _read_values(source_dir, tokenizer)
    settings = read_sentence_settings(source_dir)
    if family.embedding is not None or settings is not None:
        values["model_task"] = "embedding"
        values["embedding_metadata"] = embedding_metadata(family.embedding, settings)
    if (score_tokens := read_score_tokens(source_dir)) is not None:
        values["rerank_metadata"] = _rerank_metadata(score_tokens, tokenizer, source_dir)
    jinja_source = None
    if conv_template == AUTO:
        jinja_source = find_chat_template(source_dir, tokenizer.settings)
        conversation = _own_conversation(jinja_source, tokenizer, values["eos_token_id"])
    else:
        conversation = _named_conversation(conv_template, model_config.vocab_size)
    if output.exists() and not output.is_dir():
        raise StorageError(f"{output} is a file; name a directory to write the artifact into")
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        _place_template(jinja_source, source_dir, output)
        files = _copy_tokenizer(source_dir, output, tokenizer)
        fields = model_config.to_json()
        config = ChatConfig(
            model_type=family.name,
            quantization=quantization,
            model_config=fields,
            vocab_size=model_config.vocab_size,
            context_window_size=model_config.context_window_size,
            sliding_window_size=model_config.sliding_window_size,
            prefill_chunk_size=model_config.prefill_chunk_size,
            attention_sink_size=model_config.attention_sink_size,
            tensor_parallel_shards=fields.get("tensor_parallel_shards", 1),
            pipeline_parallel_stages=fields.get("pipeline_parallel_stages", 1),
            active_vocab_size=tokenizer.vocab_size,
            layer_formats=dict(layer_formats),
            conv_template=conversation.to_json(),
            tokenizer_files=files,
            tokenizer_info=detect_tokenizer_info(
                read_json_object(output / TOKENIZER_NAME) if TOKENIZER_NAME in files else {}
            ),
            **values,
        )
        write_chat_config(output, config)
    return config


def _rerank_metadata(
    score_tokens: tuple[int, int], tokenizer: Tokenizer, source_dir: Path
) -> dict[str, Any]:
    """Return the tokens of a reranker's answers. Raises UnsupportedModel for other answers."""
    prompts = RankingPrompts(tokenizer)
    if score_tokens != (prompts.yes_id, prompts.no_id):
        texts = " and ".join(repr(tokenizer.id_to_token(token)) for token in score_tokens)
        raise UnsupportedModel(
            f"{source_dir} is a reranker that answers {texts}; only those are supported that, like "
            f"Qwen3-Reranker, answer {YES!r} and {NO!r}"
        )
    return {"true_token_id": prompts.yes_id, "false_token_id": prompts.no_id}


def _check_added_once(path: Path) -> None:
    seen: set[str] = set()
    content = read_json_object(path) if path.is_file() else {}
    for token in content.get("added_tokens") or []:
        if token["content"] in seen:
            raise CorruptFile(
                f"{path} adds the token {token['content']!r} twice; remove one of the entries"
            )
        seen.add(token["content"])


def _read_values(source_dir: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return sampling defaults and special ids: generation_config.json goes before config.json."""
    paths = [source_dir / "generation_config.json", source_dir / "config.json"]
    files = [(path, read_json_object(path)) for path in paths if path.is_file()]
    values: dict[str, Any] = {
        "pad_token_id": 0,
        "bos_token_id": _id_of(tokenizer.bos_token, tokenizer, 1),
        "eos_token_id": _id_of(tokenizer.eos_token, tokenizer, 2),
    }
    for name in (*_SAMPLING, *values):
        for path, content in files:
            if content.get(name) is not None:
                values[name] = _check_value(name, content[name], path)
                break
    return values


def _id_of(token: str | None, tokenizer: Tokenizer, default: int) -> int:
    token_id = None if token is None else tokenizer.token_to_id(token)
    return default if token_id is None else token_id


def _check_value(name: str, value: Any, path: Path) -> Any:
    if name not in _SAMPLING:
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CorruptFile(f"{path}: {name} must be a token id, it is {value!r:.80}; correct it")
        return value
    lowest, highest, meaning = _SAMPLING[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not lowest <= value <= highest:
        raise CorruptFile(f"{path}: {name} must be {meaning}, it is {value!r:.80}; correct it")
    return float(value)


def _named_conversation(name: str, vocab_size: int) -> Conversation:
    conversation = get_conversation(name)
    highest = max(conversation.system_prefix_token_ids, default=0)
    if highest >= vocab_size:
        raise OptionError(
            f"conversation template {name!r} begins with token id {highest}, the model has only "
            f"{vocab_size:,} tokens; use 'auto' or the template of this model's family"
        )
    return conversation


def _own_conversation(
    jinja_source: str | None, tokenizer: Tokenizer, eos_token_id: int | list[int]
) -> Conversation:
    """Return what is closest to the model's own template, with the model's own ids."""
    name = None if jinja_source is None else detect_conversation(jinja_source)
    like = Conversation() if name is None else get_conversation(name)
    if jinja_source is None:
        prefix = tokenizer.bos_prefix
    else:
        bos, bos_id = tokenizer.bos_token, _id_of(tokenizer.bos_token, tokenizer, -1)
        has_bos = bos is None or like.system_template.startswith(bos)
        prefix = [bos_id] if bos_id >= 0 and not has_bos and "bos_token" in jinja_source else []
    eos_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    # Some models' configurations name only the end of a text, not the end of a turn.
    ends = [_id_of(tokenizer.eos_token, tokenizer, -1), *_turn_ends(like, tokenizer)]
    stop_ids = dict.fromkeys([*eos_ids, *(token_id for token_id in ends if token_id >= 0)])
    return dataclasses.replace(like, system_prefix_token_ids=prefix, stop_token_ids=list(stop_ids))


def _turn_ends(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the special tokens that end a turn, where the tokenizer has them."""
    texts = [text.strip() for text in (*conversation.seps, *conversation.stop_str)]
    encoded = [tokenizer.encode(text) for text in texts if text]
    return [ids[0] for ids in encoded if len(ids) == 1 and tokenizer.decode(ids) == ""]


def _place_template(jinja_source: str | None, source_dir: Path, output: Path) -> None:
    """Write the Jinja template, or see to it that none is in the way of a named one."""
    path = output / CHAT_TEMPLATE_NAME
    if jinja_source is not None:
        write_atomically(path, jinja_source)
    elif path.is_file():
        if _is_same(path, source_dir / CHAT_TEMPLATE_NAME):
            raise OptionError(
                f"{path} would go before the conversation template you named; write the artifact "
                "to another directory"
            )
        path.unlink()


def _copy_tokenizer(source_dir: Path, output: Path, tokenizer: Tokenizer) -> list[str]:
    """Copy the tokenizer files; return their names.

    Where none says all of the vocabulary, a file that does is made and goes first; settings that
    only the vocabulary's file has are added to tokenizer_config.json.
    """
    patterns = (*FILE_PATTERNS, *_TOKENIZER_FILES)
    paths = [path for pattern in patterns for path in sorted(source_dir.glob(pattern))]
    contents = {path.name: path.read_bytes() for path in paths if path.is_file()}
    if tokenizer.origin is None:
        name, content = tokenizer.to_file()
        contents = {name: content, **{**contents, name: content}}
    settings = _settings_text(source_dir / SETTINGS_NAME, tokenizer.derived_settings)
    if settings is not None:
        contents[SETTINGS_NAME] = settings
    for name, content in contents.items():
        if not _has_content(output / name, content):
            write_atomically(output / name, content)
    return list(contents)


def _settings_text(path: Path, derived: Mapping[str, Any]) -> bytes | None:
    """Return tokenizer_config.json as it is, or with what it lacks; None if there is nothing."""
    own = read_json_object(path) if path.is_file() else {}
    if not derived:
        return path.read_bytes() if path.is_file() else None
    return (json.dumps({**own, **derived}, ensure_ascii=False, indent=2) + "\n").encode()


def _has_content(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _is_same(left: Path, right: Path) -> bool:
    return left.exists() and right.exists() and left.samefile(right)
