"""The Hopper kernels of softmax attention, interpreted on a CPU and lowered for CUDA, against the dense form."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.export import DisabledSafetyCheck, export

from effattn_jax import kernels
from effattn_jax.sparse import attention
from pallas_kernels.mosaic_gpu.attention import TILES
from pallas_kernels.mosaic_gpu.attention import attention as kernel
from pallas_kernels.mosaic_gpu.attention_backward import BackwardTiles
from pallas_kernels.mosaic_gpu.attention_forward import Tiles
from tests.linear.packings import row
from tests.ratio import BFLOAT16_GRAD, BFLOAT16_OUT, assert_close

INTERPRET = plgpu.InterpretGPUParams()


def draw(length, dim=64, value_dim=None, *, keys=None, heads=2, kv_heads=1, batch=1, sinks=False):
    rng = np.random.default_rng(0)
    randn = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    keys, value_dim = keys or length, value_dim or dim
    q, k, v = (
        randn(batch, length, heads, dim),
        randn(batch, keys, kv_heads, dim),
        randn(batch, keys, kv_heads, value_dim),
    )
    z = np.resize(np.array([-2, 1, 5], np.float32), heads) if sinks else None
    return (q, k, v, z), randn(batch, length, heads, value_dim), rng.standard_normal((batch, length, heads))


def results(function, arrays, d_out, d_lse):
    def loss(arrays):
        out, lse = function(*arrays)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(finite * d_lse), (out, finite)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return outputs, gradients


def check(arrays, d_out, d_lse, *, ids=None, interpret=INTERPRET, tiles=None, scale=None, **options):
    options = {"causal": True} | options
    exact = tuple(None if x is None else x.astype(jnp.float32) for x in arrays)
    cap = options.pop("cap", None)

    def dense(q, k, v, z):
        return attention(
            q,
            k,
            v,
            sinks=z,
            segment_ids=ids,
            scale=scale,
            logits_soft_cap=cap,
            implementation="dense",
            return_lse=True,
            **options,
        )

    length, keys = arrays[0].shape[1], arrays[1].shape[1]
    run = functools.partial(
        kernel,
        query_ids=None if ids is None else ids[:, keys - length :],
        key_ids=ids,
        offset=keys - length,
        scale=scale or arrays[0].shape[-1] ** -0.5,
        cap=cap,
        tiles=tiles,
        interpret=interpret,
        **options,
    )
    want, want_grads = results(dense, exact, d_out, d_lse)
    got, grads = results(run, arrays, d_out, d_lse)
    assert got[0].dtype == arrays[0].dtype
    assert_close(want, got, BFLOAT16_OUT)
    assert_close(want_grads, grads, BFLOAT16_GRAD)
    return got, grads


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"length": 130}, {}),
        slow({"length": 100, "keys": 230}, {"scale": 0.7}),
        slow({"length": 128}, {"causal": False}),
        slow({"length": 1}, {}),
        slow({"length": 15, "keys": 300}, {"causal": False}),
    ],
    ids=["causal", "a past", "all", "one token", "no mask but at the end"],
)
def test_is_softmax(sizes, options):
    check(*draw(**sizes), **options)


@pytest.mark.parametrize(
    ("window", "options"),
    [(40, {}), slow(120, {"sinks": True}), slow(1000, {}), slow(70, {"causal": False}), slow(1, {})],
)
@pytest.mark.slow
def test_windows(window, options):
    sinks = options.pop("sinks", False)
    check(*draw(200, heads=1, sinks=sinks), window=window, **options)


@pytest.mark.slow
def test_sinks_and_soft_cap():
    check(*draw(70, heads=3, kv_heads=3, sinks=True), cap=2.0)


@pytest.mark.parametrize(("dim", "value_dim"), [slow(50, 24), slow(128, 128), slow(200, 100), slow(256, 256)])
def test_sizes(dim, value_dim):
    check(*draw(130, dim, value_dim, heads=1))


IDS = np.stack([row((0, 100), (1, 1), (2, 60), (-1, 9), (5, 130)), row((-1, 140), (3, 90), (4, 1), (-1, 69))])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, slow({"window": 50}), slow({"causal": False})], ids=["", "window", "all"])
def test_documents(options):
    arrays, d_out, d_lse = draw(300, heads=1, batch=2, sinks=False)
    (out, _), (dq, dk, dv, _) = check(arrays, d_out, d_lse, ids=IDS, **options)
    for x in (out, dq, dk, dv):
        assert not np.asarray(x, np.float32)[IDS < 0].any()


@pytest.mark.slow
def test_documents_and_a_past():
    check(*draw(90, keys=300, heads=1, batch=2, sinks=True), ids=IDS, window=80)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiles",
    [
        (Tiles(64, overlap=False), BackwardTiles(128)),
        (Tiles(128, stages=3), BackwardTiles(64, stages=1, warpgroups=1)),
        (Tiles(64, stages=1), BackwardTiles(64, warpgroups=1, parts=2)),
        (Tiles(64, overlap=False, warpgroups=3), BackwardTiles(64)),
    ],
)
def test_other_tiles(tiles):
    check(*draw(260, 128, heads=1), tiles=tiles, window=200)


@pytest.mark.slow
def test_has_no_races():
    check(*draw(130, kv_heads=1), interpret=plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.slow
def test_vmap_is_rows():
    arrays, _, _ = draw(64, batch=3, heads=1)
    run = functools.partial(kernel, offset=0, causal=True, scale=1.0, interpret=INTERPRET)
    together = lambda q, k, v: jnp.sum(run(q, k, v)[0] ** 2)  # noqa: E731
    want = jax.grad(together, (0, 1, 2))(*arrays[:3])
    got = jax.vmap(jax.grad(together, (0, 1, 2)))(*(x[:, None] for x in arrays[:3]))
    jax.tree.map(lambda w, x: np.testing.assert_array_equal(w, x[:, 0]), want, got)


@pytest.mark.slow
def test_by_name_on_a_cpu_it_is_interpreted_and_none_never_takes_it():
    (q, k, v, _), _, _ = draw(64)
    named = attention(q, k, v, implementation="mosaic_gpu", return_lse=True)
    direct = kernel(q, k, v, offset=0, causal=True, scale=64**-0.5, interpret=INTERPRET)
    jax.tree.map(np.testing.assert_array_equal, named, direct)
    assert "custom_vmap" not in str(jax.make_jaxpr(lambda: attention(q, k, v))())


@pytest.mark.parametrize(
    ("platform", "devices", "length", "order"),
    [
        ("gpu", 1, 64, ("cudnn", "mosaic_gpu", "xla")),
        ("gpu", 1, 63, ("cudnn", "xla")),
        ("gpu", 2, 64, ("cudnn", "xla")),
        ("tpu", 1, 64, ("cudnn", "xla")),
    ],
)
def test_what_none_tries(platform, devices, length, order, monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert kernels.attention_here(length) == order


def test_none_takes_ours_for_what_cudnn_refuses(monkeypatch):
    """The order is that of one GPU; the kernel itself, which sees a CPU, is interpreted."""
    module = sys.modules["effattn_jax.sparse.attention"]  # the package's attribute is the function
    monkeypatch.setattr(module, "attention_here", lambda length: ("cudnn", "mosaic_gpu", "xla"))
    (q, k, v, z), _, _ = draw(64, heads=1, sinks=True)
    named = attention(q, k, v, sinks=z, implementation="mosaic_gpu")
    np.testing.assert_array_equal(attention(q, k, v, sinks=z), named)


def test_none_on_a_gpu_that_is_no_hopper_takes_xla(monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    (q, k, v, z), _, _ = draw(64, heads=1, sinks=True)
    assert kernels.attention_here(64)[1] == "mosaic_gpu"
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        attention(q, k, v, sinks=z, implementation="mosaic_gpu")
    want = attention(q, k, v, sinks=z, implementation="xla")
    np.testing.assert_array_equal(attention(q, k, v, sinks=z), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "needs one of bfloat16, float16"),
        ({"dim": 300}, "needs at most 256"),
        ({"scale": -1.0}, "needs a positive number"),
    ],
)
def test_refusals_say_why(change, message):
    (q, k, v, _), _, _ = draw(8, change.pop("dim", 64))
    dtype = change.pop("dtype", jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=message):
        attention(*(x.astype(dtype) for x in (q, k, v)), implementation="mosaic_gpu", **change)


@pytest.mark.parametrize("dim", sorted(TILES))
@pytest.mark.quick_cases(1)
def test_lowers_for_cuda(dim):
    (q, k, v, z), d_out, d_lse = draw(256, dim, sinks=True)
    ids = np.zeros((1, 256), np.int32)
    for segments, options in ((None, {}), (ids, {"window": 100, "cap": 5.0})):
        run = functools.partial(
            kernel, query_ids=segments, key_ids=segments, offset=0, causal=True, scale=1.0, **options
        )
        both = jax.jit(lambda *x, run=run: results(run, x, d_out, d_lse))
        exported = export(both, platforms=["cuda"], disabled_checks=[DisabledSafetyCheck.custom_call("mosaic_gpu_v2")])(
            q, k, v, z
        )
        assert exported.mlir_module().count("mosaic_gpu_v2") == 2
