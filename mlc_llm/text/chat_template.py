"""Chat templates in Jinja, rendered in a child process that time, memory and output limits bind.

A template comes with the model, so it is foreign code: the sandbox keeps it from objects it must
not touch, the limits keep it from using up the machine. Does not know token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlc_llm.artifact import CHAT_TEMPLATE_NAME, read_json_object
from mlc_llm.errors import CorruptFile, RequestError, TemplateError
from mlc_llm.text.child_process import ChildError, ChildOverdue, ChildProcess
from mlc_llm.text.settings import SETTINGS_NAME

PROCESSOR_TEMPLATE_NAME = "chat_template.json"
DEFAULT_TIMEOUT_S = 5.0
DEFAULT_MAX_OUTPUT_CHARS = 8 << 20
DEFAULT_MEMORY_LIMIT_BYTES = 512 << 20
_WORKER_PATH = Path(__file__).with_name("template_worker.py")
_ADVICE = "use a named template instead: `mlc_llm gen_config --conv-template NAME`"


class ChatTemplate:
    """One Jinja chat template, ready to render messages; safe to call from several threads."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_output_chars: int = DEFAULT_MAX_OUTPUT_CHARS,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    ) -> None:
        """Keep the template; `variables` are what it may use beside messages, as `bos_token`."""
        self.source = source
        self._variables = dict(variables or {})
        self._timeout_s = timeout_s
        self._max_output_chars = max_output_chars
        self._child = ChildProcess(_WORKER_PATH, ("jinja2", "markupsafe"), memory_limit_bytes)

    def start(self) -> None:
        """Launch the child process without waiting for it, so that it is ready when needed.

        Raises TemplateError if the system cannot start it.
        """
        try:
            self._child.start()
        except ChildError as error:
            raise TemplateError(f"the model's chat template cannot be rendered: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the prompt text. `kwargs` are further variables of the template.

        Raises TemplateError if the template is broken, refuses the messages or exceeds a limit,
        RequestError if the messages cannot be sent as JSON.
        """
        variables = {
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }
        request = {
            "source": self.source,
            "variables": variables,
            "max_output_chars": self._max_output_chars,
        }
        try:
            reply = self._child.ask(request, self._timeout_s)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages cannot be written as JSON: {error}") from None
        except ChildOverdue as error:
            raise TemplateError(
                f"the model's chat template was stopped: {error}; {_ADVICE}"
            ) from None
        except ChildError as error:
            raise TemplateError(f"the model's chat template failed: {error}; {_ADVICE}") from None
        if "text" in reply:
            return str(reply["text"])
        if "refusal" in reply:
            raise TemplateError(
                f"the model's chat template refuses the messages: {reply['refusal']}"
            )
        reason = str(reply.get("error")).rstrip(".")
        raise TemplateError(f"the model's chat template failed: {reason}; {_ADVICE}")

    def close(self) -> None:
        """End the child process; a later call would start another."""
        self._child.close()


def find_chat_template(
    directory: Path, settings: Mapping[str, Any], *, with_tools: bool = False
) -> str | None:
    """Return the Jinja source a model directory brings, or None.

    The file chat_template.jinja goes before chat_template.json, and that before the `chat_template`
    of tokenizer_config.json, given as `settings`: a string, or a list of named ones of which
    "default" is taken, or "tool_use" with tools. Raises CorruptFile if it is something else.
    """
    path = directory / CHAT_TEMPLATE_NAME
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CorruptFile(f"{path} is not UTF-8 text; fetch or make it again") from None
    given = settings.get("chat_template")
    # Where transformers 4 kept the templates of models that see.
    of_processor = directory / PROCESSOR_TEMPLATE_NAME
    if of_processor.is_file():
        given = read_json_object(of_processor).get("chat_template", given)
    if given is None or isinstance(given, str):
        return given
    try:
        named = {str(item["name"]): str(item["template"]) for item in given}
    except (TypeError, KeyError):
        raise CorruptFile(
            f"chat_template in {directory / SETTINGS_NAME} is neither a text nor a list of named "
            "templates; download the model again"
        ) from None
    wanted = "tool_use" if with_tools and "tool_use" in named else "default"
    if named and wanted not in named:
        raise CorruptFile(
            f"{directory / SETTINGS_NAME} has chat templates {', '.join(named)} but no "
            f"{wanted!r}; put the one to use into {path}"
        )
    return named.get(wanted)
