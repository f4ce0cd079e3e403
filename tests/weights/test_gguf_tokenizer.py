"""Tokenizer files rebuilt from GGUF vocabularies."""

import json

import gguf
import jinja2
import pytest
from make_gguf import add_value, finish
from tokenizer_references import DIRECTORY, SENTENCEPIECE, load_sentencepiece, read_reference
from tokenizers import Tokenizer, pre_tokenizers

from mlc_llm.errors import CorruptFile, StorageError, UnsupportedModel
from mlc_llm.prepare.gguf_tokenizer import write_tokenizer
from mlc_llm.text.formats.byte_level import recipe_names
from mlc_llm.text.formats.rwkv import read_vocabulary
from mlc_llm.text.formats.sentencepiece_file import ModelType, read_sentencepiece
from mlc_llm.text.tokenizer import Tokenizer as OwnTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]


def write(path, values):
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        if value is not None:
            add_value(writer, f"tokenizer.{key}", value)
    finish(writer)
    return path


def byte_level_values(**changes):
    special = ["<|end|>", "<|user|>", "[tool]"]
    tokens = [*special, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 3),
        "ggml.merges": MERGES,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 0,
        **{f"ggml.{key}": value for key, value in changes.items()},
    }


def sentencepiece_values(**changes):
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    scores = [0.0] * len(tokens)
    # In order of score, best first, as SentencePiece training leaves them.
    for token in ["th", "▁a", "he", "▁t", "the", "▁the", *"▁abehtx"]:
        scores.append(-float(len(tokens) - 259))
        tokens.append(token)
        types.append(NORMAL)
    tokens.append("▁▁x")
    types.append(USER_DEFINED)
    scores.append(-1000.0)
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": scores,
        "ggml.token_type": types,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        **{f"ggml.{key}": value for key, value in changes.items()},
    }


def rebuild(tmp_path, values):
    names = write_tokenizer(write(tmp_path / "m.gguf", values), tmp_path / "out")
    assert names == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    config, generation = (json.loads((tmp_path / "out" / name).read_text()) for name in names[1:])
    return Tokenizer.from_file(str(tmp_path / "out" / names[0])), config, generation


def test_byte_level(tmp_path):
    tokenizer, config, generation = rebuild(tmp_path, byte_level_values())
    encoding = tokenizer.encode("<|user|>hello wörld[tool]<|end|>")
    assert encoding.tokens == [
        *("<|user|>", "hello", "Ġw", "Ã", "¶", "r", "l", "d", "[tool]", "<|end|>")
    ]
    assert encoding.ids[0] == 1
    text = "hello  wörld 🙂\n\t12"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.decode([1, 0, 2]) == "[tool]"  # user-defined tokens are text
    assert config["bos_token"] == "<|user|>"
    assert config["eos_token"] == "<|end|>"
    assert config["add_bos_token"] is False
    assert "chat_template" not in config
    assert generation == {"bos_token_id": 1, "eos_token_id": 0}


def test_special_tokens_and_template_reach_the_configs(tmp_path):
    values = byte_level_values(
        add_bos_token=True, add_eos_token=True, eot_token_id=1, padding_token_id=0
    )
    values["chat_template"] = "{{ messages }}"
    tokenizer, config, generation = rebuild(tmp_path, values)
    assert tokenizer.encode("he").tokens == ["<|user|>", "he", "<|end|>"]
    assert tokenizer.encode("he", add_special_tokens=False).tokens == ["he"]
    assert config["chat_template"] == "{{ messages }}"
    assert config["pad_token"] == "<|end|>"
    assert config["add_bos_token"] is True
    assert generation == {"bos_token_id": 1, "eos_token_id": [0, 1], "pad_token_id": 0}


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "a's 123  b\n", ["a", "'s", "Ġ123", "Ġ", "Ġb", "Ċ"]),
        ("smollm", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "I'M 1234!\n\nb", ["I", "'M", "Ġ", "123", "4", "!ĊĊ", "b"]),
        ("qwen2", "I'M 12\n b", ["I", "'M", "Ġ", "1", "2", "Ċ", "Ġb"]),
        ("deepseek-llm", "ab 12, 一二\n", ["ab", "Ġ", "12", ",", "Ġ", "ä\u00b8ĢäºĮ", "Ċ"]),
        ("deepseek-coder", "ab 12.", ["ab", "Ġ", "1", "2", "."]),
        ("tekken", "helloWorld 1/\n", ["hello", "World", "Ġ", "1", "/Ċ"]),
        ("qwen35", "a\u0301b 12", ["aÌģb", "Ġ", "1", "2"]),
        ("gpt-4o", "HelloWorld's 1234/\n", ["Hello", "World's", "Ġ", "123", "4", "/Ċ"]),
        ("kimi-k2", "ab東京c 1234", ["ab", "æĿ±äº¬", "c", "Ġ", "123", "4"]),
        ("deepseek-v3", "ab 1234!x 東京", ["ab", "Ġ", "123", "4", "!x", "Ġ", "æĿ±äº¬"]),
        ("falcon", "a, 1234 b", ["a", ",", "Ġ", "123", "4", "Ġb"]),
        ("bloom", "ab cd, e", ["ab", "Ġcd", ",", "Ġe"]),
        ("viking", "ab 12", ["ab", "Ġ", "1", "2"]),
        ("bailingmoe", "I'M 12\nb", ["I", "'M", "Ġ", "1", "2", "Ċ", "b"]),
        ("seed-coder", "a!\nb", ["a", "!", "Ċ", "b"]),
        ("chameleon", "ab 1\tc", ["ab", "Ġ", "1", "ĉ", "c"]),
        ("glm4", "ab 1234", ["ab", "Ġ", "123", "4"]),
    ],
)
def test_text_is_cut_as_the_pre_tokenizer_says(tmp_path, name, text, pieces):
    tokenizer, _, _ = rebuild(tmp_path, byte_level_values(pre=name))
    found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


@pytest.mark.parametrize("name", recipe_names())
def test_every_pre_tokenizer_loads_and_round_trips(tmp_path, name):
    tokenizer, _, _ = rebuild(tmp_path, byte_level_values(pre=name))
    text = "Hello, wörld! 1234 一二 don't\n\n  x  "
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_llama3_takes_whole_words_and_begins_with_bos(tmp_path):
    values = byte_level_values(pre="llama-bpe")
    values["ggml.tokens"] = [*values["ggml.tokens"], "xyz"]  # no merge makes it
    values["ggml.token_type"] = [*values["ggml.token_type"], NORMAL]
    tokenizer, config, _ = rebuild(tmp_path, values)
    assert tokenizer.encode("xyz").tokens == ["<|user|>", "xyz"]
    assert config["add_bos_token"] is True


def test_sentencepiece(tmp_path):
    tokenizer, config, generation = rebuild(tmp_path, sentencepiece_values())
    assert tokenizer.encode("the a").tokens == ["<s>", "▁the", "▁a"]
    # "th" has a better score than "he", so "the" is th + e.
    assert tokenizer.encode("bthe", add_special_tokens=False).tokens == ["▁", "b", "the"]
    text = "the é 🙂 x"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert "<0xC3>" in tokenizer.encode(text).tokens
    assert tokenizer.encode("</s>", add_special_tokens=False).ids == [2]
    assert tokenizer.encode("a  x", add_special_tokens=False).tokens == ["▁a", "▁▁x"]
    assert config["unk_token"] == "<unk>"
    assert config["add_bos_token"] is True
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}


def test_sentencepiece_without_a_leading_space(tmp_path):
    values = sentencepiece_values(add_space_prefix=False, add_bos_token=False)
    tokenizer, _, _ = rebuild(tmp_path, values)
    assert tokenizer.encode("the a").tokens == ["the", "▁a"]
    assert tokenizer.decode(tokenizer.encode(" a").ids) == " a"


def test_merges_follow_the_scores(tmp_path):
    values = sentencepiece_values()
    scores = list(values["ggml.scores"])
    tokens = values["ggml.tokens"]
    th, he = tokens.index("th"), tokens.index("he")
    scores[th], scores[he] = scores[he], scores[th]
    tokenizer, _, _ = rebuild(tmp_path, values | {"ggml.scores": scores})
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert merges[0] == ["h", "e"]
    assert [pair for pair in merges if "".join(pair) == "the"] == [["th", "e"], ["t", "he"]]
    assert tokenizer.encode("he", add_special_tokens=False).tokens == ["▁", "he"]


def spm_values(name, **changes):
    """Return what llama.cpp's converter writes for one of the stored SentencePiece models."""
    model = read_sentencepiece(DIRECTORY / f"{name}.model")
    values = {
        "ggml.model": "t5" if model.model_type is ModelType.UNIGRAM else "llama",
        "ggml.tokens": [piece.text for piece in model.pieces],
        "ggml.scores": [piece.score for piece in model.pieces],
        "ggml.token_type": [int(piece.type) for piece in model.pieces],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_space_prefix": model.add_dummy_prefix,
        "ggml.remove_extra_whitespaces": model.remove_extra_whitespaces,
        "ggml.precompiled_charsmap": list(model.charsmap) or None,
    }
    return values | {f"ggml.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_ids_equal_those_of_sentencepiece(tmp_path, name):
    tokenizer, config, _ = rebuild(tmp_path, spm_values(name))
    original = load_sentencepiece(tmp_path / "original", name)
    for text in read_reference(name).texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text)
    is_unigram = name.startswith("unigram")
    assert (config["add_bos_token"], config["add_eos_token"]) == (not is_unigram, is_unigram)
    ends = [2] if is_unigram else []
    assert tokenizer.encode("a").ids[-1:] == (ends or original.encode("a")[-1:])


def test_unused_pieces_fill_up_a_vocabulary(tmp_path):
    values = spm_values("unigram_nfkc")
    values["ggml.tokens"] = [*values["ggml.tokens"], "[PAD500]"]
    values["ggml.scores"] = [*values["ggml.scores"], -1000.0]
    values["ggml.token_type"] = [*values["ggml.token_type"], 5]
    tokenizer, _, _ = rebuild(tmp_path, values)
    reference = read_reference("unigram_nfkc")
    found = [tokenizer.encode(text, add_special_tokens=False).ids for text in reference.texts]
    assert found == reference.ids


def test_wordpiece(tmp_path):
    words = ["hello", "un", "##aff", "##able", ",", "東"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    spelled = [w.removeprefix("##") if w.startswith("##") else f"▁{w}" for w in words]
    values = {
        "ggml.model": "bert",
        "ggml.tokens": [*special, "[unused0]", *spelled],
        "ggml.token_type": [CONTROL, UNKNOWN, *[CONTROL] * 3, NORMAL] + [NORMAL] * len(words),
        "ggml.unknown_token_id": 1,
        "ggml.cls_token_id": 2,
        "ggml.seperator_token_id": 3,
        "ggml.padding_token_id": 0,
        "ggml.mask_token_id": 4,
    }
    names = write_tokenizer(write(tmp_path / "m.gguf", values), tmp_path / "out")
    assert names == ["vocab.txt", "tokenizer_config.json", "generation_config.json"]
    lines = (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [*special, "[unused0]", *words]
    tokenizer = OwnTokenizer.load(tmp_path / "out")
    ids = tokenizer.encode("Hello, unaffable 東", add_special_tokens=True)
    assert [tokenizer.id_to_token(n) for n in ids] == [
        *("[CLS]", "hello", ",", "un", "##aff", "##able", "東", "[SEP]")
    ]
    values["ggml.tokens"] = [*special, "[unused0]", "▁Hello", *spelled[1:]]
    write_tokenizer(write(tmp_path / "m.gguf", values), tmp_path / "cased")
    tokenizer = OwnTokenizer.load(tmp_path / "cased")
    assert tokenizer.id_to_token(tokenizer.encode("Hello")[0]) == "Hello"


def rwkv_values(**changes):
    tokens = read_vocabulary(DIRECTORY / "rwkv_vocab_small.txt")
    spelled = [repr(token)[2:-1] for token in tokens.values()]
    return {
        "ggml.model": "rwkv",
        "ggml.tokens": ["<s>", *spelled, "[PAD999]"],
        "ggml.token_type": [CONTROL, *[NORMAL] * len(spelled), 5],
        "ggml.eos_token_id": 0,
        "ggml.eot_token_id": list(tokens.values()).index(b"\n\n") + 1,
        "chat_template": "rwkv-world",
        **{f"ggml.{key}": value for key, value in changes.items()},
    }


def test_rwkv(tmp_path):
    names = write_tokenizer(write(tmp_path / "m.gguf", rwkv_values()), tmp_path / "out")
    assert names == ["tokenizer_model", "tokenizer_config.json", "generation_config.json"]
    tokenizer = OwnTokenizer.load(tmp_path / "out")
    reference = read_reference("rwkv")
    for text, ids in zip(reference.texts, reference.ids, strict=True):
        assert tokenizer.encode(text) == ids
    assert (tokenizer.eos_token, tokenizer.token_to_id("<s>")) == ("<s>", 0)
    assert "chat_template" not in tokenizer.settings  # the name of one is none
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == 0
    assert tokenizer.bytes_of(generation["eos_token_id"][1]) == b"\n\n"


def test_unknown_pre_tokenizer_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", byte_level_values(pre="klingon"))
    with pytest.raises(UnsupportedModel, match=r"'klingon', which is not known.*llama-bpe"):
        write_tokenizer(path, tmp_path)


@pytest.mark.parametrize("kind", ["plamo2", "none", None])
def test_other_tokenizers_are_refused(tmp_path, kind):
    path = write(tmp_path / "m.gguf", byte_level_values(model=kind))
    with pytest.raises(UnsupportedModel, match=f"tokenizer of kind {kind!r}"):
        write_tokenizer(path, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (byte_level_values(tokens=None), "no vocabulary"),
        (byte_level_values(tokens=[1, 2]), "no vocabulary"),
        (byte_level_values(token_type=[1, 1]), "token types"),
        (byte_level_values(merges=None), "no merges"),
        (byte_level_values(merges=["h"]), "merge 'h' does not fit"),
        (byte_level_values(merges=["h z"]), "merge 'h z' does not fit"),
        (byte_level_values(eos_token_id=100_000), "eos token is 100000"),
        (byte_level_values(bos_token_id="one"), "bos_token_id is 'one'"),
        (byte_level_values(tokens=["a"] * 265), "holds a token twice"),
        (byte_level_values(token_type=[99] * 265), "99 is not a valid PieceType"),
        (spm_values("unigram_nfkc", precompiled_charsmap=[1, 2, 3]), "damaged map of characters"),
        (spm_values("unigram_nfkc", precompiled_charsmap=[1000]), "holds no bytes"),
        (
            rwkv_values(tokens=["<s>", "a\\q"], token_type=[CONTROL, NORMAL]),
            "an escape that is none",
        ),
        (rwkv_values(tokens=["<s>", "a"], token_type=[CONTROL, NORMAL]), "no token for byte"),
        (sentencepiece_values(scores=None), "scores does not fit"),
        (sentencepiece_values(scores=[1.0]), "scores does not fit"),
        (sentencepiece_values(scores=["x"] * 273), "something else than numbers"),
    ],
)
def test_contradictions(tmp_path, values, message):
    path = write(tmp_path / "m.gguf", values)
    with pytest.raises(CorruptFile, match=message):
        write_tokenizer(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "m.gguf", byte_level_values())
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="cannot write the tokenizer"):
        write_tokenizer(path, tmp_path / "out")


@pytest.mark.weights
def test_demo_model_encodes_its_chat_prompt(demo_gguf, tmp_path):
    write_tokenizer(demo_gguf, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    prompt = jinja2.Environment().from_string(config["chat_template"])
    text = prompt.render(
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
    )
    # fmt: off
    assert tokenizer.encode(text).ids == [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411,
        407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1,
        520, 9531, 198,
    ]
    # fmt: on
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
