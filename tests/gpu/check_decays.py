"""Decay kernels against the recurrence on an NVIDIA GPU: `python -m tests.gpu.check_decays [name ...]`.

Grouped heads, K and V that differ, an initial state, documents and rows in parts; the loss reads the final state too. A
line per case with the error ratios of outputs, gradients and gradients of gates, status 1 if one is too large. Names
are beginnings of cases' names.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import linear
from tests.ratio import BFLOAT16_GATE, BFLOAT16_GRAD, BFLOAT16_OUT, error_ratio

CASES = {
    "scalar_decay": {},
    "scalar_decay, documents": {"documents": True},
    "scalar_decay, 256": {"key_dim": 256, "value_dim": 200},
    "scalar_decay, 256, documents": {"key_dim": 256, "value_dim": 256, "documents": True},
    "scalar_decay, parts": {"length": 2000, "rows": 1},
    "scalar_decay, parts, documents": {"length": 2000, "rows": 1, "documents": True},
    # one wave of blocks, a few chunks each: loads that outlive their slot showed here, in most runs of three
    **{f"scalar_decay, many rows, run {i}": {"key_dim": 64, "length": 256, "rows": 33, "gate": 6} for i in (1, 2, 3)},
    "vector_decay": {},
    "vector_decay, documents": {"documents": True},
    "vector_decay, 256": {"key_dim": 256, "value_dim": 256},
    "vector_decay, parts": {"length": 2000, "rows": 1},
    "vector_decay, bonus": {"bonus": True},
    "vector_decay, bonus, documents": {"bonus": True, "documents": True},
    "triton, scalar_decay, documents": {"documents": True},
}
GATES = ("log_decay", "bonus")


def inputs(name, length=300, rows=2, key_dim=128, value_dim=64, documents=False, bonus=False, gate=3):
    """Arrays by name, documents, and cotangents of the output and of the state."""
    rng = np.random.default_rng(0)
    randn = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    heads = 4
    arrays = {x: randn(rows, length, 2, key_dim).astype(jnp.bfloat16) for x in "qk"}
    arrays["v"] = randn(rows, length, heads, value_dim).astype(jnp.bfloat16)
    arrays["log_decay"] = jax.nn.log_sigmoid(
        gate + randn(rows, length, heads, *([key_dim] if "vector" in name else []))
    )
    arrays["initial_state"] = randn(rows, heads, key_dim, value_dim)
    if bonus:
        arrays["bonus"] = randn(heads, key_dim)
    ids = None
    if documents:
        lengths = [3, 130, 1, length - 140, 6]
        ids = np.stack([np.repeat(np.array([-1, 0, 1, 2, -1], np.int32), lengths)] * rows)
    cotangents = randn(rows, length, heads, value_dim).astype(jnp.bfloat16), randn(rows, heads, key_dim, value_dim)
    return arrays, ids, cotangents


def check(name, **options):
    """Error ratios of outputs, gradients and gradients of gates, the largest of each."""
    arrays, ids, (d_out, d_state) = inputs(name, **options)
    call = linear.vector_decay if "vector" in name else linear.scalar_decay

    def run(arrays, **how):
        def loss(arrays):
            out, state = call(**arrays, segment_ids=ids, **how)
            return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(state * d_state), (out, state)

        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return outputs, gradients

    exact = {x: y.astype(jnp.float32) for x, y in arrays.items()}
    want, want_gradients = run(exact, form="recurrent", implementation="xla")
    got, gradients = run(arrays, implementation="triton" if name.startswith("triton") else "mosaic_gpu")
    ratios = {x: error_ratio(want_gradients[x], gradients[x]) for x in arrays}
    return (
        max(map(error_ratio, want, got)),
        max(ratio for x, ratio in ratios.items() if x not in GATES),
        max(ratio for x, ratio in ratios.items() if x in GATES),
    )


def main(names):
    if jax.default_backend() != "gpu":
        raise SystemExit("this check needs an NVIDIA GPU")
    failed = 0
    for name, options in CASES.items():
        if not name.startswith(tuple(names or [""])):
            continue
        ratios = check(name, **options)
        too_large = not all(x <= y for x, y in zip(ratios, (BFLOAT16_OUT, BFLOAT16_GRAD, BFLOAT16_GATE), strict=True))
        failed += too_large
        print(f"{'FAILED' if too_large else 'ok':8}{name:34}" + "".join(f"{x:10.1e}" for x in ratios), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
