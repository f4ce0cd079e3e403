"""Every small file a model consists of, damaged at random: read rightly, or refused with a message.

Damage of weights is in tests/weights, of downloads in tests/prepare. Nothing may crash, hang, or
take time or memory for what a file merely claims.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_tokenizers
from damage import count_refusals, damaged_copies, damaged_json
from reference_cases import REFERENCES

from mlc_llm.artifact import read_chat_config, read_tensor_index
from mlc_llm.models.registry import find_family, get_family
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer
from mlc_llm.weights.convert import convert
from mlc_llm.weights.open import open_source

ROUNDS = 150
TOKENIZERS = REFERENCES / "tokenizers"


def convert_model(directory: Path, output: Path) -> None:
    source = open_source(directory)
    family = find_family(source.config)
    config = family.config_from_huggingface(source.config)
    plan = plan_parameters(family, config, get_scheme("q4f16_1"))
    convert(plan, source, output, lambda done, total, name: None)


@pytest.mark.parametrize("case", ["llama_gqa", "mistral_sliding_window", "qwen2_gqa"])
def test_config_json(tmp_path, case):
    directory = shutil.copytree(REFERENCES / case, tmp_path / "model")
    path = directory / "config.json"
    whole = path.read_bytes()

    def use(content):
        path.write_bytes(content)
        convert_model(directory, tmp_path / "out")

    use(whole)
    assert count_refusals(damaged_json(json.loads(whole), 51, ROUNDS), use) > 20
    assert count_refusals(damaged_copies(whole, 52, 60), use) > 20


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "pytorch_model.bin.index.json", "config.json"]
)
def test_index_of_shards(tmp_path, name):
    directory = shutil.copytree(REFERENCES / "llama_mha_sharded", tmp_path / "model")
    path = directory / "model.safetensors.index.json"
    if name.startswith("pytorch"):
        # Shards of the wrong kind: whatever the index says, nothing else may happen.
        path = path.rename(directory / name)
    path = directory / name
    whole = path.read_bytes()

    def use(content):
        path.write_bytes(content)
        source = open_source(directory)
        for tensor in source.names():
            source.read(tensor)

    assert count_refusals(damaged_json(json.loads(whole), 53, ROUNDS), use) >= 0
    assert count_refusals(damaged_copies(whole, 54, ROUNDS), use) > 40


@pytest.fixture
def artifact(tmp_path):
    """Return a whole artifact but for its template: weights, configuration, tokenizer."""
    output = tmp_path / "artifact"
    convert_model(REFERENCES / "llama_gqa", output)
    family = get_family("llama")
    config = json.loads((REFERENCES / "llama_gqa" / "config.json").read_text())
    chat_config = {
        "version": "0.1.0",
        "model_type": "llama",
        "quantization": "q4f16_1",
        "model_config": family.config_from_huggingface(config).to_json(),
        "vocab_size": 131,
        "context_window_size": 256,
        "prefill_chunk_size": 256,
        "conv_template": {"name": "chatml"},
        "temperature": 0.7,
        "tokenizer_files": ["tokenizer.json"],
        "tokenizer_info": {"token_postproc_method": "byte_level"},
        "eos_token_id": [1, 2],
    }
    (output / "mlc-chat-config.json").write_text(json.dumps(chat_config))
    small_tokenizers.write_tokenizer(output)
    return output


def use_chat_config(directory):
    """Do with a configuration what opening and compiling a model does."""
    config = read_chat_config(directory)
    family = get_family(config.model_type)
    model_config = family.config_from_json(config.model_config)
    plan_parameters(family, model_config, get_scheme(config.quantization))
    builder = PromptBuilder.load(directory, config, Tokenizer.load(directory))
    builder.close()


def test_chat_config(artifact):
    path = artifact / "mlc-chat-config.json"
    whole = path.read_bytes()

    def use(content):
        path.write_bytes(content)
        use_chat_config(artifact)

    use(whole)
    assert count_refusals(damaged_json(json.loads(whole), 55, ROUNDS), use) > 20
    assert count_refusals(damaged_copies(whole, 56, 60), use) > 20


@pytest.mark.parametrize("name", ["tensor-cache.json", "ndarray-cache.json"])
def test_tensor_cache(artifact, name):
    path = (artifact / "tensor-cache.json").rename(artifact / name)
    whole = path.read_bytes()

    def use(content):
        path.write_bytes(content)
        index = read_tensor_index(artifact)
        assert sum(np.asarray(index.read(tensor)).nbytes for tensor in index.records) < 1 << 20

    use(whole)
    assert count_refusals(damaged_json(json.loads(whole), 57, ROUNDS), use) > 40
    assert count_refusals(damaged_copies(whole, 58, ROUNDS), use) > 40


def use_tokenizer(directory):
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("Hello, world! Äpfel 你好 \n\n 1234", add_special_tokens=True)
    assert len(ids) < 10_000
    tokenizer.decode(ids)
    stream = tokenizer.stream()
    for token_id in ids:
        stream.put(token_id)
    stream.finish()


@pytest.mark.parametrize("make", [small_tokenizers.byte_level, small_tokenizers.byte_fallback])
def test_tokenizer_json(tmp_path, make):
    small_tokenizers.write_tokenizer(tmp_path, make())
    path = tmp_path / "tokenizer.json"
    whole = path.read_bytes()

    def use(content):
        path.write_bytes(content)
        use_tokenizer(tmp_path)

    use(whole)
    assert count_refusals(damaged_json(json.loads(whole), 59, ROUNDS), use) > 20
    assert count_refusals(damaged_copies(whole, 60, ROUNDS), use) > 40


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("bpe_bytes.model", "tokenizer.model"),
        ("unigram_nfkc.model", "tokenizer.model"),
        ("ranks.tiktoken", "qwen.tiktoken"),
        ("rwkv_vocab_small.txt", "rwkv_vocab_small.txt"),
    ],
)
def test_other_vocabularies(tmp_path, source, name):
    path = tmp_path / name
    whole = (TOKENIZERS / source).read_bytes()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    if not name.endswith(".tiktoken"):
        (tmp_path / "tokenizer_config.json").write_text("{}")

    def use(content):
        path.write_bytes(content)
        use_tokenizer(tmp_path)

    use(whole)
    assert count_refusals(damaged_copies(whole, 61, ROUNDS), use) > 20


def test_tokenizer_config(tmp_path):
    small_tokenizers.write_tokenizer(tmp_path, bos_token="<|im_start|>", eos_token="<|im_end|>")
    path = tmp_path / "tokenizer_config.json"
    whole = path.read_bytes()

    def use(content):
        path.write_bytes(content)
        use_tokenizer(tmp_path)

    use(whole)
    assert count_refusals(damaged_json(json.loads(whole), 62, ROUNDS), use) >= 0
    assert count_refusals(damaged_copies(whole, 63, ROUNDS), use) > 20
