"""`jit` for tests."""

from functools import partial

import jax

# These programs run for a millisecond and compile for a second: LLVM's optimisations do not pay.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
