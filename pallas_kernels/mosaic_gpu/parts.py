"""A scan whose rows are cut into parts when there are too few of them to fill the chip.

What enters a part is composed of what those before it write when they start from nothing, which is a pass of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.last_state import last_state
from pallas_kernels.mosaic_gpu.scan import COLUMNS, Extras, Factors, scan

PROCESSORS = 132  # of an H100 or H200; each takes one block of threads of `scan`


def number_of_parts(batch: int, heads: int, chunks: int, value_dim: int) -> int:
    """So many that the blocks come near the number of processors, a divisor of the chunks. A second part costs a pass
    over k and v: it pays where less than half of the processors had work."""
    blocks = batch * heads * (value_dim // COLUMNS)
    most = PROCESSORS // blocks
    return max(parts for parts in range(1, max(1, min(most, chunks)) + 1) if chunks % parts == 0)


def scan_in_parts(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    factors: Factors,
    initial_state: jax.Array,
    x: jax.Array | None = None,
    others: jax.Array | None = None,
    *,
    parts: int | None = None,
    reverse: bool = False,
    keep_states: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, Extras]:
    """`scan`; `parts` is how many each row is cut into, None: as many as fill the chip."""
    batch, length = q.shape[:2]
    heads, value_dim, chunks = initial_state.shape[1], v.shape[-1], factors.keep.shape[2]
    parts = number_of_parts(batch, heads, chunks, value_dim) if parts is None else parts
    options = {"reverse": reverse, "interpret": interpret}
    if parts == 1:
        return scan(q, k, v, factors, initial_state, x, others, keep_states=keep_states, **options)

    def cut_tokens(y: jax.Array) -> jax.Array:
        return y.reshape(batch * parts, length // parts, *y.shape[2:])

    def cut_chunks(y: jax.Array) -> jax.Array:
        y = y.reshape(batch, heads, parts, chunks // parts, *y.shape[3:])
        return jnp.moveaxis(y, 2, 1).reshape(batch * parts, heads, *y.shape[3:])

    def join(y: jax.Array) -> jax.Array:
        """[B * parts, H, n, ...] -> [B, H, parts * n, ...]"""
        y = jnp.moveaxis(y.reshape(batch, parts, *y.shape[1:]), 1, 2)
        return y.reshape(batch, heads, -1, *y.shape[4:])

    q, k, v = cut_tokens(q), cut_tokens(k), cut_tokens(v)
    x = None if x is None else cut_tokens(x)
    factors = jax.tree.map(cut_chunks, factors)
    others = None if others is None else cut_chunks(others)
    written = last_state(k, v, factors, heads, **options)
    written = written.reshape(batch, parts, *initial_state.shape[1:])
    keep = jnp.prod(factors.keep[..., 0], -1).reshape(batch, parts, heads, 1, 1)
    entering, state = [], initial_state
    for part in reversed(range(parts)) if reverse else range(parts):
        entering.append(state)
        state = keep[:, part] * state + written[:, part]
    entering = entering[::-1] if reverse else entering
    start = jnp.stack(entering, 1).reshape(batch * parts, *initial_state.shape[1:])
    out, states, extras = scan(q, k, v, factors, start, x, others, keep_states=keep_states, **options)
    last = states.reshape(batch, parts, *initial_state.shape[1:])[:, 0 if reverse else -1]
    extras = Extras(*(None if y is None else join(y) for y in extras))
    return out.reshape(batch, length, *out.shape[2:]), last, extras
