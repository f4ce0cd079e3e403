"""Text out of a session: stop strings, characters of several tokens, and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
from fakes import VOCAB_SIZE, FakeRunner, only
from prometheus_client.parser import text_string_to_metric_families

from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.engine.grammar_cache import GrammarCache
from mlc_llm.engine.session import ChatSession, SamplingParams
from mlc_llm.errors import ContextTooLong, RequestError
from mlc_llm.text.answers import AnswerFormats
from mlc_llm.text.events import Content, Reasoning, join_events
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.reasoning import find_reasoning

MESSAGES = [{"role": "user", "content": "hello"}]
GREEDY = SamplingParams(temperature=0.0)


def say(
    open_session, tokenizer, text: str, context: int = 64, **changes
) -> tuple[ChatSession, FakeRunner]:
    """Return a session whose model answers the messages with `text`, a byte a token."""
    runner = FakeRunner(context_window_size=context)
    session = open_session(runner, **changes)
    prompt_len = len(session._prompts.token_ids(MESSAGES))
    # Characters one by one, so that no merge joins what a stop string would split.
    script = [token for character in text for token in tokenizer.encode(character)]
    script.append(2)
    runner.logits_of = lambda tokens: only(script[len(tokens) - prompt_len])
    return session, runner


def texts(pieces: Iterable[Content | Reasoning]) -> list[str]:
    """Return the texts of an answer without thoughts."""
    found = list(pieces)
    assert all(isinstance(piece, Content) for piece in found)
    return [piece.text for piece in found]


def test_answer_comes_piece_by_piece(open_session, tokenizer) -> None:
    session, _ = say(open_session, tokenizer, "Hi there")
    assert texts(session.chat(MESSAGES, GREEDY)) == list("Hi there")
    assert session.last.finish_reason == "stop"


def test_characters_of_several_tokens_come_whole(open_session, tokenizer) -> None:
    session, _ = say(open_session, tokenizer, "né 🙂!")
    assert texts(session.chat(MESSAGES, GREEDY)) == ["n", "é", " ", "🙂", "!"]


def test_cut_character_is_shown_as_such(open_session, tokenizer) -> None:
    session, _ = say(open_session, tokenizer, "a🙂")
    text = "".join(texts(session.chat(MESSAGES, GREEDY.with_changes(max_tokens=3))))
    assert text[0] == "a" and set(text[1:]) == {"\N{REPLACEMENT CHARACTER}"}
    assert session.last.finish_reason == "length"


@pytest.mark.parametrize("own", [True, False])
def test_stop_string_is_not_said(open_session, tokenizer, own) -> None:
    stop_str = ("END",) if own else ()
    session, runner = say(open_session, tokenizer, "one EN two END three", stop_str=stop_str)
    params = GREEDY if own else GREEDY.with_changes(stop=("###", "END"))
    pieces = texts(session.chat(MESSAGES, params))
    assert "".join(pieces) == "one EN two "
    assert all(piece for piece in pieces)
    assert session.last.finish_reason == "stop"
    assert session.last.completion_tokens == len("one EN two END")
    steps = len(runner.steps)
    list(session.chat(MESSAGES, params.with_changes(max_tokens=1)))
    assert len(runner.steps) == steps + 1


def test_half_a_stop_string_at_the_end_is_said(open_session, tokenizer) -> None:
    session, _ = say(open_session, tokenizer, "the EN")
    assert "".join(texts(session.chat(MESSAGES, GREEDY.with_changes(stop=("END",))))) == "the EN"


def test_closing_stops_the_work(open_session, tokenizer) -> None:
    session, runner = say(open_session, tokenizer, "a long answer")
    pieces = session.chat(MESSAGES, GREEDY)
    assert next(pieces) == Content("a")
    pieces.close()
    steps = len(runner.steps)
    assert session.last.finish_reason == "abort"
    assert "".join(texts(session.chat(MESSAGES, GREEDY))) == "a long answer"
    assert len(runner.steps) > steps


def test_bad_messages_are_refused(open_session, tokenizer) -> None:
    session, runner = say(open_session, tokenizer, "x")
    with pytest.raises(RequestError, match="no messages"):
        list(session.chat([], GREEDY))
    with pytest.raises(ContextTooLong):
        list(session.chat([{"role": "user", "content": "word " * 100}], GREEDY))
    assert runner.steps == []
    assert "".join(texts(session.chat(MESSAGES, GREEDY))) == "x"


def test_metrics_are_sums_in_prometheus_text(open_session, tokenizer) -> None:
    session, _ = say(open_session, tokenizer, "abc")
    assert read_metrics(session)["mlc_llm_request_success_total stop"] == 0
    list(session.chat(MESSAGES, GREEDY))
    first = session.last
    list(session.chat(MESSAGES, GREEDY.with_changes(max_tokens=2)))
    metrics = read_metrics(session)
    assert metrics["mlc_llm_request_success_total stop"] == 1
    assert metrics["mlc_llm_request_success_total length"] == 1
    assert metrics["mlc_llm_prompt_tokens_total"] == 2 * first.prompt_tokens
    assert metrics["mlc_llm_prefix_cache_hits_total"] == (first.prompt_tokens - 1) // 16 * 16
    assert metrics["mlc_llm_generation_tokens_total"] == 5
    assert metrics["mlc_llm_num_requests_running"] == 0
    assert metrics["mlc_llm_prefill_seconds_total"] > 0 < metrics["mlc_llm_decode_seconds_total"]


def read_metrics(session: ChatSession) -> dict[str, float]:
    """Return each sample by its name and the values of its labels."""
    families = text_string_to_metric_families(session.metrics_text())
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_large_counts_are_exact(open_session) -> None:
    session = open_session(FakeRunner())
    session._engine.metrics.prompt_tokens = 123_456_789
    assert read_metrics(session)["mlc_llm_prompt_tokens_total"] == 123_456_789


@pytest.fixture
def with_grammars(tokenizer) -> Iterator[Callable[[ChatSession], ChatSession]]:
    cache = GrammarCache(lambda: GrammarVocabulary(tokenizer, [2], VOCAB_SIZE))

    def add(session: ChatSession) -> ChatSession:
        session._engine.grammars = cache
        return session

    yield add
    cache.close()


def test_answer_is_held_to_a_grammar(open_session, tokenizer, with_grammars) -> None:
    session = with_grammars(say(open_session, tokenizer, "no way!")[0])
    choice = GrammarSpec("choice", '["never", "nobody knows"]')
    assert "".join(texts(session.chat(MESSAGES, GREEDY, choice))) == "nobody knows"
    assert session.last.finish_reason == "stop"


def let_think(session: ChatSession, **changes) -> None:
    """Let a session's model mark its thoughts."""
    prompts = session._prompts
    thinking = replace(prompts.formats, reasoning=find_reasoning("think", None))
    prompts.formats = replace(thinking, **changes)


def test_grammar_begins_after_the_thoughts(open_session, tokenizer, with_grammars) -> None:
    said = "<think>well</think>no way!"
    session = with_grammars(say(open_session, tokenizer, said)[0])
    choice = GrammarSpec("choice", '["never", "nobody knows"]')
    let_think(session, thinks_first=True)
    answer = join_events(session.chat(MESSAGES, GREEDY, choice))
    assert answer == [Reasoning("well"), Content("nobody knows")]


def test_thoughts_end_when_their_budget_is_spent(open_session, tokenizer, with_grammars) -> None:
    said = "<think>well, well, well</think>no way!"
    session = with_grammars(say(open_session, tokenizer, said)[0])
    with pytest.raises(RequestError, match="nothing marks what this model thinks"):
        session.check_thought_limit(3)
    with pytest.raises(RequestError, match="nothing marks"):
        next(iter(session.chat(MESSAGES, GREEDY, None, 3)))
    let_think(session)
    session.check_thought_limit(3)
    thought, *_ = join_events(session.chat(MESSAGES, GREEDY, None, 3))
    assert isinstance(thought, Reasoning) and "well".startswith(thought.text.strip())
    choice = GrammarSpec("choice", '["never", "nobody knows"]')
    answer = join_events(session.chat(MESSAGES, GREEDY, choice, 0))
    assert [type(event) for event in answer if event.text] == [Content]


def test_thoughts_are_told_from_the_answer(open_session, tokenizer) -> None:
    session, _ = say(open_session, tokenizer, "<think>\nHm, 1 < 2.\n</think>\n\nYes.")
    plain = "".join(texts(session.chat(MESSAGES, GREEDY)))
    assert plain.startswith("<think>")  # no format of thoughts is known yet
    let_think(session)
    pieces = list(session.chat(MESSAGES, GREEDY))
    assert join_events(pieces) == [Reasoning("Hm, 1 < 2."), Content("Yes.")]
    assert len(pieces) > 9
    cut = list(session.chat(MESSAGES, GREEDY.with_changes(max_tokens=15)))
    assert join_events(cut) == [Reasoning("Hm, 1 <")]
    stop = GREEDY.with_changes(stop=("s",))
    assert join_events(session.chat(MESSAGES, stop))[-1] == Content("Ye")


def test_thoughts_that_the_prompt_begins(open_session, tokenizer) -> None:
    session, _ = say(open_session, tokenizer, "Hm.</think>Yes.", opening="<think>\n")
    let_think(session)
    answer = join_events(session.chat(MESSAGES, GREEDY))
    assert answer == [Reasoning("Hm."), Content("Yes.")]


def test_channels_are_told_apart(open_session, tokenizer) -> None:
    said = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes"
    )
    session, _ = say(open_session, tokenizer, said, context=256)
    session._prompts.formats = AnswerFormats.find(None, "gpt_oss")
    assert join_events(session.chat(MESSAGES, GREEDY)) == [Reasoning("Hm."), Content("Yes")]


def test_bad_grammar_is_refused_before_the_first_piece(
    open_session, tokenizer, with_grammars
) -> None:
    session = with_grammars(say(open_session, tokenizer, "no")[0])
    with pytest.raises(RequestError, match="not JSON"):
        next(iter(session.chat(MESSAGES, GREEDY, GrammarSpec("json_schema", "{"))))
    prompts = session._prompts
    prompts.formats = replace(prompts.formats, splits_channels=True)
    with pytest.raises(RequestError, match="channels"):
        session.check_grammar(GrammarSpec("json_object"))
