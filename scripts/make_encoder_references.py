"""Make the tiny embedding models and the hidden states that encoder tests compare against.

Knows torch and transformers; run it as `make_references.py` says, in the same environment:

    references-venv/bin/python scripts/make_encoder_references.py [CASE ...]

Cases are described in `tests/encoder_references/cases.json`. Weights depend on the seed and the
tensor's name alone; states can differ in the last bit between CPUs.
"""

from __future__ import annotations

import json
import platform
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_references import BIAS_STD, NORM_STD, make_cases, write_tokenizer

REFERENCES = Path(__file__).parent.parent / "tests" / "encoder_references"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_case(case: dict[str, Any]) -> dict[str, Any]:
    """Write one checkpoint directory with its reference.npz; return its manifest entry."""
    directory = REFERENCES / case["name"]
    shutil.rmtree(directory, ignore_errors=True)
    config = transformers.AutoConfig.for_model(case["model_type"], **case["config"])
    model = getattr(transformers, case["model_class"])(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(random_tensor(case, name, tuple(parameter.shape))))
    model.save_pretrained(directory)
    if case["model_type"] == "bert":
        write_vocab(directory, case["config"]["vocab_size"])
    else:
        write_tokenizer(directory)
    write_sentence_files(directory, case.get("sentence_transformers"))
    model = getattr(transformers, case["model_class"]).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    base = model.eval().base_model
    generator = np.random.default_rng([case["seed"], zlib.crc32(b"inputs")])
    arrays = {}
    for index, length in enumerate(case["input_lens"]):
        token_ids = generator.integers(5, case["config"]["vocab_size"], length).astype(np.int32)
        with torch.no_grad():
            states = base(torch.from_numpy(token_ids.astype(np.int64))[None]).last_hidden_state[0]
        arrays[f"token_ids_{index}"], arrays[f"states_{index}"] = token_ids, states.numpy()
    np.savez(directory / "reference.npz", **arrays)
    path = directory / "config.json"
    content = {**json.loads(path.read_text()), **case.get("config_set", {})}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def random_tensor(case: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return weights spread widely enough that a mistake anywhere shows."""
    generator = np.random.default_rng([case["seed"], zlib.crc32(name.encode())])
    values = generator.standard_normal(shape, np.float32)
    if name.endswith(("norm.weight", "LayerNorm.weight")):
        return 1 + NORM_STD * values
    return (BIAS_STD if name.endswith(".bias") else case["weight_std"]) * values


def write_vocab(directory: Path, vocab_size: int) -> None:
    """Write a vocab.txt of special tokens, ASCII characters and letters that continue a word."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    letters = [f"##{chr(code)}" for code in range(ord("a"), ord("z") + 1)]
    tokens = [*SPECIAL_TOKENS, *characters, *letters]
    tokens += [f"[unused{number}]" for number in range(vocab_size - len(tokens))]
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))


def write_sentence_files(directory: Path, settings: dict[str, Any] | None) -> None:
    """Write what sentence-transformers puts beside a checkpoint."""
    if settings is None:
        return
    switches = {key: value for key, value in settings.items() if key.startswith("pooling_mode")}
    kinds = ["Transformer", "Pooling", *(["Normalize"] if settings.get("normalize") else [])]
    folders = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": folder,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (kind, folder) in enumerate(zip(kinds, folders, strict=False))
    ]
    (directory / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(switches, indent=2) + "\n")
    if "max_seq_length" in settings:
        limits = {"max_seq_length": settings["max_seq_length"], "do_lower_case": False}
        (directory / "sentence_bert_config.json").write_text(json.dumps(limits, indent=2) + "\n")


if __name__ == "__main__":
    make_cases(__doc__.splitlines()[0], REFERENCES, make_case)
