"""Make the tiny checkpoints and reference logits that parity tests compare against.

Knows torch and transformers, which nothing else here needs. Run in an environment of its own,

    python -m venv references-venv
    references-venv/bin/pip install torch==2.13.0 transformers==5.23.0
    references-venv/bin/python scripts/make_references.py [CASE ...]

torch 2.13.0 (CPU) and transformers 5.23.0 made the stored files; `manifest.json` beside them says
which versions made each case. Cases are described in `tests/references/cases.json`. Weights depend
on the seed and the tensor's name alone; logits can differ in the last bit between CPUs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import reference_layouts
import rwkv_references
import safetensors
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

REFERENCES = Path(__file__).parent.parent / "tests" / "references"
GREEDY_STEPS = 20
# Far above float32 noise, so that a right implementation cannot pick another token.
MIN_GREEDY_MARGIN = 0.03
MIN_GREEDY_KINDS = 10  # among the 20 tokens, or repetition would hide mistakes
NORM_STD = 0.3
BIAS_STD = 0.3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_cases(
    description: str, references: Path, make: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Make the cases that the command line names, or all of them, and enter them in the manifest.

    description: of the program. references: where `cases.json` is; make returns a manifest entry.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", metavar="CASE", help="default: every case")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    cases = json.loads((references / "cases.json").read_text())
    unknown = set(names) - {case["name"] for case in cases}
    if unknown:
        parser.error(f"cases.json has no {', '.join(sorted(unknown))}")
    manifest_path = references / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    for case in cases:
        if not names or case["name"] in names:
            manifest[case["name"]] = make(case)
            print(case["name"], manifest[case["name"]])
    ordered = {case["name"]: manifest[case["name"]] for case in cases if case["name"] in manifest}
    manifest_path.write_text(json.dumps(ordered, indent=1) + "\n")


def make_case(case: dict[str, Any]) -> dict[str, Any]:
    """Write one checkpoint directory with its reference.npz; return its manifest entry."""
    directory = REFERENCES / case["name"]
    shutil.rmtree(directory, ignore_errors=True)
    write_checkpoint(case, directory)
    write_tokenizer(directory)
    # Read back what was stored: rounded weights and a rewritten config are part of the reference.
    model = load_model(case, directory)
    generator = np.random.default_rng([case["seed"], zlib.crc32(b"prompt")])
    vocab_size = case["config"]["vocab_size"]
    token_ids = generator.integers(3, vocab_size, case["prompt_len"]).astype(np.int32)
    logits = compute_logits(model, token_ids)
    greedy_tokens, margin = continue_greedily(model, token_ids)
    if margin < MIN_GREEDY_MARGIN:
        raise SystemExit(
            f"{case['name']}: greedy margin {margin:.4f} is too small, change the seed"
        )
    if len(set(greedy_tokens.tolist())) < MIN_GREEDY_KINDS:
        raise SystemExit(f"{case['name']}: greedy text repeats itself, change the seed")
    np.savez(
        directory / "reference.npz",
        token_ids=token_ids,
        logits=logits,
        greedy_tokens=greedy_tokens,
    )
    reference_layouts.rewrite(case, directory)
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "logits_std": round(float(logits.std()), 3),
        "greedy_margin": round(margin, 3),
    }


def load_model(case: dict[str, Any], directory: Path) -> Any:
    """Return the model of a checkpoint, to be called with token ids (1, n)."""
    if "package" in case:
        return rwkv_references.PackageModel(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return reference_layouts.as_family(case, model)


def write_checkpoint(case: dict[str, Any], directory: Path) -> None:
    """Save a model with random weights as transformers does, then apply the case's config edits."""
    if "package" in case:
        rwkv_references.write_checkpoint(case, directory, random_tensor)
        return
    config = transformers.AutoConfig.for_model(
        case.get("transformers_type", case["model_type"]), **case["config"]
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Biases of the choice of experts are buffers there, of zeros.
        biases = [item for item in model.named_buffers() if item[0].endswith("correction_bias")]
        for name, tensor in [*model.named_parameters(), *biases]:
            tensor.copy_(torch.from_numpy(random_tensor(case, name, tuple(tensor.shape))))
    model = model.to(getattr(torch, case.get("dtype", "float32")))
    model.save_pretrained(directory, max_shard_size=case.get("max_shard_size", "1GB"))
    path = directory / "config.json"
    data = json.loads(path.read_text())
    if case.get("old_config"):
        data = to_old_style(data)
    for key in case.get("config_drop", ()):
        del data[key]
    data.update(case.get("config_set", {}))
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def random_tensor(case: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return weights spread widely enough that a mistake anywhere shows in the logits."""
    generator = np.random.default_rng([case["seed"], zlib.crc32(name.encode())])
    values = generator.standard_normal(shape, np.float32)
    norms = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
    if name.endswith(norms) or ".norms." in name:
        return case.get("norm_mean", 1) + NORM_STD * values
    if name.endswith(".bias"):
        return BIAS_STD * values
    # Where a table is scaled and also the output layer, its own token would always win.
    std = case["weight_std"]
    return (case.get("table_std", std) if "embed_tokens" in name else std) * values


def to_old_style(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a transformers 5 config.json as releases up to 4.55 wrote it."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    old["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    old["torch_dtype"] = old.pop("dtype")
    old["transformers_version"] = "4.44.0"
    return old


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of three special tokens and the 128 ASCII characters, one token each."""
    specials = ["<unk>", "<s>", "</s>"]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [byte_level.pre_tokenize_str(chr(code))[0][0] for code in range(128)]
    vocab = {token: token_id for token_id, token in enumerate(specials + characters)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(directory)


def compute_logits(model: Any, token_ids: np.ndarray) -> np.ndarray:
    """Return (n, vocab) float32 logits of one sequence, computed without a cache."""
    tokens = torch.from_numpy(token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits: np.ndarray = model(tokens, use_cache=False).logits[0].numpy()
    return logits


def continue_greedily(model: Any, token_ids: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the next tokens by argmax, and the smallest lead of a winner over the second."""
    tokens, margin = list(token_ids), float("inf")
    for _ in range(GREEDY_STEPS):
        logits = compute_logits(model, np.array(tokens))[-1]
        second, first = np.sort(logits)[-2:]
        margin = min(margin, float(first - second))
        tokens.append(int(logits.argmax()))
    return np.array(tokens[len(token_ids) :], np.int32), margin


if __name__ == "__main__":
    make_cases(__doc__.splitlines()[0], REFERENCES, make_case)
