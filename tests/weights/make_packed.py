"""Write weights as AWQ, GPTQ, fp8 and compressed-tensors store them: slow and by the letter."""

import ml_dtypes
import numpy as np

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of columns 0..7


def pack_stream(codes, bits):
    """Pack the last axis into 32-bit words, bit after bit, lowest first."""
    flat = codes.reshape(-1, codes.shape[-1])
    words = np.zeros((len(flat), codes.shape[-1] * bits // 32), np.uint32)
    for row, values in enumerate(flat):
        number = sum(int(value) << (bits * place) for place, value in enumerate(values))
        for word in range(words.shape[1]):
            words[row, word] = number >> (32 * word) & 0xFFFFFFFF
    return words.reshape(*codes.shape[:-1], -1).view(np.int32)


def random_codes(rng, shape, bits):
    return rng.integers(0, 1 << bits, shape)


def make_awq(rng, outputs, inputs, group_size):
    """Return the parts of a weight and its values (out, in)."""
    groups = inputs // group_size
    codes, zeros = random_codes(rng, (inputs, outputs), 4), random_codes(rng, (groups, outputs), 4)
    scales = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)
    weight = np.empty((outputs, inputs), np.float32)
    for k in range(inputs):
        for n in range(outputs):
            group = k // group_size
            weight[n, k] = (codes[k, n] - zeros[group, n]) * np.float32(scales[group, n])

    def pack(values):
        words = np.zeros((len(values), outputs // 8), np.uint32)
        for column in range(outputs):
            shift = 4 * AWQ_ORDER[column % 8]
            words[:, column // 8] |= values[:, column].astype(np.uint32) << np.uint32(shift)
        return words.view(np.int32)

    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}, weight


def make_gptq(rng, outputs, inputs, group_size, bits, *, act_order=False, version=1):
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    size = inputs if group_size == -1 else group_size
    g_idx = np.arange(inputs) // size
    if act_order:
        g_idx = rng.permutation(g_idx)
    codes = random_codes(rng, (inputs, outputs), bits)
    zeros = random_codes(rng, (groups, outputs), bits)
    scales = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)
    weight = np.empty((outputs, inputs), np.float32)
    for k in range(inputs):
        group = g_idx[k]
        weight[:, k] = (codes[k] - zeros[group]) * scales[group].astype(np.float32)
    stored = (zeros - 1) % (1 << bits) if version == 1 else zeros
    parts = {
        "qweight": pack_stream(codes.T, bits).T,
        "qzeros": pack_stream(stored, bits),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return parts, weight


def make_packed_rows(rng, outputs, inputs, group_size, bits, *, symmetric=True):
    groups = 1 if group_size == -1 else inputs // group_size
    size = inputs if group_size == -1 else group_size
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (outputs, inputs))
    zeros = np.zeros((outputs, groups), int)
    if not symmetric:
        zeros = rng.integers(-half, half, (outputs, groups))
    scale = rng.uniform(0.01, 0.1, (outputs, groups)).astype(ml_dtypes.bfloat16)
    wide = scale.astype(np.float32)
    weight = np.empty((outputs, inputs), np.float32)
    for k in range(inputs):
        weight[:, k] = (codes[:, k] - zeros[:, k // size]) * wide[:, k // size]
    parts = {
        "weight_packed": pack_stream(codes + half, bits),
        "weight_scale": scale,
        "weight_shape": np.array([outputs, inputs]),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack_stream((zeros + half).T, bits).T
    return parts, weight


def make_float8(rng, outputs, inputs, block, dtype=ml_dtypes.float8_e4m3fn):
    """block: (rows, columns) of a scale, or None for one scale."""
    values = rng.standard_normal((outputs, inputs)).astype(dtype)
    rows, columns = block or (outputs, inputs)
    scale = rng.uniform(0.5, 2, (-(-outputs // rows), -(-inputs // columns))).astype(np.float32)
    weight = np.empty((outputs, inputs), np.float32)
    for n in range(outputs):
        for k in range(inputs):
            weight[n, k] = np.float32(values[n, k]) * scale[n // rows, k // columns]
    return values, scale, weight


def make_mxfp4(rng, experts, outputs, groups):
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table += [-value for value in table]
    blocks = rng.integers(0, 256, (experts, outputs, groups, 16), dtype=np.uint8)
    scales = rng.integers(120, 130, (experts, outputs, groups), dtype=np.uint8)
    weight = np.empty((experts, groups * 32, outputs), np.float32)
    for place in np.ndindex(blocks.shape):
        expert, row, group, byte = place
        factor = 2.0 ** (int(scales[expert, row, group]) - 127)
        for half in range(2):
            code = int(blocks[place]) >> (4 * half) & 15
            weight[expert, group * 32 + byte * 2 + half, row] = table[code] * factor
    return {"blocks": blocks, "scales": scales}, weight
