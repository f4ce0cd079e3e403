"""The contents of chat messages: texts, and for some models images between them.

Knows the parts that OpenAI's clients send. Does not know templates, and decodes no image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlc_llm.errors import RequestError
from mlc_llm.images.reader import MAX_IMAGES

_DETAILS = ("auto", "low", "high")  # all the same to models that see images of one size


@dataclass(frozen=True)
class ImageToken:
    """What stands for an image in prompts: a token of the vocabulary.

    Where images are numbered, templates are given <|image_1|>, <|image_2|> and so on instead.
    """

    token: str
    is_numbered: bool = False

    def text(self, number: int) -> str:
        """Return what stands for an image, numbered from 1 in a conversation."""
        return f"<|image_{number}|>" if self.is_numbered else self.token

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Find every place of an image in a text."""
        numbered = r"|<\|image_\d+\|>" if self.is_numbered else ""
        return re.compile(re.escape(self.token) + numbered)


@dataclass(frozen=True)
class ImagePart:
    """An image of a message: where it comes from, and which field of the request says so."""

    url: str
    where: str


# A message's content in order, text and images.
Parts = list[str | ImagePart]


@dataclass(frozen=True)
class CheckedMessage:
    """A message, all fields but its content as they were given."""

    fields: Mapping[str, Any]
    role: str
    parts: Parts

    @property
    def images(self) -> list[ImagePart]:
        """The message's images, in order."""
        return [part for part in self.parts if isinstance(part, ImagePart)]

    def with_text(self, token: ImageToken | None = None, number: int = 1) -> dict[str, Any]:
        """Return the message with its content as one text, images as their token and a new line.

        number: that of the message's first image.
        """
        pieces = []
        for part in self.parts:
            if isinstance(part, str):
                pieces.append(part)
            elif token is not None:
                pieces.append(f"{token.text(number)}\n")
                number += 1
        return {**self.fields, "role": self.role, "content": "".join(pieces)}

    def with_parts(self) -> dict[str, Any]:
        """Return the message with its content as the list that templates for images go through."""
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in self.parts
        ]
        return {**self.fields, "role": self.role, "content": content}


def with_texts(
    messages: Sequence[CheckedMessage], token: ImageToken | None
) -> list[dict[str, Any]]:
    """Return messages with their contents as texts, images in them numbered through."""
    number, result = 1, []
    for message in messages:
        result.append(message.with_text(token, number))
        number += len(message.images)
    return result


def read_messages(
    messages: Sequence[Mapping[str, Any]], image_token: ImageToken | None = None
) -> list[CheckedMessage]:
    """Return the messages, checked. Raises RequestError naming the bad one.

    image_token: what stands for an image in a prompt, None for a model that takes none.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list, not {type(messages).__name__}")
    if not messages:
        raise RequestError("there are no messages; send at least one")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {number} must be an object, not {message!r:.80}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"message {number} has role {role!r:.80}; it must be a text")
        parts = _read_parts(message.get("content"), number, image_token)
        checked.append(CheckedMessage(message, role, parts))
    if image_token is not None:
        _check_images(checked, image_token)
    return checked


def _read_parts(content: Any, number: int, image_token: ImageToken | None) -> Parts:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise RequestError(
            f"message {number} has content {content!r:.80}; it must be a text or a list of parts"
        )
    return [
        _read_part(part, f"messages[{number}].content[{place}]", image_token)
        for place, part in enumerate(content)
    ]


def _read_part(part: Any, where: str, image_token: ImageToken | None) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image_url" and image_token is not None:
        return _read_image(part.get("image_url"), f"{where}.image_url")
    kinds = "'text' only" if image_token is None else "'text' and 'image_url'"
    raise RequestError(
        f"{where} has type {kind!r:.80}; this model takes parts of type {kinds}", f"{where}.type"
    )


def _read_image(value: Any, where: str) -> ImagePart:
    if isinstance(value, Mapping):
        if (detail := value.get("detail")) not in (None, *_DETAILS):
            raise RequestError(
                f"{where}.detail is {detail!r:.80}; it must be one of {', '.join(_DETAILS)}",
                f"{where}.detail",
            )
        if other := sorted(str(name) for name in value.keys() - {"url", "detail"}):
            raise RequestError(f"{where} has the unknown field {other[0]!r:.80}", where)
        value, where = value.get("url"), f"{where}.url"
    if not isinstance(value, str):
        raise RequestError(f"{where} is missing; it must be a data URL", where)
    return ImagePart(value, where)


def _check_images(messages: Sequence[CheckedMessage], image_token: ImageToken) -> None:
    num_images = 0
    for number, message in enumerate(messages):
        num_images += len(message.images)
        if message.images and message.role != "user":
            raise RequestError(
                f"message {number} of role {message.role!r} has an image; images belong to "
                "messages of role 'user'",
                message.images[0].where,
            )
        texts = (part for part in message.parts if isinstance(part, str))
        if found := next(filter(None, map(image_token.pattern.search, texts)), None):
            raise RequestError(
                f"message {number} has the text {found[0]!r:.80}, which stands for an image in "
                "this model's prompts; send the image as a part of type 'image_url', or leave it "
                "out",
                f"messages[{number}].content",
            )
    if num_images > MAX_IMAGES:
        raise RequestError(
            f"the messages have {num_images} images, at most {MAX_IMAGES} are taken; send fewer",
            "messages",
        )
