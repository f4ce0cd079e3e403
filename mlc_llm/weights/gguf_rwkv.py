"""RWKV-6 in GGUF files: layers without attention, and matrices of low rank that are transposed."""

from __future__ import annotations

from mlc_llm.weights.gguf_parts import LAYER_NORM, Architecture, Change

_BLOCK = "rwkv.blocks.{layer}."
_TIME, _CHANNEL = _BLOCK + "attention.", _BLOCK + "feed_forward."
_TENSORS = {
    "token_embd": "rwkv.embeddings",
    "token_embd_norm": "rwkv.blocks.0.pre_ln",
    "output_norm": "rwkv.ln_out",
    "output": "head",
    "blk.{layer}.attn_norm": _BLOCK + "ln1",
    "blk.{layer}.attn_norm_2": _BLOCK + "ln2",
    "blk.{layer}.time_mix_key": _TIME + "key",
    "blk.{layer}.time_mix_value": _TIME + "value",
    "blk.{layer}.time_mix_receptance": _TIME + "receptance",
    "blk.{layer}.time_mix_gate": _TIME + "gate",
    "blk.{layer}.time_mix_output": _TIME + "output",
    "blk.{layer}.time_mix_ln": _TIME + "ln_x",
    "blk.{layer}.channel_mix_key": _CHANNEL + "key",
    "blk.{layer}.channel_mix_value": _CHANNEL + "value",
    "blk.{layer}.channel_mix_receptance": _CHANNEL + "receptance",
}
# Without `.weight` on Hugging Face.
_PLAIN = {
    "blk.{layer}.time_mix_w1.weight": _TIME + "time_maa_w1",
    "blk.{layer}.time_mix_w2.weight": _TIME + "time_maa_w2",
    "blk.{layer}.time_mix_lerp_x.weight": _TIME + "time_maa_x",
    "blk.{layer}.time_mix_lerp_fused.weight": _TIME + "time_maa_{wkvrg}",
    "blk.{layer}.time_mix_first.weight": _TIME + "time_faaaa",
    "blk.{layer}.time_mix_decay.weight": _TIME + "time_decay",
    "blk.{layer}.time_mix_decay_w1.weight": _TIME + "time_decay_w1",
    "blk.{layer}.time_mix_decay_w2.weight": _TIME + "time_decay_w2",
    "blk.{layer}.channel_mix_lerp_k.weight": _CHANNEL + "time_maa_k",
    "blk.{layer}.channel_mix_lerp_r.weight": _CHANNEL + "time_maa_r",
}
_CHANGES: dict[str, Change] = {
    name: "flat_row" if "lerp" in name or name.endswith("decay.weight") else "transposed"
    for name in _PLAIN
    if not name.endswith("first.weight")
}
RWKV6 = Architecture(
    "rwkv6",
    "Rwkv6ForCausalLM",
    _TENSORS,
    _CHANGES,
    exact=_PLAIN,
    fields=dict.fromkeys(
        (
            "attention_bias",
            "hidden_act",
            "max_position_embeddings",
            "mlp_bias",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_scaling",
            "rope_theta",
        )
    ),
    numbers={
        "head_size": ("wkv.head_size", "count", None),
        "layer_norm_epsilon": LAYER_NORM,
        "rescale_every": ("rescale_every_n_layers", "count", 0),
        "time_decay_rank": ("time_decay_extra_dim", "count", None),
        "time_mix_rank": ("time_mix_extra_dim", "count", None),
    },
    constants={"is_rescaled": True},
    is_recurrent=True,
)
