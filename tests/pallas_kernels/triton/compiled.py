"""The kernels as a call makes them, compiled ahead of time for a GPU that need not be there.

    python -m tests.pallas_kernels.triton.compiled cuda 80 bfloat16 float32

Prints the shared memory of each in bytes, of calls forward and backward at K = V = 128. Its own process: where kernels
are interpreted, nothing compiles.
"""

import sys

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.triton import scalar_decay as module

TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}
WARP = {"cuda": 32, "hip": 64}


def calls(dtype):
    """What the gradient of a call launches: (kernel, types of arrays, size, constants)."""
    found = []

    def launch(kernel, programs, out, arrays, size, **constants):
        found.append((kernel, [TYPES[x.dtype.name] for x in (*arrays, *out)], size, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in out]

    module.launch = launch
    q = jax.ShapeDtypeStruct((2, 200, 2, 128), dtype)
    v = jax.ShapeDtypeStruct((2, 200, 4, 128), dtype)
    g = jax.ShapeDtypeStruct((2, 200, 4), jnp.float32)
    state = jax.ShapeDtypeStruct((2, 4, 128, 128), jnp.float32)
    run = lambda *x: module.scalar_decay(*x, None, scale=0.1)  # noqa: E731
    jax.eval_shape(lambda x, cotangents: jax.vjp(run, *x)[1](cotangents), (q, q, v, g, state), (v, state))
    return found


def main(backend, architecture, *dtypes):
    cuda = backend == "cuda"
    target = GPUTarget(backend, int(architecture) if cuda else architecture, WARP[backend])
    module.precision = lambda dtype: "tf32x3" if dtype == jnp.float32 and cuda and target.arch >= 80 else "ieee"
    for dtype in dtypes:
        for kernel, types, size, constants in calls(jnp.dtype(dtype)):
            arrays = kernel.arg_names[: len(types)]
            source = ASTSource(
                kernel,
                signature=dict(zip(arrays, types, strict=True)) | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
            )
            options = {"num_warps": size.warps, "num_stages": size.stages}
            print(dtype, kernel.fn.__name__, triton.compile(source, target=target, options=options).metadata.shared)


if __name__ == "__main__":
    main(*sys.argv[1:])
