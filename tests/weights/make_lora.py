"""Write LoRA adapters as PEFT does."""

import json

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "target_modules": ["q_proj"],
    "modules_to_save": None,
}


def make_pair(rng, outputs, inputs, rank=4):
    down = rng.standard_normal((rank, inputs)).astype(np.float32)
    return down, rng.standard_normal((outputs, rank)).astype(np.float32)


def write_adapter(directory, tensors, **config):
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(whole, directory / "adapter_model.safetensors")
    return directory


def pair_of(module, down, up):
    return {
        f"base_model.model.{module}.lora_A.weight": down,
        f"base_model.model.{module}.lora_B.weight": up,
    }
