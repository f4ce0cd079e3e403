"""Codes of GGUF encodings against the gguf package's own dequantizer."""

import gguf
import numpy as np
import pytest
from gguf_blocks import random_blocks
from make_gguf import HEADS, HF_NAMES, HIDDEN, interleave_halves, make_tensors, write_gguf
from packed_layouts import unpack_format

from mlc_llm.quantization.formats import OTHER_ENCODING, pack_codes, parse_format
from mlc_llm.weights.gguf import GGUFSource
from mlc_llm.weights.gguf_codes import FORMATS, decode_blocks


def values_of(part):
    size = part.codes.shape[1] // part.scale.shape[1]
    weight = (part.codes.astype(np.float32) - part.zero) * np.repeat(part.scale, size, axis=1)
    return weight if part.minimum is None else weight + np.repeat(part.minimum, size, axis=1)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_stand_for_the_same_values(name):
    kind = gguf.GGMLQuantizationType[name]
    rows = random_blocks(np.random.default_rng(1), kind, 6, 512)
    expected = gguf.dequantize(rows, kind)
    blocks = rows.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    found = decode_blocks(blocks, name, 6)
    np.testing.assert_array_equal(values_of(found), expected)
    # In a layer's format, what is lost is the rounding of scales to float16.
    words, scales = pack_codes([found], parse_format(FORMATS[name]))
    stored = unpack_format(words, scales, FORMATS[name], 512)
    is_exact = name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
    tolerance = 1e-7 if is_exact else 2**-11
    size = parse_format(FORMATS[name]).group_size
    terms = [np.abs(found.scale) * 255, *([] if found.minimum is None else [-found.minimum])]
    largest = np.repeat(np.sum(np.abs(terms), axis=0), size, axis=1)
    assert (np.abs(stored - expected) <= tolerance * np.maximum(largest, 1e-2)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rows_are_in_hugging_face_order(tmp_path, kind):
    tensors = make_tensors()
    query = tensors["blk.0.attn_q.weight"]
    tensors["blk.0.attn_q.weight"] = interleave_halves(query, HEADS)
    encoding = gguf.GGMLQuantizationType[kind]
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tensors, quantization=encoding))
    for ggml, name in HF_NAMES.items():
        full = f"{name}.weight"
        if tensors[f"{ggml}.weight"].ndim == 1:
            assert source.encoding(full) is None and source.read_encoded(full) is None
            continue
        assert source.encoding(full) == FORMATS[kind]
        np.testing.assert_array_equal(values_of(source.read_encoded(full)), source.read(full))
    found = values_of(source.read_encoded("model.layers.0.self_attn.q_proj.weight"))
    expected = gguf.dequantize(gguf.quantize(query, encoding), encoding)
    np.testing.assert_array_equal(found, expected.reshape(HIDDEN, HIDDEN))


def test_plain_and_unknown_encodings_have_no_codes(tmp_path):
    plain = GGUFSource(write_gguf(tmp_path / "plain.gguf", make_tensors()))
    name = "model.layers.0.mlp.down_proj.weight"
    assert plain.encoding(name) is None and plain.read_encoded(name) is None
    kind = gguf.GGMLQuantizationType.TQ2_0
    tensors = {name: np.tile(t, (1, 8)) if t.ndim == 2 else t for name, t in make_tensors().items()}
    path = write_gguf(tmp_path / "ternary.gguf", tensors, quantization=kind)
    ternary = GGUFSource(path)
    assert ternary.encoding("model.embed_tokens.weight") == OTHER_ENCODING
    assert ternary.read_encoded("model.embed_tokens.weight") is None
