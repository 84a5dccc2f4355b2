"""cuDNN against the oracle on an NVIDIA GPU: `python -m tests.gpu.check_cudnn` prints a line per case and fails on any.

Both are measured against the oracle in float32 on the same rounded inputs.
"""

import sys

import jax
import jax.numpy as jnp

from effattn_jax.sparse import attention
from tests.ratio import BFLOAT16_GRAD, BFLOAT16_OUT, error_ratio
from tests.sparse.inputs import qkv, randn

CASES = {
    "causal": {"length": 200},
    "causal, long": {"length": 2048, "key_dim": 128, "value_dim": 128},
    "causal, odd": {"length": 65},
    "grouped heads": {"length": 256, "heads": 8, "kv_heads": 2},
    "multi-query": {"length": 256, "heads": 8, "kv_heads": 1},
    "window": {"length": 500, "window": 64},
    "window of one": {"length": 130, "window": 1, "gradients": False},
    "window above the length": {"length": 130, "window": 1000},
    "all keys": {"length": 300, "causal": False},
    "all keys, more of them": {"length": 100, "keys": 300, "causal": False},
    "one token": {"length": 1, "gradients": False},
    "scale": {"length": 128, "scale": 0.05},
    "head of 256": {"length": 256, "key_dim": 256, "value_dim": 256},
    "float16": {"length": 200, "dtype": jnp.float16},
}


def check(
    length,
    keys=None,
    heads=4,
    kv_heads=2,
    key_dim=64,
    value_dim=64,
    dtype=jnp.bfloat16,
    implementation="cudnn",
    gradients=True,
    **options,
):
    """Error ratios of the output and of the gradients in q, k and v; a row with one key has none in q and k."""
    arrays = qkv(length, keys, heads=heads, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    (do,) = randn(1, (*arrays[0].shape[:3], value_dim))

    def run(implementation, arrays):
        def loss(arrays):
            out = attention(*arrays, implementation=implementation, **options)
            return jnp.sum(out.astype(jnp.float32) * do), out

        if not gradients:
            return jax.jit(loss)(arrays)[1:]
        (_, out), (dq, dk, dv) = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return out, dq, dk, dv

    want = run("dense", tuple(x.astype(jnp.float32) for x in arrays))
    return [error_ratio(x, y) for x, y in zip(want, run(implementation, arrays), strict=True)]


def main(implementations):
    failed = 0
    for name, case in CASES.items():
        for implementation in implementations:
            try:
                ratios = check(implementation=implementation, **case)
            except NotImplementedError as refusal:
                print(f"{name:26s} {implementation:6s} refused: {refusal.__cause__}")
                continue
            except Exception as error:
                failed += 1
                print(f"{name:26s} {implementation:6s} FAILED {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            good = ratios[0] <= BFLOAT16_OUT and all(x <= BFLOAT16_GRAD for x in ratios[1:])
            failed += not good
            errors = "  ".join(f"{x} {ratio:.1e}" for x, ratio in zip(("out", "dq", "dk", "dv"), ratios, strict=False))
            print(f"{name:26s} {implementation:6s} {'ok' if good else 'FAILED'}  {errors}", flush=True)
    return failed


if __name__ == "__main__":
    print(jax.devices())
    sys.exit(min(1, main(sys.argv[1:] or ["cudnn", "xla"])))
