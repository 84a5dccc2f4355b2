"""The TPU kernel of scalar decay, interpreted on the CPU, against the equation token by token in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effattn_jax.linear import scalar_decay as engine
from pallas_kernels.mosaic_tpu.scalar_decay import scalar_decay
from tests.linear.draw import log_decays
from tests.linear.packings import PACKINGS
from tests.ratio import BFLOAT16_GATE, BFLOAT16_GRAD, BFLOAT16_OUT, FLOAT32, assert_close

STRENGTHS = ("mild", "weak", "strong", "heavy")
NAMES = ("dq", "dk", "dv", "dlog_decay", "dinitial_state")
INTERPRET = pltpu.InterpretParams()


def draw(length, key_dim=64, value_dim=64, heads=(2, 2, 2), strength="mild", dtype=jnp.float32, batch=2):
    """Arguments of the kernel, and what its outputs are multiplied with in the loss."""
    rng = np.random.default_rng(0)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    round_ = lambda x: np.asarray(jnp.asarray(x, dtype))  # noqa: E731
    most = max(heads)
    dims = (key_dim, key_dim, value_dim)
    qkv = [round_(randn(batch, length, h, dim)) for h, dim in zip(heads, dims, strict=True)]
    g = log_decays(rng, (batch, length, most), strength)
    state = (batch, most, key_dim, value_dim)
    return (*qkv, g, randn(*state)), (round_(randn(batch, length, most, value_dim)), randn(*state))


def of(cases, *quick):
    """All cases, those that are not quick marked slow."""
    marks = [() if case in quick else pytest.mark.slow for case in cases]
    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=mark, id=str(case)) for case, mark in zip(cases, marks, strict=True)]
    )


def loss_and_gradients(function, arguments, weights):
    def loss(*arguments):
        out, state = function(*arguments)
        return sum((x.astype(w.dtype) * w).sum() for x, w in zip((out, state), weights, strict=True)), (out, state)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, tuple(range(5)), has_aux=True))(*arguments)
    return outputs, gradients


def assert_equals_oracle(drawn, segment_ids=None, limits=(FLOAT32,) * 3, scale=0.3, interpret=INTERPRET):
    arguments, weights = drawn

    def oracle(q, k, v, g, state):
        return engine(q, k, v, g, scale=scale, initial_state=state, segment_ids=segment_ids, form="recurrent")

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(np.float64), drawn)
        want, want_gradients = jax.tree.map(np.asarray, loss_and_gradients(oracle, *exact))
    weights = [w.astype(np.float32) for w in weights]
    got, gradients = loss_and_gradients(
        lambda *x: scalar_decay(*x, segment_ids, scale=scale, interpret=interpret), arguments, weights
    )
    assert got[0].dtype == arguments[0].dtype
    assert [x.dtype for x in gradients] == [x.dtype for x in arguments]
    out, gradient, gate = limits
    assert_close(want, got, out, "(out, state)")
    for name, x, y in zip(NAMES, want_gradients, gradients, strict=True):
        assert_close(x, y, gate if name == "dlog_decay" else gradient, name)


@of(STRENGTHS, "weak", "strong")
@pytest.mark.quick_cases(1)
def test_strengths_of_gates(case):
    assert_equals_oracle(draw(200, 64, 128, strength=case))


@of([1, 65, 128, 700], 1, 65, 700)
@pytest.mark.quick_cases(1)
def test_lengths(case):
    """One token, a part of a chunk, a chunk, two blocks of three chunks."""
    assert_equals_oracle(draw(case, batch=1))


@of([(128, 64), (50, 100), (256, 16)], (50, 100))
@pytest.mark.slow
def test_dims(case):
    assert_equals_oracle(draw(200, *case, batch=1))


@of([(2, 2, 4), (4, 2, 2), (1, 4, 4), (4, 1, 2)], (2, 2, 4), (4, 2, 2))
@pytest.mark.slow
def test_groups_of_heads(case):
    assert_equals_oracle(draw(200, heads=case, batch=1))


@of(PACKINGS, "one token", "padding")
@pytest.mark.quick_cases(1)
def test_packed_documents(case):
    assert_equals_oracle(draw(196, strength="weak"), PACKINGS[case])


@of(STRENGTHS, "weak", "strong")
@pytest.mark.slow
def test_bfloat16(case):
    limits = (BFLOAT16_OUT, BFLOAT16_GRAD, BFLOAT16_GATE)
    assert_equals_oracle(draw(700, 128, 64, strength=case, dtype=jnp.bfloat16, batch=1), limits=limits)


@pytest.mark.slow
def test_bfloat16_of_packed_grouped_heads():
    limits = (BFLOAT16_OUT, BFLOAT16_GRAD, BFLOAT16_GATE)
    assert_equals_oracle(draw(196, heads=(2, 2, 4), dtype=jnp.bfloat16), PACKINGS["padding"], limits)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.slow
def test_scale(scale):
    assert_equals_oracle(draw(65, batch=1), scale=scale)


@pytest.mark.slow
def test_gates_below_any_exponential():
    """-1e9 forgets all: tokens read their own write alone, and nothing overflows."""
    arguments, weights = draw(200, batch=1)
    (q, k, v, _, state), gates = arguments, np.full((1, 200, 2), -1e9, np.float32)
    (out, end), gradients = loss_and_gradients(
        lambda *x: scalar_decay(*x, scale=1.0, interpret=INTERPRET), (q, k, v, gates, state), weights
    )
    assert_close(np.sum(q * k, -1, keepdims=True) * v, out, FLOAT32)
    assert_close(k[:, -1, :, :, None] * v[:, -1, :, None, :], end, FLOAT32)
    assert not np.any(gradients[3])
    assert not np.any(gradients[4])


@pytest.mark.slow
def test_no_races(capfd):
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    assert_equals_oracle(draw(700, heads=(2, 2, 4), batch=1), interpret=interpret)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
def test_vmap_and_checkpoint():
    arguments, weights = draw(65)
    kernel = lambda *x: scalar_decay(*x, scale=1.0, interpret=True)  # noqa: E731
    row = lambda *x: jax.tree.map(lambda y: y[0], kernel(*[y[None] for y in x]))  # noqa: E731
    want = loss_and_gradients(kernel, arguments, weights)
    assert_close(want, loss_and_gradients(jax.checkpoint(jax.vmap(row)), arguments, weights), FLOAT32)


@pytest.mark.slow
def test_shard_map():
    arguments, weights = draw(65)
    kernel = lambda *x: scalar_decay(*x, scale=1.0, interpret=INTERPRET)  # noqa: E731
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    tokens, state = P("rows", None, "heads"), P("rows", "heads")
    split = jax.shard_map(kernel, mesh=mesh, in_specs=(*[tokens] * 4, state), out_specs=(tokens, state))
    want = loss_and_gradients(kernel, arguments, weights)
    assert_close(want, loss_and_gradients(split, arguments, weights), FLOAT32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float16}, "needs bfloat16 or float32"),
        ({"key_dim": 320}, "needs 256 at most"),
        ({"length": 0}, "is empty"),
    ],
)
def test_refusals(change, reason):
    arguments, _ = draw(**{"length": 8} | change)
    with pytest.raises(NotImplementedError, match=reason):
        scalar_decay(*arguments, scale=1.0, interpret=INTERPRET)
