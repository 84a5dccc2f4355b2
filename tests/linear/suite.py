"""What every engine of matrix memories goes through: drawing inputs, running a form, comparing with another."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.compiled import jit
from tests.ratio import FLOAT32, assert_close

STRENGTHS = ("mild", "weak", "strong", "heavy")


class Sizes(NamedTuple):
    length: int = 196
    key_dim: int = 16
    value_dim: int = 10
    batch: int = 2
    heads: tuple[int, int, int] = (4, 4, 4)  # of q, k and v


def matrix_state(sizes):
    return (sizes.batch, max(sizes.heads), sizes.key_dim, sizes.value_dim)


def head_values(sizes):
    return (sizes.batch, sizes.length, max(sizes.heads), sizes.value_dim)


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """One mechanism under test; its arguments are those that `draw` returns, each differentiable."""

    name: str
    function: Callable  # (**inputs, initial_state, segment_ids, form) -> (out, state)
    chunkwise: Callable  # (inputs, initial_state, segment_ids, chunk) -> (out, state)
    draw: Callable  # (rng, sizes, strength) -> float32 arrays by name
    row: Callable  # the equation in numpy for one row: (inputs [T, ...] by name, state) -> (out [T, ...], state)
    gates: tuple[str, ...] = ()  # stay float32 in lower precision, and have their own limit there
    static: tuple[str, ...] = ()  # arguments without rows and tokens
    heads: Mapping[str, int | None] = MappingProxyType({})  # axis of heads where it is not 2 (static: 0); None: shared
    groups: tuple[tuple[int, int, int], ...] = ()  # heads of q, k and v that are not alike
    state: Callable = matrix_state  # sizes -> shapes of the state, a pytree of tuples
    draw_state: Callable | None = None  # (rng, sizes) -> a state; None: randn. Its integers get no gradient
    out: Callable = head_values
    read: tuple[str, ...] = ("q", "v")  # what the output of a token depends on at that very token
    fresh: Callable | None = None  # inputs -> the state of one row that begins; None: zeros
    map: Callable | None = None  # (inputs, segment_ids) -> the affine map of all tokens, in float32
    forms: tuple[str, ...] = ("recurrent", "parallel", "chunkwise", "associative")
    slow_forms: tuple[str, ...] = ("associative",)  # share almost all with another form: most checks of them are slow
    bad: Mapping[str, tuple] = MappingProxyType({})  # more bad arguments: case -> (argument, what is done to it)
    main: Sizes = Sizes()  # noqa: RUF009 - of most checks
    dtype: Any = np.float32  # of all but gates and states
    limits: tuple[float, float, float] = (FLOAT32,) * 3  # of outputs, of gradients and of those of gates
    gate_floor: float = 0.0  # error of gradients of gates that is none, however small they are: they are differences
    of: "Engine | None" = None  # what this one implements: its reference
    refuses: Mapping[str, tuple[str, Callable]] = MappingProxyType({})  # case -> (reason, arguments -> refused ones)
    takes: Callable = lambda sizes: True  # whether it takes a problem of these sizes
    longest: int = 32768  # tokens, of what is worth its time
    is_interpreted: bool = False  # with effects: neither `checkpoint` nor several devices take part
    output_is_state: bool = False  # the memory after every token is what it returns
    variant: bool = False  # another layout of an engine that is listed too: its checks are marked slow

    def take(self, name, x, rows=slice(None), tokens=slice(None)):
        """The argument for some rows and tokens; one row stays a batch."""
        if name in self.static:
            return x
        return x[np.atleast_1d(rows) if np.isscalar(rows) else rows][:, tokens]

    def head_axis(self, name):
        return self.heads.get(name, 0 if name in self.static else 2)


class Problem(NamedTuple):
    inputs: dict
    initial_state: Any
    segment_ids: np.ndarray | None
    d_out: np.ndarray
    d_state: Any


class Result(NamedTuple):
    out: jax.Array
    state: Any
    grads: dict


def draw_problem(engine, sizes=Sizes(), strength="mild", segment_ids=None, seed=0):  # noqa: B008
    rng = np.random.default_rng(seed)
    inputs = engine.draw(rng, sizes, strength)
    randn = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    if engine.draw_state is None:
        initial_state = jax.tree.map(randn, engine.state(sizes), is_leaf=_is_shape)
    else:
        initial_state = engine.draw_state(rng, sizes)
    d_state = jax.tree.map(lambda x: randn(x.shape) if is_float(x) else np.zeros(x.shape, np.float32), initial_state)
    problem = Problem(inputs, initial_state, segment_ids, randn(engine.out(sizes)), d_state)
    return problem if engine.dtype == np.float32 else cast(engine, problem, engine.dtype)


def _is_shape(x):
    return type(x) is tuple and all(isinstance(size, int) for size in x)


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def apply(engine, form, inputs, initial_state=None, segment_ids=None):
    """`form` is the name of a form, or the chunk size of the chunkwise one."""
    if isinstance(form, int):
        return engine.chunkwise(inputs, initial_state, segment_ids, form)
    return engine.function(**inputs, initial_state=initial_state, segment_ids=segment_ids, form=form)


forward = jit(apply, static_argnums=(0, 1))


def arguments_of(problem):
    """What gradients are taken of: the inputs, and the initial state where there is one."""
    if problem.initial_state is None:
        return problem.inputs
    floats = jax.tree.map(lambda x: x if is_float(x) else None, problem.initial_state)
    return problem.inputs | {"initial_state": floats}


def with_integers(floats, state):
    """The state whose floats, and only those, are given."""
    return jax.tree.map(lambda x, whole: whole if x is None else x, floats, state, is_leaf=lambda x: x is None)


def loss(engine, form, arguments, problem):
    """(out . d_out) + (state . d_state), and what it is made of."""
    inputs = dict(arguments)
    state = with_integers(inputs.pop("initial_state", None), problem.initial_state)
    out, state = apply(engine, form, inputs, state, problem.segment_ids)
    parts = jax.tree.map(lambda x, d: (x * d).sum(), (out, state), (problem.d_out, problem.d_state))
    return sum(jax.tree.leaves(parts)), (out, state)


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
        is_gate = name in engine.gates
        if is_gate and engine.gate_floor and np.max(np.abs(want.grads[name] - got.grads[name])) <= engine.gate_floor:
            continue
        assert_close(want.grads[name], got.grads[name], gate if is_gate else grad, f"d{name}")


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
        return jax.tree.map(np.asarray, run(engine.of or engine, "recurrent", astype(problem, np.float64)))
