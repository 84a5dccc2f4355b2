"""One token of a decaying matrix memory on TPUs.

    S' = diag(e^g) S + k v^T
    o = scale S'^T q                    or, with a bonus u, scale (S^T q + (q . (u * k)) v)

The heads of all rows are alike, B H of them; a step of the grid has as many as make BLOCK bytes of states, so that the
copies are long. q, k and v come in float32, repeated to all heads, which is little beside the states; of a head they
are rows of a tile that is turned around, as they scale rows of the state. The vector unit does all: 2 K V fused
multiply-adds a head.

Floor: bytes, twice the state. At B64 H16 K = V = 128: 134 MB, 0.16 ms at the 819 GB/s of a v5e's data sheet. No time
has been measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.step import run_step

BLOCK = 2**20  # bytes of the states of a step of the grid; VMEM has four times as many
LANES, SUBLANES = 128, 8


def step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    bonus: jax.Array | None = None,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The equation above for every head: out [B, 1, H, V] in q's dtype and the next state [B, H, K, V] in float32.

    Differentiable in all arrays of floats; the state is updated in place where it is not used again.

    Args:
      q, k: [B, 1, heads, K], v: [B, 1, heads, V] in bfloat16, float16 or float32; heads divide H, each serves
        consecutive ones. K and V are multiples of 64 up to 256.
      log_decay: [B, 1, H] or [B, 1, H, K], float32, <= 0.
      initial_state: [B, H, K, V], float32.
      segment_ids: [B, 1]; negative ids mark padding: the state passes, out is zero.
      bonus: [H, K], float32.
      interpret: False compiles for the TPU; `pltpu.InterpretParams()` or True runs the same on the CPU.

    Raises:
      NotImplementedError: other dtypes, sizes or numbers of tokens, a scale that is not a number.
    """
    return run_step(_run, q, k, v, log_decay, bonus, initial_state, segment_ids, scale=scale, interpret=interpret)


def _run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array | None,
    initial_state: jax.Array,
    *,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    batch, heads, key_dim, value_dim = initial_state.shape
    everyone = batch * heads

    def of_heads(x: jax.Array) -> jax.Array:
        """[B, 1, heads, D] -> [B H, 1, D] in float32."""
        return jnp.repeat(x[:, 0].astype(jnp.float32), heads // x.shape[2], 1).reshape(everyone, 1, x.shape[3])

    gates = log_decay if log_decay.ndim == 4 else jnp.broadcast_to(log_decay[..., None], (batch, 1, heads, key_dim))
    rows = [of_heads(q), of_heads(k), of_heads(gates)]
    if bonus is not None:
        rows.append((rows[1].reshape(batch, heads, key_dim) * bonus).reshape(everyone, 1, key_dim))
    most = max(1, BLOCK // (4 * key_dim * pl.cdiv(value_dim, LANES) * LANES))
    heads_of_block = max(n for n in range(1, min(most, everyone) + 1) if everyone % n == 0)
    of_block = lambda *shape: pl.BlockSpec((heads_of_block, *shape), lambda n: (n, 0, 0))  # noqa: E731
    manual = jax.typeof(initial_state).manual_axis_type  # the mesh axes that inputs vary over
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=manual)  # noqa: E731
    out, state = pl.pallas_call(
        functools.partial(_kernel, scale=scale),
        grid=(everyone // heads_of_block,),
        in_specs=[of_block(key_dim, value_dim), of_block(1, value_dim), *[of_block(1, key_dim)] * len(rows)],
        out_specs=[of_block(1, value_dim), of_block(key_dim, value_dim)],
        out_shape=[array(everyone, 1, value_dim), array(everyone, key_dim, value_dim)],
        input_output_aliases={0: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="decay_step",
    )(initial_state.reshape(everyone, key_dim, value_dim), of_heads(v), *rows)
    return out.reshape(batch, 1, heads, value_dim).astype(q.dtype), state.reshape(initial_state.shape)


def _kernel(start_ref: Any, v_ref: Any, *refs: Any, scale: float) -> None:
    *row_refs, out_ref, state_ref = refs  # q, k, the gates and, with a bonus, u * k

    def of_head(head: Any, _: None) -> None:
        columns = _columns([ref[head] for ref in row_refs])
        q, k, gates = columns[:3]
        start, v = start_ref[head], v_ref[head]
        state = jnp.exp(gates) * start + k * v
        seen = start + columns[3] * v if len(columns) > 3 else state
        out_ref[head] = scale * jnp.sum(q * seen, 0, keepdims=True)
        state_ref[head] = state

    jax.lax.fori_loop(0, start_ref.shape[0], of_head, None)


def _columns(rows: list[jax.Array]) -> list[jax.Array]:
    """[1, K] -> [K, 1] each, by way of one tile."""
    index = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, rows[0].shape[1]), 0)
    tile = jnp.zeros(index.shape, jnp.float32)
    for i, row in enumerate(rows):
        tile = jnp.where(index == i, row, tile)
    turned = tile.T
    return [turned[:, i : i + 1] for i in range(len(rows))]
