"""Make the tiny models that take images, and what transformers computes of images with them.

Knows torch, transformers and Pillow; run it as `make_references.py` says, in the same environment
with Pillow:

    references-venv/bin/pip install pillow
    references-venv/bin/python scripts/make_image_references.py [CASE ...]

Cases are described in `tests/image_references/cases.json`. Weights depend on the seed and the
tensor's name alone; logits can differ in the last bit between CPUs.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phi3_v_reference
import PIL
import torch
import transformers
from make_references import (
    BIAS_STD,
    GREEDY_STEPS,
    MIN_GREEDY_KINDS,
    NORM_STD,
    make_cases,
    write_tokenizer,
)
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

REFERENCES = Path(__file__).parent.parent / "tests" / "image_references"
# As wide as high, wider and higher; the last has an alpha channel.
IMAGES = {"square.png": (40, 40), "wide.png": (53, 31), "high.png": (29, 47)}
# And one much wider, for models that see tiles of images.
STRIP = {"strip.png": (90, 25)}
IMAGE_TOKEN = "<image>"
MIN_GREEDY_MARGIN = 0.02
# What llava-hf's repositories bring, in fewer words: images of a message go before its texts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "See."}]},
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}, {"type": "image"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "two things"}]},
    {"role": "user", "content": [{"type": "text", "text": "and that?"}, {"type": "image"}]},
]
CHAT_IMAGES = ["wide.png", "high.png", "wide.png"]
TILED_IMAGES = ["strip.png", "high.png", "strip.png"]


def make_any_case(case: dict[str, Any]) -> dict[str, Any]:
    """Write one checkpoint directory with its reference.npz; return its manifest entry."""
    make = make_tiled_case if case["model_type"] == "phi3_v" else make_case
    make(case)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
    }


def write_images() -> None:
    """Write the images, if they are not there: noise at two scales, so that every filter shows."""
    for seed, (name, (width, height)) in enumerate((IMAGES | STRIP).items()):
        path = REFERENCES / name
        if path.exists():
            continue
        generator = np.random.default_rng(seed)
        channels = 4 if name == "high.png" else 3
        coarse = generator.integers(0, 256, (6, 6, channels), np.uint8)
        scaled = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = generator.integers(-24, 25, (height, width, channels))
        pixels = np.clip(np.asarray(scaled) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, optimize=True)


def make_case(case: dict[str, Any]) -> None:
    """Write a checkpoint of LLaVA with its reference.npz."""
    directory = REFERENCES / case["name"]
    shutil.rmtree(directory, ignore_errors=True)
    config = transformers.AutoConfig.for_model(case["model_type"], **case["config"])
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(random_tensor(case, name, tuple(parameter.shape))))
    model.save_pretrained(directory)
    processor = CLIPImageProcessorPil(**case["processor"])
    processor.save_pretrained(directory)
    tokenizer = write_chat_tokenizer(directory, IMAGE_TOKEN, CHAT_TEMPLATE)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    np.savez(directory / "reference.npz", **compute(case, model, processor, tokenizer))
    if case.get("old_names"):
        write_old_style(directory, config)


def write_chat_tokenizer(directory: Path, image_token: str, template: str) -> Any:
    """Write and return a tokenizer with a token for images, the last one, and a template."""
    write_tokenizer(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(template)
    return tokenizer


def make_tiled_case(case: dict[str, Any]) -> None:
    """Write a checkpoint of Phi-3-vision with its reference.npz."""
    directory, settings = REFERENCES / case["name"], case["processor"]
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    model = phi3_v_reference.Phi3V(case, lambda name, shape: random_tensor(case, name, shape))
    whole = {"image_processor_type": "Phi3VImageProcessor", **settings}
    (directory / "preprocessor_config.json").write_text(json.dumps(whole, indent=2) + "\n")
    template = phi3_v_reference.CHAT_TEMPLATE
    tokenizer = write_chat_tokenizer(directory, "<|image|>", template)
    arrays, rows = {}, {}
    for name in dict.fromkeys(TILED_IMAGES):
        with Image.open(REFERENCES / name) as image:
            white = Image.new("RGBA", image.size, "white")
            seen = Image.alpha_composite(white, image.convert("RGBA"))
        pixels, across, down = phi3_v_reference.prepare(seen, model.size, settings)
        with torch.no_grad():
            rows[name] = model.rows(pixels, across, down)
        arrays[f"pixels_{name}"], arrays[f"rows_{name}"] = pixels.numpy(), rows[name].numpy()
    token = case["config"]["image_token_index"]
    text = tokenizer.apply_chat_template(
        phi3_v_reference.CHAT, tokenize=False, add_generation_prompt=True
    )
    token_ids: list[int] = []
    for number, piece in enumerate(re.split(r"<\|image_\d+\|>", text)):
        token_ids += [token] * len(rows[TILED_IMAGES[number - 1]]) if number else []
        token_ids += tokenizer(piece)["input_ids"]
    joined = torch.cat([rows[name] for name in TILED_IMAGES])
    arrays |= continue_chat(case, token_ids, lambda ids: model.logits(ids, token, joined))
    model.save(directory, case["config"])
    np.savez(directory / "reference.npz", **arrays)


def random_tensor(case: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return weights spread widely enough that a mistake anywhere shows."""
    generator = np.random.default_rng([case["seed"], zlib.crc32(name.encode())])
    values = generator.standard_normal(shape, np.float32)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        return 1 + NORM_STD * values
    if name.endswith(".bias"):
        return BIAS_STD * values
    # Rows of images as large as those of tokens.
    return (0.05 if "patch_embedding" in name else case["weight_std"]) * values


def compute(case: dict[str, Any], model: Any, processor: Any, tokenizer: Any) -> dict[str, Any]:
    """Return pixels and rows of every image, and logits and greedy tokens of the chat."""
    arrays: dict[str, Any] = {}
    pixels, num_rows = {}, 0
    for name in IMAGES:
        with Image.open(REFERENCES / name) as image:
            prepared = processor(image, return_tensors="np")["pixel_values"]
        pixels[name] = torch.from_numpy(np.asarray(prepared))
        with torch.no_grad():
            found = model.get_image_features(pixels[name])
        found = getattr(found, "pooler_output", found)[0]
        num_rows = len(found)
        arrays[f"pixels_{name}"], arrays[f"rows_{name}"] = prepared[0], found.numpy()
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    token_ids = tokenizer(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * num_rows))["input_ids"]
    seen = torch.cat([pixels[name] for name in CHAT_IMAGES])
    found = continue_chat(case, token_ids, lambda tokens: logits_of(model, tokens, seen))
    return {**arrays, **found}


def continue_chat(
    case: dict[str, Any], token_ids: list[int], compute_logits: Callable[[list[int]], np.ndarray]
) -> dict[str, np.ndarray]:
    """Return a prompt, its logits and the greedy tokens after it; other seeds where it is close."""
    arrays = {"token_ids": np.asarray(token_ids, np.int32), "logits": compute_logits(token_ids)}
    tokens, margin = list(token_ids), float("inf")
    for _ in range(GREEDY_STEPS):
        last = compute_logits(tokens)[-1]
        second, first = np.sort(last)[-2:]
        margin = min(margin, float(first - second))
        tokens.append(int(last.argmax()))
        if not 3 <= tokens[-1] <= 130:
            raise SystemExit(f"{case['name']}: a greedy token is no text, change the seed")
    greedy = tokens[len(token_ids) :]
    if margin < MIN_GREEDY_MARGIN or len(set(greedy)) < MIN_GREEDY_KINDS:
        raise SystemExit(f"{case['name']}: greedy tokens {margin:.4f} {greedy}, change the seed")
    arrays["greedy_tokens"] = np.asarray(greedy, np.int32)
    return arrays


def logits_of(model: Any, token_ids: list[int], pixels: torch.Tensor) -> np.ndarray:
    """Return (n, vocab) float32 logits of one sequence, computed without a cache."""
    with torch.no_grad():
        tokens = torch.tensor([token_ids])
        logits: np.ndarray = model(input_ids=tokens, pixel_values=pixels, use_cache=False).logits[0]
    return np.asarray(logits)


def write_old_style(directory: Path, config: Any) -> None:
    """Rewrite names and configuration as releases before 4.52 wrote them: little is spelled out."""
    weights_path, config_path = directory / "model.safetensors", directory / "config.json"
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
        for name, tensor in load_file(weights_path).items()
    }
    save_file(tensors, weights_path, metadata={"format": "pt"})
    content = json.loads(config_path.read_text())
    text, vision = content["text_config"], content["vision_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    content["text_config"] = {
        **{k: v for k, v in text.items() if k not in ("hidden_act", "head_dim", "rms_norm_eps")},
        "torch_dtype": "float32",
    }
    del content["dtype"], content["tie_word_embeddings"]
    vision.pop("num_channels")
    content.update(torch_dtype="float32", transformers_version="4.40.0", ignore_index=-100)
    config_path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_images()
    make_cases(__doc__.splitlines()[0], REFERENCES, make_any_case)
