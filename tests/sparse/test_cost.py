"""Memory linear in T, forward and backward; work linear in T under a window, and half a square without."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from effattn_jax.sparse import attention


def gradients(window):
    loss = lambda arrays, ids: jnp.sum(attention(*arrays, window=window, segment_ids=ids, implementation="xla") ** 2)  # noqa: E731
    return jax.grad(loss)


def shapes(length):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    return (x, x, x), jax.ShapeDtypeStruct((1, length), jnp.int32)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.slow
def test_memory_is_linear(window):
    def temporary(length):
        compiled = jax.jit(gradients(window)).lower(*shapes(length)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = 4096, 16384
    assert temporary(long) < 4.5 * temporary(short)
    assert temporary(long) < long * long  # a byte per pair of tokens would be more


def multiplications(jaxpr):
    """Of the matrix products of a program; loops of unknown length are refused."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = equation.outvars[0].aval.size
            for axis in contracted:
                size *= equation.invars[0].aval.shape[axis]
            total += size
        assert equation.primitive.name != "while"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr | Jaxpr):
                total += times * multiplications(getattr(value, "jaxpr", value))
    return total


def test_work_is_linear_under_a_window():
    work = {n: multiplications(jax.make_jaxpr(gradients(64))(*shapes(n)).jaxpr) for n in (1024, 4096)}
    assert work[4096] == 4 * work[1024]
    needed = 7 * 1024 * 64 * 2 * 16  # two products forward, five backward, of 64 keys per query
    assert needed <= work[1024] <= 2.5 * needed
