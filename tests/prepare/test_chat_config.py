"""Writing an artifact's chat config: files, sampling values, template choice, bad sources."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_tokenizers
import tokenizer_references

from mlc_llm.artifact import ChatConfig, read_chat_config
from mlc_llm.errors import CorruptFile, ModelNotFound, OptionError, StorageError
from mlc_llm.prepare.chat_config import generate_chat_config
from mlc_llm.text.conversation import conversation_names, get_conversation
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "hello"}


@dataclasses.dataclass
class FakeModelConfig:
    vocab_size: int = 512
    context_window_size: int = 128
    prefill_chunk_size: int = 64
    sliding_window_size: int = -1
    attention_sink_size: int = -1

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "hidden_size": 8}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face directory with a ChatML tokenizer, a template and both config files."""
    directory = small_tokenizers.write_tokenizer(
        tmp_path / "source",
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
        chat_template=small_tokenizers.CHATML_TEMPLATE,
    )
    write_json(directory / "config.json", {"model_type": "llama", "eos_token_id": 0})
    return directory


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def generate(source: Path, output: Path, **changes: Any) -> ChatConfig:
    options: dict[str, Any] = {
        "family": SimpleNamespace(name="llama", embedding=None),
        "model_config": FakeModelConfig(),
        "quantization": "q4f16_1",
    }
    return generate_chat_config(source, output, **{**options, **changes})


def prompt_text(artifact: Path) -> str:
    tokenizer = Tokenizer.load(artifact)
    builder = PromptBuilder.load(artifact, read_chat_config(artifact), tokenizer)
    try:
        return tokenizer.decode(builder.token_ids([USER]), skip_special_tokens=False)
    finally:
        builder.close()


def test_config_of_a_chat_model(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "artifact"
    config = generate(source, output)
    assert read_chat_config(output) == config
    assert (config.model_type, config.quantization) == ("llama", "q4f16_1")
    assert config.model_config == FakeModelConfig().to_json()
    assert (config.vocab_size, config.active_vocab_size) == (512, 262)
    assert (config.context_window_size, config.prefill_chunk_size) == (128, 64)
    assert (config.sliding_window_size, config.attention_sink_size) == (-1, -1)
    assert config.tokenizer_files == ["tokenizer.json", "tokenizer_config.json"]
    assert config.tokenizer_info == {
        "token_postproc_method": "byte_level",
        "prepend_space_in_encode": False,
        "strip_space_in_decode": False,
    }
    assert config.version == "0.1.0" and config.model_task == "chat"
    for name in config.tokenizer_files:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    template = (output / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == small_tokenizers.CHATML_TEMPLATE
    assert sorted(path.name for path in output.iterdir()) == [
        "chat_template.jinja", "mlc-chat-config.json", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


def test_own_template_gets_the_model_s_own_ids(source: Path, tmp_path: Path) -> None:
    config = generate(source, tmp_path / "out")
    chatml = get_conversation("chatml").to_json()
    # The end of a turn, <|im_end|>, is found though the configuration names only <|endoftext|>.
    assert config.conv_template == {**chatml, "stop_token_ids": [0, 2]}
    assert prompt_text(tmp_path / "out") == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bos_of_the_template_becomes_a_prefix_for_other_readers(
    source: Path, tmp_path: Path
) -> None:
    (source / "chat_template.jinja").write_text("{{ bos_token }}[INST] {{ messages[0].content }}")
    config = generate(source, tmp_path / "out")
    assert config.conv_template["name"] == "mistral_default"
    assert config.conv_template["system_prefix_token_ids"] == [1]
    assert config.conv_template["stop_token_ids"] == [0]


def test_unknown_layout_is_kept_as_jinja_and_told_as_plain_text(
    source: Path, tmp_path: Path
) -> None:
    (source / "chat_template.jinja").write_text("Q: {{ messages[0].content }}\nA:")
    config = generate(source, tmp_path / "out")
    assert config.conv_template["name"] == "LM"
    assert config.conv_template["stop_token_ids"] == [0]
    assert prompt_text(tmp_path / "out") == "Q: hello\nA:"


def test_named_template_turns_jinja_off(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    generate(source, output)
    config = generate(source, output, conv_template="redpajama_chat")
    assert config.conv_template == get_conversation("redpajama_chat").to_json()
    assert not (output / "chat_template.jinja").exists()
    assert prompt_text(output) == "<human>: hello\n<bot>:"


def test_base_model_is_a_plain_completion(stories260k: Path, tmp_path: Path) -> None:
    config = generate(stories260k, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert config.conv_template["name"] == "LM"
    assert config.conv_template["system_prefix_token_ids"] == [1]
    assert config.conv_template["stop_token_ids"] == [2]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert config.active_vocab_size == 512
    tokenizer = Tokenizer.load(tmp_path / "out")
    builder = PromptBuilder.load(tmp_path / "out", config, tokenizer)
    assert builder.token_ids([{"role": "user", "content": ""}]) == [1]


def test_stale_template_of_an_earlier_run_is_removed(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    generate(source, output)
    small_tokenizers.write_tokenizer(source)
    generate(source, output)
    assert not (output / "chat_template.jinja").exists()


def test_generation_config_goes_before_config(source: Path, tmp_path: Path) -> None:
    write_json(
        source / "config.json",
        {"temperature": 0.9, "repetition_penalty": 1.1, "bos_token_id": 5, "eos_token_id": 0},
    )
    write_json(
        source / "generation_config.json",
        {"temperature": 0.6, "top_p": None, "eos_token_id": [2, 9], "pad_token_id": 3},
    )
    config = generate(source, tmp_path / "out")
    assert (config.temperature, config.top_p, config.repetition_penalty) == (0.6, 1.0, 1.1)
    assert (config.presence_penalty, config.frequency_penalty) == (0.0, 0.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, [2, 9], 3)
    assert config.conv_template["stop_token_ids"] == [2, 9, 0]


def test_ids_come_from_the_tokenizer_where_no_config_has_them(source: Path, tmp_path: Path) -> None:
    write_json(source / "config.json", {})
    config = generate(source, tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 0, 0)


def test_two_file_tokenizer_gets_a_tokenizer_json(source: Path, tmp_path: Path) -> None:
    whole = Tokenizer.load(source)
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "tokenizer.json").unlink()
    write_json(source / "vocab.json", model["vocab"])
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (source / "merges.txt").write_text("\n".join(pairs))
    config = generate(source, tmp_path / "out")
    assert config.tokenizer_files[0] == "tokenizer.json"
    assert {"vocab.json", "merges.txt"} < set(config.tokenizer_files)
    assert config.tokenizer_info["token_postproc_method"] == "byte_level"
    built = Tokenizer.load(tmp_path / "out")
    assert built.encode("hello <|endoftext|>") == whole.encode("hello <|endoftext|>")


MANY_TOKENS = FakeModelConfig(vocab_size=300_000)
OTHER_FORMATS: dict[str, tuple[str, str, dict[str, object]]] = {
    # file in the source: the stored file, what the artifact is read from, settings
    "tokenizer.model": ("bpe_bytes.model", "tokenizer.json", {}),
    "qwen.tiktoken": (
        "ranks.tiktoken",
        "tokenizer.json",
        {"added_tokens_decoder": {"600": {"content": "<|im_end|>", "special": True}}},
    ),
    "rwkv_vocab_v20230424.txt": ("rwkv_vocab_small.txt", "tokenizer_model", {}),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_tokenizers_are_converted(tmp_path: Path, name: str) -> None:
    stored, written, settings = OTHER_FORMATS[name]
    files: dict[str, str | bytes | Path] = {name: tokenizer_references.DIRECTORY / stored}
    source = tmp_path / "source"
    original = tokenizer_references.load_with(source, files, **settings)
    write_json(source / "config.json", {})
    output = tmp_path / "out"
    config = generate(source, output, model_config=MANY_TOKENS)
    assert config.tokenizer_files[0] == written
    assert (output / name).read_bytes() == (source / name).read_bytes()
    assert set(config.tokenizer_files) >= {name, written, "tokenizer_config.json"}
    copied = Tokenizer.load(output)
    assert copied.origin == output / written
    for text in tokenizer_references.read_reference("rwkv").texts:
        assert copied.encode(text) == original.encode(text)
    assert copied.settings == original.settings
    assert copied.bos_prefix == original.bos_prefix
    assert config.active_vocab_size == copied.vocab_size == original.vocab_size
    method = "byte_level" if name == "qwen.tiktoken" else "byte_fallback"
    assert config.tokenizer_info["token_postproc_method"] == method
    assert config.tokenizer_info["prepend_space_in_encode"] is (name == "tokenizer.model")


def test_ids_come_from_the_file_of_the_vocabulary(tmp_path: Path) -> None:
    tokenizer_references.load_rwkv(tmp_path / "rwkv")
    config = generate(tmp_path / "rwkv", tmp_path / "out", model_config=MANY_TOKENS)
    assert config.eos_token_id == 0
    assert config.conv_template["stop_token_ids"] == [0]
    tokenizer_references.load_sentencepiece(tmp_path / "llama", "bpe_bytes")
    config = generate(tmp_path / "llama", tmp_path / "other", model_config=MANY_TOKENS)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert config.conv_template["system_prefix_token_ids"] == [1]


def test_tokens_the_file_lacks_are_written_into_the_artifact(source: Path, tmp_path: Path) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text())
    added = {"262": {"content": "<tool>", "special": False}}
    write_json(source / "tokenizer_config.json", {**settings, "added_tokens_decoder": added})
    config = generate(source, tmp_path / "out")
    assert config.active_vocab_size == 263
    stored = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert stored["added_tokens"][-1]["content"] == "<tool>"
    assert Tokenizer.load(tmp_path / "out").encode("<tool>") == [262]


@pytest.mark.parametrize("name", conversation_names())
def test_every_named_template_reaches_the_artifact(source: Path, tmp_path: Path, name: str) -> None:
    config = generate(source, tmp_path / "out", model_config=MANY_TOKENS, conv_template=name)
    assert read_chat_config(tmp_path / "out").conv_template == get_conversation(name).to_json()
    builder = PromptBuilder.load(tmp_path / "out", config, Tokenizer.load(tmp_path / "out"))
    named = get_conversation(name)
    ids = builder.token_ids([USER])
    assert ids[: len(named.system_prefix_token_ids)] == named.system_prefix_token_ids
    assert set(named.stop_token_ids) <= builder.stop_token_ids
    assert builder.stop_strings == [text for text in named.stop_str if text]


def test_source_may_be_the_output(source: Path) -> None:
    before = (source / "tokenizer.json").read_bytes()
    generate(source, source)
    assert (source / "tokenizer.json").read_bytes() == before
    with pytest.raises(OptionError, match="another directory"):
        generate(source, source, conv_template="chatml")
    assert (source / "chat_template.jinja").is_file()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("repetition_penalty", True),
        ("frequency_penalty", float("nan")),
        ("eos_token_id", "</s>"),
        ("eos_token_id", []),
        ("bos_token_id", [1]),
        ("pad_token_id", 1.5),
    ],
)
def test_bad_values_are_a_corrupt_file(
    source: Path, tmp_path: Path, name: str, value: object
) -> None:
    write_json(source / "generation_config.json", {name: value})
    with pytest.raises(CorruptFile, match=rf"generation_config\.json: {name} must be"):
        generate(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def add_a_token_twice(source: Path) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    token = {**content["added_tokens"][1], "id": 300}
    content["added_tokens"].append(token)
    write_json(source / "tokenizer.json", content)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda s: (s / "tokenizer.json").unlink(), ModelNotFound, "no tokenizer"),
        (lambda s: (s / "tokenizer.json").write_text("{"), CorruptFile, "not a tokenizer"),
        (lambda s: (s / "tokenizer_config.json").write_text("["), CorruptFile, "tokenizer_config"),
        (lambda s: (s / "config.json").write_text("nope"), CorruptFile, "config.json"),
        (lambda s: (s / "generation_config.json").write_text("[]"), CorruptFile, "generation_c"),
        (lambda s: (s / "chat_template.jinja").write_bytes(b"\xff"), CorruptFile, "UTF-8"),
        (
            lambda s: write_json(s / "tokenizer_config.json", {"chat_template": 5}),
            CorruptFile,
            "chat_template",
        ),
        (add_a_token_twice, CorruptFile, r"<\|im_start\|>' twice"),
    ],
)
def test_bad_sources_leave_no_config(
    source: Path,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    error: type[Exception],
    message: str,
) -> None:
    spoil(source)
    with pytest.raises(error, match=message):
        generate(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"has 262 tokens, the model only 200"):
        generate(source, tmp_path / "out", model_config=FakeModelConfig(vocab_size=200))


def test_named_templates_are_checked(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no conversation template 'chatlm'; use one of chatml"):
        generate(source, tmp_path / "out", conv_template="chatlm")
    with pytest.raises(OptionError, match="'llama-3' begins with token id 128000"):
        generate(source, tmp_path / "out", conv_template="llama-3")


def test_output_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="is a file; name a directory"):
        generate(source, tmp_path / "file")


def test_interrupted_writing_leaves_no_config(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail_on_settings(old: Path, new: Path) -> None:
        if Path(new).name == "tokenizer_config.json":
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail_on_settings)
    with pytest.raises(KeyboardInterrupt):
        generate(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja", "tokenizer.json"
    ]  # fmt: skip


@pytest.mark.weights
def test_prompt_of_the_demo_model(demo_gguf: Path, tmp_path: Path) -> None:
    from mlc_llm.prepare.gguf_tokenizer import write_tokenizer

    write_tokenizer(demo_gguf, tmp_path / "source")
    model_config = FakeModelConfig(vocab_size=49152)
    config = generate(tmp_path / "source", tmp_path / "out", model_config=model_config)
    tokenizer = Tokenizer.load(tmp_path / "out")
    builder = PromptBuilder.load(tmp_path / "out", config, tokenizer)
    question = {"role": "user", "content": "What is the capital of France?"}
    try:
        ids = builder.token_ids([question])
    finally:
        builder.close()
    # fmt: off
    assert ids == [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411,
        407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1,
        520, 9531, 198,
    ]
    # fmt: on
    assert builder.stop_token_ids == {2}
    assert tokenizer.decode([504, 3575, 282, 4649, 314, 7042, 30, 2]) == (
        "The capital of France is Paris."
    )
