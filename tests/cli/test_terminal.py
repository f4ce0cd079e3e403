"""The dialogue on a terminal: keys, commands, Ctrl-C."""

import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlc_llm.cli.chat_commands import run_command
from mlc_llm.cli.dialogue import Dialogue
from mlc_llm.cli.terminal import print_answer, prompt_reader, run_interactive
from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.errors import MlcError, OptionError, RequestError, TemplateError
from mlc_llm.text.events import Content, Reasoning

from .fakes import FakeParams, FakeSession, Piece

CTRL_C, CTRL_D, ENTER, ESCAPE = "\x03", "\x04", "\r", "\x1b"


def dialogue_of(*answers: Sequence[Piece]) -> Dialogue:
    return Dialogue(FakeSession(answers), FakeParams(), None)  # type: ignore[arg-type]


def lines(*script: str | BaseException) -> Callable[[], str]:
    """Return a reader that gives the script line by line and then Ctrl-D."""
    rest = list(script)

    def read_line() -> str:
        line = rest.pop(0) if rest else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    return read_line


def type_keys(keys: str, dialogue: Dialogue) -> None:
    with create_pipe_input() as terminal_input:
        terminal_input.send_text(keys)
        run_interactive(dialogue, prompt_reader(terminal_input, DummyOutput()))


def test_enter_sends_and_ctrl_d_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    dialogue = dialogue_of(["Hel", "lo"], ["Bye\n"])
    type_keys(f"Hi{ENTER}bye{ENTER}{CTRL_D}", dialogue)
    captured = capsys.readouterr()
    assert captured.out == "Hello\nBye\n"
    assert captured.err == ""


def test_escape_enter_begins_a_new_line() -> None:
    dialogue = dialogue_of(["ok"])
    type_keys(f"first{ESCAPE}{ENTER}second{ENTER}{CTRL_D}", dialogue)
    assert dialogue.messages[0]["content"] == "first\nsecond"


def test_ctrl_c_at_the_prompt_clears_the_line() -> None:
    dialogue = dialogue_of(["ok"])
    type_keys(f"not this{CTRL_C}this{ENTER}{CTRL_D}", dialogue)
    assert [message["content"] for message in dialogue.messages] == ["this", "ok"]


def test_what_was_typed_can_be_called_back() -> None:
    with create_pipe_input() as terminal_input:
        read_line = prompt_reader(terminal_input, DummyOutput())
        terminal_input.send_text(f"one{ENTER}two{ENTER}")
        assert [read_line(), read_line()] == ["one", "two"]
        history = read_line.__self__.history  # type: ignore[attr-defined]
        assert history.get_strings() == ["one", "two"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    dialogue = dialogue_of(["one ", KeyboardInterrupt(), "two"], ["next"])
    run_interactive(dialogue, lines("count", "go on"))
    captured = capsys.readouterr()
    assert captured.out == "one \nnext\n"
    assert captured.err == "[stopped]\n"
    assert [m["content"] for m in dialogue.messages] == ["count", "one ", "go on", "next"]


def test_a_real_interrupt_signal_stops_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    class Pressing(FakeSession):
        def chat(self, *question):  # type: ignore[no-untyped-def]
            for piece in super().chat(*question):
                yield piece
                signal.raise_signal(signal.SIGINT)

    session = Pressing([["one", "two"]])
    dialogue = Dialogue(session, FakeParams(), None)  # type: ignore[arg-type]
    # Shells have their background jobs ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_interactive(dialogue, lines("count"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out == "one\n"
    assert dialogue.messages[-1]["content"] == "one"


def test_an_error_is_printed_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    dialogue = dialogue_of([TemplateError("the template refuses this")], ["fine"])
    run_interactive(dialogue, lines("one", "bad \udcff", "", "two"))
    captured = capsys.readouterr()
    assert captured.out == "fine\n"
    assert captured.err.splitlines() == [
        "error: the template refuses this",
        "error: the message is not valid UTF-8 text",
    ]


def test_a_slash_after_a_space_is_a_message() -> None:
    dialogue = dialogue_of(["ok"])
    run_interactive(dialogue, lines(" /etc/hosts says"))
    assert dialogue.messages[0]["content"] == "/etc/hosts says"


def test_exit_leaves_before_the_next_line() -> None:
    dialogue = dialogue_of(["never"])
    run_interactive(dialogue, lines("/ex", "unread"))
    assert dialogue.messages == []


def test_a_cut_answer_gets_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    dialogue = dialogue_of(["long"])
    dialogue.session.finish_reason = "length"  # type: ignore[attr-defined]
    print_answer(dialogue, "Tell me")
    captured = capsys.readouterr()
    assert captured.out == "long\n"
    assert captured.err.startswith("[the answer was cut")


THINKING = (Reasoning("Two "), Reasoning("cities."), "Paris ", "or Rome")


def test_thoughts_are_marked_beside_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    dialogue = dialogue_of(THINKING, THINKING, ["a", *THINKING, "\n", Reasoning("Hm\n")])
    print_answer(dialogue, "Where?")
    captured = capsys.readouterr()
    assert captured.out == "Paris or Rome\n"
    assert captured.err == "[thoughts]\nTwo cities.\n[end of thoughts]\n"
    run_interactive(dialogue, lines("/set thoughts=false", "Where?"))
    captured = capsys.readouterr()
    assert captured.out == "Paris or Rome\n"
    assert "thoughts=false" in captured.err and "cities" not in captured.err
    run_interactive(dialogue, lines("/set thoughts=true;seed=3", "Where?"))
    captured = capsys.readouterr()
    assert captured.out == "aParis or Rome\n"
    assert captured.err.endswith(
        "\n[thoughts]\nTwo cities.\n[end of thoughts]\n[thoughts]\nHm\n[end of thoughts]\n"
    )


@pytest.mark.parametrize(
    ("variables", "begin", "end"),
    [
        ({"TERM": "xterm"}, "\x1b[2m", "\x1b[0m"),
        ({"TERM": "dumb"}, "[thoughts]\n", "[end of thoughts]\n"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "[thoughts]\n", "[end of thoughts]\n"),
    ],
)
def test_thoughts_are_dimmed_where_a_terminal_can(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    begin: str,
    end: str,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    print_answer(dialogue_of(THINKING), "Where?")
    captured = capsys.readouterr()
    assert captured.out == "Paris or Rome\n"
    assert captured.err == f"{begin}Two cities.\n{end}"


def test_thoughts_end_where_an_answer_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    dialogue = dialogue_of([Reasoning("Hm"), KeyboardInterrupt()])
    run_interactive(dialogue, lines("count"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[thoughts]\nHm\n[end of thoughts]\n[stopped]\n"


def test_commands_print_and_act(capsys: pytest.CaptureFixture[str]) -> None:
    dialogue = dialogue_of(["ok"])
    run_interactive(dialogue, lines("/stats", "hi", "/st", "/met", "/re", "/h"))
    captured = capsys.readouterr()
    assert captured.out == "ok\n"
    assert "prefill: N/A, decode: N/A" in captured.err
    assert "prefill: 100.0 tok/s, decode: 20.5 tok/s" in captured.err
    assert "# TYPE tokens counter" in captured.err
    assert "Esc+Enter" in captured.err
    assert dialogue.messages == []


def test_set_changes_the_settings_of_the_next_answer() -> None:
    dialogue = dialogue_of()
    said: list[str] = []
    text = "/set temperature = 0.5; stop=two words, end;max_tokens=7;seed=1"
    run_command(text, dialogue, said.append)
    assert dialogue.params == FakeParams(
        temperature=0.5, stop=("two words", "end"), max_tokens=7, seed=1
    )
    run_command("/set stop=none;max_tokens=none", dialogue, said.append)
    assert dialogue.params == FakeParams(temperature=0.5, seed=1)
    run_command("/set", dialogue, said.append)
    assert said[-1] == (
        "temperature=0.5; top_p=1.0; frequency_penalty=0.0; presence_penalty=0.0; "
        "max_tokens=none; seed=1; stop=none; thinking_token_budget=none; thoughts=true; "
        "response_format=text"
    )


def test_set_limits_the_thoughts_of_the_next_answers() -> None:
    dialogue = dialogue_of(["one"], ["two"])
    said: list[str] = []
    for value in ("5", "none"):
        run_command(f"/set thinking_token_budget={value}", dialogue, said.append)
        assert f"; thinking_token_budget={value};" in said[-1]
        assert list(dialogue.answer("a question", said.append))
    session: Any = dialogue.session
    assert session.max_thoughts == [5, None]
    session.has_thoughts = False
    with pytest.raises(RequestError, match="no thoughts"):
        run_command("/set seed=3;thinking_token_budget=5", dialogue, print)
    assert dialogue.max_thoughts is None and dialogue.params == FakeParams()


def test_set_changes_the_format_of_the_next_answers() -> None:
    dialogue = dialogue_of(["{}"], ["a;b"], ["any"])
    said: list[str] = []
    choice = '{"type": "choice", "choice": ["a;b"]}'
    for form in ("json_object", choice, "text"):
        run_command(f"/set response_format = {form}", dialogue, said.append)
        assert said[-1].endswith(f"; response_format={form}")
        assert list(dialogue.answer("a question", said.append))
    assert dialogue.session.grammars == [  # type: ignore[attr-defined]
        GrammarSpec("json_object"),
        GrammarSpec("choice", '["a;b"]'),
        None,
    ]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("json", "neither text, json_object nor such a format in JSON"),
        ('{"type": "json_schema"', "neither text"),
        ('{"type": "json_schema"}', "json_schema: Field required"),
        ('{"type": "regex", "regex": "a"}', "no expressions here"),
    ],
)
def test_a_bad_format_changes_nothing(form: str, words: str) -> None:
    dialogue = dialogue_of(["any"])
    run_command("/set response_format=json_object", dialogue, lambda _: None)
    with pytest.raises(MlcError) as caught:
        run_command(f"/set response_format={form}", dialogue, print)
    assert words in str(caught.value) and dialogue.format == "json_object"
    assert list(dialogue.answer("a question", print)) == [Content("any")]
    assert dialogue.session.grammars == [GrammarSpec("json_object")]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/frobnicate", "there is no command /frobnicate; known: /help"),
        ("/s", "/s may be /stats or /set"),
        ("/exit now", "/exit takes no value"),
        ("/set temperature", "not of the form key=value"),
        ("/set temperature=hot", "temperature must be a number, not 'hot'"),
        ("/set temperature=-1", "must not be negative"),
        ("/set thinking_token_budget=-1", "thinking_token_budget must be at least 0, not -1"),
        ("/set thoughts=dim", "thoughts must be true or false, not 'dim'"),
        ("/set top_k=3", "unknown key 'top_k'"),
    ],
)
def test_a_bad_command_is_explained_and_changes_nothing(line: str, words: str) -> None:
    dialogue = dialogue_of()
    with pytest.raises(OptionError) as caught:
        run_command(line, dialogue, print)
    assert words in str(caught.value)
    assert dialogue.params == FakeParams() and dialogue.shows_thoughts
