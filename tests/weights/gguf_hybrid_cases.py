"""Linear attention as llama.cpp's converter stores it, one value head after another."""

import numpy as np

# Which of a tensor's rows are of value heads: all, or the last ones.
_ALL = ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")
_LAST = ("in_proj_qkv.weight", "conv1d.weight")


def hybrid_metadata(config):
    values = config["linear_num_value_heads"]
    return {
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


def _tile(rows, config):
    """Put the first value head of each key head first, then the second of each, and so on."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = np.split(rows, values)
    each = values // keys
    return np.concatenate([heads[key * each + turn] for turn in range(each) for key in range(keys)])
