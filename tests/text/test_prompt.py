"""Prompts: which template is used, the ids it gives, what ends an answer, bad messages."""

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers

from mlc_llm.artifact import ChatConfig
from mlc_llm.errors import CorruptFile, OptionError, RequestError, TemplateError
from mlc_llm.text.conversation import get_conversation
from mlc_llm.text.prompt import PromptBuilder, load_template
from mlc_llm.text.tokenizer import Tokenizer
from mlc_llm.text.tool_calls.tools import Tool

USER = {"role": "user", "content": "hello"}


def make_config(**changes: Any) -> ChatConfig:
    values: dict[str, Any] = {
        "model_type": "llama",
        "quantization": "q0f32",
        "model_config": {},
        "vocab_size": 512,
        "context_window_size": 64,
        "prefill_chunk_size": 64,
        "conv_template": {},
    }
    return ChatConfig(**{**values, **changes})


def load(directory: Path, **changes: Any) -> PromptBuilder:
    return PromptBuilder.load(directory, make_config(**changes), Tokenizer.load(directory))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A directory with a ChatML tokenizer and no template."""
    return small_tokenizers.write_tokenizer(tmp_path, bos_token="<|im_start|>")


@pytest.fixture
def jinja_builder(artifact: Path) -> Iterator[PromptBuilder]:
    (artifact / "chat_template.jinja").write_text(small_tokenizers.CHATML_TEMPLATE)
    builder = load(artifact, conv_template={"name": "llama-2"}, eos_token_id=[0, 7])
    yield builder
    builder.close()


def test_jinja_template_of_the_artifact_goes_first(
    artifact: Path, jinja_builder: PromptBuilder
) -> None:
    tokenizer = Tokenizer.load(artifact)
    ids = jinja_builder.token_ids([USER])
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == tokenizer.token_to_id("<|im_start|>")
    assert jinja_builder.stop_token_ids == {0, 2, 7}
    assert jinja_builder.stop_strings == ["[INST]"]


def test_started_early_or_not_the_prompt_is_the_same(
    artifact: Path, jinja_builder: PromptBuilder
) -> None:
    config = make_config()
    template = load_template(artifact, config)
    assert template is not None
    template.start()
    builder = PromptBuilder.load(artifact, config, Tokenizer.load(artifact), template)
    with closing(builder):
        found = builder.token_ids([USER])
    assert template._child._child is None
    assert found == jinja_builder.token_ids([USER])


def test_named_template_when_there_is_no_jinja_file(tmp_path: Path) -> None:
    small_tokenizers.write_tokenizer(tmp_path, chat_template="not used")
    builder = load(tmp_path, conv_template={"name": "mistral_default"}, eos_token_id=9)
    tokenizer = Tokenizer.load(tmp_path)
    ids = builder.token_ids([{"role": "system", "content": "S. "}, USER])
    assert ids == [1, *tokenizer.encode("[INST] S. hello [/INST]")]
    assert builder.stop_token_ids == {2, 9}
    assert builder.stop_strings == ["</s>"]
    assert load_template(tmp_path, make_config(conv_template={"name": "mistral_default"})) is None
    builder.close()


def test_template_of_the_tokenizer_when_the_config_has_none(tmp_path: Path) -> None:
    small_tokenizers.write_tokenizer(
        tmp_path, bos_token="<|im_start|>", chat_template="{{ bos_token }}{{ messages[0].content }}"
    )
    builder = load(tmp_path)
    try:
        assert builder.token_ids([USER]) == [1, *Tokenizer.load(tmp_path).encode("hello")]
    finally:
        builder.close()


def test_base_model_joins_the_contents(artifact: Path) -> None:
    builder = load(artifact)
    text = [USER, {"role": "assistant", "content": " there"}]
    assert builder.token_ids(text) == Tokenizer.load(artifact).encode("hello there")


def test_stories_model_is_a_plain_completion(stories260k: Path) -> None:
    builder = load(stories260k, eos_token_id=2)
    tokenizer = Tokenizer.load(stories260k)
    assert builder.token_ids([{"role": "user", "content": ""}]) == [1]
    ids = builder.token_ids([{"role": "user", "content": "Once upon"}])
    assert ids == tokenizer.encode("Once upon", add_special_tokens=True)
    assert ids[0] == 1 and 1 not in ids[1:]
    assert (builder.stop_token_ids, builder.stop_strings) == ({2}, [])


@pytest.mark.parametrize("with_jinja", [False, True])
def test_text_parts_are_joined(artifact: Path, with_jinja: bool) -> None:
    if with_jinja:
        (artifact / "chat_template.jinja").write_text("{{ messages[0].content }}")
    builder = load(artifact)
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    try:
        ids = builder.token_ids([{"role": "user", "content": parts}])
    finally:
        builder.close()
    assert ids == Tokenizer.load(artifact).encode("hello")


def test_other_fields_go_to_the_jinja_template_and_nowhere_else(artifact: Path) -> None:
    message = {**USER, "name": "Ann"}
    with pytest.raises(RequestError, match="message 0 has name"):
        load(artifact).token_ids([message])
    (artifact / "chat_template.jinja").write_text("{{ messages[0].name }}")
    builder = load(artifact)
    try:
        assert builder.token_ids([message]) == Tokenizer.load(artifact).encode("Ann")
    finally:
        builder.close()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ("hello", "must be a list, not str"),
        ({"role": "user"}, "must be a list, not dict"),
        (7, "must be a list, not int"),
        ([USER, "hello"], "message 1 must be an object"),
        ([{"content": "x"}], "message 0 has role None"),
        ([{"role": 3, "content": "x"}], "message 0 has role 3"),
        ([{"role": "user"}], "message 0 has content None"),
        ([{"role": "user", "content": 5}], "message 0 has content 5"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "type None"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "type 'text'"),
        ([{"role": "user", "content": "a\ud800"}], "surrogate"),
    ],
)
def test_bad_messages_are_request_errors(
    artifact: Path, jinja_builder: PromptBuilder, messages: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        jinja_builder.token_ids(messages)
    with pytest.raises(RequestError, match=message):
        PromptBuilder(
            Tokenizer.load(artifact), get_conversation("chatml_nosystem"), None, [], 512
        ).token_ids(messages)


def test_a_refusing_template_is_a_template_error(artifact: Path) -> None:
    (artifact / "chat_template.jinja").write_text("{{ raise_exception('only once') }}")
    builder = load(artifact)
    try:
        with pytest.raises(TemplateError, match="only once"):
            builder.token_ids([USER])
    finally:
        builder.close()


def test_ids_beyond_the_model_s_vocabulary_are_refused(artifact: Path) -> None:
    builder = load(artifact, conv_template={"name": "llama-3"})
    with pytest.raises(RequestError, match="token id 128000, the model has 512 tokens"):
        builder.token_ids([USER])


def test_bad_configs(artifact: Path) -> None:
    with pytest.raises(OptionError, match="llama_default"):
        load(artifact, conv_template={"name": "llama_default"})
    with pytest.raises(CorruptFile, match="eos_token_id"):
        load(artifact, eos_token_id="</s>")
    with pytest.raises(CorruptFile, match=r"mlc-chat-config\.json.*seps"):
        load(artifact, conv_template={"name": "x", "seps": 4})


def test_loading_starts_no_process(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    (artifact / "chat_template.jinja").write_text("x")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    builder = load(artifact)
    builder.close()
    template = load_template(artifact, make_config())
    assert template is not None
    with pytest.raises(AssertionError, match="a process was started"):
        template.start()


def test_template_for_tools_beside_the_usual_one(artifact: Path) -> None:
    named = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{% for t in tools %}{{ t.function.name }}{% endfor %}"},
    ]
    small_tokenizers.write_tokenizer(artifact, chat_template=named)
    with closing(load(artifact)) as builder:
        tokenizer = Tokenizer.load(artifact)
        assert tokenizer.decode(builder.token_ids([USER])) == "hello"
        assert tokenizer.decode(builder.token_ids([USER], tools=[Tool("add")])) == "add"


def test_formats_of_answers_are_the_templates_or_named_ones(artifact: Path) -> None:
    (artifact / "chat_template.jinja").write_text("{{ '<tool_call>' }}{{ '</think>' }}")
    with closing(load(artifact)) as builder:
        assert builder.formats.calls.name == "hermes"
        assert builder.formats.reasoning is not None
    tokenizer, config = Tokenizer.load(artifact), make_config()
    names: dict[str, Any] = {"tool_parser": "llama", "reasoning_parser": "none"}
    with closing(PromptBuilder.load(artifact, config, tokenizer, **names)) as builder:
        assert (builder.formats.calls.name, builder.formats.reasoning) == ("llama", None)
    with pytest.raises(OptionError, match="no tool parser 'x'"):
        PromptBuilder.load(artifact, config, tokenizer, tool_parser="x")
    (artifact / "chat_template.jinja").unlink()
    with closing(load(artifact, conv_template={"name": "qwen3"}, model_type="qwen3")) as builder:
        assert builder.formats.calls.name == "hermes"
        assert builder.formats.reasoning is not None
