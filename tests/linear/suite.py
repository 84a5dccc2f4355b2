"""What every engine of matrix memories goes through: drawing inputs, running a form, comparing with another."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.ratio import assert_close

STRENGTHS = ("mild", "weak", "strong", "heavy")

# These programs run for a millisecond and compile for a second: LLVM's optimisations do not pay.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


class Sizes(NamedTuple):
    length: int = 196
    key_dim: int = 16
    value_dim: int = 10
    batch: int = 2
    heads: tuple[int, int, int] = (4, 4, 4)  # of q, k and v


class Engine(NamedTuple):
    """One mechanism under test; its arguments are those that `draw` returns, each differentiable."""

    name: str
    function: Callable  # (**inputs, initial_state, segment_ids, form) -> (out, state)
    chunkwise: Callable  # (inputs, initial_state, segment_ids, chunk) -> (out, state)
    draw: Callable  # (rng, sizes, strength) -> float32 arrays by name
    token: Callable  # the equation for one token of one head: (state, **token) -> (state, out)
    gates: tuple[str, ...] = ()  # stay float32 in lower precision, and have their own limit there
    per_head: tuple[str, ...] = ()  # arguments [H, ...] without rows and tokens
    variant: bool = False  # another layout of an engine that is listed too: its dearer checks are marked slow

    def take(self, name, x, rows=slice(None), tokens=slice(None)):
        """The argument for some rows and tokens; one row stays a batch."""
        if name in self.per_head:
            return x
        return x[np.atleast_1d(rows) if np.isscalar(rows) else rows][:, tokens]


class Problem(NamedTuple):
    inputs: dict
    initial_state: np.ndarray | None
    segment_ids: np.ndarray | None
    d_out: np.ndarray
    d_state: np.ndarray


class Result(NamedTuple):
    out: jax.Array
    state: jax.Array
    grads: dict


def draw_problem(engine, sizes=Sizes(), strength="mild", segment_ids=None, seed=0):  # noqa: B008
    rng = np.random.default_rng(seed)
    heads = max(sizes.heads)
    inputs = engine.draw(rng, sizes, strength)
    state = (sizes.batch, heads, sizes.key_dim, sizes.value_dim)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    out = (sizes.batch, sizes.length, heads, sizes.value_dim)
    return Problem(inputs, randn(*state), segment_ids, randn(*out), randn(*state))


def apply(engine, form, inputs, initial_state=None, segment_ids=None):
    """`form` is the name of a form, or the chunk size of the chunkwise one."""
    if isinstance(form, int):
        return engine.chunkwise(inputs, initial_state, segment_ids, form)
    return engine.function(**inputs, initial_state=initial_state, segment_ids=segment_ids, form=form)


forward = jit(apply, static_argnums=(0, 1))


def arguments_of(problem):
    """What gradients are taken of: the inputs, and the initial state where there is one."""
    state = {} if problem.initial_state is None else {"initial_state": problem.initial_state}
    return problem.inputs | state


def loss(engine, form, arguments, problem):
    """(out . d_out) + (state . d_state), and what it is made of."""
    inputs = dict(arguments)
    state = inputs.pop("initial_state", None)
    out, state = apply(engine, form, inputs, state, problem.segment_ids)
    return (out * problem.d_out).sum() + (state * problem.d_state).sum(), (out, state)


def result(engine, form, problem):
    gradient = jax.value_and_grad(partial(loss, engine, form), has_aux=True)
    (_, (out, state)), grads = gradient(arguments_of(problem), problem)
    return Result(out, state, grads)


run = jit(result, static_argnums=(0, 1))


def assert_results_close(engine, want, got, out, grad=None, gate=None):
    """Limits for outputs and state, for gradients, and for gradients of gates."""
    grad = out if grad is None else grad
    gate = grad if gate is None else gate
    assert_close(want.out, got.out, out, "out")
    assert_close(want.state, got.state, out, "state")
    assert want.grads.keys() == got.grads.keys()
    for name in want.grads:
        assert_close(want.grads[name], got.grads[name], gate if name in engine.gates else grad, f"d{name}")


def cast(engine, problem, dtype):
    """Everything but gates and states rounded to `dtype`."""
    inputs = {
        name: x if name in engine.gates else np.asarray(jnp.asarray(x, dtype)) for name, x in problem.inputs.items()
    }
    return problem._replace(inputs=inputs, d_out=np.asarray(jnp.asarray(problem.d_out, dtype).astype(jnp.float32)))


def astype(problem, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype != np.int32 else x, problem)


def reference(engine, problem):
    """The recurrent form with its gradients in float64: in float32 its own sum of a gate over tokens loses 2e-5."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(engine, "recurrent", astype(problem, np.float64)))
