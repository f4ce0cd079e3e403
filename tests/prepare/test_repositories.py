"""Names of repositories, access to them, and which of their files make a model."""

from __future__ import annotations

import pytest
from recorder import RecordedProgress

from mlc_llm.errors import (
    ModelNotFound,
    OptionError,
    UnsupportedModel,
)
from mlc_llm.prepare.cache import CacheHome, CachePolicy
from mlc_llm.prepare.download import (
    HubAccess,
    RepoRef,
    fetch,
    is_repo,
    parse_repo,
    select_files,
)

REF = RepoRef("user", "model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HF://user/model", RepoRef("user", "model")),
        ("hf://user/model/", RepoRef("user", "model")),
        ("HF://u/m-1.5_x@v1.0", RepoRef("u", "m-1.5_x", revision="v1.0")),
        ("HF://u/m@refs/pr/1", RepoRef("u", "m", revision="refs/pr/1")),
        ("HF://u/m/q4.gguf", RepoRef("u", "m", "q4.gguf")),
        ("HF://u/m/sub/q4.gguf@main", RepoRef("u", "m", "sub/q4.gguf", "main")),
    ],
)
def test_repository_names(text: str, expected: RepoRef) -> None:
    assert parse_repo(text) == expected
    assert parse_repo(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["HF://", "HF://user", "HF://user/", "HF://a/../b", "HF://a/b/c", "a/b", "HF://a/b@"]
)
def test_bad_repository_names(text: str) -> None:
    with pytest.raises(OptionError, match=r"HF://user/name"):
        parse_repo(text)


def test_only_the_scheme_makes_a_repository() -> None:
    assert is_repo("hf://a/b")
    assert not is_repo("user/model")


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://host", "http:///path"])
def test_bad_endpoint(home: CacheHome, progress: RecordedProgress, endpoint: str) -> None:
    access = HubAccess.from_environment({"HF_ENDPOINT": endpoint})
    with pytest.raises(OptionError, match="HF_ENDPOINT is"):
        fetch(REF, home=home, policy=CachePolicy.ON, progress=progress, access=access)


def test_access_from_the_environment() -> None:
    access = HubAccess.from_environment({"HF_ENDPOINT": "https://mirror", "HF_TOKEN": "secret"})
    assert (access.endpoint, access.token) == ("https://mirror", "secret")
    assert HubAccess.from_environment({"HF_TOKEN": ""}) == HubAccess()


def test_weights_in_two_layouts_are_taken_once() -> None:
    names = ["config.json", "consolidated.safetensors", "model-00001-of-00001.safetensors"]
    assert select_files(names, REF) == ["config.json", "model-00001-of-00001.safetensors"]


def test_pytorch_weights_are_taken_where_there_are_no_safetensors() -> None:
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    index = "pytorch_model.bin.index.json"
    names = ["config.json", "training_args.bin", index, *shards]
    assert select_files(names, REF) == ["config.json", index, *shards]
    chosen = select_files([*names, "model.safetensors"], REF)
    assert chosen == ["config.json", index, "model.safetensors"]


def test_other_checkpoints_are_not_supported() -> None:
    with pytest.raises(UnsupportedModel, match="no weights in a format of Hugging Face"):
        select_files(["config.json", "consolidated.00.pth"], REF)


def test_files_of_sentence_transformers_are_selected() -> None:
    wanted = ["config.json", "modules.json", "sentence_bert_config.json", "vocab.txt"]
    folders = ["1_Pooling/config.json", "onnx/config.json", "1_a/../config.json", "1_b/x.json"]
    chosen = select_files([*wanted, *folders, "model.safetensors"], REF)
    assert chosen == [*wanted, "1_Pooling/config.json", "model.safetensors"]


def test_repository_without_a_model() -> None:
    with pytest.raises(ModelNotFound, match=r"not a model .* it holds README\.md, data\.csv"):
        select_files(["README.md", "data.csv", "sub/config.json"], REF)
    with pytest.raises(ModelNotFound, match=r"it holds adapter_model\.safetensors, config\.json"):
        select_files(["config.json", "adapter_model.safetensors"], REF)


def test_files_of_models_that_see_are_selected() -> None:
    wanted = ["chat_template.json", "config.json", "preprocessor_config.json"]
    wanted += ["processor_config.json", "tokenizer.json"]
    chosen = select_files([*wanted, "README.md", "model.safetensors"], REF)
    assert sorted(chosen) == sorted([*wanted, "model.safetensors"])
