"""`key=value;key=value` strings and the checks that commands share."""

import pytest

from mlc_llm.cli.options import (
    CHAT_OVERRIDES,
    COMPILE_OVERRIDES,
    parse_overrides,
    parse_settings,
    read_caches,
    require_text,
)
from mlc_llm.errors import OptionError
from mlc_llm.prepare.cache import CachePolicy

KINDS = {"count": int, "share": float, "name": str, "flag": bool}


def test_values_get_the_type_of_their_key() -> None:
    text = " count = 3 ; share=0.5;name= two words ;flag=True; "
    assert parse_settings(text, KINDS, "--x") == {
        "count": 3,
        "share": 0.5,
        "name": "two words",
        "flag": True,
    }


def test_a_value_may_hold_an_equals_sign_and_nothing_is_fine() -> None:
    assert parse_settings("name=a=b", KINDS, "--x") == {"name": "a=b"}
    assert parse_settings("", KINDS, "--x") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count", "'count' is not of the form key=value"),
        ("size=3", "unknown key 'size'; known: count, share, name, flag"),
        ("count=1;count=2", "count is given twice"),
        ("count=1.5", "count must be a whole number, not '1.5'"),
        ("share=much", "share must be a number, not 'much'"),
        ("flag=maybe", "flag must be true or false, not 'maybe'"),
        ("count=none", "count must be a whole number, not 'none'"),
        ("=3", "unknown key ''"),
    ],
)
def test_a_bad_setting_is_named(text: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_settings(text, KINDS, "--x")
    assert str(caught.value).startswith("--x: ")
    assert words in str(caught.value)


def test_none_unsets_only_where_allowed() -> None:
    assert parse_settings("count=None", KINDS, "/set", can_be_none=("count",)) == {"count": None}


def test_overrides_keep_their_types() -> None:
    text = "context_window_size=2048;opt=O3;tensor_parallel_shards=1"
    assert parse_overrides(text, CHAT_OVERRIDES) == {"context_window_size": 2048, "opt": "O3"}
    assert parse_overrides("disaggregation=false;max_batch_size=4", COMPILE_OVERRIDES) == {
        "max_batch_size": 4
    }


@pytest.mark.parametrize(
    "text", ["tensor_parallel_shards=2", "pipeline_parallel_stages=0", "disaggregation=true"]
)
def test_overrides_that_cannot_be_honoured_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=text.partition("=")[0]):
        parse_overrides(text, COMPILE_OVERRIDES)


def test_text_must_be_text() -> None:
    assert require_text("--prompt", "Grüße 🙂") == "Grüße 🙂"
    with pytest.raises(OptionError, match="--prompt is empty"):
        require_text("--prompt", " \n")
    with pytest.raises(OptionError, match="--prompt is not valid UTF-8"):
        require_text("--prompt", "a\udcff")


def test_caches_come_from_the_environment(tmp_path) -> None:  # type: ignore[no-untyped-def]
    caches = read_caches({"MLC_LLM_HOME": str(tmp_path), "MLC_JIT_POLICY": "redo"})
    assert caches.home.root == tmp_path
    assert caches.jit_policy is CachePolicy.REDO
    assert caches.download_policy is CachePolicy.ON
    with pytest.raises(OptionError, match=r"MLC_DOWNLOAD_CACHE_POLICY.*'SOMETIMES'"):
        read_caches({"MLC_LLM_HOME": str(tmp_path), "MLC_DOWNLOAD_CACHE_POLICY": "SOMETIMES"})
