"""Linear attention as llama.cpp's converter stores it, one value head after another."""

import numpy as np

# Which of a tensor's rows are of value heads: all, or the last ones.
_ALL = ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")
_LAST = ("in_proj_qkv.weight", "conv1d.weight")


def hybrid_metadata(config):
    values = config["linear_num_value_heads"]
    kinds = config.get("layer_types") or ["linear_attention"] * 3 + ["full_attention"]
    return {
        "full_attention_interval": kinds.index("full_attention") + 1,
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * config["linear_value_head_dim"],
        "rope.dimension_sections": [1, 1, 0, 0],
    }


def store_hybrid(name, tensor, config):
    """Return a tensor of linear attention under the name that the converter gives it first."""
    if ".linear_attn." not in name:
        return tensor
    if name.endswith("A_log"):
        tensor = -np.exp(tensor)
    if name.endswith("conv1d.weight"):
        tensor = tensor.squeeze(1)
    if name.endswith(_ALL):
        return _tile(tensor, config)
    if name.endswith(_LAST):
        count = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        return np.concatenate([tensor[:-count], _tile(tensor[-count:], config)])
    if name.endswith("out_proj.weight"):
        return np.ascontiguousarray(_tile(tensor.T, config).T)
    return tensor


def store_next(name, tensor, config):
    """Yield a tensor of Qwen3-Next as llama.cpp's newer converters have it, and its parts' names.

    Rows of q, k, v and z lie by key heads, and are sorted apart.
    """
    if name.endswith("A_log"):
        yield name, -np.exp(tensor)
    elif name.endswith("conv1d.weight"):
        yield name, tensor.squeeze(1)
    elif name.endswith("in_proj_qkvz.weight"):
        keys, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
        values = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
        parts = [[], [], [], []]
        for group in np.split(tensor, keys):
            for part, rows in zip(
                parts, np.split(group, [size, 2 * size, 2 * size + values]), strict=True
            ):
                part.append(rows)
        yield name.replace("qkvz", "qkv"), np.concatenate([*parts[0], *parts[1], *parts[2]])
        yield name.replace("qkvz", "z"), np.concatenate(parts[3])
    else:
        yield name, tensor


def _tile(rows, config):
    """Put the first value head of each key head first, then the second of each, and so on."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = np.split(rows, values)
    each = values // keys
    return np.concatenate([heads[key * each + turn] for turn in range(each) for key in range(keys)])
