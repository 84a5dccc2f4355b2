"""PaTH against a loop over its equation, printed goldens, a public implementation and softmax attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.sparse import attention, cached_path_attention, init_path_cache, path_attention
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det, heads
from tests.linear.draw import unit
from tests.ratio import FLOAT32, assert_close

run = jit(path_attention, static_argnames=("scale",))


def draw(length, groups=4, batch=2, key_dim=12, value_dim=10, seed=0):
    rng = np.random.default_rng(seed)
    randn = lambda *shape: rng.standard_normal((batch, length, *shape), np.float32)  # noqa: E731
    return {
        "q": randn(4, key_dim),
        "k": randn(groups, key_dim),
        "v": randn(groups, value_dim),
        "w": unit(randn(groups, key_dim)),
        "beta": rng.choice([0, 0.3, 1, 1.7, 2], (batch, length, groups)).astype(np.float32),
        "log_forget": -np.logaddexp(0, randn(4) - 2),
    }


def oracle(inputs, segment_ids):
    """Every key takes every later step; in float64."""
    x = {name: np.asarray(a, np.float64) for name, a in inputs.items()}
    batch, length, count, dim = x["q"].shape
    share = count // x["k"].shape[2]
    out = np.zeros((*x["q"].shape[:3], x["v"].shape[3]))
    for row, head, i in np.ndindex(batch, count, length):
        own, document = head // share, segment_ids[row, i]
        if document < 0:
            continue
        scores, seen, q, forget = [], [], x["q"][row, i, head] * dim**-0.5, 0.0
        for j in range(i, -1, -1):
            if segment_ids[row, j] == document:
                scores.append(q @ x["k"][row, j, own] + forget)
                seen.append(x["v"][row, j, own])
                w, beta = x["w"][row, j, own], x["beta"][row, j, own]
                q = q - beta * (q @ w) * w
                forget += x["log_forget"][row, j, head]
        p = np.exp(np.array(scores) - max(scores))
        out[row, i, head] = p / p.sum() @ np.array(seen)
    return out


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("length", [1, 7, 64, 150])
@pytest.mark.quick_cases(1)
def test_equals_the_equation(length, groups):
    inputs = draw(length, groups)
    assert_close(oracle(inputs, np.zeros((2, length), int)), run(**inputs), FLOAT32)


IDS = np.stack([np.repeat([0, 1, 4, 5, -1], [30, 1, 70, 39, 10]), np.repeat([-1, 2, 3, 9, 10], [5, 65, 10, 60, 10])])


def test_packed_documents():
    inputs = draw(150)
    got = run(**inputs, segment_ids=IDS)
    assert_close(oracle(inputs, IDS), got, FLOAT32)
    assert not np.asarray(got)[IDS < 0].any()


@pytest.mark.parametrize("sizes", [(150,), (64, 64, 22), (1, 2, 3, 70, 74), (149, 1)], ids=str)
@pytest.mark.quick_cases(1)
def test_any_split_over_the_cache_is_one_pass(sizes):
    inputs, start, outs = draw(150), 0, []
    cache = init_path_cache(2, 160, 4, 12, 10)
    for size in sizes:
        part = {name: x[:, start : start + size] for name, x in inputs.items()}
        out, cache = jit(cached_path_attention)(**part, cache=cache, segment_ids=IDS[:, start : start + size])
        outs.append(out)
        start += size
    assert_close(oracle(inputs, IDS), np.concatenate(outs, axis=1), FLOAT32)


@pytest.mark.slow
def test_gradients_are_those_of_the_cached_form():
    """Another algorithm: there the keys pass through the steps, here the queries."""
    inputs, weights = draw(100), np.random.default_rng(1).standard_normal((2, 100, 4, 10))
    ids = IDS[:, :100]

    @jit
    def one_pass(inputs):
        return jax.grad(lambda x: jnp.sum(weights * path_attention(**x, segment_ids=ids)))(inputs)

    @jit
    def over_cache(inputs):
        cache = init_path_cache(2, 100, 4, 12, 10)
        return jax.grad(lambda x: jnp.sum(weights * cached_path_attention(**x, cache=cache, segment_ids=ids)[0]))(
            inputs
        )

    assert_close(over_cache(inputs), one_pass(inputs), 2e-5)


@pytest.mark.slow
def test_no_gradient_to_the_future():
    inputs = draw(100)
    read = np.zeros((2, 100, 4, 10), np.float32)
    read[:, 41] = 1
    grads = jit(jax.grad(lambda x: jnp.sum(read * path_attention(**x))))(inputs)
    for name, x in grads.items():
        assert not np.asarray(x)[:, 42:].any(), name
        assert np.isfinite(x).all(), name


def test_no_steps_is_softmax_attention():
    inputs = draw(100)
    inputs["beta"][:], inputs["log_forget"][:] = 0, 0
    want = attention(inputs["q"], inputs["k"], inputs["v"], implementation="dense")
    assert_close(want, run(**inputs), FLOAT32)


def test_golden():
    T, K = 8, 4
    inputs = [heads(det(i, (T, K))) for i in (1, 2, 3)]
    w, beta = heads(unit(det(27, (T, K)))), (1 + 0.8 * det(28, (T,)))[None, :, None]
    with jax.enable_x64(True):
        out = np.asarray(run(*inputs, w, beta, scale=0.5))[0, :, 0]
    np.testing.assert_allclose(out.sum(), -0.190289, atol=5.1e-7)
    np.testing.assert_allclose(out[-1, :3], [-0.042096, -0.054703, -0.047578], atol=5.1e-7)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("case", ["T1", "T65"])
def test_fixture(case):
    """There the scale multiplies the gates too."""

    def function(x):
        forget = x["g"] * x["q"].shape[-1] ** -0.5
        return {"o": path_attention(x["q"], x["k"], x["v"], x["w"], x["beta"], log_forget=forget)}

    fixture.assert_matches(function, fixture.load("path_attn")[case])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("k", lambda x: x[:, :-1]),
        ("w", lambda x: x[..., :-1]),
        ("beta", lambda x: x[:, :, :1]),
        ("v", lambda x: x[:, :, 0]),
        ("q", lambda x: x.astype(int)),
        ("log_forget", lambda x: x[..., None]),
    ],
)
def test_bad_arguments(name, spoil):
    inputs = draw(5)
    with pytest.raises(ValueError, match=rf"^{name}: got .+; needs .+"):
        path_attention(**inputs | {name: spoil(inputs[name])})


def test_a_full_cache_is_an_error():
    inputs = draw(5)
    with pytest.raises(ValueError, match=r"^k: got 5 tokens; needs at most 4"):
        cached_path_attention(**inputs, cache=init_path_cache(2, 4, 4, 12, 10), segment_ids=np.zeros((2, 5), int))
