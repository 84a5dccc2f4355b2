"""The online softmax against the oracle: outputs, log-sum-exps and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ratio import BFLOAT16_GRAD, BFLOAT16_OUT, FLOAT32, assert_close
from tests.sparse.inputs import attend, documents, qkv, sink_logits, value_and_gradients

CASES = {
    "one token": {"length": 1},
    "one query over many keys": {"length": 1, "keys": 200, "window": 64},
    "shorter than a block": {"length": 15, "window": 2, "causal": False},
    "block less one": {"length": 63, "window": 7, "sinks": True},
    "block and one": {"length": 65, "sinks": True, "logits_soft_cap": 2.0},
    "odd": {"length": 100, "window": 64, "value_dim": 24, "heads": 6, "kv_heads": 2},
    "multi-query, window above the length": {
        "length": 200,
        "window": 1000,
        "heads": 4,
        "kv_heads": 1,
        "value_dim": 5,
        "sinks": True,
    },
    "four blocks": {"length": 500, "sinks": True},
    "four blocks of a window": {"length": 500, "window": 64, "sinks": True, "logits_soft_cap": 5.0},
    "chunk after a past": {"length": 100, "keys": 333, "scale": 0.7},
    "both sides of a window": {"length": 200, "keys": 215, "causal": False, "window": 64, "sinks": True},
    "documents": {"length": 500, "segments": True, "sinks": True},
    "documents of a window": {"length": 200, "segments": True, "window": 64, "logits_soft_cap": 5.0},
    "documents, both sides": {"length": 100, "segments": True, "causal": False, "heads": 2},
    "documents and a past": {"length": 65, "keys": 150, "segments": True, "window": 50, "sinks": True},
}


def arguments(case, dtype=jnp.float32):
    case = dict(case)
    sizes = {name: case.pop(name) for name in ("length", "keys", "heads", "kv_heads", "value_dim") if name in case}
    arrays = qkv(**sizes, dtype=dtype)
    if case.pop("sinks", False):
        case["sinks"] = sink_logits(arrays[0].shape[2]).astype(jnp.promote_types(dtype, jnp.float32))
    if case.pop("segments", False):
        case["segment_ids"] = documents(arrays[1].shape[1])
    return arrays, case


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.quick_cases(1)
def test_online_softmax_is_softmax(case):
    arrays, options = arguments(case)
    assert_close(
        value_and_gradients("dense", *arrays, **options), value_and_gradients("xla", *arrays, **options), FLOAT32
    )


@pytest.mark.parametrize("name", ["four blocks", "documents and a past"])
@pytest.mark.quick_cases(1)
def test_float64(name):
    with jax.enable_x64(True):
        arrays, options = arguments(CASES[name], jnp.float64)
        want, got = (value_and_gradients(x, *arrays, **options) for x in ("dense", "xla"))
        assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.float64)}
        assert_close(want, got, 1e-13)


@pytest.mark.parametrize("name", ["four blocks", "documents of a window"])
@pytest.mark.quick_cases(1)
def test_bfloat16(name):
    arrays, options = arguments(CASES[name], jnp.bfloat16)
    exact = value_and_gradients("dense", *(x.astype(jnp.float32) for x in arrays), **options)
    outputs, gradients = value_and_gradients("xla", *arrays, **options)
    assert outputs[0].dtype == gradients[0].dtype == jnp.bfloat16
    assert outputs[1].dtype == jnp.float32
    assert_close(exact[0], outputs, BFLOAT16_OUT)
    assert_close(exact[1], gradients, BFLOAT16_GRAD)


def test_heads_share_keys_in_order():
    q, k, v = qkv(40, heads=6, kv_heads=2)
    shared = attend(q, k, v, implementation="xla")
    repeated = attend(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), implementation="xla")
    assert_close(repeated, shared, 1e-6)


def test_packed_rows_are_separate_rows():
    ids = np.repeat(np.arange(3), [70, 1, 130])[None]
    arrays = qkv(201, batch=1)
    packed = attend(*arrays, window=50, sinks=sink_logits(), segment_ids=ids)
    for part in (slice(0, 70), slice(70, 71), slice(71, 201)):
        alone = attend(*(x[:, part] for x in arrays), window=50, sinks=sink_logits())
        assert_close(alone, packed[:, part], 1e-6)


def test_sink_is_a_gate_after_the_fact():
    q, k, v = qkv(100)
    z = sink_logits()
    out, lse = attend(q, k, v, window=30, return_lse=True)
    gated = out * jax.nn.sigmoid(lse - z)[..., None]
    assert_close((gated, jnp.logaddexp(lse, z)), attend(q, k, v, window=30, sinks=z, return_lse=True), FLOAT32)


def test_a_sink_of_minus_infinity_is_none():
    q, k, v = qkv(33)
    without = attend(q, k, v, return_lse=True)
    assert_close(without, attend(q, k, v, sinks=jnp.full(4, -jnp.inf), return_lse=True), 1e-7)


def test_no_queries():
    q, k, v = qkv(0, 5, value_dim=3)
    out, lse = attend(q, k, v, return_lse=True)
    assert out.shape == (2, 0, 4, 3)
    assert lse.shape == (2, 0, 4)
