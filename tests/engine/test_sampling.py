"""What may be set of sampling, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.errors import OptionError, RequestError

HUGE = 10**400  # no float holds it


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", HUGE),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", None),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("min_p", 1.5),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("presence_penalty", -2.1),
        ("presence_penalty", -math.inf),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 101),
        ("repetition_penalty", -1.0),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_k", 1.0),
        ("top_k", None),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", "5"),
        ("min_tokens", -1),
        ("min_tokens", None),
        ("min_tokens", 1.0),
        ("seed", -(2**63) - 1),
        ("seed", 2**63),
        ("seed", HUGE),
        ("seed", 1.5),
        ("seed", "1"),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: HUGE}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {5: None}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {2**31: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", ((5, 1.0), (5, 2.0))),
        ("logit_bias", ((5,),)),
        ("logit_bias", (5,)),
        ("logit_bias", "5"),
        ("logit_bias", None),
        ("logit_bias", {token: 0.0 for token in range(1025)}),
        ("stop", "word"),
        ("stop", None),
        ("stop", (1,)),
        ("stop", ("x", "")),
        ("stop", ("x" * 1025,)),
        ("stop", ("x",) * 65),
        ("ignore_eos", 1),
        ("ignore_eos", None),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name) as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 200
    with pytest.raises(OptionError, match=name):
        SamplingParams().with_changes(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0, "top_p": 0, "min_p": 0},
        {"temperature": 100, "top_p": 1, "min_p": 1},
        {"frequency_penalty": -2, "presence_penalty": 2, "repetition_penalty": 0.01},
        {"top_k": 2**31 - 1, "max_tokens": 2**31 - 1, "min_tokens": 2**31 - 1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"logprobs": 0},
        {"logprobs": 20},
        {"logit_bias": {token: -100 for token in range(1024)}},
        {"stop": ("x" * 1024,) * 64},
    ],
)
def test_limits_themselves_are_allowed(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    for name, value in values.items():
        kept = getattr(params, name)
        assert kept == (tuple(value.items()) if name == "logit_bias" else value)


def test_messages_say_value_and_limits() -> None:
    with pytest.raises(OptionError, match=r"^top_p must be a number from 0 to 1, is 1\.5$"):
        SamplingParams(top_p=1.5)
    with pytest.raises(OptionError, match=r"^logprobs must be a whole number from 0 to 20, is 21$"):
        SamplingParams(logprobs=21)
    with pytest.raises(
        OptionError, match=r"^seed must .* 9,223,372,036,854,775,807, is a number of"
    ):
        SamplingParams(seed=HUGE)
    with pytest.raises(
        OptionError, match=r"^logit_bias of token 7 must .* from -100 to 100, is -101"
    ):
        SamplingParams(logit_bias={7: -101})
    with pytest.raises(OptionError, match=r"^logit_bias names 2,000 tokens, at most 1,024"):
        SamplingParams(logit_bias={token: 1.0 for token in range(2000)})


def test_params_with_lists_and_mappings_do_not_change_and_have_a_hash() -> None:
    bias, stop = {9: 1, 3: -2.5}, ["a", "b"]
    params = SamplingParams(logit_bias=bias, stop=stop)  # type: ignore[arg-type]
    bias[5] = 1
    stop.clear()
    same = SamplingParams(logit_bias=((3, -2.5), (9, 1.0)), stop=("a", "b"))
    assert params == same and hash(params) == hash(same)
    assert params.logit_bias == ((3, -2.5), (9, 1.0))
    assert params.with_changes(top_k=4).logit_bias == params.logit_bias


def test_defaults_come_from_the_model() -> None:
    config = ChatConfig(
        model_type="llama",
        quantization="q4f16_1",
        model_config={},
        vocab_size=10,
        context_window_size=16,
        prefill_chunk_size=16,
        conv_template={},
        temperature=0.6,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
    )
    assert SamplingParams.from_config(config) == SamplingParams(0.6, 0.9, 0.2, 0.1, 1.1)


def test_min_tokens_must_fit_max_tokens() -> None:
    with pytest.raises(OptionError, match="min_tokens is 5, more than max_tokens, 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    params = SamplingParams(logit_bias={3: 1.0, 40: 1.0})
    params.check_vocabulary(41)
    with pytest.raises(RequestError, match="token 40, the vocabulary has 40") as caught:
        params.check_vocabulary(40)
    assert caught.value.param == "logit_bias"
