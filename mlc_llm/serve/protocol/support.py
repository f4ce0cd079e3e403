"""Which fields of a request are known but not honoured: refused by name, or without effect.

The one place for this: a field that comes to be supported leaves these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlc_llm.serve.protocol.fields import CheckedBody, Refused, WithoutEffect, with_fields

_WITHOUT_EFFECT: WithoutEffect = {
    # OpenAI's: accounts, caches and keeping of answers are not this server's affair.
    "user": "there are no accounts",
    "metadata": "answers are not stored",
    "safety_identifier": "there are no accounts",
    "prompt_cache_key": "equal beginnings of prompts are found without it; see cache_salt",
    "prompt_cache_options": "the prefix cache keeps what was used last",
    "prompt_cache_retention": "the prefix cache keeps what was used last",
    "parallel_tool_calls": "there are no tool calls in completions",
    # Other servers': where the model and its cache stay, what is told beside the answer.
    "keep_alive": "the model stays loaded",
    "cache_prompt": "the prefix cache changes no answer",
    "id_slot": "sequences have no fixed places",
    "timings_per_token": "times are in /metrics",
}
_USE_FORMAT = "use response_format"
_NO_TOOLS = "tools are for v1/chat/completions"
_USE_TOOLS = "use tools and tool_choice"
_NOT_SPLIT = "reasoning is part of a completion's text"
_NO_BEAMS = "answers are sampled one by one; for the likeliest tokens use temperature 0"
_REFUSED: Refused = {
    "tools": (([],), _NO_TOOLS),
    "functions": (([],), _USE_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "function_call": (("none", "auto"), _USE_TOOLS),
    "modalities": ((["text"],), "answers are text only"),
    "audio": ((), "answers are text only"),
    "prediction": ((), "predicted outputs are not used"),
    "web_search_options": ((), "the server does not search the web"),
    "reasoning_effort": ((), "completions have no chat template, which would be told of it"),
    "verbosity": (("medium",), "say in the messages how long the answer should be"),
    "moderation": ((), "there is no moderation model"),
    "store": ((False,), "the server stores no answers"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "structured_outputs": ((), _USE_FORMAT),
    "guided_json": ((), _USE_FORMAT),
    "guided_regex": ((), _USE_FORMAT),
    "guided_choice": ((), _USE_FORMAT),
    "guided_grammar": ((), _USE_FORMAT),
    "grammar": ((), _USE_FORMAT),
    "json_schema": ((), _USE_FORMAT),
    "chat_template": ((), "templates come with the model, not with requests"),
    "documents": (([],), "put them into the messages"),
    "use_beam_search": ((False,), _NO_BEAMS),
    "length_penalty": ((1, 1.0), _NO_BEAMS),
    "early_stopping": ((False,), _NO_BEAMS),
    "skip_special_tokens": ((True,), "special tokens are never shown"),
    "spaces_between_special_tokens": ((True, False), "special tokens are never shown"),
    "include_stop_str_in_output": ((False,), "stop strings are never shown"),
    "bad_words": (([],), "use logit_bias"),
    "prompt_logprobs": ((), "ask for completions with echo and logprobs"),
    "typical_p": ((1, 1.0), "use top_p or min_p"),
    "mirostat": ((0,), "use top_p or min_p"),
    "include_reasoning": ((True,), _NOT_SPLIT),
    "separate_reasoning": ((False,), _NOT_SPLIT),
}


class _Supported(CheckedBody):
    @classmethod
    def refuse_unsupported(cls, values: Mapping[str, Any]) -> None:
        if values.get("tool_choice") == "none":
            values = {**values, "tools": None, "functions": None}
        super().refuse_unsupported(values)


if TYPE_CHECKING:
    KnownFields = _Supported
else:
    # A body with the fields of both tables, checked.
    KnownFields = with_fields("KnownFields", _WITHOUT_EFFECT, _REFUSED, _Supported)
