"""Models with recurrent state in the engine: same bits in pieces, in company and from snapshots."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy_recurrent
import pytest
from mlc_packer import pack_artifact
from numpy.typing import NDArray
from numpy_model import read_weights
from paged_sequence import PagedSequence
from reference_cases import get_case
from tiny_models import FLOAT_OPT, NUM_PAGES, PAGE_SIZE, TinyModels, relative_error, run_step

from mlc_llm.artifact import LibraryMetadata, read_chat_config, read_tensor_index
from mlc_llm.compiler.compile import CompileOptions, compile_model
from mlc_llm.engine.engine import Engine
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.engine.session import ChatSession
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.models.registry import find_family, get_family
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.group import dequantize_group
from mlc_llm.quantization.schemes import Scheme, get_scheme
from mlc_llm.runtime.pages import PagePool

NAMES = ["rwkv5", "rwkv6", "qwen3_5"]
pytestmark = pytest.mark.cpu


def prompt_of(name: str, length: int) -> list[int]:
    tokens: list[int] = get_case(name).load().token_ids.tolist()
    return (tokens * 4)[:length]


@pytest.mark.parametrize("quantization", ["q0f32", "q4f16_1"])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_and_company_change_no_bit(
    tiny_models: TinyModels, name: str, quantization: str
) -> None:
    runner = tiny_models.runner(name, quantization, "O2")
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    prompt = prompt_of(name, 40)
    other = prompt[::-1]
    alone = [run_step(runner, [(PagedSequence(pool), tokens)])[0] for tokens in (prompt, other)]
    first, second = PagedSequence(pool), PagedSequence(pool)
    found: list[Any] = [[], []]
    for start, end in ((0, 1), (1, 18), (18, 39), (39, 40)):
        # The other sequence is ahead of the first and above it in the step.
        work = [(second, other[start:end]), (first, prompt[start:end])]
        logits = run_step(runner, work)
        found[0].append(logits[1])
        found[1].append(logits[0])
    for pieces, whole in zip(found, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


def stored_weights(name: str, artifact: Path, scheme: Scheme) -> dict[str, NDArray[Any]]:
    """Return what a quantized artifact stands for, under Hugging Face's names."""
    case, index = get_case(name), read_tensor_index(artifact)
    family, plain = find_family(case.config()), read_weights(case.directory)
    found: dict[str, NDArray[Any]] = {}
    config = family.config_from_huggingface(case.config())
    for item in plan_parameters(family, config, scheme):
        arrays = [index.read(spec.name) for spec in item.outputs]
        value = arrays[0].astype(np.float64)
        if len(arrays) > 1:
            value = dequantize_group(*arrays, scheme, item.shape[-1], transposed=False)
        sources = item.rule.sources
        ends = np.cumsum([len(plain[source]) for source in sources])[:-1]
        for source, part in zip(sources, np.split(value, ends), strict=True):
            adds_one = np.abs(part - plain[source] - 1).max() < 1e-2
            found[source] = part - 1 if adds_one else part
    return found


@pytest.mark.parametrize("name", NAMES)
def test_quantized_is_the_dequantized_model(tiny_models: TinyModels, name: str) -> None:
    weights = stored_weights(name, tiny_models.artifact(name, "q4f16_1"), get_scheme("q4f16_1"))
    prompt = prompt_of(name, 40)
    expected = numpy_recurrent.forward(get_case(name).config(), weights, prompt)
    runner = tiny_models.runner(name, "q4f16_1")
    found = run_step(runner, [(PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE)), prompt)])[0]
    # Sums are float32; only K and V of the hybrid model are float16.
    assert relative_error(found, expected) < (3e-3 if name == "qwen3_5" else 1e-5)


def make_engine(tiny_models: TinyModels, name: str, **options: Any) -> Engine:
    return Engine(tiny_models.runner(name, "q4f16_1"), max_num_sequence=4, **options)


def generate(engine: Engine, *requests: Request) -> dict[tuple[str, int], list[int]]:
    said: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            if output.token_id is not None:
                said.setdefault((output.request_id, output.index), []).append(output.token_id)
        engine.check_integrity()
    return said


def ask(name: str, prompt: list[int], count: int, **changes: Any) -> Request:
    # Draws, unlike choices of the likeliest, show small differences.
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=count)
    return Request(name, prompt, params, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_turns_from_snapshots_equal_those_from_the_start(
    tiny_models: TinyModels, name: str
) -> None:
    engine = make_engine(tiny_models, name)
    chat = prompt_of(name, 50)
    turns = []
    for turn, message in enumerate(([9, 8, 7], [11] * 20, [30])):
        chat = [*chat, *message]
        stats = engine.add(ask(f"r{turn}", chat, 20))
        answer = generate(engine)[f"r{turn}", 0]
        # Of the answer, all but the last token have been computed.
        assert turn == 0 or stats.cached_tokens >= len(chat) - len(message) - 16
        turns.append((chat, answer))
        chat = [*chat, *answer]
    # Afterwards: the engines share a runner, and so its slots.
    for prompt, answer in turns:
        fresh = make_engine(tiny_models, name, has_prefix_cache=False)
        assert generate(fresh, ask("r", prompt, 20))["r", 0] == answer


@pytest.mark.parametrize("name", NAMES)
def test_many_at_once_equal_each_alone(tiny_models: TinyModels, name: str) -> None:
    prompts = {f"r{n}": prompt_of(name, n) for n in (1, 15, 16, 17, 33, 40, 64)}
    engine = make_engine(tiny_models, name)
    requests = [
        ask(key, tokens, 25, n=1 + index % 3) for index, (key, tokens) in enumerate(prompts.items())
    ]
    together = generate(engine, *requests)
    for request in requests:
        alone = generate(make_engine(tiny_models, name, has_prefix_cache=False), request)
        for key, tokens in alone.items():
            assert together[key] == tokens


@pytest.mark.parametrize("name", NAMES)
def test_chat_session(tiny_models: TinyModels, name: str) -> None:
    artifact = tiny_models.artifact(name, "q4f16_1")
    library = tiny_models.library(name, "q4f16_1", FLOAT_OPT)
    session = ChatSession.open(artifact, library)
    try:
        params = SamplingParams(temperature=0.0, max_tokens=30)
        messages = [{"role": "user", "content": "tell me of the sea, and of the ships on it"}]
        first = "".join(piece.text for piece in session.chat(messages, params))
        assert first
        messages += [
            {"role": "assistant", "content": first},
            {"role": "user", "content": "more"},
        ]
        second = "".join(piece.text for piece in session.chat(messages, params))
        assert session.last is not None and session.last.cached_tokens >= 32
    finally:
        session.close()
    session = ChatSession.open(artifact, library)
    try:
        assert "".join(piece.text for piece in session.chat(messages, params)) == second
    finally:
        session.close()


@pytest.mark.parametrize("name", NAMES)
def test_library_says_what_state_it_has(tiny_models: TinyModels, name: str) -> None:
    library = tiny_models.library(name)
    text = (library / "metadata.json").read_text()
    metadata = LibraryMetadata.from_json(text, "library")
    assert LibraryMetadata.from_json(metadata.to_json(), "again") == metadata
    shapes = {spec.name.split(".")[0]: spec.shape for spec in metadata.states}
    if name == "qwen3_5":
        assert metadata.kv_cache.num_layers == 1 and len(metadata.states) == 6
        assert shapes == {"conv": (3, 80), "delta": (4, 8, 12)}
    else:
        size = get_case(name).config()["head_size"]
        assert metadata.kv_cache.num_layers == 0 and metadata.kv_cache.bytes_per_token == 0
        assert len(metadata.states) == 9
        rows = dict.fromkeys(("attention_shift", "feed_forward_shift"), (32,))
        assert shapes == {**rows, "wkv": (32 // size, size, size)}


def test_recurrent_models_make_no_embeddings(tiny_models: TinyModels) -> None:
    config = read_chat_config(tiny_models.artifact("rwkv6"))
    options = CompileOptions("cpu", FLOAT_OPT, {"model_task": "embedding"})
    with pytest.raises(UnsupportedModel, match="no embeddings"):
        compile_model(config, options, lambda _: None)


@pytest.mark.parametrize("name", NAMES)
def test_artifacts_of_mlc_llm_compile_to_the_same(
    tiny_models: TinyModels, name: str, tmp_path: Path
) -> None:
    """Its configurations leave out what follows, and say -1 of the context of RWKV."""
    pack_artifact(get_case(name).directory, tmp_path, "q0f32")
    theirs = read_chat_config(tmp_path)
    ours = read_chat_config(tiny_models.artifact(name))
    family = get_family(ours.model_type)
    expected = family.config_from_json(ours.model_config)
    found = family.config_from_json(theirs.model_config)
    same = {"max_batch_size": 128, "context_window_size": expected.context_window_size}
    same |= {"prefill_chunk_size": expected.prefill_chunk_size}
    if name == "qwen3_5":
        same["tensor_prefix"] = "model."
    assert dataclasses.replace(found, **same) == expected


def rescaled_copy(directory: Path) -> Path:
    """Write the stored RWKV-5 with a configuration that halves hidden states on the way."""
    shutil.copytree(get_case("rwkv5").directory, directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_every": 1}))
    return directory


def test_rescaled_hidden_states(tmp_path: Path) -> None:
    from mlc_llm.prepare.progress import NullProgress
    from mlc_llm.prepare.resolve import convert_weights, write_chat_config_for
    from mlc_llm.runtime.library import load_library
    from mlc_llm.runtime.model import CompiledRunner
    from mlc_llm.runtime.parameters import load_parameters

    source, artifact = rescaled_copy(tmp_path / "source"), tmp_path / "artifact"
    write_chat_config_for(source, artifact, quantization="q0f32")
    convert_weights(source, artifact, quantization="q0f32", progress=NullProgress())
    config = read_chat_config(artifact)
    compiled = compile_model(config, CompileOptions("cpu", FLOAT_OPT), lambda _: None)
    compiled.save_objects(tmp_path / "library")
    library = load_library(tmp_path / "library")
    parameters = load_parameters(artifact, library, lambda _: None)
    runner = CompiledRunner(library, parameters, 4, 1)
    prompt = prompt_of("rwkv5", 40)
    found = run_step(runner, [(PagedSequence(PagePool(1, 64)), prompt)])[0]
    runner.close()
    settings = json.loads((source / "config.json").read_text())
    expected = numpy_recurrent.forward(settings, read_weights(source), prompt)
    assert relative_error(found, expected) < 1e-5
    # The final norm undoes it, but for its epsilon.
    assert 0 < relative_error(found, get_case("rwkv5").load().logits) < 1e-3


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("rwkv5", {"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}, "RWKV-4"),
        ("rwkv5", {"model_version": "5_1"}, "version '5_1'.*5_2"),
        ("rwkv5", {"head_size": 24}, "multiple of head_size 24"),
        ("rwkv5", {"attention_hidden_size": 64}, "attention_hidden_size 64"),
        ("rwkv6", {"tie_word_embeddings": True}, "tied"),
        ("rwkv6", {"head_size": "x"}, "head_size must be a positive int"),
        ("qwen3_5", {"layer_types": ["full_attention"]}, "layer_types must say"),
        ("qwen3_5", {"linear_num_key_heads": 3}, "share 3 key heads"),
        ("qwen3_5", {"linear_key_head_dim": 0}, "linear_key_head_dim must be at least 1"),
        ("qwen3_5", {"attn_output_gate": False}, "gates"),
        ("qwen3_5_moe", {"num_experts_per_tok": 7}, "a token has 7 experts, the model 6"),
        ("qwen3_next", {"mlp_only_layers": 1}, "mlp_only_layers is 1"),
    ],
)
def test_what_is_not_supported_is_refused(name: str, changes: dict[str, Any], words: str) -> None:
    config = {**get_case(name).config(), **changes}
    with pytest.raises((UnsupportedModel, CorruptFile), match=words):
        find_family(config).config_from_huggingface(config)


def test_missing_fields_follow_from_others() -> None:
    config = get_case("rwkv6").config()
    del config["head_size"], config["intermediate_size"]
    found = get_family("rwkv6").config_from_huggingface({**config, "hidden_size": 4096})
    assert (found.head_dim, found.num_attention_heads) == (64, 64)
    assert found.intermediate_size == 14336
    assert (found.time_mix_rank, found.time_decay_rank) == (64, 128)
    config = get_case("qwen3_5").config()
    del config["layer_types"]
    found = get_family("qwen3_5").config_from_huggingface({**config, "num_hidden_layers": 8})
    assert [found.is_linear(layer) for layer in range(8)] == [True, True, True, False] * 2


def test_scaling_beside_the_base_is_not_lost() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = {**get_case("qwen3_next").config(), "rope_scaling": scaling}
    del config["partial_rotary_factor"]
    found = get_family("qwen3_next").config_from_huggingface(config)
    assert found.rope_scaling == scaling and found.position_embedding_base == 1000
    assert found.partial_rotary_factor == 0.25


def test_text_part_of_a_model_with_images() -> None:
    text = get_case("qwen3_5").config()
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": True,
    }
    family = find_family(config)
    found = family.config_from_huggingface(config)
    assert found.tie_word_embeddings and found.hidden_size == text["hidden_size"]
    names = {
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.0.linear_attn.conv1d_weight": (
            "model.language_model.layers.0.linear_attn.conv1d.weight"
        ),
    }
    for parameter, source in names.items():
        assert family.rule_for(parameter, found).sources == (source,)
    assert any("model.visual.blocks.0".startswith(prefix) for prefix in family.unused)
