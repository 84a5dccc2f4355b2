"""Spherical k-means: tokens go to the center that is nearest in direction, centers to the mean of their tokens."""

import jax
import jax.numpy as jnp

from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.sparse.routing import unit
from effattn_jax.typing import Array, Float, Int


def spherical_kmeans(
    x: Float[Array, "n K"], count: int, *, key: Array, iterations: int = 20
) -> tuple[Float[Array, "N K"], Int[Array, " n"]]:
    """Centers mu_c = mean_{x_i in c} x_i (of the vectors as they are) and the center of every vector.

    Starts from `count` of the vectors, drawn without repetition as far as there are so many. A center that has lost all
    its vectors stays where it was. Of equally near centers the first is taken.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    start = jax.random.permutation(key, x.shape[0])[jnp.arange(count) % x.shape[0]]

    def assign(centers: Float[Array, "N K"]) -> Int[Array, " n"]:
        return jnp.argmax(contract("nk,ck->nc", unit(x), unit(centers)), axis=-1)

    def step(_: int, centers: Float[Array, "N K"]) -> Float[Array, "N K"]:
        return means(x, assign(centers), centers)

    centers = jax.lax.fori_loop(0, iterations, step, x[start])
    labels = assign(centers)
    return means(x, labels, centers), labels


def means(x: Float[Array, "n K"], labels: Int[Array, " n"], empty: Float[Array, "N K"]) -> Float[Array, "N K"]:
    """The mean of the vectors of each label; of a label without vectors what `empty` has."""
    which = jax.nn.one_hot(labels, empty.shape[0], dtype=x.dtype)
    sizes = jnp.sum(which, axis=0)[:, None]
    return jnp.where(sizes > 0, contract("nc,nk->ck", which, x) / jnp.maximum(sizes, 1), empty)
