"""Weights in MXFP4 against a decoder that goes bit by bit, and a whole gpt-oss whose experts are stored in it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effattn_jax.pretrained import load, save
from effattn_jax.pretrained.mxfp4 import Dequantised, dequantised
from effattn_jax.pretrained.safetensors_reader import SafetensorsReader
from tests.pretrained.fixture import fixture, header


def number(bits):
    """Sign, two bits of exponent with a bias of 1, one of mantissa; no leading one where the exponent is 0."""
    sign, exponent, mantissa = bits >> 3, (bits >> 1) & 3, bits & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def decode(blocks, scales):
    experts, out, count, _ = blocks.shape
    weights = np.zeros((experts, 32 * count, out))
    for e, o, n, i in np.ndindex(experts, out, count, 32):
        byte = int(blocks[e, o, n, i // 2])
        bits = byte & 15 if i % 2 == 0 else byte >> 4
        weights[e, 32 * n + i, o] = number(bits) * 2.0 ** (int(scales[e, o, n]) - 127)
    return weights


def draw(seed, *shape):
    random = np.random.default_rng(seed)
    scales = random.integers(121, 128, shape).astype(np.uint8)
    return random.integers(0, 256, (*shape, 16)).astype(np.uint8), scales


def test_every_number_and_the_order_of_a_block():
    blocks, scales = draw(0, 2, 3, 4)
    blocks[0, 0, 0] = np.arange(16) * 17  # 0x00, 0x11, ...: all sixteen
    scales[0, 0] = [0 + 10, 127, 252, 130]
    got = dequantised(blocks, scales)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(np.float64), decode(blocks, scales))


def quantised(path, given, seed=0):
    """The fixture with experts in MXFP4, as two shards: a tensor's scales are in another file than its blocks."""
    tensors = load_file(given.path / "model.safetensors")
    experts = [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]
    decoded, scales = {}, {}
    for i, name in enumerate(experts):
        count, inner, out = tensors.pop(name).shape
        blocks, scales[f"{name}_scales"] = draw((seed, i), count, out, inner // 32)
        tensors[f"{name}_blocks"] = blocks
        decoded[name] = decode(blocks, scales[f"{name}_scales"])
    shards = {"a.safetensors": tensors, "b.safetensors": scales}
    for file, part in shards.items():
        save_file(part, path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(given.config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return decoded


def test_a_model_whose_experts_are_quantised(tmp_path):
    given = fixture("gpt_oss")
    decoded = quantised(tmp_path, given)
    save(load(tmp_path), tmp_path / "out")
    assert header(tmp_path / "out") == given.tensors
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, want in decoded.items():
        assert written[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(written[name].astype(np.float64), want)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("x_scales"), "tensors: got x_blocks without its scales; needs both"),
        (lambda t: t.pop("x_blocks"), "tensors: got x_scales without its blocks; needs both"),
        (lambda t: t.update(x_scales=t["x_scales"][:, :1]), r"x: got blocks .* and scales .*; needs bytes"),
        (lambda t: t.update(x_scales=t["x_scales"].astype(np.int8)), r"x: got blocks .* and scales .*; needs bytes"),
        (lambda t: t["x_scales"].fill(255), "x_scales: got a scale of 255; needs at most 252"),
    ],
)
def test_what_does_not_fit(change, message, tmp_path):
    blocks, scales = draw(0, 2, 3, 1)
    tensors = {"x_blocks": blocks, "x_scales": scales}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        dict(Dequantised(SafetensorsReader(tmp_path)).read({"x": None}))


def test_another_quantisation(tmp_path):
    config = fixture("gpt_oss").config | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="quantization_config: got 'gptq'; needs none, or mxfp4"):
        load(tmp_path)
