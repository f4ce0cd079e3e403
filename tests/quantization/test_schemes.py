"""The table of schemes: derived numbers and the error for an unknown name."""

import pytest

from mlc_llm.errors import OptionError
from mlc_llm.quantization.schemes import SCHEMES, get_scheme


@pytest.mark.parametrize(
    ("name", "bits", "values_per_word", "max_int", "layout", "dtype"),
    [
        ("q3f16_0", 3, 10, 3, "KN", "float16"),
        ("q3f16_1", 3, 10, 3, "NK", "float16"),
        ("q4f16_0", 4, 8, 7, "KN", "float16"),
        ("q4f16_1", 4, 8, 7, "NK", "float16"),
        ("q4bf16_1", 4, 8, 7, "NK", "bfloat16"),
        ("q4f32_1", 4, 8, 7, "NK", "float32"),
        ("q8f16_1", 8, 4, 127, "NK", "float16"),
    ],
)
def test_group_schemes(name, bits, values_per_word, max_int, layout, dtype):
    scheme = get_scheme(name)
    assert (scheme.kind, scheme.bits, scheme.layout, scheme.dtype) == ("group", bits, layout, dtype)
    assert scheme.values_per_word == values_per_word
    assert scheme.max_int == max_int
    assert scheme.quantize_embedding
    assert scheme.quantize_final_fc


def test_groups_are_whole_words_in_every_scheme():
    grouped = [scheme for scheme in SCHEMES.values() if scheme.kind == "group"]
    assert len(grouped) == 9
    for scheme in grouped:
        assert scheme.words_per_group * scheme.values_per_word == scheme.group_size
    assert {s.words_per_group for s in grouped if s.bits < 8} == {4}


def test_unquantized_schemes_name_their_dtype():
    dtypes = {name: s.dtype for name, s in SCHEMES.items() if s.kind == "none"}
    assert dtypes == {"q0f16": "float16", "q0bf16": "bfloat16", "q0f32": "float32"}


def test_q4f16_2_keeps_embedding_and_head():
    scheme = get_scheme("q4f16_2")
    assert not scheme.quantize_embedding
    assert not scheme.quantize_final_fc


def test_partial_group_counts():
    assert get_scheme("q4f16_1").num_groups(33) == 2
    assert get_scheme("q3f16_1").num_groups(80) == 2


def test_unknown_name_lists_the_known():
    with pytest.raises(OptionError, match=r"'q5f16' is not known.*q4f16_1.*q8f16_1"):
        get_scheme("q5f16")
