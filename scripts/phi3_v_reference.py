"""Phi-3-vision put together from CLIP and Phi-3 of transformers, which has no class for it.

Knows torch, transformers and Pillow. What the published model's own code does to images and their
features is said here a second time, in other words than in `mlc_llm`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.numpy import save_file
from torch.nn import functional

# How the published repositories write a chat; contents are texts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{{ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "See."},
    {"role": "user", "content": "<|image_1|>\nwhat?<|image_2|>\n"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and<|image_3|>\n"},
]
TOWER = "model.vision_embed_tokens.img_processor.vision_model."


class Phi3V(torch.nn.Module):
    """The model of a case, in float32."""

    def __init__(self, case: dict[str, Any], fill: Callable[[str, Any], np.ndarray]) -> None:
        super().__init__()
        config = case["config"]
        vision = transformers.CLIPVisionConfig(**config["vision_config"])
        text = {name: value for name, value in config.items() if name in case["text_fields"]}
        rope = dict(config.get("rope_scaling") or {"type": "default"})
        kind = {"su": "longrope"}.get(rope.pop("type"), "default")
        text["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0, **rope}
        if kind == "longrope":
            trained = config["original_max_position_embeddings"]
            text["rope_parameters"]["original_max_position_embeddings"] = trained
        options = {"attn_implementation": "eager"}
        self.tower = transformers.CLIPVisionModel._from_config(vision, **options).eval()
        phi3 = transformers.Phi3Config(**text)
        self.text = transformers.Phi3ForCausalLM._from_config(phi3, **options).eval()
        width, hidden = 4 * vision.hidden_size, config["hidden_size"]
        self.first = torch.nn.Linear(width, hidden)
        self.second = torch.nn.Linear(hidden, hidden)
        self.sub_gn = torch.nn.Parameter(torch.zeros(1, 1, 1, width))
        self.glb_gn = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.size, self.order = vision.image_size, config["embd_layer"]["hd_transform_order"]
        with torch.no_grad():
            for name, tensor in self.published().items():
                tensor.copy_(torch.from_numpy(fill(name, tuple(tensor.shape))))

    def published(self) -> dict[str, torch.Tensor]:
        """Return the parameters under the names that published checkpoints have."""
        named = {name: p for name, p in self.text.named_parameters()}
        for name, parameter in self.tower.named_parameters():
            named[TOWER + name.removeprefix("vision_model.")] = parameter
        prefix = "model.vision_embed_tokens."
        for number, layer in (("0", self.first), ("2", self.second)):
            named[f"{prefix}img_projection.{number}.weight"] = layer.weight
            named[f"{prefix}img_projection.{number}.bias"] = layer.bias
        return {**named, f"{prefix}sub_GN": self.sub_gn, f"{prefix}glb_GN": self.glb_gn}

    def save(self, directory: Path, config: dict[str, Any]) -> None:
        """Write a checkpoint as the published ones are."""
        tensors = {name: p.detach().numpy() for name, p in self.published().items()}
        tensors["model.vision_embed_tokens.wte.weight"] = tensors["model.embed_tokens.weight"]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        whole = {
            "architectures": ["Phi3VForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_phi3_v.Phi3VConfig"},
            "model_type": "phi3_v",
            "torch_dtype": "float32",
            **config,
        }
        text = json.dumps(whole, indent=2, sort_keys=True)
        (directory / "config.json").write_text(text + "\n")

    def rows(self, views: torch.Tensor, across: int, down: int) -> torch.Tensor:
        """Return the rows of an image, whose views are the whole and then its tiles."""
        states = self.tower(views, output_hidden_states=True).hidden_states[-2][:, 1:]
        side = math.isqrt(states.shape[1])
        maps = states.unflatten(1, (side, side))  # views, lines, columns, width
        lines = [torch.cat(list(line), 1) for line in maps[1:].split(across)]
        assert len(lines) == down
        whole, tiles = self._lines(maps[0]), self._lines(torch.cat(lines, 0))
        parts = [tiles, self.glb_gn[0], whole]
        merged = torch.cat(parts if self.order == "sub_glb" else parts[::-1])
        return self.second(functional.gelu(self.first(merged)))

    def _lines(self, features: torch.Tensor) -> torch.Tensor:
        """Join squares of four features and end each line, (lines, columns, width) -> rows."""
        corners = [features[i::2, j::2] for i in (0, 1) for j in (0, 1)]
        joined = torch.cat(corners, -1)
        ends = self.sub_gn[0].expand(len(joined), 1, -1)
        return torch.cat([joined, ends], 1).flatten(0, 1)

    def logits(self, token_ids: list[int], image_token: int, rows: torch.Tensor) -> np.ndarray:
        """Return (n, vocab) float32, rows of images in place of their tokens."""
        tokens = torch.tensor(token_ids)
        with torch.no_grad():
            embeds = self.text.get_input_embeddings()(tokens)
            embeds[tokens == image_token] = rows
            found: np.ndarray = self.text(inputs_embeds=embeds[None], use_cache=False).logits[0]
        return np.asarray(found)


def prepare(
    image: Image.Image, size: int, settings: dict[str, Any]
) -> tuple[torch.Tensor, int, int]:
    """Return the views of an image, and how many tiles are across and down."""
    image = image.convert("RGB")
    is_high = image.height > image.width
    if is_high:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    fitting = [n for n in range(1, 100) if n * np.ceil(n / ratio) <= settings["num_crops"]]
    width = max(fitting) * size
    image = image.resize((width, int(width / ratio)), Image.Resampling.BILINEAR)
    lacking = -image.height % size
    border = (0, lacking // 2, 0, lacking - lacking // 2)
    image = ImageOps.expand(image, border, fill=(255, 255, 255))
    if is_high:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(settings[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    pixels = (pixels - mean) / std
    whole = functional.interpolate(pixels[None], size=(size, size), mode="bicubic")
    across, down = image.width // size, image.height // size
    tiles = [
        pixels[:, y : y + size, x : x + size]
        for y in range(0, image.height, size)
        for x in range(0, image.width, size)
    ]
    return torch.cat([whole, torch.stack(tiles)]), across, down
