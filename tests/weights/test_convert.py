"""Conversion: what is written, and what is refused before anything is written."""

import hashlib
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from make_checkpoint import SCHEME, check_complete, plain, quiet, read_json

from mlc_llm.artifact import SHARD_LIMIT_BYTES, TensorSpec, read_tensor_index
from mlc_llm.errors import CorruptFile, ModelNotFound, ParameterMismatch
from mlc_llm.models.plan import ParamPlan, ParamRule
from mlc_llm.quantization.group import dequantize_group
from mlc_llm.weights.convert import convert
from mlc_llm.weights.shards import lay_out


def test_whole_conversion(model, tmp_path):
    seen = []
    summary = convert(model.plan, model.source(), tmp_path / "out", lambda *a: seen.append(a))
    check_complete(model, tmp_path / "out")
    assert seen[0] == (0, 9, "")
    assert seen[-1] == (9, 9, "m9.weight")
    assert [done for done, _, _ in seen] == list(range(10))
    assert summary.num_tensors == 10
    assert summary.num_parameters == 10 * 512
    size = 16 * 32 + 16 * 4 + 6 * 2048 + 2 * 1024
    assert summary.size_bytes == size
    assert summary.bits_per_parameter == size * 8 / 5120
    index = read_tensor_index(tmp_path / "out")
    words, scales = index.read("fused.q_weight"), index.read("fused.q_scale")
    weight = dequantize_group(words, scales, SCHEME, 64, transposed=False)
    fused = np.concatenate([model.tensors["m0.weight"], model.tensors["m1.weight"]])
    assert np.abs(weight - fused).max() < 0.3


def test_index_fields(model, tmp_path, small_shards):
    summary = convert(model.plan, model.source(), tmp_path / "out", quiet)
    index = read_json(tmp_path / "out" / "tensor-cache.json")
    assert index["metadata"] == {
        "ParamSize": 10,
        "ParamBytes": summary.size_bytes,
        "BitsPerParam": summary.bits_per_parameter,
    }
    assert len(index["records"]) == 4
    for number, shard in enumerate(index["records"]):
        data = (tmp_path / "out" / f"params_shard_{number}.bin").read_bytes()
        assert shard["dataPath"] == f"params_shard_{number}.bin"
        assert shard["format"] == "raw-shard"
        assert shard["nbytes"] == len(data) < 5000
        assert shard["md5sum"] == hashlib.md5(data).hexdigest()
    record = index["records"][0]["records"][1]
    assert record == {
        "name": "fused.q_scale",
        "shape": [16, 2],
        "dtype": "float16",
        "format": "raw",
        "nbytes": 64,
        "byteOffset": 512,
    }


def test_float32_keeps_every_bit(model, tmp_path):
    convert(model.plan, model.source(), tmp_path / "out", quiet)
    record = read_tensor_index(tmp_path / "out").records["m2.weight"]
    assert not record.is_f32_as_bf16
    assert record.size_bytes == 8 * 64 * 4


def specs_of(*sizes):
    return [TensorSpec(f"t{n}", (size,), "uint8") for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ((10, 20, 30), [[0, 1, 2]]),
        ((60, 39, 1), [[0, 1], [2]]),
        ((10, 90, 20), [[1], [0, 2]]),  # a large one goes out at once, what was begun goes on
        ((60, 45, 10), [[0], [1, 2]]),
        ((250, 10), [[0], [1]]),
        ((10, 250), [[1], [0]]),
        ((), []),
    ],
)
def test_shard_rule(sizes, shards):
    found = lay_out(specs_of(*sizes), 100)
    assert [[int(spec.name[1:]) for spec in shard] for shard in found] == shards


def test_shard_limit_of_mlc():
    assert SHARD_LIMIT_BYTES == 33554432


def test_missing_and_surplus_tensors(model, tmp_path):
    del model.tensors["m3.weight"]
    model.tensors["extra.weight"] = np.zeros(3, np.float32)
    model.save()
    with pytest.raises(ParameterMismatch, match=r"missing m3\.weight; surplus extra\.weight;"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_long_lists_are_cut(model, tmp_path):
    model.tensors |= {f"x{n}": np.zeros(1, np.float32) for n in range(9)}
    model.save()
    with pytest.raises(ParameterMismatch, match="surplus x0, x1, x2, x3, x4 and 4 more"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)


def test_known_buffers_are_left_out(model, tmp_path):
    for name in (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "h.0.attn.bias",
        "h.0.attn.masked_bias",
        "lm_head.weight",
    ):
        model.tensors[name] = np.zeros(3, np.float32)
    model.config["tie_word_embeddings"] = True
    model.save()
    convert(model.plan, model.source(), tmp_path / "tied", quiet)
    check_complete(model, tmp_path / "tied")
    model.config["tie_word_embeddings"] = False
    model.save()
    with pytest.raises(ParameterMismatch, match=r"surplus lm_head\.weight;"):
        convert(model.plan, model.source(), tmp_path / "untied", quiet)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("m0.weight", (9, 64)), ("m1.weight", (8, 63)), ("m5.weight", (64, 8)), ("m9.weight", ())],
)
def test_wrong_shapes_are_found_before_anything_is_written(model, tmp_path, name, shape):
    model.tensors[name] = np.zeros(shape, np.float32)
    model.save()
    with pytest.raises(ParameterMismatch, match=r"must have shape \[.*the checkpoint has \["):
        convert(model.plan, model.source(), tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_other_ways_to_combine_are_checked_when_read(model, tmp_path):
    item = model.plan[1]
    rule = ParamRule(item.rule.sources, lambda parts: parts[0].T)
    model.plan[1] = ParamPlan(item.name, item.shape, rule, item.outputs, item.store)
    with pytest.raises(ParameterMismatch, match=r"m2\.weight must have shape \[8, 64\].*\[64, 8\]"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)
    with pytest.raises(ModelNotFound):
        read_tensor_index(tmp_path / "out")


def test_a_plan_that_contradicts_itself(model, tmp_path):
    item = plain("m2.weight", (8, 64), "float16")
    model.plan[1] = ParamPlan(item.name, item.shape, item.rule, model.plan[1].outputs, item.store)
    with pytest.raises(ParameterMismatch, match=r"float32 was planned, but \[8, 64\] float16"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)


def test_bad_values_name_the_parameter(model, tmp_path):
    model.tensors["m1.weight"][0, 0] = np.nan
    model.save()
    with pytest.raises(CorruptFile, match=r"fused\.weight: the weight holds NaN"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)


def test_shard_truncated_after_the_conversion(model, tmp_path):
    convert(model.plan, model.source(), tmp_path / "out", quiet)
    shard = tmp_path / "out" / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CorruptFile, match=r"params_shard_0\.bin has .* bytes, the index says"):
        read_tensor_index(tmp_path / "out")


def test_bfloat16_reaches_the_file_unchanged(model, tmp_path):
    convert(model.plan, model.source(), tmp_path / "out", quiet)
    found = read_tensor_index(tmp_path / "out").read("m9.weight")
    assert found.dtype == ml_dtypes.bfloat16


_MEMORY_SCRIPT = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from make_checkpoint import grouped, quiet
from mlc_llm.weights.convert import convert
from mlc_llm.weights.huggingface import HuggingFaceSource
directory = Path(sys.argv[1])
count, rows, columns = 10, 8192, 2048  # 64 MiB each as float32
size = rows * columns * 4
entries = {
    f"m{n}.weight": {
        "dtype": "F32", "shape": [rows, columns], "data_offsets": [n * size, (n + 1) * size]
    }
    for n in range(count)
}
text = json.dumps(entries).encode()
with (directory / "model.safetensors").open("wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    stream.truncate(8 + len(text) + count * size)  # holes: zeros that take no disk
(directory / "config.json").write_text("{}")
plan = [
    grouped(f"f{n}", (2 * rows, columns), [f"m{2 * n}.weight", f"m{2 * n + 1}.weight"])
    for n in range(count // 2)
]
source = HuggingFaceSource(directory)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(plan, source, directory / "out", quiet)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_two_tensors_and_a_bit(tmp_path):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", _MEMORY_SCRIPT, str(tmp_path), here]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    fused_mib, checkpoint_mib = 128, 640
    assert int(done.stdout) < 2 * fused_mib + 200 < checkpoint_mib
    assert len(read_tensor_index(tmp_path / "out").records) == 10
