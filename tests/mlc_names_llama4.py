"""Parameter names and layouts of Llama 4: those of MLC LLM, but for the experts.

Part of the independent packer: shares no code with mlc_llm. MLC LLM never quantizes these experts,
nine tenths of the model, and keeps them as raw parameters; here they are layers like those of other
families, (experts, out, in).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = Mapping[str, Array]

MODEL_TYPES = ("llama4", "llama4_text")


def fuse(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield parameters under the names that artifacts have."""
    del config
    for name, weight in weights.items():
        if name.startswith(("vision_model.", "multi_modal_projector.")) or ".up_proj." in name:
            continue
        ours = name.removeprefix("language_model.")
        if ".experts." in name:
            yield ours + ".weight", np.stack([matrix.T for matrix in weight])
        elif ".gate_proj." in name:
            joined = [weight, weights[name.replace(".gate_proj.", ".up_proj.")]]
            yield ours.replace("gate_proj", "gate_up_proj"), np.concatenate(joined)
        else:
            yield ours, weight


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of MLC LLM's class of the family, without the limits all have."""
    text = dict(config.get("text_config", config))
    rope = dict(text.pop("rope_parameters"))
    base = rope.pop("rope_theta")
    is_scaled = rope["rope_type"] != "default"
    text.update(rope_theta=base, rope_scaling=rope if is_scaled else None)
    return {"text_config": text, "vocab_size": text["vocab_size"]}
