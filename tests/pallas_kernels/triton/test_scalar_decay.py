"""The Triton kernels of scalar decay, interpreted on a CPU, against the equation in float32; and compiled for GPUs."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import kernels
from effattn_jax.linear import scalar_decay
from tests.linear.packings import row
from tests.pallas_kernels.triton import interpreter  # before the kernels: they are interpreted
from tests.ratio import BFLOAT16_GATE, BFLOAT16_GRAD, BFLOAT16_OUT, FLOAT32, assert_close

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
NAMES = ("q", "k", "v", "log_decay", "initial_state")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    from pallas_kernels.triton import scalar_decay as module

    monkeypatch.setattr(module, "launch", interpreter.launch)


def kernel(*arrays, scale):
    from pallas_kernels.triton.scalar_decay import scalar_decay as function

    return function(*arrays, scale=scale)


def draw(length, key_dim=16, value_dim=16, heads=(1, 1, 1), gate=2.0, batch=1, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    most = max(heads)
    dims = (key_dim, key_dim, value_dim)
    qkv = [jnp.asarray(randn(batch, length, h, d), dtype) for h, d in zip(heads, dims, strict=True)]
    log_decay = jax.nn.log_sigmoid(gate + randn(batch, length, most))
    arrays = (*qkv, log_decay, jnp.asarray(randn(batch, most, key_dim, value_dim)))
    d_out = jnp.asarray(randn(batch, length, most, value_dim), dtype)
    return arrays, d_out, randn(batch, most, key_dim, value_dim)


def results(function, arrays, d_out, d_state):
    def loss(*arrays):
        out, state = function(*arrays)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(state * d_state), (out, state)

    return jax.jit(jax.value_and_grad(loss, tuple(range(5)), has_aux=True))(*arrays)


def check(arrays, d_out, d_state, segment_ids=None, scale=0.3):
    run = functools.partial(scalar_decay, segment_ids=segment_ids, scale=scale, form="recurrent")
    (_, want), want_grads = results(
        lambda q, k, v, g, s: run(q, k, v, g, initial_state=s),
        [x.astype(jnp.float32) for x in arrays],
        d_out.astype(jnp.float32),
        d_state,
    )
    (_, got), grads = results(lambda *x: kernel(*x, segment_ids, scale=scale), arrays, d_out, d_state)
    exact = arrays[0].dtype == jnp.float32
    assert got[0].dtype == arrays[0].dtype
    assert_close(want, got, FLOAT32 if exact else BFLOAT16_OUT)
    for name, x, y in zip(NAMES, want_grads, grads, strict=True):
        limit = BFLOAT16_GATE if name == "log_decay" else BFLOAT16_GRAD
        assert_close(x, y, FLOAT32 if exact else limit, f"d{name}")
    return got, grads


@pytest.mark.parametrize("gate", [slow(6.0), slow(2.0), -4.0, -30.0], ids=["weak", "mild", "strong", "all but gone"])
@pytest.mark.quick_cases(1)
def test_is_the_recurrence(gate):
    check(*draw(200, gate=gate))


@pytest.mark.parametrize(
    ("dtype", "gate"), [(jnp.bfloat16, 6.0), slow(jnp.bfloat16, -4.0), (jnp.float16, -4.0), slow(jnp.float16, 6.0)]
)
@pytest.mark.slow
def test_in_two_bytes(dtype, gate):
    check(*draw(130, gate=gate, dtype=dtype))


@pytest.mark.parametrize(
    ("length", "key_dim", "value_dim"),
    [(1, 16, 16), (65, 50, 80), *(slow(*x) for x in [(63, 16, 50), (64, 100, 16), (65, 5, 200), (70, 256, 3)])],
)
@pytest.mark.quick_cases(1)
def test_ragged_lengths_and_sizes(length, key_dim, value_dim):
    check(*draw(length, key_dim, value_dim))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [slow((1, 1, 4)), slow((4, 2, 2)), (2, 1, 4)])
def test_groups_of_heads(heads):
    check(*draw(65, heads=heads))


def test_packed_documents():
    ids = np.stack([row((0, 60), (1, 1), (2, 70), (-1, 9), (5, 60)), row((-1, 30), (3, 98), (4, 1), (-1, 71))])
    (out, _), (dq, _, _, dg, _) = check(*draw(200, batch=2), ids)
    for x in (out, dq, dg):
        assert not np.asarray(x)[ids < 0].any()
    assert not np.asarray(dg)[0, [60, 61, 140]].any()  # nothing is there to decay where a document starts


@pytest.mark.slow
def test_a_gate_between_mild_neighbours_is_exact():
    arrays, d_out, d_state = draw(128, gate=6.0)
    arrays = (*arrays[:3], arrays[3].at[:, 3::7].set(-60.0), arrays[4])
    check(arrays, d_out, d_state)


def test_vmap_is_rows():
    arrays, _, _ = draw(10, batch=3)
    mapped = jax.vmap(lambda q, k, v, s: kernel(q, k, v, arrays[3][:1], s, None, scale=1.0))
    got = mapped(*(x[:, None] for x in (*arrays[:3], arrays[4])))
    want = kernel(*arrays[:3], jnp.repeat(arrays[3][:1], 3, 0), arrays[4], None, scale=1.0)
    jax.tree.map(lambda w, x: np.testing.assert_array_equal(w, x[:, 0]), want, got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": jnp.zeros((1, 8, 1, 16), jnp.float16)}, "needs one of bfloat16, float16, float32"),
        ({"v": jnp.zeros((1, 8, 1, 300))}, "V = 300; needs at most 256"),
        ({"scale": jnp.ones(())}, "needs a number"),
    ],
)
def test_refusals_say_why(change, message):
    arrays, _, _ = draw(8)
    inputs = dict(zip(("q", "k", "v", "log_decay", "initial_state"), arrays, strict=True)) | {"scale": 1.0} | change
    scale = inputs.pop("scale")
    with pytest.raises(NotImplementedError, match=message):
        kernel(*inputs.values(), None, scale=scale)


def test_by_name_where_there_is_no_gpu():
    (q, k, v, g, _), _, _ = draw(8)
    with pytest.raises(NotImplementedError, match=r"'triton' refuses this call: a kernel for GPUs; this is a cpu"):
        scalar_decay(q, k, v, g, implementation="triton")


def test_by_name_on_a_gpu(monkeypatch):
    (q, k, v, g, s), _, _ = draw(65)
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    named = scalar_decay(q, k, v, g, initial_state=s, implementation="triton", scale=0.3)
    jax.tree.map(np.testing.assert_array_equal, named, kernel(q, k, v, g, s, None, scale=0.3))
    with pytest.raises(NotImplementedError, match="needs 'chunkwise'"):
        scalar_decay(q, k, v, g, implementation="triton", form="parallel")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"no jax_triton, triton here.*pip install 'effattn_jax\[triton\]'"):
        scalar_decay(q, k, v, g, implementation="triton")


# Bytes of shared memory a block of threads may have.
SHARED = {
    ("cuda", "75"): 65536,
    ("cuda", "80"): 166912,
    ("cuda", "86"): 101376,
    ("cuda", "89"): 101376,
    ("cuda", "90"): 232448,
    ("hip", "gfx90a"): 65536,
    ("hip", "gfx942"): 65536,
}


@pytest.mark.parametrize(
    ("target", "dtypes"),
    [
        (("cuda", "80"), ["bfloat16"]),
        (("hip", "gfx942"), ["bfloat16"]),
        *(slow(target, ["float16", "float32"]) for target in SHARED),
    ],
    ids=lambda x: x[1] if isinstance(x, tuple) else "",
)
@pytest.mark.slow
def test_compiles(target, dtypes, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.triton.compiled", *target, *dtypes],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(shared) == 6 * len(dtypes)  # two forward; the states, their gradients, dq with dk, dv
    assert max(shared) <= SHARED[target]
