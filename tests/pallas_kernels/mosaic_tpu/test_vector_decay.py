"""The TPU kernel of vector decay, interpreted on the CPU, against the equation token by token in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effattn_jax.linear import vector_decay as engine
from pallas_kernels.mosaic_tpu.vector_decay import vector_decay
from tests.linear.draw import log_decays
from tests.linear.packings import PACKINGS
from tests.ratio import BFLOAT16_GATE, BFLOAT16_GRAD, BFLOAT16_OUT, FLOAT32, assert_close

STRENGTHS = ("mild", "weak", "strong", "heavy", "extreme", "sigmoid")
NAMES = ("dq", "dk", "dv", "dlog_decay", "dinitial_state", "dbonus")
INTERPRET = pltpu.InterpretParams()


def draw(length, key_dim=64, value_dim=64, heads=(2, 2, 2), strength="mild", dtype=jnp.float32, batch=1, bonus=True):
    """Arguments of the kernel, the bonus last, and what its outputs are multiplied with in the loss."""
    rng = np.random.default_rng(0)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    round_ = lambda x: np.asarray(jnp.asarray(x, dtype))  # noqa: E731
    most = max(heads)
    dims = (key_dim, key_dim, value_dim)
    qkv = [round_(randn(batch, length, h, dim)) for h, dim in zip(heads, dims, strict=True)]
    gates = (batch, length, most, key_dim)
    g = -np.logaddexp(0, 4 - randn(*gates)) if strength == "sigmoid" else log_decays(rng, gates, strength)
    state = (batch, most, key_dim, value_dim)
    arguments = (*qkv, g, randn(*state), *([randn(most, key_dim)] if bonus else []))
    return arguments, (round_(randn(batch, length, most, value_dim)), randn(*state))


def of(cases, *quick):
    """All cases, those that are not quick marked slow."""
    marks = [() if case in quick else pytest.mark.slow for case in cases]
    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=mark, id=str(case)) for case, mark in zip(cases, marks, strict=True)]
    )


def kernel_of(segment_ids=None, scale=1.0, interpret=INTERPRET):
    def kernel(q, k, v, g, state, bonus=None):
        return vector_decay(q, k, v, g, state, segment_ids, bonus=bonus, scale=scale, interpret=interpret)

    return kernel


def loss_and_gradients(function, arguments, weights):
    def loss(*arguments):
        out, state = function(*arguments)
        return sum((x.astype(w.dtype) * w).sum() for x, w in zip((out, state), weights, strict=True)), (out, state)

    argnums = tuple(range(len(arguments)))
    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*arguments)
    return outputs, gradients


def assert_equals_oracle(drawn, segment_ids=None, limits=(FLOAT32,) * 3, scale=0.3, interpret=INTERPRET):
    arguments, weights = drawn

    def oracle(q, k, v, g, state, bonus=None):
        more = {"scale": scale, "initial_state": state, "segment_ids": segment_ids, "form": "recurrent"}
        return engine(q, k, v, g, bonus=bonus, **more)

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(np.float64), drawn)
        want, want_gradients = jax.tree.map(np.asarray, loss_and_gradients(oracle, *exact))
    weights = [w.astype(np.float32) for w in weights]
    got, gradients = loss_and_gradients(kernel_of(segment_ids, scale, interpret), arguments, weights)
    assert got[0].dtype == arguments[0].dtype
    assert [x.dtype for x in gradients] == [x.dtype for x in arguments]
    out, gradient, gate = limits
    assert_close(want, got, out, "(out, state)")
    for name, x, y in zip(NAMES, want_gradients, gradients, strict=False):
        assert_close(x, y, gate if name == "dlog_decay" else gradient, name)


@of([(strength, bonus) for strength in STRENGTHS for bonus in (False, True)], ("sigmoid", False), ("extreme", True))
@pytest.mark.slow
def test_strengths_of_gates(case):
    strength, bonus = case
    assert_equals_oracle(draw(200, 64, 128, strength=strength, bonus=bonus))


@of([1, 65, 128, 700], 700)
@pytest.mark.slow
def test_lengths(case):
    """One token, a part of a chunk, a chunk, two blocks of three chunks."""
    assert_equals_oracle(draw(case, heads=(1, 1, 1), strength="weak"))


@pytest.mark.slow
def test_lengths_without_bonus():
    assert_equals_oracle(draw(700, strength="weak", bonus=False))


@of([(128, 64), (50, 100), (256, 16)])
def test_dims(case):
    assert_equals_oracle(draw(200, *case))


@of([(2, 2, 4), (4, 2, 2), (1, 4, 4), (4, 1, 2)], (4, 1, 2))
@pytest.mark.slow
def test_groups_of_heads(case):
    assert_equals_oracle(draw(140, 50, 100, heads=case))


@of([(packing, bonus) for packing in PACKINGS for bonus in (False, True)], ("padding", True))
def test_packed_documents(case):
    packing, bonus = case
    assert_equals_oracle(draw(196, strength="weak", batch=2, bonus=bonus), PACKINGS[packing])


@of([(strength, bonus) for strength in STRENGTHS for bonus in (False, True)], ("strong", False))
@pytest.mark.slow
def test_bfloat16(case):
    strength, bonus = case
    limits = (BFLOAT16_OUT, BFLOAT16_GRAD, BFLOAT16_GATE)
    assert_equals_oracle(draw(200, 128, 64, strength=strength, dtype=jnp.bfloat16, bonus=bonus), limits=limits)


@pytest.mark.slow
def test_bfloat16_of_packed_grouped_heads():
    limits = (BFLOAT16_OUT, BFLOAT16_GRAD, BFLOAT16_GATE)
    assert_equals_oracle(draw(196, heads=(2, 2, 4), dtype=jnp.bfloat16, batch=2), PACKINGS["padding"], limits)


@of([-0.5, 0.0])
def test_scale(case):
    assert_equals_oracle(draw(65), scale=case)


@pytest.mark.slow
def test_gates_below_any_exponential():
    """-1e9 forgets all: tokens read their own write alone, and nothing overflows."""
    arguments, weights = draw(200, bonus=False)
    (q, k, v, _, state), gates = arguments, np.full((1, 200, 2, 64), -1e9, np.float32)
    (out, end), gradients = loss_and_gradients(kernel_of(), (q, k, v, gates, state), weights)
    assert_close(np.sum(q * k, -1, keepdims=True) * v, out, FLOAT32)
    assert_close(k[:, -1, :, :, None] * v[:, -1, :, None, :], end, FLOAT32)
    assert_close((out, end), jax.jit(kernel_of())(q, k, v, gates, state), FLOAT32)  # not differentiated
    assert not np.any(gradients[3])
    assert not np.any(gradients[4])


@pytest.mark.slow
def test_no_races(capfd):
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    assert_equals_oracle(draw(700, heads=(2, 2, 4)), interpret=interpret)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
def test_vmap_and_checkpoint():
    (*arguments, _), weights = draw(65, batch=2)
    kernel = kernel_of(interpret=True)
    row = lambda *x: jax.tree.map(lambda y: y[0], kernel(*[y[None] for y in x]))  # noqa: E731
    want = loss_and_gradients(kernel, arguments, weights)
    assert_close(want, loss_and_gradients(jax.checkpoint(jax.vmap(row)), arguments, weights), FLOAT32)


@of([False, True], True)
@pytest.mark.slow
def test_shard_map(case):
    arguments, weights = draw(65, batch=2, bonus=case)
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    tokens, state = P("rows", None, "heads"), P("rows", "heads")
    specs = (*[tokens] * 4, state, *([P("heads")] if case else []))
    split = jax.shard_map(kernel_of(), mesh=mesh, in_specs=specs, out_specs=(tokens, state))
    want = loss_and_gradients(kernel_of(), arguments, weights)
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
        kernel_of()(*arguments)
