"""`show`: what it says of models here and on the hub, and what it must not fetch for that."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from hub import LocalHub
from manage import Run, files_of
from tiny import write_artifact, write_llama

from mlc_llm.artifact import LibraryMetadata, read_tensor_index
from mlc_llm.prepare import preview
from mlc_llm.prepare.cache import CacheHome

# Numbers of the tiny Llama: two tables of 256 x 64, norms, and two layers.
NUM_PARAMETERS = 2 * 256 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64)


def test_a_directory_is_described(run: Run, llama: Path) -> None:
    (llama / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Tiny\n")
    facts = run("show", str(llama), "--json", "--quantization", "q0f16").json
    assert facts["kind"] == "raw" and facts["is_here"] is True
    assert (facts["architecture"], facts["family"]) == ("LlamaForCausalLM", "llama")
    assert facts["problem"] is None
    assert facts["num_parameters"] == NUM_PARAMETERS
    assert facts["weights_bytes"] == 2 * NUM_PARAMETERS
    assert (facts["stored_as"], facts["quantization"]) == ("F32", "q0f16")
    assert facts["size_bytes"] == (llama / "model.safetensors").stat().st_size
    assert (facts["context_window_size"], facts["vocab_size"]) == (128, 256)
    assert facts["licence"] == "apache-2.0"
    # 2 layers, K and V, 2 heads of 16 float16 values each, for 128 tokens.
    (need,) = facts["memory"]
    assert need["context"] == 128 and need["kv_bytes"] == 128 * 2 * 2 * 2 * 16 * 2
    assert need["total_bytes"] > need["kv_bytes"] + facts["weights_bytes"]
    assert need["fits"] is True
    assert {file["name"] for file in facts["files"]} == set(files_of(llama))


def test_the_page_for_people(run: Run, llama: Path) -> None:
    done = run("show", str(llama))
    assert (done.code, done.err) == (0, "")
    lines = dict(line.split(None, 1) for line in done.out.splitlines() if " " in line.strip())
    assert lines["architecture"] == "LlamaForCausalLM"
    assert lines["parameters"] == f"{NUM_PARAMETERS:,}"
    assert lines["context"] == "128 tokens"
    assert "memory in q4f16_1: weights " in done.out
    assert max(len(line) for line in done.out.splitlines() if str(llama) not in line) <= 80


def test_longer_contexts_need_more(run: Run, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    needs = run("show", str(llama), "--json").json["memory"]
    assert [need["context"] for need in needs] == [2048, 8192, 16384]
    assert needs[1]["kv_bytes"] == 4 * needs[0]["kv_bytes"]


def test_the_template_and_the_licence_alone(run: Run, llama: Path) -> None:
    template = json.loads((llama / "tokenizer_config.json").read_text())["chat_template"]
    assert run("show", str(llama), "--template").out == template + "\n"
    none = run("show", str(llama), "--license")
    assert none.code == 1 and "name no licence" in none.err
    (llama / "LICENSE").write_text("Do as you like.\n")
    assert run("show", str(llama), "--license").out == "Do as you like.\n"
    both = run("show", str(llama), "--license", "--json")
    assert both.code == 2 and "exclude one another" in both.err


def test_a_repository_is_described_without_its_weights(
    run: Run, home: CacheHome, hub: LocalHub, published: str, llama: Path
) -> None:
    local = run("show", str(llama), "--json").json
    hub.requests.clear()
    facts = run("show", published, "--json").json
    assert facts["is_here"] is False and facts["path"] is None
    for key in ("num_parameters", "memory", "stored_as", "size_bytes", "chat_template_chars"):
        if key != "memory":
            assert facts[key] == local[key], key
    assert [n["kv_bytes"] for n in facts["memory"]] == [n["kv_bytes"] for n in local["memory"]]
    (asked,) = hub.downloads("model.safetensors")
    assert asked.range == "bytes=0-65535"
    assert not hub.downloads("tokenizer.json") and not hub.downloads("training.log")
    assert not home.root.exists()
    assert "on the hub, not downloaded" in run("show", "user/tiny").out
    run("pull", published)
    assert run("show", published, "--json").json["is_here"] is True


def test_a_header_longer_than_the_first_piece_is_read_on(
    run: Run, hub: LocalHub, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(preview._FIRST_BYTES, ".safetensors", 64)
    for hub.ignores_ranges in (False, True):
        hub.add("user/tiny", files_of(llama))
        hub.requests.clear()
        assert run("show", "user/tiny", "--json").json["stored_as"] == "F32"
        assert len(hub.downloads("model.safetensors")) == 2


def test_converted_repositories_and_copies(run: Run, hub: LocalHub, llama: Path) -> None:
    done = run("pull", str(llama), "--quantization", "q4f16_1")
    artifact = Path(done.out.strip())
    size = sum(record.size_bytes for record in read_tensor_index(artifact).records.values())
    files = {n: c for n, c in files_of(artifact).items() if not n.startswith(".")}
    hub.add("user/tiny-MLC", files)
    facts = run("show", "user/tiny-MLC", "--json").json
    assert (facts["kind"], facts["stored_as"]) == ("converted", "q4f16_1")
    assert facts["size_bytes"] == facts["weights_bytes"] == size
    assert facts["num_parameters"] == NUM_PARAMETERS
    assert not hub.downloads("params_shard_0.bin")
    assert run("show", str(llama), "--json").json["converted_copies"] == ["q4f16_1"]
    assert run("show", artifact.name, "--json").json["size_bytes"] == size


def test_an_unsupported_architecture_is_described_all_the_same(run: Run, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(
        json.dumps({**config, "architectures": ["NovelForCausalLM"], "model_type": "novel"})
    )
    facts = run("show", str(llama), "--json").json
    assert facts["architecture"] == "NovelForCausalLM" and facts["family"] is None
    assert "architecture NovelForCausalLM is not supported" in facts["problem"]
    assert facts["num_parameters"] == NUM_PARAMETERS and facts["memory"] == []
    assert "no: architecture" in run("show", str(llama)).out


@pytest.mark.cpu
def test_temporary_memory_is_known_once_compiled(run: Run, home: CacheHome, llama: Path) -> None:
    before = run("show", str(llama), "--json", "--quantization", "q0f16").json["memory"][-1]
    assert run("pull", str(llama), "--compile", "--quantization", "q0f16").code == 0
    after = run("show", str(llama), "--json", "--quantization", "q0f16").json["memory"][-1]
    (path,) = home.library_directory.glob("*/metadata.json")
    known = LibraryMetadata.from_json(path.read_text(), str(path)).memory_usage["forward"]
    assert after["total_bytes"] - before["total_bytes"] == known > 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("no-such-thing", 1, "neither a path, nor a repository"),
        ("user/unknown", 1, "does not exist"),
        ("{tmp}", 1, "is not a model"),
        ("{llama} --quantization q9", 2, "q9"),
        ("{broken}", 1, "is not valid JSON"),
        ("{artifact}", 1, "lacks"),
    ],
)
def test_mistakes_of_a_show(
    run: Run, llama: Path, tmp_path: Path, words: str, code: int, message: str
) -> None:
    broken = write_llama(tmp_path / "models" / "broken")
    (broken / "config.json").write_text("{")
    artifact = write_artifact(tmp_path / "models" / "artifact", model_config={})
    names = {"tmp": tmp_path, "llama": llama, "broken": broken, "artifact": artifact}
    done = run("show", *words.format(**names).split())
    assert (done.code, done.out) == (code, ""), done.err
    assert message in done.err and "Traceback" not in done.err


def test_damaged_headers_on_the_hub_are_told(run: Run, hub: LocalHub, llama: Path) -> None:
    files = files_of(llama)
    hub.add("user/bad", {**files, "model.safetensors": b"\xff" * 100_000})
    bad = run("show", "user/bad")
    assert bad.code == 1 and "claims a header" in bad.err
    hub.add("user/bad-GGUF", {"m.gguf": b"no model" * 100})
    gguf = run("show", "user/bad-GGUF")
    assert gguf.code == 1 and "m.gguf" in gguf.err


def write_gguf(path: Path) -> Path:
    """Write a Llama as GGUF, with a vocabulary that makes its header long."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    tokens = [f"token number {number:050}" for number in range(2000)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    shapes = {
        "token_embd": (2000, 64),
        "output_norm": (64,),
        "output": (2000, 64),
        "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,),
        **{"blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64)},
        **{"blk.0.attn_output": (64, 64), "blk.0.ffn_down": (64, 96)},
        **{"blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64)},
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_here_and_on_the_hub(
    run: Run, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.F16.gguf")
    here = run("show", str(path), "--json").json
    assert (here["kind"], here["architecture"], here["stored_as"]) == ("GGUF", "llama", "F16")
    assert here["problem"] is None and here["licence"] == "mit"
    assert (
        here["num_parameters"] == 2 * 2000 * 64 + 3 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    )
    hub.add("user/tiny-GGUF", {path.name: path.read_bytes()})
    monkeypatch.setitem(preview._FIRST_BYTES, ".gguf", 1 << 14)
    there = run("show", "user/tiny-GGUF", "--json").json
    for key in ("num_parameters", "stored_as", "size_bytes", "licence", "context_window_size"):
        assert there[key] == here[key], key
    assert run("show", "user/tiny-GGUF", "--template").out == "{{ messages[0]['content'] }}\n"
    ranges = [request.range for request in hub.downloads(path.name)]
    # The header has some 150 kB; the weights, 560 kB, begin behind it.
    assert ranges[:3] == ["bytes=0-16383", "bytes=16384-65535", "bytes=65536-262143"]
    assert len(set(ranges)) == 3


def test_models_that_see_say_what(run: Run) -> None:
    path = Path(__file__).parents[1] / "image_references" / "llava"
    assert run("show", str(path), "--json").json["images"] == {"size": 30, "num_rows": 9}
    lines = run("show", str(path)).out.splitlines()
    assert "images        30 x 30 pixels, 9 tokens each" in lines
    path = path.with_name("phi3_v")
    facts = run("show", str(path), "--json").json["images"]
    assert facts == {"size": 24, "num_rows": 85, "max_tiles": 6}
    lines = run("show", str(path)).out.splitlines()
    assert "images        up to 6 tiles of 24 x 24 pixels, up to 85 tokens" in lines
