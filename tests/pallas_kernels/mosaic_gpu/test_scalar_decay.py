"""The Hopper kernel of scalar decay, interpreted on a CPU and lowered for CUDA, against the equation in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.export import DisabledSafetyCheck, export

from effattn_jax.linear import scalar_decay
from pallas_kernels.mosaic_gpu.scalar_decay import scalar_decay as kernel
from tests.linear.packings import row
from tests.ratio import BFLOAT16_GATE, BFLOAT16_GRAD, BFLOAT16_OUT, assert_close

NAMES = ("q", "k", "v", "log_decay", "initial_state")


def draw(length, key_dim=64, value_dim=64, heads=(2, 2, 2), gate=2.0, batch=1):
    rng = np.random.default_rng(0)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    most = max(heads)
    dims = (key_dim, key_dim, value_dim)
    qkv = [jnp.asarray(randn(batch, length, h, d), jnp.bfloat16) for h, d in zip(heads, dims, strict=True)]
    log_decay = np.asarray(jax.nn.log_sigmoid(gate + randn(batch, length, most)))
    arrays = (*qkv, log_decay, randn(batch, most, key_dim, value_dim))
    d_out = jnp.asarray(randn(batch, length, most, value_dim), jnp.bfloat16)
    return arrays, d_out, randn(batch, most, key_dim, value_dim)


def results(function, arrays, d_out, d_state):
    def loss(*arrays):
        out, state = function(*arrays)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(state * d_state), (out, state)

    return jax.jit(jax.value_and_grad(loss, tuple(range(5)), has_aux=True))(*arrays)


def check(arrays, d_out, d_state, segment_ids=None, **options):
    options = {"parts": 1} | options
    run = functools.partial(scalar_decay, segment_ids=segment_ids)
    exact = [x.astype(jnp.float32) for x in arrays]
    (_, want), want_grads = results(
        lambda q, k, v, g, s: run(q, k, v, g, initial_state=s, form="recurrent"), exact, d_out, d_state
    )
    (_, got), grads = results(
        lambda *x: kernel(*x, segment_ids, scale=exact[0].shape[-1] ** -0.5, **options), arrays, d_out, d_state
    )
    assert got[0].dtype == jnp.bfloat16
    assert_close(want[0], got[0], BFLOAT16_OUT, "out")
    assert_close(want[1], got[1], BFLOAT16_OUT, "state")
    for name, x, y in zip(NAMES, want_grads, grads, strict=True):
        assert_close(x, y, BFLOAT16_GATE if name == "log_decay" else BFLOAT16_GRAD, f"d{name}")
    return got, grads


INTERPRET = plgpu.InterpretGPUParams()


@pytest.mark.parametrize(
    "gate",
    [pytest.param(6.0, marks=pytest.mark.slow), pytest.param(2.0, marks=pytest.mark.slow), -4.0],
    ids=["weak", "mild", "strong"],
)
def test_is_the_recurrence(gate):
    check(*draw(192, gate=gate), interpret=INTERPRET)


@pytest.mark.parametrize(
    ("length", "key_dim", "value_dim"),
    [
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in [
                (1, 64, 64),
                (200, 128, 64),
                (65, 50, 100),
                (127, 64, 128),
                (384, 128, 128),
            ]
        ),
    ],
)
def test_ragged_lengths_and_sizes(length, key_dim, value_dim):
    check(*draw(length, key_dim, value_dim), interpret=INTERPRET)


@pytest.mark.parametrize(
    "heads", [(1, 1, 2), pytest.param((2, 1, 1), marks=pytest.mark.slow)], ids=["shared q, k", "shared k, v"]
)
@pytest.mark.slow
def test_groups_of_heads(heads):
    check(*draw(130, heads=heads), interpret=INTERPRET)


# sizes above 128 take other passes
both_passes = pytest.mark.parametrize(
    "value_dim", [64, pytest.param(256, marks=pytest.mark.slow)], ids=["scans", "chunks"]
)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "key_dim", "value_dim"), [(150, 64, 256), (70, 256, 200)])
def test_chunks_take_larger_sizes(length, key_dim, value_dim):
    check(*draw(length, key_dim, value_dim), interpret=INTERPRET)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(128, 64), (64, 256)], ids=["scans", "chunks"])
@pytest.mark.parametrize("gate", [6.0, 2.0, -4.0], ids=["weak", "mild", "strong"])
def test_both_passes_are_the_recurrence(gate, sizes):
    check(*draw(256, *sizes, heads=(1, 1, 2), gate=gate), interpret=INTERPRET)


@both_passes
@pytest.mark.slow
def test_packed_documents(value_dim):
    ids = np.stack([row((0, 100), (1, 1), (2, 60), (-1, 9), (5, 130)), row((-1, 30), (3, 200), (4, 1), (-1, 69))])
    arrays, d_out, d_state = draw(300, 64, value_dim, heads=(1, 1, 1), batch=2)
    (out, _), (dq, _, _, dg, _) = check(arrays, d_out, d_state, ids, interpret=INTERPRET)
    for x in (out, dq, dg):
        assert not np.asarray(x, np.float32)[ids < 0].any()
    assert not np.asarray(dg)[0, [100, 101, 170]].any()  # nothing is there to decay where a document starts


@pytest.mark.slow
@pytest.mark.parametrize("parts", [3, 6])
@both_passes
def test_parts_of_a_row_are_the_row(parts, value_dim):
    ids = np.stack([row((0, 100), (1, 64 * parts - 150), (-1, 40))])
    check(*draw(64 * parts - 10, 64, value_dim, heads=(1, 1, 1)), ids, parts=parts, interpret=INTERPRET)


@both_passes
@pytest.mark.slow
def test_vmap_is_rows(value_dim):
    arrays, _, _ = draw(128, 64, value_dim, batch=3)
    each = [x[:, None] for x in arrays]
    want = kernel(*arrays, None, scale=1.0, interpret=INTERPRET)
    got = jax.vmap(lambda *x: kernel(*x, None, scale=1.0, interpret=INTERPRET))(*each)
    jax.tree.map(lambda w, x: np.testing.assert_array_equal(w, x[:, 0]), want, got)


@pytest.mark.slow
@both_passes
def test_has_no_races(value_dim):
    arrays, d_out, d_state = draw(192, 128, value_dim, heads=(1, 1, 1))
    check(arrays, d_out, d_state, interpret=plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.slow
def test_padding_may_hold_nan_and_gates_may_be_infinite():
    (q, k, v, g, s), d_out, d_state = draw(70, heads=(1, 1, 1))
    ids = np.stack([row((0, 60), (-1, 10))])
    spoilt = [jnp.where((ids < 0)[..., None, None], jnp.nan, x) for x in (q, k, v)]
    run = functools.partial(kernel, scale=1.0, interpret=INTERPRET)
    g = jnp.asarray(g).at[:, 30].set(-jnp.inf)
    want = results(lambda *x: run(*x, ids), (q, k, v, g, s), d_out, d_state)
    got = results(lambda *x: run(*x, ids), (*spoilt, g, s), d_out, d_state)
    jax.tree.map(np.testing.assert_array_equal, want, got)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(got))


def test_gates_that_nothing_differentiates_cost_nothing():
    (q, k, v, g, s), _, _ = draw(64)

    def text(argnums):
        loss = lambda q, g: kernel(q, k, v, g, s, None, scale=1.0)[0].astype(jnp.float32).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss, argnums))(q, g))

    states = "bf16[1,2,1,64,64]"  # that enter the chunks
    assert states in text((0, 1))
    assert states not in text((0,))


@pytest.mark.slow
def test_by_name_on_a_cpu_it_is_interpreted_and_none_never_takes_it():
    (q, k, v, g, s), _, _ = draw(64)
    named = scalar_decay(q, k, v, g, initial_state=s, implementation="mosaic_gpu")
    direct = kernel(q, k, v, g, s, None, scale=64**-0.5, interpret=INTERPRET)
    jax.tree.map(np.testing.assert_array_equal, named, direct)
    text = str(jax.make_jaxpr(lambda: scalar_decay(q, k, v, g))())
    assert "custom_vmap" not in text


def test_under_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    (q, k, v, g, s), _, _ = draw(64, batch=2)

    def out(check_vma):
        run = lambda *x: scalar_decay(*x[:4], initial_state=x[4], implementation="mosaic_gpu")  # noqa: E731
        rows = jax.sharding.PartitionSpec("data")
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check_vma))

    with pytest.raises(NotImplementedError, match="check_vma=False"):
        out(True).trace(q, k, v, g, s)
    out(False).trace(q, k, v, g, s)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.float32, "k": jnp.float32, "v": jnp.float32}, "needs one of bfloat16, float16"),
        ({"form": "recurrent"}, "needs 'chunkwise'"),
        ({"scale": -1.0}, "needs a positive number"),
    ],
)
def test_refusals_say_why(change, message):
    arrays, _, _ = draw(64)
    inputs = dict(zip(("q", "k", "v", "log_decay"), arrays[:4], strict=True))
    casts = {name: x for name, x in change.items() if name in inputs}
    inputs |= {name: inputs[name].astype(dtype) for name, dtype in casts.items()}
    options = {name: x for name, x in change.items() if name not in inputs}
    with pytest.raises(NotImplementedError, match=message):
        scalar_decay(**inputs, implementation="mosaic_gpu", **options)


@pytest.mark.parametrize(
    ("dim", "kernels"),
    [
        (64, 4),  # forward, dq, dk, dv
        (128, 4),
        (256, 5),  # scores, forward, states, dv, dq with dk
    ],
)
@pytest.mark.quick_cases(1)
def test_lowers_for_cuda(dim, kernels):
    arrays, d_out, d_state = draw(256, dim, dim)
    run = lambda *x: kernel(*x, None, scale=1.0, parts=1)  # noqa: E731
    both = jax.jit(lambda *x: results(run, x, d_out, d_state))
    exported = export(both, platforms=["cuda"], disabled_checks=[DisabledSafetyCheck.custom_call("mosaic_gpu_v2")])(
        *arrays
    )
    assert exported.mlir_module().count("mosaic_gpu_v2") >= kernels
