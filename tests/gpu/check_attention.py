"""Attention as None takes it on one Hopper GPU: `python -m tests.gpu.check_attention [name ...]`.

Each call goes to the implementation that its case names, by the calls of the compiled program, and agrees with the
oracle in float32 on the same rounded inputs, gradients of sinks among them; one case is a layer, forward and backward.
A line per case with the error ratios of outputs and gradients, status 1 if one fails. Names are beginnings of cases'.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effattn_jax.layers import Attention
from effattn_jax.sparse import attention
from tests.ratio import BFLOAT16_GRAD, BFLOAT16_OUT, error_ratio
from tests.sparse.inputs import qkv, randn

CALLS = {"mosaic_gpu": "mosaic_gpu", "cudnn": "fmha"}  # a piece of what the program names its calls
SIZES = (64, 128, 256)
CASES = {
    **{f"causal, {size}": {"size": size, "takes": "cudnn"} for size in SIZES},
    **{f"by name, {size}": {"size": size, "implementation": "mosaic_gpu"} for size in SIZES},
    **{f"by name, window, {size}": {"size": size, "window": 200, "implementation": "mosaic_gpu"} for size in SIZES},
    **{f"sinks, {size}": {"size": size, "sinks": True} for size in SIZES},
    **{f"documents, {size}": {"size": size, "documents": True} for size in SIZES},
    **{f"cap, {size}": {"size": size, "logits_soft_cap": 5.0} for size in SIZES},
    "log-sum-exp": {"return_lse": True},
    "sinks, documents, window": {"sinks": True, "documents": True, "window": 100},
    "sinks, few queries": {"length": 63, "sinks": True, "takes": None},
}


def ratios(want, got):
    """Error ratios of the output (and log-sum-exp) and of the gradients, the largest of each."""
    return [max(map(error_ratio, *map(jax.tree.leaves, pair))) for pair in zip(want, got, strict=True)]


def calls(compiled):
    """Which of the kernels a compiled program calls."""
    text = compiled.as_text()
    return [name for name, piece in CALLS.items() if piece in text]


def check(length=500, size=128, sinks=False, documents=False, implementation=None, takes="mosaic_gpu", **options):
    q, k, v = qkv(length, None, heads=4, kv_heads=2, key_dim=size, value_dim=size, dtype=jnp.bfloat16)
    do, dl = randn(1, q.shape, q.shape[:3])
    arrays = {"q": q, "k": k, "v": v} | ({"sinks": jnp.asarray([-1.0, 0.0, 1.0, 3.0])} if sinks else {})
    if documents:
        row = np.repeat(np.array([-1, 0, 1, 5, -1], np.int32), [3, 130, 1, length - 140, 6])
        options["segment_ids"] = jnp.asarray(np.stack([row] * q.shape[0]))

    def run(arrays, implementation):
        def loss(arrays):
            found = attention(**arrays, implementation=implementation, **options)
            out, lse = found if options.get("return_lse") else (found, jnp.zeros_like(dl))
            return jnp.sum(out.astype(jnp.float32) * do) + jnp.sum(lse * dl), found

        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(arrays).compile()
        return compiled(arrays)[::-1], calls(compiled)

    want, _ = run({x: y.astype(jnp.float32) for x, y in arrays.items()}, "dense")
    got, taken = run(arrays, implementation)
    out, gradients = ratios(want, got)
    good = out <= BFLOAT16_OUT and gradients <= BFLOAT16_GRAD and taken == ([takes] if takes else [])
    return out, gradients, good, taken


def check_layer():
    """A layer with sinks over packed documents, in bfloat16; the oracle has the same parameters in float32."""
    (x,) = randn(2, (2, 300, 256))
    ids = jnp.asarray(np.stack([np.repeat(np.array([0, 1, 2], np.int32), [100, 129, 71])] * 2))

    def run(dtype, implementation):
        layer = Attention(
            256,
            heads=4,
            kv_heads=2,
            head_dim=64,
            sinks=True,
            dtype=dtype,
            implementation=implementation,
            rngs=nnx.Rngs(0),
        )
        graph, state = nnx.split(layer)

        def loss(x, state):
            out = nnx.merge(graph, state)(x, segment_ids=ids)[0]
            return jnp.sum(out.astype(jnp.float32) ** 2), out

        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(x, state).compile()
        return compiled(x, state)[::-1], calls(compiled)

    want, _ = run(jnp.float32, "dense")
    got, taken = run(jnp.bfloat16, None)
    out, gradients = ratios(want, got)
    return out, gradients, max(out, gradients) <= 2e-2 and taken == ["mosaic_gpu"], taken  # projections round too


def main(names):
    if jax.default_backend() != "gpu":
        raise SystemExit("this check needs an NVIDIA GPU")
    failed = 0
    for name, run in {**{x: lambda o=o: check(**o) for x, o in CASES.items()}, "layer": check_layer}.items():
        if not name.startswith(tuple(names or [""])):
            continue
        out, gradients, good, taken = run()
        failed += not good
        print(
            f"{'ok' if good else 'FAILED':8}{name:28}{out:10.1e}{gradients:10.1e}  {', '.join(taken) or 'XLA'}",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
