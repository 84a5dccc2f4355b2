"""A decoding step of routed attention touches what chooses and what is chosen, and nothing else that grows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from effattn_jax.layers import DSA, NSA, InfLLM2, MoBA, SharedNSA
from tests.layers.catalogue import agree, decode_documents, filled, forward_documents, jit, random

BATCH, DIM, HEADS, GROUPS, HEAD_DIM = 2, 32, 4, 2, 32
CAPACITY, BLOCK = 80, 4


def windows(block):
    return {"kernel_size": block, "kernel_stride": block, "block_size": block}


LAYERS = {  # options by the size of a block; the most slots of a row that a token reads, its own block among them
    "moba": (MoBA, lambda block: {"block_size": block, "topk": 2}, HEADS * BLOCK + BLOCK),
    "nsa": (
        NSA,
        lambda block: windows(block) | {"topk": 3, "local_blocks": 1, "window": 3},
        GROUPS * BLOCK + 2 * BLOCK,
    ),
    "nsa_shared": (SharedNSA, lambda block: {"block_size": block, "topk": 4, "window": 3}, GROUPS * BLOCK + 3 * BLOCK),
    "infllm2": (
        InfLLM2,
        lambda block: windows(block) | {"topk": 2, "window": block, "dense_len": 0},
        GROUPS * BLOCK + 3 * BLOCK,
    ),
    "dsa": (DSA, lambda _: {"index_heads": 2, "index_dim": 4, "topk": 6}, 6),
}
EVERY = pytest.mark.parametrize(
    "mechanism", [pytest.param(name, marks=[pytest.mark.slow] if name == "nsa_shared" else []) for name in LAYERS]
)


@functools.cache
def layer(mechanism, block=BLOCK):
    make, options, _ = LAYERS[mechanism]
    attention = {"heads": HEADS, "kv_heads": GROUPS, "head_dim": HEAD_DIM}
    return filled(lambda: make(DIM, **attention, **options(block), rngs=nnx.Rngs(0)))


def spoiled(state, slots):
    """Not a number in some slots [S] of the keys and values to select from."""
    spoil = lambda x: jnp.where(slots[:, None, None], jnp.nan, x)  # noqa: E731
    cache = state.cache
    if hasattr(cache, "selected"):
        cache = cache._replace(selected=jax.tree.map(spoil, cache.selected))
    else:
        cache = cache._replace(k=spoil(cache.k), v=spoil(cache.v))
    return state._replace(cache=cache)


@EVERY
def test_slots_that_are_not_chosen_are_not_touched(mechanism):
    """Each slot is spoiled by itself, then all that had no effect together."""
    x = random("tokens", BATCH, 63, DIM)

    @jit
    def filled_state(layer):
        state = layer.init_state(BATCH, CAPACITY)
        return state._replace(cache=layer.append(layer.remember(x[:, :62], jnp.arange(62)[None]), state.cache, None))

    step = lambda layer, state, slots: layer(x[:, 62:], spoiled(state, slots))[0]  # noqa: E731
    step = jit(jax.vmap(step, in_axes=(None, None, 0)))
    state = filled_state(layer(mechanism))
    which = np.concatenate([np.eye(CAPACITY), np.zeros((1, CAPACITY))]).astype(bool)
    *outs, want = np.asarray(step(layer(mechanism), state, which))
    touched = ~np.isfinite(outs).all(axis=(2, 3))
    assert np.isfinite(want).all()
    assert np.all((touched.sum(axis=0) > 1) & (touched.sum(axis=0) <= LAYERS[mechanism][2]))
    together = step(layer(mechanism), state, np.broadcast_to(~touched.any(axis=1), which.shape))
    agree(want, together[0], limit=1e-6)


def traffic(jaxpr):
    """Bytes into and out of every operation, none fused; of gathers and scatters those that move."""
    total = 0
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        assert kind not in ("while", "cond", "scan")
        inner = [getattr(x, "jaxpr", x) for x in equation.params.values() if isinstance(x, ClosedJaxpr | Jaxpr)]
        sizes = [math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in (*equation.invars, *equation.outvars)]
        if kind == "gather":
            total += sizes[1] + 2 * sizes[2]  # indices, what is read and written
        elif kind == "scatter":
            total += sizes[1] + 2 * sizes[2]  # indices, updates
        else:
            total += sum(map(traffic, inner)) if inner else sum(sizes)
    return total


@EVERY
def test_traffic_grows_with_what_chooses_alone(mechanism):
    """In blocks of 16, from 1024 to 16,384 tokens: one look at all keys and values would be 1."""
    module = layer(mechanism, 16)

    def of(capacity):
        state = jax.eval_shape(lambda: module.init_state(BATCH, capacity))
        return traffic(jax.make_jaxpr(module)(jnp.zeros((BATCH, 1, DIM)), state).jaxpr)

    keys_and_values = 4 * BATCH * 2 * GROUPS * HEAD_DIM
    assert of(16_384) - of(1024) < 0.3 * 15 * 1024 * keys_and_values


@EVERY
def test_a_donated_state_is_written_in_place(mechanism):
    module = layer(mechanism, 16)
    state = jax.eval_shape(lambda: module.init_state(BATCH, 16_384))
    step = jax.jit(lambda module, x, state: module(x, state), donate_argnums=2)
    memory = step.lower(module, jnp.zeros((BATCH, 1, DIM)), state).compile().memory_analysis()
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 10  # no copy of keys or values


@pytest.mark.parametrize("mechanism", ["moba", pytest.param("nsa", marks=pytest.mark.slow)])
def test_room_is_for_the_tokens_of_one_document(mechanism):
    """Three documents of up to four real tokens, padding between them, go through a state of four."""
    ids = np.int32([[0, -1, 0, 0, 0, -1, 1, 1, 1, 1, 3, 3], [-1, -1, -1, 2, 2, 2, 2, 3, -1, 5, 5, -1]])
    x, state = random("tokens", BATCH, ids.shape[1], DIM), layer(mechanism).init_state(BATCH, 4)
    y, state = decode_documents(layer(mechanism), x, state, ids)
    agree(forward_documents(layer(mechanism), x, ids), y)
    np.testing.assert_array_equal(state.cache.length, [2, 2])


@EVERY
def test_more_tokens_than_there_is_room_for(mechanism):
    cache = layer(mechanism).init_state(BATCH, 4).cache._replace(length=np.int32([1, 4]))
    one = jax.eval_shape(layer(mechanism).remember, jnp.zeros((BATCH, 1, DIM)), jnp.zeros((1, 1)))
    one = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), one)
    with pytest.raises(ValueError, match="k: got 1 tokens; needs at most 0, the free slots of the cache"):
        layer(mechanism).append(one, cache, None)
    jax.eval_shape(lambda: layer(mechanism).append(one, cache, np.int32([1, 0])))
