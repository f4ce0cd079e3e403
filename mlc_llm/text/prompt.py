"""From chat messages to the token ids of a prompt, and what ends the answer to it.

Chooses between the model's Jinja template and MLC LLM's conversation template. Does not know how
long a prompt may be, nor how tokens are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlc_llm.artifact import CHAT_CONFIG_NAME, CHAT_TEMPLATE_NAME, ChatConfig
from mlc_llm.errors import CorruptFile, OptionError, RequestError, TemplateError
from mlc_llm.images.inputs import PromptImage
from mlc_llm.images.reader import ImageReader, url_of_file
from mlc_llm.text.answers import AnswerFormats
from mlc_llm.text.chat_template import ChatTemplate, find_chat_template
from mlc_llm.text.content import CheckedMessage, ImageToken, read_messages, with_texts
from mlc_llm.text.conversation import Conversation
from mlc_llm.text.reasoning import AUTO
from mlc_llm.text.settings import read_settings, special_tokens_of
from mlc_llm.text.tokenizer import Tokenizer
from mlc_llm.text.tool_calls.tools import Tool
from mlc_llm.text.tool_prompt import ToolPrompts

# Variables that templates are given anyway, or that would not be variables.
_RESERVED_VARIABLES = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "chat_template", "self"]
)


# What tells whether a template goes through the parts of a content.
_PROBE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}


@dataclass(frozen=True)
class Prompt:
    """The token ids of a prompt, and the images whose rows stand in place of some of them."""

    token_ids: list[int]
    images: tuple[PromptImage, ...] = ()


class PromptBuilder:
    """Builds prompts for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        conversation: Conversation,
        template: ChatTemplate | None,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        images: ImageReader | None = None,
        formats: AnswerFormats | None = None,
        tool_template: ChatTemplate | None = None,
    ) -> None:
        """Keep the parts; owns `template`. With one, `conversation` only tells how answers end.

        images: for models that take images, what reads them. formats: how the model answers, by
        its template if left out. tool_template: the one for requests with tools, if it has two.
        """
        self.stop_token_ids = frozenset([*conversation.stop_token_ids, *eos_token_ids])
        self.stop_strings = [text for text in conversation.stop_str if text]
        self._tokenizer = tokenizer
        self._conversation = conversation
        self._template = template
        self._vocab_size = vocab_size
        self._images = images
        # Models that see tiles of images also number the images of a conversation.
        self._image_token = (
            None if images is None else ImageToken(images.token, bool(images.inputs.tiling))
        )
        self._takes_parts: bool | None = None  # not known yet
        self._tool_template = tool_template
        self.template_text = template_text(template, conversation)
        self.formats = formats or AnswerFormats.find(self.template_text)
        self._tools = self._tool_prompts()

    def _tool_prompts(self) -> ToolPrompts:
        form, template = self.formats.calls, self._tool_template or self._template
        if template is None:
            return ToolPrompts(form, None, None, self._conversation.has_system)
        return ToolPrompts(form, template.source, partial(_render, template))

    @classmethod
    def load(
        cls,
        directory: Path,
        config: ChatConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        images: ImageReader | None = None,
        *,
        tool_parser: str = AUTO,
        reasoning_parser: str = AUTO,
    ) -> PromptBuilder:
        """Read what the artifact says of prompts; `template` is what `load_template` returned.

        A base model has no template, its messages are joined. tool_parser and reasoning_parser
        name the formats of its answers. Raises CorruptFile for a damaged template and OptionError
        for an unknown named one, or an unknown format.
        """
        where = str(directory / CHAT_CONFIG_NAME)
        if config.conv_template:
            conversation = Conversation.from_json(config.conv_template, where)
        else:
            conversation = Conversation(system_prefix_token_ids=tokenizer.bos_prefix)
        if template is None:
            template = load_template(directory, config)
        eos_token_ids = _read_ids(config.eos_token_id, where)
        formats = AnswerFormats.find(
            template_text(template, conversation), config.model_type, tool_parser, reasoning_parser
        )
        return cls(
            tokenizer,
            conversation,
            template,
            eos_token_ids,
            config.vocab_size,
            images,
            formats,
            load_tool_template(directory),
        )

    def read_image(self, path: Path) -> str:
        """Return an image file as the data URL of a part of a message.

        Raises OptionError where the model takes none or there is no image, RequestError where it
        is damaged.
        """
        if self._images is None:
            raise OptionError("this model takes no images; choose one that does, such as LLaVA")
        url = url_of_file(path)
        self._images.read(url, str(path))
        return url

    def token_ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the ids of a prompt, see `build`."""
        return self.build(messages, **options).token_ids

    def build(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Prompt:
        """Return the prompt that asks for an answer to the messages.

        A message has a `role` and a `content`: text, or a list of parts of type "text" and, for
        models that take images, "image_url"; calls and results of tools are as OpenAI's messages
        have them. tools are described to the model; variables are given to its Jinja template.
        Without add_generation_prompt the prompt ends with the last message; with
        continue_final_message it ends inside that one, the assistant's.
        Raises RequestError for other messages, and for options the model's template has no place
        for; TemplateError where it fails.
        """
        token = self._image_token
        fitted = self._tools.fit(messages, tools)
        checked = read_messages(fitted.messages, token)
        if self._template is not None:
            # A Jinja template writes the BOS token itself where the model wants one.
            _check_variables(variables or {})
            template = (self._tool_template if tools else None) or self._template
            text = template.render(
                fitted.with_bare(self._template_messages(checked)),
                tools=fitted.tools,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                **(variables or {}),
            )
            if continue_final_message:
                text = _cut_after_content(text, checked[-1].with_text())
            # Templates of models with images leave it to the tokenizer.
            bos, sees = self._tokenizer.bos_token, self._images is not None
            ids = self._encode(text, sees and not (bos and text.startswith(bos)))
        else:
            plain = with_texts(checked, token)
            _refuse_other_fields(plain, self._conversation.name)
            for name, is_given in (
                ("chat_template_kwargs", bool(variables)),
                ("add_generation_prompt", not add_generation_prompt),
                ("continue_final_message", continue_final_message),
            ):
                if is_given:
                    raise RequestError(
                        f"{name} is for Jinja templates; this model has conversation template "
                        f"{self._conversation.name!r}",
                        name,
                    )
            text = self._conversation.render(plain)
            ids = self._conversation.system_prefix_token_ids + self._encode(text)
        if ids and max(ids) >= self._vocab_size:
            raise RequestError(
                f"the prompt has token id {max(ids)}, the model has {self._vocab_size:,} tokens: "
                "its tokenizer or conversation template belongs to another model; convert it again"
            )
        return Prompt(ids) if self._images is None else self._with_images(ids, checked)

    def _encode(self, text: str, adds_special_tokens: bool = False) -> list[int]:
        """Return the ids of a prompt, one in each place of an image."""
        if self._images is None or self._image_token is None or not self._image_token.is_numbered:
            return self._tokenizer.encode(text, adds_special_tokens)
        # As the model's own processor does: each piece between images is a text by itself.
        pieces = self._image_token.pattern.split(text)
        ids = self._tokenizer.encode(pieces[0], adds_special_tokens)
        for piece in pieces[1:]:
            ids.append(self._images.inputs.token_id)
            ids += self._tokenizer.encode(piece, adds_special_tokens)
        return ids

    def _template_messages(self, checked: Sequence[CheckedMessage]) -> list[dict[str, Any]]:
        """Return the messages in the form that the template goes through."""
        token = self._image_token
        if token is None:
            return with_texts(checked, None)
        if self._takes_parts is None:
            self._takes_parts = self._finds_parts(token)
        if self._takes_parts:
            return [message.with_parts() for message in checked]
        return with_texts(checked, token)

    def _finds_parts(self, token: ImageToken) -> bool:
        """Return whether the template writes the parts of a content, or takes it for a text."""
        assert self._template is not None
        try:
            text = self._template.render([_PROBE])
        except TemplateError:
            return False
        return token.pattern.search(text) is not None and "probe" in text

    def _with_images(self, ids: list[int], checked: Sequence[CheckedMessage]) -> Prompt:
        """Return the prompt with a token for each row of each image."""
        assert self._images is not None
        inputs = self._images.inputs
        parts = [part for message in checked for part in message.images]
        if (found := ids.count(inputs.token_id)) != len(parts):
            raise TemplateError(
                f"the model's chat template has {found} places for the {len(parts)} images of the "
                "messages; use a named template instead: `mlc_llm gen_config --conv-template NAME`"
            )
        waiting = iter(parts)
        whole: list[int] = []
        images: list[PromptImage] = []
        for token_id in ids:
            if token_id == inputs.token_id:
                part = next(waiting)
                images.append(self._images.place(part.url, part.where, len(whole)))
                whole += [token_id] * images[-1].num_rows
            else:
                whole.append(token_id)
        return Prompt(whole, tuple(images))

    def close(self) -> None:
        """End the template's process."""
        for template in (self._template, self._tool_template):
            if template is not None:
                template.close()


def _render(template: ChatTemplate, messages: Any, tools: Any) -> str:
    return template.render(messages, tools=tools)


def template_text(template: ChatTemplate | None, conversation: Conversation) -> str:
    """Return the text that shows what a model knows: that of its template, of either kind."""
    if template is not None:
        return template.source
    text = json.dumps(conversation.to_json(), ensure_ascii=False)
    return text + "</think>" if conversation.strip_reasoning_in_history else text


def load_template(directory: Path, config: ChatConfig) -> ChatTemplate | None:
    """Return the model's Jinja template, if it has one; needs no tokenizer.

    The file chat_template.jinja goes first, then the `conv_template` of the config, which is no
    Jinja, then a chat template in the tokenizer's settings. Raises CorruptFile.
    """
    if config.conv_template and not (directory / CHAT_TEMPLATE_NAME).is_file():
        return None
    settings = read_settings(directory)
    source = find_chat_template(directory, settings)
    return None if source is None else ChatTemplate(source, special_tokens_of(settings))


def load_tool_template(directory: Path) -> ChatTemplate | None:
    """Return the template that a model brings for requests with tools beside its usual one."""
    settings = read_settings(directory)
    named = settings.get("chat_template")
    for item in named if isinstance(named, list) else ():
        if isinstance(item, Mapping) and item.get("name") == "tool_use":
            return ChatTemplate(str(item.get("template")), special_tokens_of(settings))
    return None


def _refuse_other_fields(messages: Sequence[Mapping[str, Any]], name: str) -> None:
    for number, message in enumerate(messages):
        other = sorted(str(key) for key in message if key not in ("role", "content"))
        if other:
            raise RequestError(
                f"message {number} has {', '.join(other)}, of which conversation template "
                f"{name!r} makes no use; send role and content only"
            )


def _check_variables(variables: Mapping[str, Any]) -> None:
    for name in variables:
        if name in _RESERVED_VARIABLES:
            raise RequestError(
                f"chat_template_kwargs must not set {name!r}", f"chat_template_kwargs.{name}"
            )


def _cut_after_content(text: str, message: Mapping[str, Any]) -> str:
    """Return a rendered prompt up to the end of its last message's content."""
    content = str(message["content"]).strip()
    if message["role"] != "assistant" or not content:
        raise RequestError(
            "continue_final_message needs a last message of role 'assistant' with some text",
            "continue_final_message",
        )
    head, found, _ = text.rpartition(content)
    if not found:
        raise RequestError(
            "the model's chat template changes the last message, so that it cannot be continued",
            "continue_final_message",
        )
    return head + content


def _read_ids(value: Any, where: str) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise CorruptFile(f"{where}: eos_token_id must be a number or a list of them, is {value!r}")
    return ids
