"""`ChatModule` and its callbacks, as programs for older releases use them."""

from __future__ import annotations

import io
import queue
import re
import threading
from collections.abc import Iterator

import pytest
from fake_engine import Parts

from mlc_llm.api import MLCEngine
from mlc_llm.callback import StreamIterator, StreamToStdout
from mlc_llm.chat_module import ChatMessage, ChatModule, GenerationConfig
from mlc_llm.errors import ContextTooLong, OptionError, RequestError

SHORT = GenerationConfig(max_gen_len=10)


@pytest.fixture
def module(parts: Parts) -> Iterator[ChatModule]:
    module = ChatModule.from_engine(MLCEngine.from_models(parts.models, parts.close))
    yield module
    module.close()


def test_a_conversation_goes_on_until_it_is_reset(module: ChatModule) -> None:
    first = module.generate("hello", SHORT)
    assert len(first) == 10
    assert module.generate("hello", SHORT) != first
    module.reset_chat()
    assert module.generate("hello", SHORT) == first


def test_a_stateless_prompt_leaves_no_trace(module: ChatModule) -> None:
    first = module.generate("hello", SHORT)
    once = module.generate("more", SHORT, stateless=True)
    assert module.generate("more", SHORT, stateless=True) == once
    assert module.generate("hello", SHORT) != first


def test_messages_in_place_of_a_prompt(module: ChatModule) -> None:
    answer = module.generate([ChatMessage("user", "hello")], SHORT)
    module.reset_chat()
    assert module.generate([{"role": "user", "content": "hello"}], SHORT) == answer
    with pytest.raises(RequestError, match="no messages"):
        module.generate([])


def test_text_is_printed_as_it_comes(
    module: ChatModule, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = module.generate("hello", SHORT, StreamToStdout(callback_interval=2))
    assert capsys.readouterr().out == answer + "\n"


def test_the_interval_counts_pieces(module: ChatModule) -> None:
    calls: list[str] = []

    class Recorder(StreamToStdout):
        def delta_callback(self, delta_message: str) -> None:
            calls.append(delta_message)

    answer = module.generate("hello", SHORT, Recorder(4, io.StringIO()))
    assert "".join(calls) == answer
    assert 1 <= len(calls) <= 3


def test_another_thread_iterates(module: ChatModule) -> None:
    pieces = StreamIterator(callback_interval=1, timeout=5)
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.extend(pieces))
    reader.start()
    answer = module.generate("hello", SHORT, pieces)
    reader.join(5)
    assert "".join(texts) == answer
    with pytest.raises(queue.Empty):
        next(StreamIterator(timeout=0.01))


def test_stats(module: ChatModule) -> None:
    assert module.stats() == "prefill: N/A, decode: N/A"
    module.generate("hello", SHORT)
    pattern = r"prefill: \d+\.\d tok/s, decode: \d+\.\d tok/s"
    assert re.fullmatch(pattern, module.stats())
    assert "mlc_llm_generation_tokens_total 10" in module.stats(verbose=True)


def test_a_turn_that_fails_is_not_remembered(module: ChatModule) -> None:
    first = module.generate("hello", SHORT)
    with pytest.raises(ContextTooLong):
        module.generate("hello " * 300, SHORT)
    with pytest.raises((OptionError, RequestError)):
        module.generate("hello", GenerationConfig(temperature=-1))
    second = module.generate("hello", SHORT)
    module.reset_chat()
    assert module.generate("hello", SHORT) == first
    assert module.generate("hello", SHORT) == second
