"""What the cuDNN implementation refuses, with the reason; tests/gpu/check_cudnn.py runs it where there is a GPU."""

import jax
import jax.numpy as jnp
import pytest

from effattn_jax import dispatch
from effattn_jax.sparse import attention, cached_attention, init_cache
from effattn_jax.sparse.cudnn import _refusal_of_device
from tests.sparse.inputs import qkv, sink_logits

REFUSED = {
    "sinks": ({}, {"sinks": sink_logits()}),
    "logits_soft_cap": ({}, {"logits_soft_cap": 3.0}),
    "segment_ids": ({}, {"segment_ids": jnp.zeros((2, 8), jnp.int32)}),
    "return_lse": ({}, {"return_lse": True}),
    "a window needs causal=True": ({}, {"window": 3, "causal": False}),
    "all bfloat16 or all float16, got float32": ({"dtype": jnp.float32}, {}),
    "value dimension must equal the key dimension, got 8 and 16": ({"value_dim": 8}, {}),
    "as many queries as keys, got 8 and 12": ({"keys": 12}, {}),
    "needs an NVIDIA GPU, got cpu": ({}, {"window": 3}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_reason(reason):
    sizes, options = REFUSED[reason]
    arrays = qkv(8, **{"dtype": jnp.bfloat16, **sizes})
    with pytest.raises(NotImplementedError, match=reason):
        attention(*arrays, implementation="cudnn", **options)


def test_one_token_over_a_cache_is_refused():
    arrays = qkv(1, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="one token over a cache"):
        cached_attention(*arrays, init_cache(2, 8, 2, 16), implementation="cudnn")


class Device:
    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


@pytest.mark.parametrize(
    ("capability", "head_dim", "reason"),
    [
        ("7.5", 64, "compute capability 8.0 or later, got 7.5"),
        ("gfx942", 64, "got gfx942"),
        ("8.0", 256, "a multiple of 8 up to 128, got 256"),
        ("9.0", 60, "a multiple of 8 up to 256, got 60"),
        ("8.9", 128, None),
        ("10.0", 256, None),
    ],
)
def test_devices(monkeypatch, capability, head_dim, reason):
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device(capability)])
    refusal = _refusal_of_device(head_dim)
    assert refusal is None if reason is None else reason in refusal
