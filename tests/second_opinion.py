"""Logits of every family by plain NumPy, which tests compare against; a module for each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy_deepseek
import numpy_dense
import numpy_gpt
import numpy_gpt_oss
import numpy_later
import numpy_llama4
import numpy_model
import numpy_recurrent
from numpy.typing import NDArray


def forward(
    config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]], token_ids: Sequence[int]
) -> NDArray[np.float64]:
    """Return logits (n, vocab) of one sequence; weights have Hugging Face names, any dtype."""
    if config["model_type"] in numpy_dense.MODEL_TYPES:
        return numpy_dense.forward(config, weights, token_ids)
    if config["model_type"] in numpy_later.MODEL_TYPES:
        return numpy_later.forward(config, weights, token_ids)
    if config["model_type"] in numpy_deepseek.MODEL_TYPES:
        return numpy_deepseek.forward(config, weights, token_ids)
    if config["model_type"] in numpy_gpt.MODEL_TYPES:
        return numpy_gpt.forward(config, weights, token_ids)
    if config["model_type"] in numpy_gpt_oss.MODEL_TYPES:
        return numpy_gpt_oss.forward(config, weights, token_ids)
    if config["model_type"] in numpy_llama4.MODEL_TYPES:
        return numpy_llama4.forward(config, weights, token_ids)
    if config["model_type"] in numpy_recurrent.MODEL_TYPES:
        return numpy_recurrent.forward(config, weights, token_ids)
    return numpy_model.forward(config, weights, token_ids)
