"""What the delta rule does to a memory, and the mechanisms it contains."""

import jax
import numpy as np
import pytest

from effattn_jax.linear import delta_rule, dplr, scalar_decay
from effattn_jax.linear.chunk_decay import chunk_decay, split_heads
from effattn_jax.linear.delta_rule import chunk_maps, delta_rule_map
from tests.compiled import jit
from tests.linear.draw import log_decays, unit
from tests.linear.engines import every_form
from tests.linear.records.delta_rule import draw_beta
from tests.ratio import FLOAT32, assert_close

B, T, H, K, V = 2, 70, 2, 16, 10
GATES = ("none", "scalar", "vector")
every_gate = pytest.mark.parametrize("gate", GATES)
run = jit(delta_rule, static_argnames=("scale", "form"))


def draw(gate, length=T, seed=0):
    """q, k, v, beta, log_decay and a state."""
    rng = np.random.default_rng(seed)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    shape = {"none": None, "scalar": (B, length, H), "vector": (B, length, H, K)}[gate]
    g = None if shape is None else log_decays(rng, shape, "mild")
    beta = draw_beta(rng, (B, length, H))
    q, k, v = randn(B, length, H, K), unit(randn(B, length, H, K)), randn(B, length, H, V)
    return q, k, v, beta, g, randn(B, H, K, V)


def per_row(g, like):
    """The gate of each row of the state."""
    return np.zeros_like(like) if g is None else np.broadcast_to(g if g.ndim == 4 else g[..., None], like.shape)


@every_gate
@pytest.mark.slow
def test_what_a_chunk_writes_is_the_corrected_error(gate):
    """X_i = beta_i (v_i - k_i^T diag(e^{g_i}) S_{i-1}), with the states of the recurrent form."""
    _, k, v, beta, g, start = draw(gate, length=20)
    decay = chunk_decay(None if g is None else per_row(g, k), None, 32)
    keys, values, strength = (split_heads(x, 32) for x in (k, v, beta))
    [[scores]] = decay.scores([keys], after=[keys])
    got = chunk_maps(keys, values, strength, scores, decay).inner(start[:, None])
    state, keep = start, np.exp(per_row(g, k))
    for i in range(20):
        decayed = keep[:, i, :, :, None] * state
        want = beta[:, i, :, None] * (v[:, i] - np.einsum("bhkv,bhk->bhv", decayed, k[:, i]))
        assert_close(want, got[:, 0, :, i], FLOAT32)
        state = decayed + k[:, i, :, :, None] * want[:, :, None]


@pytest.mark.quick_cases(1)
@every_gate
def test_a_transition_never_expands(gate):
    """|k| = 1, beta in [0, 2], g <= 0: no singular value, so no eigenvalue, is above 1."""
    _, k, v, beta, g, _ = draw(gate)
    singular = lambda *x: np.linalg.svd(jit(delta_rule_map)(*x).transition, compute_uv=False)  # noqa: E731
    one_by_one = (x.reshape(B * T, 1, *x.shape[2:]) for x in (k, v, beta))
    each = singular(*one_by_one, None if g is None else g.reshape(B * T, 1, *g.shape[2:]))
    assert each.max() <= 1 + 1e-6
    assert singular(k, v, beta, g).max() <= 1 + 1e-5
    if gate == "none":  # a reflection
        assert each[beta.reshape(B * T, H) == 2].min() >= 1 - 1e-6


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_memory_stays_bounded_over_a_long_run(form):
    """Reflections keep the norm of what is there; any beta keeps it from growing; writes do not pile up."""
    q, k, v, beta, _, start = draw("none", length=4096)
    norm = lambda state: np.linalg.norm(state, axis=(2, 3))  # noqa: E731
    reflected = run(q, k, 0 * v, np.full_like(beta, 2), initial_state=start, form=form)[1]
    np.testing.assert_allclose(norm(reflected), norm(start), rtol=1e-3)
    assert np.all(norm(run(q, k, 0 * v, beta, initial_state=start, form=form)[1]) <= norm(start))
    states = [norm(run(*(x[:, :length] for x in (q, k, v, beta)), form=form)[1]) for length in (512, 4096)]
    assert np.all(states[1] < 2 * states[0])


@every_form
@every_gate
@pytest.mark.quick_cases(2)
def test_a_write_with_beta_one_is_read_back(form, gate):
    _, k, v, beta, g, start = draw(gate)
    out, _ = run(k, k, v, np.ones_like(beta), g, scale=1.0, initial_state=start, form=form)
    assert_close(v, out, FLOAT32)


@pytest.mark.quick_cases(2)
@every_form
@every_gate
def test_beta_zero_reads_the_decayed_state(form, gate):
    q, k, v, beta, g, start = draw(gate)
    out, state = run(q, k, v, np.zeros_like(beta), g, scale=1.0, initial_state=start, form=form)
    keep = np.exp(np.cumsum(per_row(g, k), 1, dtype=np.float64))
    assert_close(np.einsum("bthk,bhkv->bthv", keep * q, start), out, FLOAT32)
    assert_close(keep[:, -1, :, :, None] * start, state, FLOAT32)


@pytest.mark.quick_cases(2)
@every_form
def test_orthonormal_keys_with_beta_one_are_linear_attention(form):
    q, _, v, beta, _, _ = draw("none", length=K)
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((B, H, K, K)))[0].astype(np.float32)
    k = np.moveaxis(basis, 2, 1)
    want = scalar_decay(q, k, v, form="recurrent")
    assert_close(want, run(q, k, v, np.ones_like(beta), form=form), FLOAT32)


@every_form
@pytest.mark.slow
def test_equal_gates_are_one_gate_and_zero_gates_are_none(form):
    """KDA with equal channels is Gated DeltaNet, which without decay is DeltaNet."""
    q, k, v, beta, g, _ = draw("scalar")
    zeros = np.zeros_like(g)
    assert_close(run(q, k, v, beta, g, form="recurrent"), run(q, k, v, beta, per_row(g, k), form=form), FLOAT32)
    want = run(q, k, v, beta, form="recurrent")
    for gate in (None, zeros, per_row(zeros, k)):
        assert_close(want, run(q, k, v, beta, gate, form=form), FLOAT32)


@every_form
@every_gate
@pytest.mark.quick_cases(1)
def test_equals_low_rank_transition(form, gate):
    """a = -e^g k, b = beta k and values beta v: a reads the state before it decays."""
    q, k, v, beta, g, start = draw(gate)
    rows = per_row(g, k)
    want = run(q, k, v, beta, g, initial_state=start, form="recurrent")
    strength = beta[..., None]
    got = jit(dplr, static_argnames="form")(
        q, k, strength * v, -np.exp(rows) * k, strength * k, rows, initial_state=start, form=form
    )
    assert_close(want, got, FLOAT32)


@pytest.mark.slow
def test_two_reflections_are_a_rotation():
    """Complex eigenvalues on the unit circle: what one symmetric step cannot do."""
    k = unit(np.array([[1.0, 0, 0], [1, 1, 0]], np.float32))[None, :, None]
    two = np.full((1, 2, 1), 2, np.float32)
    eigenvalues = np.linalg.eigvals(delta_rule_map(k, k, two).transition[0, 0])
    np.testing.assert_allclose(np.sort_complex(eigenvalues), [-1j, 1j, 1], atol=1e-6)


@pytest.mark.slow
def test_steps_with_orthogonal_keys_commute():
    _, _, v, beta, _, start = draw("none", length=2)
    k = np.broadcast_to(np.eye(2, K, dtype=np.float32)[None, :, None], (B, 2, H, K))
    there, back = (
        delta_rule(k, *(x[:, order] for x in (k, v, beta)), initial_state=start)[1] for order in ([0, 1], [1, 0])
    )
    assert_close(there, back, FLOAT32)


@every_form
@pytest.mark.quick_cases(1)
def test_scale(form):
    q, k, v, beta, g, start = draw("scalar")
    default, state = run(q, k, v, beta, g, initial_state=start, form=form)
    got = run(q, k, v, beta, g, scale=3.0, initial_state=start, form=form)
    assert_close((3.0 * K**0.5 * default, state), got, FLOAT32)


@pytest.mark.slow
def test_gradients_are_finite_for_beta_zero_one_two_under_strong_gates():
    q, k, v, _, _, start = draw("vector")
    for strength in (0.0, 1.0, 2.0):
        beta, g = np.full((B, T, H), strength, np.float32), np.full(k.shape, -30, np.float32)
        grads = jit(jax.grad(lambda *x: delta_rule(*x[:-1], initial_state=x[-1])[0].sum(), argnums=range(6)))(
            q, k, v, beta, g, start
        )
        assert all(np.isfinite(x).all() for x in grads)


@every_gate
@pytest.mark.quick_cases(1)
def test_float32_stays_float32_where_float64_is_enabled(gate):
    q, k, v, beta, g, start = draw(gate)
    with jax.enable_x64(True):
        out, state = run(q, k, v, beta, g, initial_state=start, form="chunkwise")
    assert out.dtype == state.dtype == np.float32
