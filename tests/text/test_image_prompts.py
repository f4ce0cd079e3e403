"""Where images stand in prompts: by templates that go through parts, and by those that do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from image_models import REFERENCES, data_url

from mlc_llm.errors import RequestError, TemplateError
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.images.processing import ImageProcessing
from mlc_llm.images.reader import ImageReader
from mlc_llm.text.chat_template import ChatTemplate
from mlc_llm.text.content import ImageToken, read_messages, with_texts
from mlc_llm.text.conversation import Conversation, get_conversation
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer

TOKEN, NUM_ROWS = 131, 3
PARTS = (
    "{{ bos_token }}{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}[<image>]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}|{% endfor %}"
)
TEXT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}|{% endfor %}"
BLIND = "{% for m in messages %}{% for part in m['content'] %}{% endfor %}{% endfor %}probe <image>"
IMAGE = {"type": "image_url", "image_url": {"url": data_url("wide.png")}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE, IMAGE]},
    {"role": "assistant", "content": "b"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(REFERENCES / "llava")


@pytest.fixture
def build(tokenizer: Tokenizer) -> Iterator[Any]:
    builders = []

    def make(
        template: str | None, conversation: Conversation | None = None, tiling: str = ""
    ) -> PromptBuilder:
        inputs = ImageInputs(TOKEN, 20, NUM_ROWS, 4, tiling=tiling)
        reader = ImageReader(inputs, ImageProcessing.usual(20), "<image>")
        jinja = None if template is None else ChatTemplate(template, {"bos_token": "<s>"})
        conversation = conversation or Conversation()
        builder = PromptBuilder(tokenizer, conversation, jinja, [2], 132, reader)
        builders.append(builder)
        return builder

    yield make
    for builder in builders:
        builder.close()


def text_of(builder: PromptBuilder, tokenizer: Tokenizer, messages: list[Any]) -> str:
    """Return the prompt, `#` for each row of an image; images must begin at theirs."""
    prompt = builder.build(messages)
    starts = [image.first for image in prompt.images]
    is_row = np.asarray(prompt.token_ids) == TOKEN
    assert is_row.sum() == NUM_ROWS * len(starts)
    assert all(is_row[start : start + NUM_ROWS].all() for start in starts)
    assert builder.token_ids(messages) == prompt.token_ids
    return tokenizer.decode(prompt.token_ids, False).replace("<image>", "#")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PARTS, "<s>a[###][###]|b|"),
        # The tokenizer puts a BOS where the template does not.
        (TEXT, "<s>user: a###\n###\n|assistant: b|"),
    ],
)
def test_jinja_templates_of_both_kinds(
    build: Any, tokenizer: Tokenizer, template: str, expected: str
) -> None:
    assert text_of(build(template), tokenizer, MESSAGES) == expected


def test_conversation_templates(build: Any, tokenizer: Tokenizer) -> None:
    builder = build(None, get_conversation("llava"))
    messages = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what?"}]}]
    assert text_of(builder, tokenizer, messages) == "<s>USER: ###\nwhat? ASSISTANT:"


OWN = PARTS.replace("[<image>]", "<|image_9|>").replace("{{ bos_token }}", "")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Pieces between images are texts by themselves, each with a BOS.
        (TEXT, "<s>user: a###<s>\n###<s>\n|assistant: b|user: ###<s>\nc|"),
        (OWN, "<s>a###<s>###<s>|b|###<s>c|"),
    ],
)
def test_models_that_see_tiles_number_their_images(
    build: Any, tokenizer: Tokenizer, template: str, expected: str
) -> None:
    messages = [*MESSAGES, {"role": "user", "content": [IMAGE, {"type": "text", "text": "c"}]}]
    builder = build(template, tiling="sub_glb")
    assert text_of(builder, tokenizer, messages) == expected
    # Templates of texts are given numbers through the conversation.
    plain = with_texts(read_messages(messages, ImageToken("<image>", True)), ImageToken("", True))
    assert [m["content"] for m in plain] == ["a<|image_1|>\n<|image_2|>\n", "b", "<|image_3|>\nc"]


def test_text_alone_goes_the_same_way(build: Any, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert text_of(build(PARTS), tokenizer, messages) == "<s>hi|"
    assert text_of(build(TEXT), tokenizer, messages) == "<s>user: hi|"


def test_templates_that_lose_images_are_named(build: Any) -> None:
    with pytest.raises(TemplateError, match="has 1 places for the 2 images"):
        build(BLIND).build(MESSAGES)


def test_continuing_an_answer_about_an_image(build: Any, tokenizer: Tokenizer) -> None:
    prompt = build(PARTS).build(MESSAGES, continue_final_message=True)
    assert tokenizer.decode(prompt.token_ids, False).endswith("<image>]|b")


def test_models_of_text_say_so(tokenizer: Tokenizer) -> None:
    builder = PromptBuilder(tokenizer, Conversation(), None, [2], 132)
    with pytest.raises(RequestError, match="takes parts of type 'text' only") as caught:
        builder.build(MESSAGES)
    assert caught.value.param == "messages[0].content[1].type"
