"""RWKV-5 and RWKV-6 for `make_references.py`: transformers has neither.

Checkpoints get the names and shapes of RWKV's own code on Hugging Face; logits come from the
package `rwkv` (0.8.32) of the architecture's authors, which knows another format:

    references-venv/bin/pip install rwkv==0.8.32 --no-deps
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

_FINCH_PARTS = "xwkvrg"
_RENAMED = (
    ("rwkv.", ""),
    ("embeddings.", "emb."),
    (".attention.", ".att."),
    (".feed_forward.", ".ffn."),
    (".pre_ln.", ".ln0."),
    ("time_mix_key", "time_mix_k"),
    ("time_mix_value", "time_mix_v"),
    ("time_mix_receptance", "time_mix_r"),
    ("time_mix_gate", "time_mix_g"),
)


def write_checkpoint(
    case: dict[str, Any],
    directory: Path,
    random_tensor: Callable[[dict[str, Any], str, tuple[int, ...]], np.ndarray],
) -> None:
    """Write config.json and random weights of a case."""
    config = {
        **case["config"],
        "model_type": case["model_type"],
        "architectures": [f"{case['model_type'].capitalize()}ForCausalLM"],
        "dtype": "float32",
    }
    weights = {
        name: _spread(name, random_tensor(case, name, shape))
        for name, shape in _shapes(config).items()
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _spread(name: str, values: np.ndarray) -> np.ndarray:
    """Move random values to where those of trained models are."""
    if name.endswith(("ln1.weight", "ln2.weight", "pre_ln.weight", "ln_x.weight", "ln_out.weight")):
        return 1 + values
    if ".time_mix_" in name or (".time_maa_" in name and not name.endswith(("_w1", "_w2"))):
        return 0.5 + values
    # Decays between half and nearly all of a state.
    return 4 * values - 2 if name.endswith("time_decay") else values


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = (width // config["head_size"], config["head_size"])
    is_finch = config["model_type"] == "rwkv6"
    shapes: dict[str, tuple[int, ...]] = {"rwkv.embeddings.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        block = f"rwkv.blocks.{layer}."
        for norm in ("ln1", "ln2", "attention.ln_x", *(["pre_ln"] if layer == 0 else [])):
            shapes |= {f"{block}{norm}.{leaf}": (width,) for leaf in ("weight", "bias")}
        for part in ("receptance", "key", "value", "gate", "output"):
            shapes[f"{block}attention.{part}.weight"] = (width, width)
        shapes[f"{block}attention.time_faaaa"] = heads
        shapes[f"{block}attention.time_decay"] = (1, 1, width) if is_finch else heads
        shapes[f"{block}feed_forward.key.weight"] = (wide, width)
        shapes[f"{block}feed_forward.receptance.weight"] = (width, width)
        shapes[f"{block}feed_forward.value.weight"] = (width, wide)
        mixes = [f"attention.time_mix_{part}" for part in ("key", "value", "receptance", "gate")]
        mixes += ["feed_forward.time_mix_key", "feed_forward.time_mix_receptance"]
        if is_finch:
            mixes = [f"attention.time_maa_{part}" for part in _FINCH_PARTS]
            mixes += ["feed_forward.time_maa_k", "feed_forward.time_maa_r"]
            shapes[f"{block}attention.time_maa_w1"] = (width, 5 * 32)
            shapes[f"{block}attention.time_maa_w2"] = (5, 32, width)
            shapes[f"{block}attention.time_decay_w1"] = (width, 64)
            shapes[f"{block}attention.time_decay_w2"] = (64, width)
        shapes |= {f"{block}{name}": (1, 1, width) for name in mixes}
    shapes |= {f"rwkv.ln_out.{leaf}": (width,) for leaf in ("weight", "bias")}
    shapes["head.weight"] = (vocab, width)
    return shapes


class PackageModel:
    """A stored checkpoint in the package; called like a model of transformers."""

    def __init__(self, directory: Path) -> None:
        os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0", RWKV_V7_ON="0")
        from rwkv.model import RWKV

        weights = {}
        for name, array in load_file(directory / "model.safetensors").items():
            for old, new in _RENAMED:
                name = name.replace(old, new)
            weights[name] = torch.from_numpy(array.copy())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pth"
            torch.save(weights, path)
            self._model = RWKV(model=str(path), strategy="cpu fp32")

    def __call__(self, tokens: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Return `logits` (1, n, vocab) of tokens (1, n)."""
        del use_cache
        logits, _ = self._model.forward(tokens[0].tolist(), None, full_output=True)
        return SimpleNamespace(logits=logits.reshape(1, tokens.shape[1], -1).float())
