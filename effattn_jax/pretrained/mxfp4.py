"""Weights in MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss publishes its experts: read as bfloat16.

A number is 4 bits, sign, two of exponent and one of mantissa (E2M1): +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}. Blocks of 32 along
the inputs share a factor 2^(s - 127), s a byte. `NAME_blocks`: [E, out, in / 32, 16] bytes, of which each holds two
numbers, the first in its low half; `NAME_scales`: [E, out, in / 32]. `NAME` is [E, in, out]. All values are exact.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from effattn_jax import checks
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.tensors import TensorInfo, Tensors
from effattn_jax.typing import Float

BLOCKS, SCALES = "_blocks", "_scales"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
PER_BYTE, BLOCK, BIAS = 2, 32, 127
LARGEST_SCALE = 252  # above it 6 * 2^(s - 127) is no bfloat16, and 255 stands for NaN


def is_mxfp4(config: Config) -> bool:
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def unquantised(config: Config) -> dict[str, Any]:
    """The config of the weights as they are read."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


class Dequantised:
    """The tensors of `reader`, each pair of blocks and scales as one of bfloat16.

    Raises:
      ValueError: a pair whose shapes or dtypes do not fit, or of which one half is not there.
    """

    def __init__(self, reader: Tensors):
        self._reader = reader
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in reader.tensors.items():
            if name.endswith(BLOCKS):
                self.tensors[name.removesuffix(BLOCKS)] = self._pair(name.removesuffix(BLOCKS))
            elif not name.endswith(SCALES):
                self.tensors[name] = info
            elif name.removesuffix(SCALES) + BLOCKS not in reader.tensors:
                checks.fail("tensors", f"{name} without its blocks", "both")

    def _pair(self, name: str) -> TensorInfo:
        blocks, scales = self._reader.tensors[name + BLOCKS], self._reader.tensors.get(name + SCALES)
        if scales is None:
            checks.fail("tensors", f"{name + BLOCKS} without its scales", "both")
        fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, BLOCK // PER_BYTE)
        if not fits or {blocks.dtype, scales.dtype} != {"U8"}:
            checks.fail(
                name, f"blocks {blocks} and scales {scales}", "bytes [E, out, in / 32, 16] and [E, out, in / 32]"
            )
        experts, out, count, _ = blocks.shape
        return TensorInfo((experts, count * BLOCK, out), "BF16")

    def read(self, names: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        stored = {name if name in self._reader.tensors else name + BLOCKS for name in names}
        for name, tensor in self._reader.read(dict.fromkeys(stored)):
            if not name.endswith(BLOCKS):
                yield name, tensor
                continue
            name = name.removesuffix(BLOCKS)
            ((_, scales),) = self._reader.read({name + SCALES: None})
            if scales.max() > LARGEST_SCALE:
                checks.fail(name + SCALES, f"a scale of {scales.max()}", f"at most {LARGEST_SCALE}")
            yield name, dequantised(tensor, scales)


def dequantised(
    blocks: UInt8[np.ndarray, "E O N 16"], scales: UInt8[np.ndarray, "E O N"]
) -> Float[np.ndarray, "E I O"]:
    experts, out, count, _ = blocks.shape
    weights = np.empty((experts, count * BLOCK, out), jnp.bfloat16)
    for expert in range(experts):  # one at a time: what is in float32 on the way stays small
        numbers = np.stack([E2M1[blocks[expert] & 15], E2M1[blocks[expert] >> 4]], axis=-1).reshape(out, count, BLOCK)
        exponents = scales[expert].astype(np.int32)[..., None] - BIAS
        weights[expert] = np.ldexp(numbers, exponents).reshape(out, -1).T
    return weights
