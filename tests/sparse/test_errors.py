"""Bad input raises one line that names the argument."""

import jax
import jax.numpy as jnp
import pytest

from effattn_jax.sparse import attention, cached_attention, init_cache
from tests.sparse.inputs import qkv

Q, K, V = qkv(8)
BAD = {
    r"q: got shape \(8, 4, 16\)": {"q": Q[0]},
    "q: got dtype int32": {"q": Q.astype(jnp.int32)},
    r"k: got shape \(2, 8, 2, 12\); needs .* = \[2, any, any, 16\]": {"k": K[..., :12]},
    r"k: got shape \(1, 8, 2, 16\)": {"k": K[:1]},
    "k: got 5 tokens; needs at least the 8 of q": {"k": K[:, :5], "v": V[:, :5]},
    "k: got 3 heads": {"k": jnp.ones((2, 8, 3, 16)), "v": jnp.ones((2, 8, 3, 16))},
    r"v: got shape \(2, 7, 2, 16\)": {"v": V[:, :7]},
    r"v: got shape \(2, 8, 1, 16\)": {"v": V[:, :, :1]},
    "window: got 0": {"window": 0},
    "window: got -3": {"window": -3},
    "window: got 2.5": {"window": 2.5},
    "window: got True": {"window": True},
    r"sinks: got shape \(2,\); needs \[H\] = \[4\]": {"sinks": jnp.ones(2)},
    "sinks: got dtype int32": {"sinks": jnp.ones(4, jnp.int32)},
    r"segment_ids: got shape \(2, 5\)": {"segment_ids": jnp.zeros((2, 5), jnp.int32)},
    "segment_ids: got dtype float32": {"segment_ids": jnp.zeros((2, 8))},
    r"segment_ids: got a row \(0\) that decreases": {"segment_ids": 8 - jnp.tile(jnp.arange(8), (2, 1))},
    "scale: got inf": {"scale": float("inf")},
    "logits_soft_cap: got 0": {"logits_soft_cap": 0},
    "logits_soft_cap: got -2.0": {"logits_soft_cap": -2.0},
    "logits_soft_cap: got nan": {"logits_soft_cap": float("nan")},
    "implementation got 'fast'": {"implementation": "fast"},
}


@pytest.mark.parametrize("message", BAD)
def test_attention(message):
    arguments = {"q": Q, "k": K, "v": V, **BAD[message]}
    with pytest.raises(ValueError, match=message) as caught:
        attention(**arguments)
    assert "\n" not in str(caught.value)


BAD_CACHE = {
    "cache: got a capacity of 16 tokens; needs at least the window of 17": {"window": 17},
    r"cache.k: got shape \(2, 16, 2, 8\)": {"cache": init_cache(2, 16, 2, 8)},
    r"cache.k: got shape \(1, 16, 2, 16\)": {"cache": init_cache(1, 16, 2, 16)},
    r"cache.v: got shape \(2, 16, 2, 12\)": {"cache": init_cache(2, 16, 2, 16, 12)},
    "k: got 8 tokens; needs at most the cache's capacity of 7": {"cache": init_cache(2, 7, 2, 16)},
    "k: got 8 tokens; needs at most 6": {"cache": init_cache(2, 16, 2, 16)._replace(length=jnp.int32(10))},
    r"k: got shape \(2, 5, 2, 16\)": {"k": K[:, :5], "v": V[:, :5]},
    r"segment_ids: got shape \(2, 16\)": {"segment_ids": jnp.zeros((2, 16), jnp.int32)},
    "logits_soft_cap: got 0": {"logits_soft_cap": 0},
}


@pytest.mark.parametrize("message", BAD_CACHE)
def test_cached_attention(message):
    arguments = {"q": Q, "k": K, "v": V, "cache": init_cache(2, 16, 2, 16), **BAD_CACHE[message]}
    with pytest.raises(ValueError, match=message) as caught:
        cached_attention(**arguments)
    assert "\n" not in str(caught.value)


def test_no_capacity():
    with pytest.raises(ValueError, match="capacity: got 0; needs at least 1"):
        init_cache(2, 0, 2, 16)


def test_a_scale_must_be_known_at_trace_time():
    with pytest.raises(ValueError, match="scale: got"):
        jax.jit(lambda scale: attention(Q, K, V, scale=scale))(0.5)
