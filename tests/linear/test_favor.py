"""Random features: the kernel they estimate, their variance, and attention with a running maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import FavorState, draw_omega, favor_attention
from effattn_jax.linear.favor import favor_plus, favor_relu
from tests.compiled import jit
from tests.linear.det import det, heads
from tests.linear.engines import every_form
from tests.linear.packings import PACKINGS
from tests.ratio import FLOAT32, assert_close

K, M, LENGTH = 8, 20, 196
run = jit(favor_attention, static_argnames=("form", "eps"))
OMEGA = np.asarray(draw_omega(jax.random.key(0), M, K))


def draw(seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, LENGTH, 4, dim)).astype(np.float32) for dim in (K, K, 10))
    return q, k * np.float32(size), v


def attention(q, k, v, omega, mask, eps=0.0):
    """The estimated kernel, exactly: exponents of features in float64, rows shifted by their maximum."""
    exponent = lambda x: np.einsum("bthk,mk->bthm", x, omega) - np.sum(x**2, -1, keepdims=True) / 2  # noqa: E731
    q, k = (exponent(x.astype(np.float64) * K**-0.25) for x in (q, k))
    k = k - np.max(k, axis=(1, 3), keepdims=True)
    q = q - np.max(q, axis=3, keepdims=True)
    scores = np.einsum("bihm,bjhm->bhij", np.exp(q) + eps, np.exp(k) + eps) * mask[:, None]
    total = np.moveaxis(scores.sum(-1), 1, 2)[..., None]
    return np.einsum("bhij,bjhv->bihv", scores, v) / np.where(total == 0, 1, total)


@every_form
@pytest.mark.quick_cases(1)
def test_golden(form):
    with jax.enable_x64(True):
        q, k, v = (heads(det(i, (8, dim))) for i, dim in ((1, 4), (2, 4), (3, 3)))
        omega = det(32, (6, 4))
        out, _ = run(q, k, v, omega, eps=0.0, form=form)
        np.testing.assert_allclose(out.sum(), -2.349268, rtol=0, atol=5.1e-7)
        np.testing.assert_allclose(out[0, -1, 0], [-0.097972, 0.069460, 0.211838], rtol=0, atol=5.1e-7)
        np.testing.assert_allclose(favor_plus(q[0, 0, 0], omega)[:3], [0.084046, 0.454703, 0.368619], atol=5.1e-7)


@every_form
@pytest.mark.parametrize("packing", [None, "straddling", "padding"])
@pytest.mark.quick_cases(1)
def test_is_the_estimated_kernel(form, packing):
    """Documents do not share a maximum, and none looks ahead; the constants cancel."""
    q, k, v = draw()
    ids = np.zeros((2, LENGTH), np.int32) if packing is None else PACKINGS[packing]
    mask = np.tri(LENGTH) * (ids[:, :, None] == ids[:, None, :]) * (ids >= 0)[:, None, :]
    out, _ = run(q, k, v, OMEGA, eps=0.0, segment_ids=None if packing is None else ids, form=form)
    assert_close(attention(q, k, v, OMEGA, mask), np.where(ids[..., None, None] >= 0, out, 0), FLOAT32)


def test_eps_is_added_to_every_feature():
    """Of one token the maximum is its own: the features are known exactly."""
    rng = np.random.default_rng(0)
    k, eps = rng.standard_normal((1, 1, 1, K)), 0.1
    x = k[0, 0, 0] * K**-0.25
    exponent = OMEGA.astype(np.float64) @ x
    _, state = run(*(a.astype(np.float32) for a in (k, k, np.ones((1, 1, 1, 1)))), OMEGA, eps=eps)
    assert_close((np.exp(exponent - exponent.max()) + eps) * M**-0.5, state.memory[0, 0, :, -1], FLOAT32)
    assert_close(np.max(exponent) - np.sum(x**2) / 2, state.key_max[0, 0], FLOAT32)


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("cut", [0, 1, 100, LENGTH])
@pytest.mark.quick_cases(1)
def test_split_is_one_pass(cut, size):
    """The maximum goes on from call to call, for keys so long that e^{exponent} is 0 too."""
    q, k, v = draw(size=size)
    want, want_state = run(q, k, v, OMEGA)
    first, state = run(q[:, :cut], k[:, :cut], v[:, :cut], OMEGA)
    second, state = run(q[:, cut:], k[:, cut:], v[:, cut:], OMEGA, initial_state=state)
    assert_close((want, want_state), (jnp.concatenate([first, second], 1), state), FLOAT32)


def test_empty_state_is_no_state():
    q, k, v = draw(size=30.0)
    empty = FavorState(np.zeros((2, 4, M, 11), np.float32), np.zeros((2, 4), np.float32))
    assert_close(run(q, k, v, OMEGA), run(q, k, v, OMEGA, initial_state=empty), 1e-6)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.quick_cases(1)
def test_gradients_of_hard_keys(form):
    """Lengths that jump by powers of ten: every exponent stays at or below 0."""
    q, k, v = draw()
    k = k * np.float32(10.0) ** np.random.default_rng(3).integers(-2, 3, (2, LENGTH, 1, 1)).astype(np.float32)
    loss = lambda q, k, v: jnp.sum(favor_attention(q, k, v, OMEGA, form=form)[0] * v)  # noqa: E731
    for gradient in jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v):
        assert np.isfinite(gradient).all()


@every_form
@pytest.mark.quick_cases(1)
def test_gradients(form):
    q, k, v = draw()
    weights = np.random.default_rng(2).standard_normal(v.shape).astype(np.float32)

    def matrix(q, k, v):
        scores = jnp.einsum("bihm,bjhm->bhij", favor_plus(q, OMEGA), favor_plus(k, OMEGA), precision="highest")
        scores = scores * np.tri(LENGTH)
        total = jnp.moveaxis(scores.sum(-1), 1, 2)[..., None]
        return jnp.einsum("bhij,bjhv->bihv", scores, v, precision="highest") / total

    def gradients(attend, q, k, v):
        return jit(jax.grad(lambda x: jnp.sum(attend(*x) * weights)))((q, k, v))

    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, gradients(matrix, *(x.astype(np.float64) for x in (q, k, v))))
    got = gradients(lambda *x: favor_attention(*x, OMEGA, eps=0.0, form=form)[0], q, k, v)
    assert_close(want, got, FLOAT32)


def test_no_key_looks_ahead():
    q, k, v = draw()
    other = k.copy()
    other[:, 100:] *= 50
    want, got = (np.asarray(run(q, x, v, OMEGA)[0])[:, :100] for x in (k, other))
    assert_close(want, got, 1e-6)


def test_a_constant_of_a_query_cancels():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((5, K)), rng.standard_normal((7, K))
    with jax.enable_x64(True):
        rows = [favor_plus(q, OMEGA, c) @ favor_plus(k, OMEGA).T for c in (0.0, 3.0, np.arange(5.0)[:, None])]
        for scores in rows[1:]:
            assert_close(rows[0] / rows[0].sum(1, keepdims=True), scores / scores.sum(1, keepdims=True), 1e-12)


DRAWS = 2000


def estimates(x, y, **options):
    """phi(x) . phi(y) under `DRAWS` draws of 2 K features."""

    def estimate(key):
        omega = draw_omega(key, 2 * K, K, **options)
        return jnp.sum(favor_plus(x, omega) * favor_plus(y, omega), axis=-1)

    return np.asarray(jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), DRAWS)), np.float64)


def test_redraws_converge_to_the_softmax_kernel_and_orthogonal_ones_faster():
    rng = np.random.default_rng(0)
    x, y = (0.4 * rng.standard_normal((6, K)).astype(np.float32) for _ in range(2))
    want = np.exp(np.sum(x * y, axis=-1) / np.sqrt(K))
    orthogonal, independent = estimates(x, y), estimates(x, y, orthogonal=False)
    for got in (orthogonal, independent):
        assert np.all(np.abs(got.mean(0) - want) < 3 * got.std(0) / np.sqrt(DRAWS))
    assert orthogonal.var(0).mean() < independent.var(0).mean()


@pytest.mark.parametrize("scaling", ["norm", "sqrt"])
def test_rows_are_orthogonal_in_blocks(scaling):
    omega = np.asarray(draw_omega(jax.random.key(2), 2 * K + 3, K, scaling=scaling))
    lengths = np.linalg.norm(omega, axis=1)
    if scaling == "sqrt":
        np.testing.assert_allclose(lengths, np.sqrt(K), rtol=1e-5)
    else:
        assert np.unique(lengths.round(4)).size == len(omega)
    for start in (0, K, 2 * K):
        rows = omega[start : start + K] / lengths[start : start + K, None]
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-5)
    assert np.abs(omega[:K] @ omega[K : 2 * K].T).max() > 0.1


def test_relu_features():
    x = np.random.default_rng(0).standard_normal((5, K))
    want = (np.maximum(x * K**-0.25 @ OMEGA.T, 0) + 1e-3) * M**-0.5
    assert_close(want, favor_relu(x.astype(np.float32), OMEGA), 1e-6)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("omega", {"omega": OMEGA[:, 1:]}),
        ("k", {"k": np.zeros((2, LENGTH, 2, K), np.float32)}),
        ("initial_state", {"initial_state": FavorState(np.zeros((2, 4, M, 11)), np.zeros((2, 3)))}),
        ("initial_state", {"initial_state": FavorState(np.zeros((2, 4, M, 10), np.float32), np.zeros((2, 4)))}),
        ("segment_ids", {"segment_ids": np.zeros((2, 3), int)}),
    ],
)
@pytest.mark.quick_cases(1)
def test_bad_arguments(argument, change):
    q, k, v = draw()
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; needs .+"):
        favor_attention(**{"q": q, "k": k, "v": v, "omega": OMEGA} | change)
