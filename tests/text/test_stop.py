"""Stop strings: found across any split of the text, never shown, at linear cost."""

import random

import pytest

from mlc_llm.text.stop import StopFilter


def first_stop(text: str, stop: list[str]) -> int | None:
    """Where the stop string that ends first begins (of several ending there, the longest)."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if s and text[:end].endswith(s)]
        if starts:
            return min(starts)
    return None


def longest_open_end(text: str, stop: list[str]) -> int:
    """How many characters at the end of the text could be the beginning of a stop string."""
    sizes = range(1, min(len(text), max(map(len, stop), default=0)) + 1)
    return max((n for n in sizes if any(s.startswith(text[-n:]) for s in stop if s)), default=0)


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_in_random_pieces(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        stop = ["".join(rng.choices("ab", k=rng.randrange(6))) for _ in range(rng.randrange(4))]
        text = "".join(rng.choices("abc", [5, 5, 1], k=rng.randrange(40)))
        stop_at = first_stop(text, stop)
        stream = StopFilter(stop)
        shown, taken = "", 0
        while taken < len(text):
            size = rng.randrange(5)
            shown += stream.put(text[taken : taken + size])
            taken = min(taken + size, len(text))
            if not stream.stopped:
                assert shown == text[: taken - longest_open_end(text[:taken], stop)]
        shown += stream.finish()
        assert stream.stopped == (stop_at is not None)
        assert shown == text[:stop_at]


def test_text_after_a_stop_string_is_dropped() -> None:
    stream = StopFilter(["STOP"])
    assert stream.put("one ST") == "one "
    assert stream.put("OP two") == ""
    assert stream.stopped
    assert stream.put("three") == stream.finish() == ""


def test_held_text_comes_out_when_it_is_no_stop_string() -> None:
    stream = StopFilter(["\n\n", "User:"])
    assert [stream.put(piece) for piece in ("a\n", "Us", "ing", "\n")] == ["a", "\n", "Using", ""]
    assert stream.finish() == "\n"
    assert not stream.stopped


def test_a_stop_string_inside_a_longer_one_wins_when_it_ends_first() -> None:
    stream = StopFilter(["abcd", "bc"])
    assert stream.put("xab") == "x"
    assert stream.put("c") == "a"
    assert stream.stopped


def test_without_stop_strings_all_text_passes() -> None:
    for stop in ([], [""]):
        stream = StopFilter(stop)
        assert stream.put("anything") == "anything"
        assert stream.put("") == stream.finish() == ""
        assert not stream.stopped


def test_cost_is_linear_where_searching_anew_would_be_quadratic() -> None:
    size = 200_000
    stream = StopFilter(["a" * size + "b"])
    assert stream.put("a" * size) == ""
    assert all(stream.put("a") == "a" for _ in range(size))
    assert stream.put("b") == ""
    assert stream.stopped
