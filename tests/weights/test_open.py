"""Finding out what a path holds, and saying what is wrong with it."""

import pytest
from make_gguf import make_tensors, write_gguf

from mlc_llm.errors import CorruptFile, ModelNotFound, OptionError, UnsupportedModel
from mlc_llm.weights.gguf import GGUFSource
from mlc_llm.weights.huggingface import HuggingFaceSource
from mlc_llm.weights.open import open_source


@pytest.fixture
def gguf_path(tmp_path):
    (tmp_path / "gguf").mkdir()
    return write_gguf(tmp_path / "gguf" / "model.gguf", make_tensors())


@pytest.mark.parametrize("source_format", ["auto", "huggingface-safetensor"])
def test_huggingface_directory(hf_dir, tensors, source_format):
    source = open_source(hf_dir, source_format)
    assert isinstance(source, HuggingFaceSource)
    assert sorted(source.names()) == sorted(tensors)
    assert isinstance(open_source(hf_dir / "config.json", source_format), HuggingFaceSource)


@pytest.mark.parametrize("source_format", ["auto", "gguf"])
def test_gguf_file_or_its_directory(gguf_path, source_format):
    assert isinstance(open_source(gguf_path, source_format), GGUFSource)
    assert isinstance(open_source(gguf_path.parent, source_format), GGUFSource)
    renamed = gguf_path.rename(gguf_path.with_name("model"))
    assert isinstance(open_source(renamed, source_format), GGUFSource)


def test_safetensors_go_before_gguf(hf_dir):
    write_gguf(hf_dir / "model.gguf", make_tensors())
    assert isinstance(open_source(hf_dir), HuggingFaceSource)
    assert isinstance(open_source(hf_dir, "gguf"), GGUFSource)


def test_several_gguf_files_are_not_guessed_from(gguf_path):
    write_gguf(gguf_path.with_name("other.gguf"), make_tensors())
    with pytest.raises(ModelNotFound, match=r"2 GGUF models \(model\.gguf, other\.gguf\)"):
        open_source(gguf_path.parent)


def test_parts_of_a_split_model_are_one(tmp_path):
    tensors = make_tensors()
    write_gguf(tmp_path / "m-00001-of-00002.gguf", tensors)
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {})
    assert len(open_source(tmp_path).names()) == len(tensors)


def test_nothing_there(tmp_path):
    with pytest.raises(ModelNotFound, match="does not exist; give a Hugging Face directory"):
        open_source(tmp_path / "absent")
    with pytest.raises(ModelNotFound, match="is empty"):
        open_source(tmp_path)
    with pytest.raises(ModelNotFound, match=r"holds no \.gguf file"):
        open_source(tmp_path, "gguf")


def test_a_directory_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelNotFound, match=r"has no config\.json, so it is not a model"):
        open_source(tmp_path)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnsupportedModel, match=r"notes\.txt is not a model"):
        open_source(tmp_path / "notes.txt")
    (tmp_path / "fake.gguf").write_text("hello")
    with pytest.raises(CorruptFile, match="is not a GGUF file"):
        open_source(tmp_path / "fake.gguf")
    with pytest.raises(UnsupportedModel, match="is not a directory"):
        open_source(tmp_path / "notes.txt", "huggingface-safetensor")


def test_one_safetensors_file(hf_dir):
    with pytest.raises(UnsupportedModel, match="give its directory"):
        open_source(hf_dir / "model.safetensors")


def test_no_weights(hf_dir):
    (hf_dir / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"has a config\.json but no weights"):
        open_source(hf_dir)
    (hf_dir / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CorruptFile, match=r"pytorch_model\.bin is not a PyTorch checkpoint"):
        open_source(hf_dir)


def test_converted_directories_are_told_apart(hf_dir):
    (hf_dir / "mlc-chat-config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="is converted already"):
        open_source(hf_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "\udcff"}'])
def test_damaged_config(hf_dir, text):
    (hf_dir / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CorruptFile, match=r"config\.json"):
        open_source(hf_dir)


def test_config_that_is_a_directory(hf_dir):
    (hf_dir / "config.json").unlink()
    (hf_dir / "config.json").mkdir()
    with pytest.raises(ModelNotFound, match="cannot be read"):
        open_source(hf_dir)


def test_unknown_format(hf_dir):
    with pytest.raises(OptionError, match=r"'ggml' is not known; choose one of auto, .*gguf"):
        open_source(hf_dir, "ggml")
