"""The int8 kernels as AArch64 code, with dot products and without, run by an emulator."""

import numpy as np
import pytest
from aarch64_emulator import Emulator, missing_program
from int8_cases import (
    ARM_DEVICES,
    FORMS,
    Layer,
    build_quantizer,
    check_product,
    check_quantizer,
    isa_of,
    quantize,
    unpack,
)

from mlc_llm.kernels.cpu.activations import Source

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(missing_program() is not None, reason=str(missing_program())),
]


@pytest.fixture(scope="module")
def emulators(tmp_path_factory):
    """One emulator for each device."""
    return {name: Emulator(name, tmp_path_factory.mktemp(name)) for name in ARM_DEVICES}


@pytest.mark.parametrize("bits", FORMS)
@pytest.mark.parametrize("device", ARM_DEVICES)
def test_quantization_is_exact(emulators, rng, device, bits):
    layer = Layer(rng, 16, 172, FORMS[bits])
    check_quantizer(emulators[device].build, rng, layer.shape(isa_of(device)), [1, 7])


@pytest.mark.parametrize("bits", FORMS)
@pytest.mark.parametrize("device", ARM_DEVICES)
def test_products_are_exact(emulators, rng, device, bits):
    bias_dtype = "float16" if bits == "4 bits" else None
    layer = Layer(rng, 100, 172, FORMS[bits], bias_dtype)
    check_product(
        emulators[device].build, rng, layer, isa_of(device), [1, 2, 3, 4, 7, 16, 17, 37, 41, 45]
    )


@pytest.mark.parametrize("device", ARM_DEVICES)
def test_fused_gate(emulators, rng, device):
    """The exponential is arithmetic of our own, so other CPUs must show the same."""
    shape = Layer(rng, 16, 172, FORMS["4 bits"]).shape(isa_of(device))
    kernel = build_quantizer(emulators[device].build, shape, Source("silu_mul"))
    x = rng.standard_normal((7, 344)).astype(np.float32) * 3
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    codes, scales, _ = unpack(kernel(x), 7, shape)
    expected, expected_scales, _ = quantize(
        (gate / (1 + np.exp(-gate)) * up).astype(np.float32), shape
    )
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
    # The last bit of a value may decide between two codes.
    assert np.abs(codes - expected).max() <= 1 and (codes != expected).mean() < 0.01


def test_code_with_dot_products_needs_a_cpu_that_has_them(emulators, rng, tmp_path, monkeypatch):
    """The emulated CPU of the plain device would not run the other device's code."""
    monkeypatch.setattr("aarch64_emulator.MODELS", {"aarch64+dotprod": "cortex-a53"})
    layer = Layer(rng, 16, 32, FORMS["4 bits"])
    emulator = Emulator("aarch64+dotprod", tmp_path)
    with pytest.raises(AssertionError):
        check_product(emulator.build, rng, layer, "neon-dotprod", [1])
