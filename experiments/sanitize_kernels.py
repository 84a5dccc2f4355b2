"""Every GPU kernel once on a small case, forward and backward, for a memory checker to watch.

    XLA_FLAGS=--xla_gpu_autotune_level=0 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m experiments.sanitize_kernels [name ...]

A name is the beginning of cases' names. Each case prints a line; the checker ends with `ERROR SUMMARY: 0 errors` and
status 0. An access outside of an allocation is reported with the kernel's name and ends with status 1, as does a case
that fails or gives a number that is not finite. So that an allocation is one array and not a pool, the script asks JAX
for CUDA's own allocator.

Libraries ask the driver for what it may not have, and the checker counts each refusal: if the report has no `Invalid
__global__ read` (write, `__shared__`) but `returned error`, add `--report-api-errors no`. Expect seconds to a minute a
case under the checker, and seconds for all of them without it, which is a quick test too.

`--tool racecheck` watches shared memory; it does not know all of Hopper's asynchronous copies, so what it reports is to
be read with care. The cases of Triton need the extra `effattn_jax[triton]`; without it they are left out, with a line.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import linear
from effattn_jax.sparse import attention
from experiments.timing import only_on_a_gpu

ROWS, LENGTH, HEADS, KEYS, VALUES = 2, 300, 4, 128, 64  # no multiple of any chunk; K and V differ
Arrays = dict[str, jax.Array]


def inputs(channels: bool, bonus: bool = False, length: int = LENGTH) -> Arrays:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    found = {
        "q": draw(ROWS, length, HEADS // 2, KEYS).astype(jnp.bfloat16),
        "k": draw(ROWS, length, HEADS // 2, KEYS).astype(jnp.bfloat16),
        "v": draw(ROWS, length, HEADS, VALUES).astype(jnp.bfloat16),
        "log_decay": jax.nn.log_sigmoid(2 + draw(ROWS, length, HEADS, *([KEYS] if channels else []))),
        "initial_state": draw(ROWS, HEADS, KEYS, VALUES),
    }
    return found | ({"bonus": draw(HEADS, KEYS)} if bonus else {})


def attention_inputs(dim: int, sinks: bool) -> Arrays:
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    found = {name: draw(ROWS, LENGTH, heads, dim) for name, heads in zip("qkv", (HEADS, 2, 2), strict=True)}
    return found | ({"sinks": jnp.asarray([-2.0, 0.0, 1.0, 5.0])} if sinks else {})


def documents() -> np.ndarray:
    row = np.repeat(np.array([-1, 0, 1, 2, -1], np.int32), [3, 130, 1, 160, 6])
    return np.stack([row] * ROWS)


def run(call: Callable[..., Any], arrays: Arrays, **options: Any) -> None:
    """Outputs and gradients of all arrays.

    Raises:
      FloatingPointError: one of them is not finite.
    """

    def both(arrays: Arrays) -> Any:
        out, pull = jax.vjp(lambda arrays: call(**arrays, **options), arrays)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    for path, x in jax.tree_util.tree_flatten_with_path(jax.jit(both)(arrays))[0]:
        if not bool(jnp.all(jnp.isfinite(x))):
            raise FloatingPointError(f"{jax.tree_util.keystr(path)} is not finite")


def cases() -> dict[str, Callable[[], None]]:
    scalar, vector, ids = linear.scalar_decay, linear.vector_decay, documents()
    ours: dict[str, Any] = {"implementation": "mosaic_gpu"}
    return {
        "scalar_decay": lambda: run(scalar, inputs(False), **ours),
        "scalar_decay, documents": lambda: run(scalar, inputs(False), segment_ids=ids, **ours),
        "vector_decay": lambda: run(vector, inputs(True), **ours),
        "vector_decay, bonus": lambda: run(vector, inputs(True, bonus=True), **ours),
        "vector_decay, bonus, documents": lambda: run(vector, inputs(True, bonus=True), segment_ids=ids, **ours),
        "attention, causal": lambda: run(attention, attention_inputs(128, False), **ours),
        "attention, window, sinks, documents": lambda: run(
            attention, attention_inputs(128, True), window=100, segment_ids=ids, **ours
        ),
        "attention, 64 channels, window": lambda: run(attention, attention_inputs(64, False), window=100, **ours),
        "attention, 256 channels, documents": lambda: run(
            attention, attention_inputs(256, False), segment_ids=ids, **ours
        ),
        "step, scalar_decay": lambda: run(scalar, inputs(False, length=1), **ours),
        "step, vector_decay": lambda: run(vector, inputs(True, length=1), **ours),
        "step, vector_decay, bonus": lambda: run(vector, inputs(True, bonus=True, length=1), **ours),
        "triton, scalar_decay": lambda: run(scalar, inputs(False), implementation="triton"),
        "triton, scalar_decay, documents": lambda: run(scalar, inputs(False), segment_ids=ids, implementation="triton"),
    }


def main(names: list[str]) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")  # read when JAX first looks for devices
    only_on_a_gpu("sanitize_kernels")
    failures = 0
    for name, case in cases().items():
        if not name.startswith(tuple(names or [""])):
            continue
        if name.startswith("triton") and importlib.util.find_spec("jax_triton") is None:
            print(f"left out: {name}, no jax_triton here")
            continue
        began = time.perf_counter()
        try:
            case()
            print(f"ok: {name}, {time.perf_counter() - began:.1f} s", flush=True)
        except Exception as error:
            failures += 1
            print(f"FAILED {name}: {type(error).__name__}: {' '.join(str(error).split())[:400]}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
