"""JAX's Splash kernels behind `implementation="mosaic_tpu"`, interpreted, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention
from tests.ratio import BFLOAT16_GRAD, BFLOAT16_OUT, FLOAT32, assert_close
from tests.sparse.inputs import qkv, randn
from tests.sparse.test_attention import CASES, arguments

LONG = {name: case for name, case in CASES.items() if case["length"] > 1}
QUICK = {"odd", "four blocks of a window", "documents and a past", "both sides of a window"}


def out_and_gradients(implementation, q, k, v, sinks=None, **options):
    (do,) = randn(1, (*q.shape[:3], v.shape[-1]))

    def loss(arrays):
        *qkv, sinks = arrays
        out = attention(*qkv, sinks=sinks, implementation=implementation, **options)
        return jnp.sum(out * do), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))((q, k, v, sinks))
    return out, gradients


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LONG]
)
@pytest.mark.quick_cases(1)
def test_is_softmax(name):
    arrays, options = arguments(CASES[name])
    want, got = (out_and_gradients(x, *arrays, **options) for x in ("dense", "mosaic_tpu"))
    assert_close(want, got, FLOAT32)
    if "segment_ids" in options:
        padding = options["segment_ids"][:, -arrays[0].shape[1] :] < 0
        assert not np.asarray(got[0])[padding].any()


@pytest.mark.slow
def test_bfloat16():
    arrays, options = arguments(CASES["four blocks"], jnp.bfloat16)
    out, gradients = out_and_gradients("dense", *(x.astype(jnp.float32) for x in arrays), **options)
    got = out_and_gradients("mosaic_tpu", *arrays, **options)
    assert got[0].dtype == jnp.bfloat16
    assert_close(out, got[0], BFLOAT16_OUT)
    assert_close(gradients, got[1], BFLOAT16_GRAD)


@pytest.mark.parametrize(
    ("length", "dtype", "options", "message"),
    [
        (40, jnp.float32, {"return_lse": True}, "return_lse"),
        (40, jnp.float16, {}, "needs bfloat16 or float32"),
        (1, jnp.float32, {}, "at least two"),
    ],
)
def test_refusals_say_why(length, dtype, options, message):
    q, k, v = qkv(length, 40, dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        attention(q, k, v, implementation="mosaic_tpu", **options)
