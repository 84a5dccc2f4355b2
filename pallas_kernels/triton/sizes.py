"""The sizes each kernel of scalar decay runs with, as data. A channel count below a block takes a smaller block."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.triton.launch import Size

LARGEST = 256  # K and V
SMALLEST = 16  # side of a product of matrices

# kernel: for two bytes a channel, for four
SIZES = {
    "walk_states": (Size(64, 64, warps=4, stages=3), Size(32, 32, warps=4, stages=2)),
    "outputs": (Size(64, 128, warps=4, stages=2), Size(32, 64, warps=8, stages=2)),
    "gradients_of_queries_and_keys": (Size(64, 64, warps=4, stages=2), Size(32, 32, warps=8, stages=2)),
    "gradients_of_values": (Size(64, 128, warps=4, stages=2), Size(32, 64, warps=8, stages=2)),
}


def size(kernel: str, dtype: Any, key_dim: int, value_dim: int) -> Size:
    best = SIZES[kernel][jnp.dtype(dtype).itemsize == 4]
    return best._replace(block_k=_block(best.block_k, key_dim), block_v=_block(best.block_v, value_dim))


def _block(most: int, dim: int) -> int:
    return min(most, max(SMALLEST, 1 << (dim - 1).bit_length()))
