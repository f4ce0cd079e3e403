"""What a dialogue remembers, and how it makes room."""

import pytest

from mlc_llm.cli.chat_commands import run_command
from mlc_llm.cli.dialogue import Dialogue, describe_stats
from mlc_llm.errors import ContextTooLong, OptionError
from mlc_llm.text.events import Content, Reasoning

from .fakes import FakeParams, FakeSession, FakeStats


def dialogue_of(session: FakeSession, system: str | None = None) -> Dialogue:
    return Dialogue(session, FakeParams(), system)  # type: ignore[arg-type]


def ask(dialogue: Dialogue, text: str, notes: list[str] | None = None) -> str:
    pieces = dialogue.answer(text, (notes if notes is not None else []).append)
    return "".join(piece.text for piece in pieces if isinstance(piece, Content))


def test_questions_and_answers_are_remembered() -> None:
    session = FakeSession([["Hel", "lo"], ["Fine"]])
    dialogue = dialogue_of(session, system="Be brief.")
    assert ask(dialogue, "Hi") == "Hello"
    assert ask(dialogue, "How are you?") == "Fine"
    assert session.prompts[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "How are you?"},
    ]
    dialogue.reset()
    assert dialogue.messages == [{"role": "system", "content": "Be brief."}]


def test_a_stopped_answer_stops_the_work_and_stays_as_far_as_it_went() -> None:
    session = FakeSession([["one", "two", "three"]])
    dialogue = dialogue_of(session)
    pieces = dialogue.answer("count", print)
    assert [next(pieces), next(pieces)] == [Content("one"), Content("two")]
    pieces.close()
    assert session.num_stopped == 1
    assert [message["content"] for message in dialogue.messages] == ["count", "onetwo"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ContextTooLong("too long")])
def test_a_question_without_answer_is_taken_back(error: BaseException) -> None:
    dialogue = dialogue_of(FakeSession([[error], ["yes"]]))
    with pytest.raises(type(error)):
        ask(dialogue, "Hm?")
    assert dialogue.messages == []
    assert ask(dialogue, "And now?") == "yes"


def test_an_error_in_the_middle_keeps_what_was_said() -> None:
    dialogue = dialogue_of(FakeSession([["so ", KeyboardInterrupt()]]))
    with pytest.raises(KeyboardInterrupt):
        ask(dialogue, "Say")
    assert dialogue.messages[-1] == {"role": "assistant", "content": "so "}


def test_thoughts_are_kept_apart_from_the_answer() -> None:
    session = FakeSession([[Reasoning("Hm, "), Reasoning("a city."), "Paris"], ["Yes"]])
    dialogue = dialogue_of(session)
    assert ask(dialogue, "Where?") == "Paris"
    assert ask(dialogue, "Sure?") == "Yes"
    reply = {"role": "assistant", "content": "Paris", "reasoning_content": "Hm, a city."}
    assert session.prompts[1][1] == reply


def test_thoughts_alone_are_an_answer_where_they_were_not_stopped() -> None:
    session = FakeSession([[Reasoning("Hm"), KeyboardInterrupt()], [Reasoning("Hm")]])
    dialogue = dialogue_of(session)
    with pytest.raises(KeyboardInterrupt):
        ask(dialogue, "Where?")
    assert dialogue.messages == []
    session.finish_reason = "length"
    assert ask(dialogue, "Where?") == ""
    assert dialogue.messages[1:] == [
        {"role": "assistant", "content": "", "reasoning_content": "Hm"}
    ]
    assert str(dialogue.note_on_ending()).startswith("the model's thoughts were cut")


def test_an_empty_answer_is_an_answer() -> None:
    dialogue = dialogue_of(FakeSession([[]]))
    assert ask(dialogue, "Quiet?") == ""
    assert dialogue.messages[-1] == {"role": "assistant", "content": ""}


def test_the_oldest_turns_go_when_the_window_is_full() -> None:
    session = FakeSession([["aaaa"]] * 9, max_chars=40)
    dialogue = dialogue_of(session, system="SYS")
    notes: list[str] = []
    for turn in range(9):
        ask(dialogue, f"q{turn}", notes)
        prompt = session.prompts[-1]
        assert prompt[0] == {"role": "system", "content": "SYS"}
        assert [message["role"] for message in prompt[1::2]] == ["user"] * (len(prompt) // 2)
    assert prompt[-3:] == [
        {"role": "user", "content": "q7"},
        {"role": "assistant", "content": "aaaa"},
        {"role": "user", "content": "q8"},
    ]
    assert notes and all("2 oldest messages were dropped" in note for note in notes)


def test_a_question_that_is_too_long_alone_leaves_the_dialogue_as_it_was() -> None:
    session = FakeSession([["ok"], ["ok"]], max_chars=20)
    dialogue = dialogue_of(session)
    ask(dialogue, "short")
    before = dialogue.messages
    notes: list[str] = []
    with pytest.raises(ContextTooLong):
        ask(dialogue, "x" * 30, notes)
    assert dialogue.messages == before
    assert notes == []


def test_a_cut_answer_is_explained() -> None:
    session = FakeSession([["a"], ["b"], ["c"]])
    dialogue = dialogue_of(session)
    ask(dialogue, "1")
    assert dialogue.note_on_ending() is None
    session.finish_reason = "length"
    ask(dialogue, "2")
    assert "context window of 64 tokens is full" in str(dialogue.note_on_ending())
    dialogue.params = FakeParams(max_tokens=3)  # type: ignore[assignment]
    ask(dialogue, "3")
    assert "cut after 3 tokens" in str(dialogue.note_on_ending())


def test_an_interrupted_answer_is_not_called_cut() -> None:
    session = FakeSession([["a"], ["b", "c"]])
    session.finish_reason = "length"
    dialogue = dialogue_of(session)
    ask(dialogue, "1")
    pieces = dialogue.answer("2", print)
    next(pieces)
    pieces.close()
    assert dialogue.messages[-1]["content"] == "b"


def test_stats_are_readable() -> None:
    assert describe_stats(None) == "prefill: N/A, decode: N/A (no answer yet)"
    stats = FakeStats(decode_tokens_per_s=float("inf"))
    assert describe_stats(stats).splitlines() == [  # type: ignore[arg-type]
        "prefill: 100.0 tok/s, decode: N/A",
        "prompt: 12 tokens (4 of them cached), answer: 3 tokens",
    ]


def test_images_go_with_the_next_question_alone(capsys: pytest.CaptureFixture[str]) -> None:
    session = FakeSession([["a cat"], ["yes"]])
    dialogue = dialogue_of(session)
    for name in ("cat.png", "dog.png"):
        run_command(f"/im {name}", dialogue, print)
    assert ask(dialogue, "What is it?") == "a cat"
    assert ask(dialogue, "Sure?") == "yes"
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:{name}"}}
        for name in ("cat.png", "dog.png")
    ]
    assert [message["content"] for message in session.prompts[1]] == [
        [*parts, {"type": "text", "text": "What is it?"}],
        "a cat",
        "Sure?",
    ]
    run_command("/image cat.png", dialogue, print)
    dialogue.reset()
    assert dialogue.messages == []
    with pytest.raises(OptionError, match="needs the path of an image"):
        run_command("/image", dialogue, print)
    assert "the image goes with the next question" in capsys.readouterr().out
