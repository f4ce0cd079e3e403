"""A small safetensors checkpoint, a plan for it, and a check of what was made of it."""

import json

import numpy as np
from safetensors.numpy import save_file

from mlc_llm.artifact import TensorSpec, numpy_dtype, read_tensor_index
from mlc_llm.models.plan import ParamPlan, ParamRule
from mlc_llm.quantization.group import packed_specs, quantize_group
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.weights.huggingface import HuggingFaceSource

SCHEME = get_scheme("q4f16_1")


def plain(name, shape, dtype="float32", sources=None):
    def store(weight):
        return (weight.astype(numpy_dtype(dtype)),)

    rule = ParamRule(tuple(sources or (name,)))
    return ParamPlan(name, shape, rule, (TensorSpec(name, shape, dtype),), store)


def grouped(module, shape, sources):
    def store(weight):
        return quantize_group(weight, SCHEME, transpose=False)

    outputs = packed_specs(module, shape, SCHEME, transpose=False)
    return ParamPlan(f"{module}.weight", shape, ParamRule(tuple(sources)), outputs, store)


def quiet(done, total, name):
    pass


class Model:
    """A checkpoint of ten matrices, and a plan that fuses two of them."""

    def __init__(self, directory):
        rng = np.random.default_rng(5)
        self.directory = directory
        self.tensors = {
            f"m{n}.weight": rng.standard_normal((8, 64)).astype(np.float32) for n in range(10)
        }
        self.config = {"model_type": "llama"}
        self.plan = [
            grouped("fused", (16, 64), ["m0.weight", "m1.weight"]),
            *(plain(f"m{n}.weight", (8, 64), "float32") for n in range(2, 8)),
            plain("m8.weight", (8, 64), "float16"),
            plain("m9.weight", (8, 64), "bfloat16"),
        ]
        self.save()

    def save(self):
        self.directory.mkdir(exist_ok=True)
        save_file(self.tensors, self.directory / "model.safetensors")
        (self.directory / "config.json").write_text(json.dumps(self.config))

    def source(self):
        return HuggingFaceSource(self.directory)


def check_complete(model, output):
    """Compare everything in the output with the checkpoint; no trace of work may be left."""
    index = read_tensor_index(output)
    index.verify_checksums()
    index.check([spec for item in model.plan for spec in item.outputs], str(output))
    fused = np.concatenate([model.tensors["m0.weight"], model.tensors["m1.weight"]])
    words, scales = quantize_group(fused, SCHEME, transpose=False)
    np.testing.assert_array_equal(index.read("fused.q_weight"), words)
    np.testing.assert_array_equal(index.read("fused.q_scale"), scales)
    for item in model.plan[1:]:
        expected = model.tensors[item.name].astype(numpy_dtype(item.outputs[0].dtype))
        np.testing.assert_array_equal(index.read(item.name), expected)
    listed = {shard["dataPath"] for shard in read_json(output / "tensor-cache.json")["records"]}
    assert {path.name for path in output.iterdir()} == listed | {"tensor-cache.json"}


def read_json(path):
    return json.loads(path.read_text())
