"""vmap, jit, checkpoint and shard_map leave values and gradients as they are."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from effattn_jax.sparse import attention
from tests.ratio import FLOAT32, assert_close
from tests.sparse.inputs import documents, qkv, sink_logits

LENGTH = 300
EACH = [("xla", None), ("xla", 50), ("dense", 50)]
pytestmark = pytest.mark.parametrize(("implementation", "window"), EACH)


def arguments():
    return (*qkv(LENGTH), sink_logits()), documents(LENGTH)


def loss(implementation, window=None):
    def function(arrays, ids):
        *qkv, sinks = arrays
        out, lse = attention(
            *qkv, sinks=sinks, segment_ids=ids, window=window, implementation=implementation, return_lse=True
        )
        return jnp.sum(out**2) + jnp.sum(jnp.sin(lse))

    return function


@functools.cache
def compiled(implementation, window):
    return jax.jit(jax.value_and_grad(loss(implementation, window)))


@pytest.mark.slow
def test_vmap(implementation, window):
    arrays, ids = arguments()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arrays)
    run = compiled(implementation, window)
    got = jax.jit(jax.vmap(run, (0, None)))(stacked, ids)
    for index in range(2):
        want = run(jax.tree.map(lambda x, index=index: x[index], stacked), ids)
        assert_close(want, jax.tree.map(lambda x, index=index: x[index], got), FLOAT32)


@pytest.mark.slow
def test_checkpoint(implementation, window):
    arrays, ids = arguments()
    want = compiled(implementation, window)(arrays, ids)
    assert_close(want, jax.jit(jax.value_and_grad(jax.checkpoint(loss(implementation, window))))(arrays, ids), FLOAT32)


@pytest.mark.quick_cases(1)
def test_shard_map(implementation, window):
    """A mesh of one device types values by axis all the same: sinks are the same on all, queries are not."""
    arrays, ids = arguments()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = (rows, rows, rows, everywhere)
    local = lambda arrays, ids: jax.lax.psum(loss(implementation, window)(arrays, ids), "data")  # noqa: E731
    sharded = jax.shard_map(jax.value_and_grad(local), mesh=mesh, in_specs=(specs, rows), out_specs=(everywhere, specs))
    want = compiled(implementation, window)(arrays, ids)
    assert_close(want, jax.jit(sharded)(arrays, ids), FLOAT32)
