"""The Hopper kernel of vector decay, interpreted on a CPU and lowered for CUDA, against the equation in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.export import DisabledSafetyCheck, export

from effattn_jax.linear import vector_decay
from pallas_kernels.mosaic_gpu.vector_decay import vector_decay as kernel
from tests.linear.packings import row
from tests.ratio import BFLOAT16_GATE, BFLOAT16_GRAD, BFLOAT16_OUT, assert_close

NAMES = ("q", "k", "v", "log_decay", "initial_state", "bonus")
INTERPRET = plgpu.InterpretGPUParams()
WITH_BONUS = pytest.mark.parametrize("bonus", [False, True], ids=["after", "bonus"])
ONE_HEAD = (1, 1, 1)
NOTHING = 1e-3  # of the largest: sums for gates are of numbers cut to 16 bits, and with a bonus their differences


def draw(length, key_dim=64, value_dim=64, heads=ONE_HEAD, gate=2.0, batch=1, bonus=False, dtype=jnp.bfloat16, seed=0):
    """Arguments of the kernel, the bonus last, and what its outputs are multiplied with in the loss."""
    rng = np.random.default_rng(seed)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    most, dims = max(heads), (key_dim, key_dim, value_dim)
    qkv = [jnp.asarray(randn(batch, length, h, d), dtype) for h, d in zip(heads, dims, strict=True)]
    log_decay = np.asarray(jax.nn.log_sigmoid(gate + randn(batch, length, most, key_dim)))
    arrays = (*qkv, log_decay, randn(batch, most, key_dim, value_dim), *([randn(most, key_dim)] if bonus else []))
    return arrays, jnp.asarray(randn(batch, length, most, value_dim), dtype), randn(batch, most, key_dim, value_dim)


def call(segment_ids=None, scale=1.0, **options):
    """The kernel as a function of its arrays; on a CPU in one part, unless told."""
    options = {"parts": 1, "interpret": INTERPRET} | options

    def function(q, k, v, log_decay, state, bonus=None):
        return kernel(q, k, v, log_decay, state, segment_ids, bonus=bonus, scale=scale, **options)

    return function


def results(function, arrays, d_out, d_state):
    def loss(*arrays):
        out, state = function(*arrays)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(state * d_state), (out, state)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True))(*arrays)
    return outputs, gradients


def check(arrays, d_out, d_state, segment_ids=None, scale=0.3, **options):
    def recurrence(q, k, v, log_decay, state, bonus=None):
        more = {"bonus": bonus, "initial_state": state, "segment_ids": segment_ids, "scale": scale}
        return vector_decay(q, k, v, log_decay, form="recurrent", **more)

    want, want_grads = results(recurrence, [x.astype(jnp.float32) for x in arrays], d_out, d_state)
    got, grads = results(call(segment_ids, scale, **options), arrays, d_out, d_state)
    assert got[0].dtype == arrays[0].dtype
    assert [x.dtype for x in grads] == [x.dtype for x in arrays]
    assert_close(want, got, BFLOAT16_OUT, "(out, state)")
    for name, x, y in zip(NAMES, want_grads, grads, strict=False):
        assert_close(x, y, BFLOAT16_GATE if name in ("log_decay", "bonus") else BFLOAT16_GRAD, f"d{name}")
    return got, grads


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("gate", "bonus"),
    [(2.0, False), slow(2.0, True), slow(6.0, False), slow(6.0, True), slow(-4.0, False), slow(-4.0, True)],
)
def test_is_the_recurrence(gate, bonus):
    """Mild gates (half of them above 0.88), weak ones (0.998) and strong ones (0.018)."""
    check(*draw(128, gate=gate, bonus=bonus))


@pytest.mark.parametrize(
    ("length", "key_dim", "value_dim"),
    [
        (1, 64, 64),
        *(slow(*case) for case in [(63, 64, 128), (65, 128, 64), (130, 50, 100), (100, 200, 33), (70, 256, 64)]),
        *(slow(*case) for case in [(129, 128, 128), (64, 64, 256), (65, 256, 256)]),
    ],
)
@pytest.mark.parametrize("bonus", [False, slow(True)], ids=["after", "bonus"])
@pytest.mark.slow
def test_ragged_lengths_and_sizes(length, key_dim, value_dim, bonus):
    check(*draw(length, key_dim, value_dim, bonus=bonus))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(1, 1, 2), (2, 1, 1), (1, 2, 1)], ids=["shared q, k", "shared k, v", "shared q, v"])
@WITH_BONUS
def test_groups_of_heads(heads, bonus):
    check(*draw(66, heads=heads, bonus=bonus))


PACKED = np.stack([row((0, 60), (1, 1), (2, 40), (-1, 9), (5, 40)), row((-1, 30), (3, 50), (4, 1), (-1, 69))])


@pytest.mark.slow
@pytest.mark.parametrize("key_dim", [64, 128])
@WITH_BONUS
def test_packed_documents(key_dim, bonus):
    drawn = draw(150, key_dim, batch=2, bonus=bonus)
    (out, _), (dq, dk, dv, d_gates, *_) = check(*drawn, PACKED)
    for x in (out, dq, dk, dv, d_gates):
        assert not np.asarray(x, np.float32)[PACKED < 0].any()
    # nothing is there to decay where a document starts
    assert np.abs(np.asarray(d_gates)[0, [60, 61, 110]]).max() <= NOTHING * np.abs(d_gates).max()


@pytest.mark.slow
@pytest.mark.parametrize("key_dim", [64, 128])
@WITH_BONUS
def test_what_is_in_padding_does_not_spread(key_dim, bonus):
    (q, k, v, log_decay, *rest), d_out, d_state = draw(150, key_dim, batch=2, bonus=bonus)
    padding = (PACKED < 0)[:, :, None, None]
    spoiled = [jnp.where(padding, jnp.nan, x).astype(x.dtype) for x in (q, k, v, log_decay)]
    want = results(call(PACKED), (q, k, v, log_decay, *rest), d_out, d_state)
    got = results(call(PACKED), (*spoiled, *rest), d_out, d_state)
    jax.tree.map(np.testing.assert_array_equal, want, got)


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "bonus"), [(2, False), (3, True)])
def test_parts_of_a_row_are_the_row(parts, bonus):
    length = 64 * parts - 10
    ids = np.stack([row((0, 50), (1, length - 70), (-1, 20))])
    check(*draw(length, bonus=bonus), ids, parts=parts)


def _as_row(function):
    """`function` of arrays without rows of their own, but for the bonus."""

    def one(*arrays):
        each = [x if i == 5 else x[None] for i, x in enumerate(arrays)]
        return jax.tree.map(lambda x: x[0], function(*each))

    return one


@pytest.mark.slow
@WITH_BONUS
def test_vmap_is_rows(bonus):
    arrays, d_out, d_state = draw(70, batch=2, bonus=bonus)
    mapped = jax.vmap(_as_row(call()), in_axes=(*[0] * 5, *[None] * bonus))
    jax.tree.map(
        np.testing.assert_array_equal,
        results(call(), arrays, d_out, d_state),
        results(mapped, arrays, d_out, d_state),
    )


@pytest.mark.slow
def test_vmap_over_bonuses():
    (*arrays, bonus), d_out, d_state = draw(70, batch=2, bonus=True)
    bonuses = np.stack([bonus, -2 * bonus])
    each = [
        results(call(), [x[i : i + 1] for x in arrays] + [bonuses[i]], d_out[i : i + 1], d_state[i : i + 1])
        for i in range(2)
    ]
    want = [jnp.concatenate(x) for x in zip(*(jax.tree.leaves((o, g[:5])) for o, g in each), strict=True)]
    outputs, grads = results(jax.vmap(_as_row(call())), (*arrays, bonuses), d_out, d_state)
    jax.tree.map(np.testing.assert_array_equal, want, jax.tree.leaves((outputs, grads[:5])))
    np.testing.assert_array_equal(np.stack([g[5] for _, g in each]), grads[5])


@pytest.mark.slow
def test_has_no_races():
    check(*draw(128, 128, 64, bonus=True), interpret=plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.slow
@WITH_BONUS
def test_gates_of_minus_infinity_forget(bonus):
    """A decay of exactly 0, of all channels of some tokens and of some channels of all."""
    arrays, d_out, d_state = draw(70, bonus=bonus)
    q, k, v, log_decay, state, *rest = arrays
    log_decay = np.array(log_decay)
    log_decay[:, [0, 7, 8, 63, 64]] = -np.inf
    log_decay[..., 5] = -np.inf
    got, grads = results(call(scale=0.3), (q, k, v, log_decay, state, *rest), d_out, d_state)
    for x in jax.tree.leaves((got, grads)):
        assert np.isfinite(np.asarray(x, np.float32)).all()
    assert np.abs(np.asarray(grads[3])[np.isinf(log_decay)]).max() <= NOTHING * np.abs(grads[3]).max()
    finite = np.maximum(log_decay, -200)  # e^-200 is 0 in float32
    exact = [x.astype(jnp.float32) for x in (q, k, v, finite, state)]
    recurrence = functools.partial(vector_decay, bonus=rest[0] if rest else None, scale=0.3, form="recurrent")
    want = recurrence(*exact[:4], initial_state=exact[4])
    assert_close(want, got, BFLOAT16_OUT, "(out, state)")


@pytest.mark.slow
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(scale):
    check(*draw(65, bonus=True), scale=scale)


@pytest.mark.slow
def test_float16():
    check(*draw(65, dtype=jnp.float16, bonus=True))


@pytest.mark.slow
@WITH_BONUS
def test_by_name_on_a_cpu_it_is_interpreted_and_none_never_takes_it(bonus):
    (q, k, v, g, s, *u), _, _ = draw(64, bonus=bonus)
    arguments = {"initial_state": s, "bonus": u[0] if u else None}
    named = vector_decay(q, k, v, g, **arguments, implementation="mosaic_gpu")
    direct = call(scale=64**-0.5, parts=None)(q, k, v, g, s, *u)
    jax.tree.map(np.testing.assert_array_equal, named, direct)
    assert "mpmd_map" not in str(jax.make_jaxpr(lambda: vector_decay(q, k, v, g, **arguments))())


@WITH_BONUS
def test_under_shard_map(bonus):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays, _, _ = draw(64, batch=2, bonus=bonus)

    def out(check_vma):
        def run(q, k, v, g, s, u=None):
            return vector_decay(q, k, v, g, bonus=u, initial_state=s, implementation="mosaic_gpu")

        rows = jax.sharding.PartitionSpec("data")
        specs = (*[rows] * 5, *[jax.sharding.PartitionSpec()] * bonus)
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=check_vma))

    with pytest.raises(NotImplementedError, match="check_vma=False"):
        out(True).trace(*arrays)
    out(False).trace(*arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.float32, "k": jnp.float32, "v": jnp.float32}, "needs one of bfloat16, float16"),
        ({"k": jnp.float16}, "needs one of bfloat16, float16"),
        ({"form": "recurrent"}, "needs 'chunkwise'"),
        ({"form": "parallel"}, "needs 'chunkwise'"),
        ({"scale": jnp.float32(0.5)}, "needs a number that is known"),
    ],
)
def test_refusals_say_why(change, message):
    arrays, _, _ = draw(64)
    inputs = dict(zip(NAMES[:4], arrays[:4], strict=True))
    inputs |= {name: inputs[name].astype(dtype) for name, dtype in change.items() if name in inputs}
    options = {name: x for name, x in change.items() if name not in inputs}
    run = functools.partial(vector_decay, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(lambda inputs, scale: run(**inputs, **options | scale))(
            inputs, {"scale": change["scale"]} if "scale" in change else {}
        )


@pytest.mark.parametrize(("key_dim", "value_dim"), [(320, 64), (64, 257)])
def test_wide_heads_are_refused(key_dim, value_dim):
    arrays, _, _ = draw(1, key_dim, value_dim)
    with pytest.raises(NotImplementedError, match=f"K = {key_dim}, V = {value_dim}; needs at most 256"):
        call()(*arrays)


@pytest.mark.parametrize(
    ("dim", "bonus"),
    [(64, True), slow(64, False), slow(128, False), slow(128, True), slow(256, False), slow(256, True)],
)
def test_lowers_for_cuda(dim, bonus):
    arrays, d_out, d_state = draw(128, dim, dim, bonus=bonus)
    both = jax.jit(lambda *x: results(call(interpret=False), x, d_out, d_state))
    safe = [DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    program = export(both, platforms=["cuda"], disabled_checks=safe)(*arrays).mlir_module()
    # scores, that forward and backward share; the forward scan, those of states and of their gradients; the gradients
    assert program.count("@mosaic_gpu_v2") == 5
