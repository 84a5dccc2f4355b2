"""Forgetting attention: against its matrix in float64, published numbers, and the mechanisms it contains."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import (
    attention,
    cached_forgetting_attention,
    forgetting_attention,
    init_forgetting_cache,
)
from tests.ratio import BFLOAT16_OUT, FLOAT32, assert_close
from tests.sparse.inputs import documents, qkv

OPS = Path(__file__).parent.parent / "fixtures" / "ops"
run = jax.jit(forgetting_attention, static_argnames=("scale",))
step = jax.jit(cached_forgetting_attention, static_argnames=("scale",))


def gates(length, strength, batch=2, heads=4):
    rng = np.random.default_rng(7)
    weak = -0.01 * np.abs(rng.standard_normal((batch, length, heads)))
    strong = np.where(rng.random(weak.shape) < 0.2, -30, weak)
    heavy = rng.uniform(-16, -7, weak.shape)
    return {"weak": weak, "strong": strong, "heavy": heavy, "none": 0 * weak}[strength].astype(np.float32)


def matrix(q, k, v, log_forget, ids=None):
    """All weights at once; padding does not forget."""
    if ids is not None:
        log_forget = jnp.where((ids >= 0)[..., None], log_forget, 0)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    total = jnp.moveaxis(jnp.cumsum(log_forget, axis=1), 1, 2)
    s = jnp.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5 + total[..., :, None] - total[..., None, :]
    mask = np.tri(q.shape[1], dtype=bool)[None]
    if ids is not None:
        mask = mask & (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :]
        s = jnp.where(mask.any(-1)[:, None, :, None], s, 0)
    s = jnp.where(mask[:, None], s, -1e300)
    out = jnp.einsum("bhij,bjhv->bihv", jax.nn.softmax(s, axis=-1), v)
    return out if ids is None else jnp.where((ids >= 0)[..., None, None], out, 0)


def out_and_gradients(function, arrays, weights):
    def loss(arrays):
        out = function(*arrays)
        return jnp.sum(out * weights), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return jax.tree.map(np.asarray, (out, gradients))


@pytest.mark.parametrize("strength", [pytest.param("weak", marks=pytest.mark.slow), "strong", "heavy"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.quick_cases(1)
def test_is_the_matrix_with_its_gradients(strength, packed):
    length = 300
    q, k, v = qkv(length, value_dim=10)
    arrays = (q, k, v, gates(length, strength))
    ids = documents(length) if packed else None
    weights = np.random.default_rng(1).standard_normal((2, length, 4, 10))
    with jax.enable_x64(True):
        exact = tuple(x.astype(np.float64) for x in arrays)
        want = out_and_gradients(lambda *x: matrix(*x, ids), exact, weights)
    got = out_and_gradients(lambda *x: forgetting_attention(*x, segment_ids=ids), arrays, weights.astype(np.float32))
    assert_close(want, got, FLOAT32)


@pytest.mark.slow
def test_long_sums_of_gates_keep_the_difference_of_neighbours():
    """After 2000 gates of -30 the sum is -60000, and a gate of 0.001 more or less still counts."""
    length = 2100
    q, k, v = qkv(length, batch=1)
    f = gates(length, "weak", batch=1)
    f[:, :2000] -= 30
    with jax.enable_x64(True):
        want = np.asarray(matrix(*(x.astype(np.float64) for x in (q, k, v, f))))
    assert_close(want[:, 2000:], run(q, k, v, f)[:, 2000:], FLOAT32)


def test_golden():
    det = lambda s, *shape: np.sin(0.61 * np.arange(np.prod(shape)) + 1.7 * s).reshape(1, shape[0], 1, -1)  # noqa: E731
    with jax.enable_x64(True):
        f = -(0.05 + 0.3 * (1 + det(4, 8)[..., 0].reshape(1, 8, 1)))
        out = run(det(1, 8, 4), det(2, 8, 4), det(3, 8, 4), f, scale=0.5)
        np.testing.assert_allclose(out.sum(), -0.141136, rtol=0, atol=5.1e-7)
        np.testing.assert_allclose(out[0, -1, 0, :3], [0.395072, 0.218450, -0.036968], rtol=0, atol=5.1e-7)


@pytest.mark.parametrize("case", ["T1", "T65"])
@pytest.mark.quick_cases(1)
def test_public_reference(case):
    with np.load(OPS / "forgetting_attn.npz") as data:
        x = {key.removeprefix(f"{case}/"): data[key] for key in data if key.startswith(f"{case}/")}
    arrays = tuple(x[f"in/{name}"] for name in "qkvg")
    out, gradients = out_and_gradients(forgetting_attention, arrays, x.get("cot/o", 0))
    np.testing.assert_allclose(out, x["out/o"], rtol=1e-4, atol=1e-5 * np.abs(x["out/o"]).max())
    if "cot/o" in x:
        for name, gradient in zip("qkvg", gradients, strict=True):
            want = x[f"grad/{name}"]
            np.testing.assert_allclose(gradient, want, rtol=5e-4, atol=5e-5 * max(1, np.abs(want).max()))


def test_without_forgetting_it_is_softmax_attention():
    q, k, v = qkv(300)
    assert_close(attention(q, k, v), run(q, k, v, gates(300, "none")), FLOAT32)


def test_constant_gates_are_alibi():
    q, k, v = qkv(300)
    slopes = np.float32([0.5, 0.25, 0.125, 0.0625])
    distance = np.arange(300)[:, None] - np.arange(300)[None]
    keys, values = (np.repeat(x, 2, axis=2) for x in (k, v))
    s = np.einsum("bihk,bjhk->bhij", q, keys, dtype=np.float64) / 4 - slopes[:, None, None] * distance
    p = np.tril(np.exp(s))
    want = np.einsum("bhij,bjhv->bihv", p / p.sum(-1, keepdims=True), values)
    assert_close(want, run(q, k, v, np.broadcast_to(-slopes, (2, 300, 4))), FLOAT32)


SPLITS = [(1,) * 12 + (288,), *(pytest.param(x, marks=pytest.mark.slow) for x in [(130, 1, 169), (299, 1)])]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.quick_cases(1)
def test_any_split_is_one_pass(sizes, packed):
    q, k, v = qkv(300)
    f, ids = gates(300, "strong"), documents(300) if packed else None
    cache, outs, start = init_forgetting_cache(2, 310, 4, 2, 16, dtype=jnp.float32), [], 0
    for size in sizes:
        part = slice(start, start + size)
        where = {} if ids is None else {"segment_ids": ids[:, part]}
        out, cache = step(q[:, part], k[:, part], v[:, part], f[:, part], cache, **where)
        outs.append(out)
        start += size
    want = run(q, k, v, f, segment_ids=ids)
    assert_close(want, np.concatenate(outs, axis=1), FLOAT32)


def test_sums_stop_growing():
    """Whole numbers would wrap around after 8e6; long before that nothing is left."""
    q, k, v = qkv(4, batch=1)
    cache = init_forgetting_cache(1, 4, 4, 2, 16, dtype=jnp.float32)
    f = np.full((1, 4, 4), -8e6, np.float32)
    for i in range(4):
        out, cache = step(*(x[:, i : i + 1] for x in (q, k, v, f)), cache)
        assert_close(np.repeat(v[:, i : i + 1], 2, axis=2), out, 1e-6)


def test_no_gradient_reaches_later_tokens():
    q, k, v = qkv(200)
    f = gates(200, "weak")
    gradients = jax.jit(jax.grad(lambda arrays: forgetting_attention(*arrays)[:, 150].sum()))((q, k, v, f))
    for gradient in map(np.asarray, gradients):
        assert not gradient[:, 151:].any()
        assert np.abs(gradient[:, 150]).max() > 0


def test_extreme_gates_and_padding_stay_finite():
    q, k, v = qkv(140)
    f, ids = np.full((2, 140, 4), -30, np.float32), np.full((2, 140), -1)
    ids[0, 20:100] = 0
    nan = np.where(ids >= 0, 0, np.nan).astype(np.float32)
    arrays = (q + nan[..., None, None], k, v, f + nan[..., None])
    out, gradients = out_and_gradients(lambda *x: forgetting_attention(*x, segment_ids=ids), arrays, 1)
    for x in (out, *gradients):
        assert np.isfinite(x).all()
    assert not out[ids < 0].any()


def test_bfloat16():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(200))
    f = gates(200, "strong")
    out = run(q, k, v, f)
    assert out.dtype == jnp.bfloat16
    assert_close(run(*(x.astype(jnp.float32) for x in (q, k, v)), f), out.astype(jnp.float32), BFLOAT16_OUT)


@pytest.mark.slow
def test_transformations():
    q, k, v = qkv(150)
    f = gates(150, "strong")
    want = np.asarray(run(q, k, v, f))
    rows = jax.jit(jax.vmap(lambda *x: forgetting_attention(*(y[None] for y in x))[0]))(q, k, v, f)
    assert_close(want, rows, 1e-6)
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("rows",))
    spec = jax.sharding.PartitionSpec("rows")
    sharded = jax.shard_map(forgetting_attention, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec)
    assert_close(want, jax.jit(sharded)(q, k, v, f), 1e-6)
    loss = lambda v: jnp.sum(forgetting_attention(q[:, :9], k[:, :9], v, f[:, :9]) ** 2)  # noqa: E731
    hessian = jax.jit(jax.grad(lambda v: jnp.vdot(jax.grad(loss)(v), v)))(v[:, :9])  # the loss is quadratic in v
    assert_close(2 * jax.grad(loss)(v[:, :9]), hessian, FLOAT32)


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def temporary(length):
        arrays = (*qkv(length, batch=1), gates(length, "weak", batch=1))
        gradient = jax.jit(jax.grad(lambda arrays: forgetting_attention(*arrays).sum()))
        return gradient.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 5 * temporary(512)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("k", {"k": np.zeros((2, 9, 2, 16), np.float32)}),
        ("k", {"k": np.zeros((2, 10, 3, 16), np.float32)}),
        ("v", {"v": np.zeros((2, 10, 4, 16), np.float32)}),
        ("log_forget", {"log_forget": np.zeros((2, 10, 2), np.float32)}),
        ("log_forget", {"log_forget": np.zeros((2, 10, 4), np.int32)}),
        ("segment_ids", {"segment_ids": np.zeros((2, 9), np.int32)}),
    ],
)
def test_bad_arguments(argument, change):
    q, k, v = qkv(10)
    arguments = {"q": q, "k": k, "v": v, "log_forget": gates(10, "weak")} | change
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        forgetting_attention(**arguments)
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        cached_forgetting_attention(**arguments, cache=init_forgetting_cache(2, 12, 4, 2, 16))


def test_a_full_cache():
    q, k, v = qkv(10)
    with pytest.raises(ValueError, match=r"^k: got 10 tokens; needs at most 8, the free slots of the cache"):
        cached_forgetting_attention(q, k, v, gates(10, "weak"), init_forgetting_cache(2, 8, 4, 2, 16))
