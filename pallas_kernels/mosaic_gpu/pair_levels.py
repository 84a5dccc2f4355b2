"""Decays between all pairs of tokens of a chunk by products of matrices, one number per channel.

The score of a pair j < i is sum_c q_ic k_jc e^{sum of the gates between them}. Bit l is the highest one where i and j
differ: j is in the lower half and i in the upper half of the same block of 2^{l+1} tokens. With m the middle of it,

    e^{gates after j up to i} = e^{gates from m up to i} e^{gates after j before m}      both exponents <= 0

so a pair of level l is the dot of q_i and k_j decayed to the middle. Each row has one exponent a level, that of its
query if it is in an upper half, else that of its key: one array X = where(upper, q, k) e^D holds both, and X X^T has
the scores of the level where i and j differ first in bit l. The exponents are sums of gates, D = P g with P of zeros
and ones: a product for the tensor cores. Gates go in as float16, which moves an exponent x by x 2^-12 and what it
decays by at most 0.37 x 2^-12; bfloat16 would be as coarse as the rounding of q and k.

These functions run inside of kernels, for chunks of 64 tokens and one warpgroup.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
LEVELS = 6
WHOLE = LEVELS  # the chunk as the half of a block: queries read the state before it, keys write the one after it
GATES = jnp.float16
FORGOTTEN = -3e4  # in place of gates that float16 has no number for; the sum of two is one still
HALVES = jnp.bfloat16  # two of them hold a float32 number to 2^-17

FIRST, END, INTO, OUT_OF, THROUGH = range(5)  # rows of `documents`, see `vector_scores`

WGMMA = plgpu.Layout.WGMMA
Level = int | jax.Array


def token_of_row() -> jax.Array:
    """[64], laid out as the rows are. What depends on the row alone is made here, once for all columns of a thread."""
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=WGMMA.reduce(1))


def token_of_column() -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=WGMMA.reduce(0))


def rows_and_columns() -> tuple[jax.Array, jax.Array]:
    return down(token_of_row()), along(token_of_column())


def is_upper(level: Level, columns: int = CHUNK) -> jax.Array:
    return down((token_of_row() >> level) & 1, columns) == 1


def in_document(documents: Any) -> jax.Array:
    """Whether j is of the document of i, whose first token and the one after its last are the rows FIRST and END.
    With loads in two layouts, of rows and of columns, the inference of layouts searched for minutes."""
    first, end = (load_rows(documents.at[row]).astype(jnp.int32) for row in (FIRST, END))
    return _between(first, end)


def is_pair(level: Level) -> jax.Array:
    """Whether i and j differ first in this bit. In these terms nothing of 64 x 64 is the same for all levels, which the
    compiler would keep in registers."""
    return along(token_of_column() >> level) == down((token_of_row() >> level) ^ 1)


def gates_of_query(level: Level, before: bool) -> jax.Array:
    """P of queries: the gates from the middle up to token i, its own among them unless the read is before the write."""
    i = token_of_row()
    return _between((i >> level) << level, i if before else i + 1)


def gates_of_key(level: Level) -> jax.Array:
    """P of keys: the gates after token i, before the middle."""
    i = token_of_row()
    return _between(i + 1, ((i >> level) + 1) << level)


def gates_of_level(level: Level, before: bool) -> jax.Array:
    """P of a level, of queries in upper halves and of keys in lower ones."""
    i = token_of_row()
    upper = (i >> level) & 1 == 1
    start = (i >> level) << level
    return _between(jnp.where(upper, start, i + 1), jnp.where(upper, i if before else i + 1, start + (1 << level)))


def _between(first: jax.Array, end: jax.Array) -> jax.Array:
    """first <= t < end of each row, in one comparison."""
    past_first = along(token_of_column()) - down(first)
    return past_first.astype(jnp.uint32) < down((end - first).astype(jnp.uint32))


def product(acc: Any, left: jax.Array, right: Any, through: Any) -> None:
    """acc += left right, where left is a value in registers. The interpreter takes no left side from there: for it
    `through` is shared memory, else None."""
    if through is None:
        plgpu.wgmma(acc, left, right)
        return
    through[...] = left
    plgpu.commit_smem()
    plgpu.wgmma(acc, through, right)
    plgpu.wgmma_wait(0)


def sums(pattern: jax.Array, right: Any, zero: jax.Array, through: Any) -> jax.Array:
    """P r in float32, of r in shared memory and a pattern of booleans.

    The zero comes from memory: where ptxas (CUDA 13.0) knew all numbers of a register of P, as for t >= i in the first
    columns, rows of the product were garbage on an H100.
    """
    left = jnp.where(pattern, (zero + 1).astype(right.dtype), zero.astype(right.dtype))

    def add(acc: Any) -> jax.Array:
        product(acc, left, right, through)
        return acc[...]

    return pl.run_scoped(add, plgpu.ACC((CHUNK, right.shape[1]), jnp.float32))


def put_gates(gates: jax.Array, ref: Any) -> None:
    """Logarithms to base 2 into shared memory."""
    ref[...] = jnp.maximum(gates, FORGOTTEN).astype(ref.dtype)


def put_halves(values: jax.Array, high: Any, low: Any) -> None:
    """float32 values into shared memory as the sum of two bfloat16 numbers.

    Warps that are done with a product must not overwrite what others still multiply: all wait for each other first.
    """
    plgpu.commit_smem()
    high[...] = values.astype(HALVES)
    low[...] = (values - load(high)).astype(HALVES)
    plgpu.commit_smem()


def down(vector: jax.Array, columns: int = CHUNK) -> jax.Array:
    """A number of every row, over the columns."""
    return lax.broadcast_in_dim(vector, (CHUNK, columns), [0])


def along(vector: jax.Array) -> jax.Array:
    """A number of every column, over the rows."""
    return lax.broadcast_in_dim(vector, (CHUNK, *vector.shape), [1])


def load(ref: Any) -> jax.Array:
    """64 rows of shared or global memory into registers, in float32."""
    return plgpu.load(ref, layout=WGMMA, optimized=False).astype(jnp.float32)


def load_rows(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=WGMMA.reduce(1), optimized=False)


def load_columns(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=WGMMA.reduce(0), optimized=False)
