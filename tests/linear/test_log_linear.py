"""Log-linear attention against printed goldens, a public implementation, and scalar decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.linear import scalar_decay
from effattn_jax.linear.fenwick import level, members, occupied, slot, token_counts
from effattn_jax.linear.log_linear import FORMS, LogLinearState, log_linear_attention, log_linear_map
from tests.compiled import jit
from tests.linear import fixture
from tests.linear.det import det, heads
from tests.linear.draw import log_decays
from tests.linear.engines import every_form
from tests.linear.packings import row
from tests.ratio import FLOAT32, assert_close

run = jit(log_linear_attention, static_argnames=("scale", "form"))
affine_map = jit(log_linear_map, static_argnames="slots")


def draw(length, slots, seed=0, batch=1, count=2, key_dim=8, value_dim=6):
    rng = np.random.default_rng(seed)
    randn = lambda *shape: rng.standard_normal((batch, length, count, *shape), np.float32)  # noqa: E731
    g = log_decays(rng, (batch, length, count), "mild")
    return randn(key_dim), randn(key_dim), randn(value_dim), g, randn(slots)


@every_form
def test_golden(form):
    length, key_dim, value_dim = 8, 4, 3
    q, k, v = det(1, (length, key_dim)), det(2, (length, key_dim)), det(3, (length, value_dim))
    g, scales = -(0.05 + 0.3 * (1 + det(4, (length,)))), 0.5 + 0.4 * det(25, (length, 4))
    with jax.enable_x64(True):
        out, state = run(heads(q), heads(k), heads(v), g[None, :, None], heads(scales), scale=1.0, form=form)
        out, state = np.asarray(out)[0, :, 0], jax.tree.map(np.asarray, state)
    np.testing.assert_allclose(out.sum(), -4.938566, rtol=0, atol=5.1e-7)
    np.testing.assert_allclose(out[-1], [-0.462136, -0.355388, -0.120450], rtol=0, atol=5.1e-7)
    # all eight tokens are one block, that of the scalar decay
    np.testing.assert_allclose(state.levels.sum((0, 1, 3, 4)), [0, 0, 0, 0.297860], rtol=0, atol=5.1e-7)
    assert state.seen == [8]


@pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, marks=() if (case, form) == ("T63", "chunkwise") else pytest.mark.slow)
        for case in fixture.load("log_linear_attn")
        for form in FORMS
    ],
)
def test_fixture(form, case):
    def function(x):
        out, _ = log_linear_attention(x["q"], x["k"], x["v"], x["g"], x["level_scales"], scale=1.0, form=form)
        return {"o": out}

    fixture.assert_matches(function, fixture.load("log_linear_attn")[case])


@pytest.mark.quick_cases(3)
@every_form
def test_level_scales_of_one_are_scalar_decay(form):
    """The blocks of the memory then sum to the one matrix; 100 tokens are no power of two."""
    q, k, v, g, scales = draw(100, 8)
    want, state = jit(scalar_decay)(q, k, v, g)
    out, levels = run(q, k, v, g, np.ones_like(scales), form=form)
    assert_close((want, state), (out, levels.levels.sum(2)), FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("length", [128, pytest.param(192, marks=pytest.mark.slow)])
def test_whole_chunks_from_nothing_equal_the_recurrence(length):
    """Blocks smaller than a chunk are left out then: outputs, states and gradients are those of the general case."""
    inputs = draw(length, 9)
    rng = np.random.default_rng(1)
    d_out = rng.standard_normal(inputs[2].shape, np.float32)
    d_state = rng.standard_normal((1, 2, 9, 8, 6), np.float32)

    def both(form):
        def loss(inputs):
            out, state = log_linear_attention(*inputs, form=form)
            return (out * d_out).sum() + (state.levels * d_state).sum(), (out, state)

        return jit(jax.value_and_grad(loss, has_aux=True))(inputs)

    (_, want), want_grads = both("recurrent")
    (_, got), grads = both("chunkwise")
    assert_close((want, want_grads), (got, grads), FLOAT32)
    assert [int(state.seen[0]) for _, state in (want, got)] == [length, length]


def test_levels_are_the_highest_digit_that_differs():
    for i in range(70):
        for j in range(i + 1):
            want = 0 if i == j else int(np.log2(i ^ j)) + 1
            assert level(jnp.int32(i), jnp.int32(j), 31) == want
            assert level(jnp.int32(i), jnp.int32(j), 3) == min(want, 2)


def test_blocks_of_a_memory_are_at_one_level_of_any_later_token():
    for count in (1, 6, 37, 64):
        index = jnp.arange(count, dtype=jnp.int32)
        slots = np.asarray(slot(jnp.int32(count), index, 8))
        held = np.bincount(slots, minlength=8)
        np.testing.assert_array_equal(held, [2**b * (count >> b & 1) for b in range(8)])
        np.testing.assert_array_equal(held > 0, occupied(jnp.int32(count), 8))
        member = members(jnp.int32(count), 8)
        for later in (count, count + 1, count + 5, 100):
            levels = np.asarray(level(jnp.int32(later), index, 8))
            np.testing.assert_array_equal(levels, np.asarray(level(jnp.int32(later), member, 8))[slots])


def test_counts_start_anew_with_a_document():
    ids = np.stack([row((-1, 2), (3, 2), (-1, 1), (3, 1), (5, 2), (-1, 1)), row((0, 9))])
    counts = token_counts(jnp.asarray(ids), jnp.asarray([10, 0], jnp.int32))
    np.testing.assert_array_equal(counts, [[10, 10, 11, 12, 12, 13, 1, 2, 2], np.arange(1, 10)])


@every_form
@pytest.mark.quick_cases(1)
def test_beyond_the_last_level_the_past_is_one_block(form):
    """Four levels tell eight tokens apart; decoding goes on for 40, as if the last scale held for all that is older."""
    q, k, v, g, scales = draw(40, 7)
    scales[..., 4:] = scales[..., 3:4]
    want, full = run(q, k, v, g, scales, form="recurrent")
    outs, state = [], None
    for start in range(0, 40, 8):
        part = slice(start, start + 8)
        out, state = run(
            q[:, part], k[:, part], v[:, part], g[:, part], scales[:, part, :, :4], initial_state=state, form=form
        )
        outs.append(out)
    assert_close(want, jnp.concatenate(outs, 1), FLOAT32)
    blocks = full.levels.at[:, :, 3].set(full.levels[:, :, 3:].sum(2))[:, :, :4]
    assert_close(blocks, state.levels, FLOAT32)


def test_slots_without_tokens_are_not_read():
    q, k, v, g, scales = draw(5, 6)
    junk = np.ones((1, 2, 6, 8, 6), np.float32)
    want, _ = run(q, k, v, g, scales)
    out, _ = run(q, k, v, g, scales, initial_state=LogLinearState(junk, np.zeros(1, np.int32)))
    assert_close(want, out, 1e-6)


@pytest.mark.slow
def test_affine_maps_compose_to_one_pass():
    """Across a boundary of documents too; the map of a later part depends on how many tokens came before."""
    _, k, v, g, _ = draw(50, 8, batch=2)
    ids = np.stack([row((0, 50)), row((0, 33), (1, 17))])
    count = np.array([5, 9], np.int32)
    whole = affine_map(k, v, g, slots=8, count=count, segment_ids=ids)
    first = affine_map(k[:, :20], v[:, :20], g[:, :20], slots=8, count=count, segment_ids=ids[:, :20])
    last = affine_map(k[:, 20:], v[:, 20:], g[:, 20:], slots=8, count=count + 20, segment_ids=ids[:, 20:])
    assert_close(whole, last.after(first), FLOAT32)
    blocks = np.random.default_rng(2).standard_normal((2, 2, 8, 8, 6), np.float32)
    blocks *= np.asarray(occupied(jnp.asarray(count), 8))[:, None, :, None, None]
    state = LogLinearState(blocks, count)
    _, state = run(k, k, v, g, np.ones((2, 50, 2, 8), np.float32), initial_state=state, segment_ids=ids)
    assert_close(state.levels.reshape(2, 2, 8, -1), whole(blocks.reshape(2, 2, 8, -1)), FLOAT32)


@pytest.mark.parametrize(
    ("field", "change"),
    [("levels", lambda x: x[:, :, 1:]), ("seen", lambda x: x[None]), ("seen", lambda x: x.astype(np.float32))],
)
def test_bad_state(field, change):
    inputs = draw(5, 4)
    state = LogLinearState(np.zeros((1, 2, 4, 8, 6), np.float32), np.zeros(1, np.int32))
    state = state._replace(**{field: change(getattr(state, field))})
    with pytest.raises(ValueError, match=rf"^initial_state.{field}: got (shape|dtype) .+; needs .+"):
        log_linear_attention(*inputs, initial_state=state)
