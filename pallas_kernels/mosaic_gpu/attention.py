"""Softmax attention on Hopper GPUs, forward and backward: causal or not, windows, sinks, documents, grouped heads.

    o_i = sum_j e^{s_ij} v_j / (e^z + sum_j e^{s_ij})        s_ij = scale q_i . k_j, or c tanh(scale q_i . k_j / c)

Two kernels do the work, `attention_forward.forward` and `attention_backward.backward`, where the schedules and the
floors are; here are the sizes they run with, what fills up a tile, and the little that XLA does around them: the row
sums D of the backward pass, the gradient of a sink, dz = -sum_i e^{z - L_i} D_i, and the rounding of dq.

Measured at B4 T8192 H16 K = V = 128, bfloat16, causal, milliseconds; with a backward pass, forward and backward
together. On an H100, before the backward pass was made leaner:

    forward       one by one, 128 keys          1.927
                  overlap, 128 keys             1.978
                  overlap, 64 keys, 4 stages    2.291
                  cuDNN                         1.965
    and backward  64 queries, 2 stages          7.972
                  64 queries, 1 stage           9.877
                  cuDNN                         7.403

On an H200, all in one run:

    forward       one by one                    1.960       window of 1024    0.593
                  overlap                       1.944                         0.580
                  cuDNN                         1.986                         0.608
    and backward  overlap, as it was before     7.782                         2.348
                  one by one                    7.392                         2.210
                  overlap                       7.305                         2.176
                  cuDNN                         7.487                         2.492

At B4 T8192 H32 K = V = 64 exponentials take as long as products: 128 x 128 pairs are 1024 cycles of exponentials and
982 of products, so that a third warpgroup has something to fill in. On an H100:

    forward       2 warpgroups, overlap         2.90, 2.86      one by one    2.67
                  3 warpgroups, overlap         2.51                          2.59
                  the same, 3 stages            2.48
                  the same, 64 keys, 4 stages   2.77                          3.11
                  cuDNN                         2.58
    with 2 warpgroups forward, and backward
                  64 queries, 2 or 3 stages     9.89            dS from shared memory 10.24
                  128 queries, 2 stages         9.36            dS from shared memory  9.49
                  128 queries, 1 stage          12.82
                  as it is                      9.06
                  cuDNN                         9.36
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.attention_backward import BackwardTiles, backward
from pallas_kernels.mosaic_gpu.attention_forward import LOG2E, Tiles, forward
from pallas_kernels.mosaic_gpu.attention_mask import Band, band
from pallas_kernels.mosaic_gpu.rows import fold_rows

# Sizes by head dimension; smaller ones are filled up with zeros.
TILES = {
    64: (Tiles(keys=128, warpgroups=3), BackwardTiles(queries=128)),
    128: (Tiles(keys=128), BackwardTiles(queries=64)),
    256: (Tiles(keys=64), BackwardTiles(queries=64, stages=1, warpgroups=1, parts=2)),
}
BLOCK = 128  # queries and keys are filled up to a multiple of it


class Call(NamedTuple):
    """What is known at trace time."""

    band: Band
    scale: float
    cap: float | None
    tiles: tuple[Tiles, BackwardTiles]
    interpret: Any


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None = None,
    query_ids: jax.Array | None = None,
    key_ids: jax.Array | None = None,
    *,
    offset: int,
    causal: bool,
    window: int | None = None,
    scale: float,
    cap: float | None = None,
    tiles: tuple[Tiles, BackwardTiles] | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Out [B, T, H, V] in q's dtype and L [B, T, H] in float32, -inf in a row that may read no key, whose out is 0.

    Differentiable once, in q, k, v and sinks, through both results.

    Args:
      q: [B, T, H, K], k: [B, M, G, K], v: [B, M, G, V] in bfloat16 or float16; G divides H, each key head serves
        consecutive query heads. Query i is at position i + offset, key j at j.
      sinks: [H], logits z; None is -inf.
      query_ids: [B, T], key_ids: [B, M], documents; negative ones mark padding, which neither reads nor is read.
      causal, window: read j <= p and, with a window, |p - j| < window.
      scale: > 0. cap: c.
      tiles: sizes of the two kernels; None: those of `TILES`.
      interpret: parameters of the interpreter that runs the kernels on a CPU.

    Raises:
      NotImplementedError: other dtypes, K or V above 256, a scale that is not a positive number, an offset that is
        negative or not known at trace time.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}; needs one of bfloat16, float16")
    value_dim, length, keys = v.shape[-1], q.shape[1], k.shape[1]
    dim = next((size for size in TILES if size >= max(q.shape[-1], value_dim)), None)
    if dim is None:
        raise NotImplementedError(f"K = {q.shape[-1]}, V = {value_dim}; needs at most {max(TILES)}")
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise NotImplementedError(f"scale {scale}; needs a positive number")
    if not isinstance(offset, int) or offset < 0:
        raise NotImplementedError(f"offset {offset}; needs a number of at least 0, known at trace time")
    more, more_keys = -length % BLOCK, -keys % BLOCK
    q = _fill(q, (0, more, 0, dim - q.shape[-1]))
    k, v = (_fill(x, (0, more_keys, 0, dim - x.shape[-1])) for x in (k, v))
    if query_ids is not None and key_ids is not None:
        # padding has two ids, so that it differs from itself
        query_ids = _fill(jnp.maximum(query_ids.astype(jnp.int32), -1), (0, more), -1)
        key_ids = _fill(jnp.where(key_ids < 0, -2, key_ids).astype(jnp.int32), (0, more_keys), -2)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32), (q.shape[0], q.shape[2]))
    call = Call(band(causal, window, offset, keys), float(scale), cap, tiles or TILES[dim], interpret)
    out, lse = _attention(call, q, k, v, sinks, query_ids, key_ids)
    return out[:, :length, :, :value_dim], lse[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    query_ids: jax.Array | None,
    key_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    return _forward(call, q, k, v, sinks, query_ids, key_ids)[0]


def _forward(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    query_ids: jax.Array | None,
    key_ids: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    static = {"band": call.band, "scale": call.scale, "cap": call.cap, "interpret": call.interpret}
    run = fold_rows(functools.partial(forward, tiles=call.tiles[0], **static), (0,) * 6)
    out, lse = run(q, k, v, sinks, query_ids, key_ids)
    return (out, jnp.swapaxes(lse, 1, 2) / LOG2E), (q, k, v, sinks, query_ids, key_ids, out, lse)


def _backward(call: Call, kept: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q, k, v, sinks, query_ids, key_ids, out, lse = kept
    d_out, d_lse = cotangents
    empty = jnp.isneginf(lse)
    delta = jnp.einsum("bthv,bthv->bht", d_out, out, preferred_element_type=jnp.float32)
    delta = delta - jnp.where(empty, 0, jnp.swapaxes(d_lse, 1, 2))
    lse = jnp.where(empty, jnp.inf, lse)  # e^{s - L} is 0 in a row without keys
    static = {"band": call.band, "scale": call.scale, "cap": call.cap, "interpret": call.interpret}
    run = fold_rows(functools.partial(backward, tiles=call.tiles[1], **static), (0,) * 8)
    dq, dk, dv = run(q, k, v, d_out.astype(q.dtype), lse, delta, query_ids, key_ids)
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(sinks[..., None] - lse / LOG2E) * delta, -1)
    return dq, dk, dv, d_sinks, None, None


_attention.defvjp(_forward, _backward)


def _fill(x: jax.Array, tails: tuple[int, ...], value: float = 0) -> jax.Array:
    if not any(tails):
        return x
    return jnp.pad(x, [(0, tail) for tail in tails], constant_values=value)
