"""One token of a matrix memory that decays by channel or by head: the equation, and what kernels of it share.

    S' = diag(e^g) S + k v^T
    o = scale S'^T q                    or, with a bonus u, scale (S^T q + (q . (u * k)) v)

Decoding calls it once a token. All but the state is small: a kernel reads the state once and writes it once, in place
where the caller has no more use of the old one (donated to `jax.jit`, or the carry of a loop). The gradient is that of
the equation, by XLA; it keeps the old state.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
MULTIPLE, LARGEST = 64, 256  # of K and V


class Call(NamedTuple):
    kernel: Callable[..., tuple[jax.Array, jax.Array]]  # arguments as `equation`, and interpret
    scale: float
    interpret: Any


def run_step(
    kernel: Callable[..., tuple[jax.Array, jax.Array]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Out and the next state by a kernel, differentiable; arguments as those of `equation`, and

      segment_ids: [B, 1]; where negative (padding) the state passes and out is zero. Else of no consequence: one token
        is of one document.

    Raises:
      NotImplementedError: what kernels do not take.
    """
    _check_support(q, k, v, initial_state, scale)
    if segment_ids is not None:
        real = lambda x: jnp.where((segment_ids >= 0).reshape(-1, *(1,) * (x.ndim - 1)), x, 0)  # noqa: E731
        q, k, v, log_decay = real(q), real(k), real(v), real(log_decay)
    return _step(Call(kernel, float(scale), interpret), q, k, v, log_decay, bonus, initial_state)


def equation(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array | None,
    initial_state: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Out [B, 1, H, V] in q's dtype and the next state [B, H, K, V], computed in float32.

    Args:
      q, k: [B, 1, heads, K], v: [B, 1, heads, V]; heads divide H, each serves consecutive ones.
      log_decay: [B, 1, H] or [B, 1, H, K], float32, <= 0.
      bonus: [H, K], float32; with it the read comes before the write.
      initial_state: [B, H, K, V], float32.
    """
    heads = initial_state.shape[1]
    of_heads = lambda x: jnp.repeat(x[:, 0].astype(jnp.float32), heads // x.shape[2], 1)  # noqa: E731
    q32, k32, v32 = of_heads(q), of_heads(k), of_heads(v)
    decay = jnp.exp(log_decay[:, 0].reshape(*initial_state.shape[:2], -1))
    written = k32[..., None] * v32[:, :, None]
    state = decay[..., None] * initial_state + written
    seen = state if bonus is None else initial_state + bonus[:, :, None] * written
    out = scale * jnp.sum(q32[..., None] * seen, 2)
    return out[:, None].astype(q.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(call: Call, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    return call.kernel(*arrays, scale=call.scale, interpret=call.interpret)


def _forward(call: Call, *arrays: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    return _step(call, *arrays), arrays


def _backward(call: Call, arrays: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    return jax.vjp(functools.partial(equation, scale=call.scale), *arrays)[1](cotangents)


_step.defvjp(_forward, _backward)


def _check_support(q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array, scale: Any) -> None:
    if any(x.dtype not in DTYPES for x in (q, k, v)) or state.dtype != jnp.float32:
        dtypes = ", ".join(str(x.dtype) for x in (q, k, v, state))
        raise NotImplementedError(
            f"q, k, v and the state are {dtypes}; needs bfloat16, float16 or float32, and float32"
        )
    if q.shape[1] != 1:
        raise NotImplementedError(f"{q.shape[1]} tokens; needs one")
    if 0 in state.shape:
        raise NotImplementedError(f"the state {state.shape} is empty")
    if any(dim % MULTIPLE or dim > LARGEST for dim in state.shape[2:]):
        raise NotImplementedError(
            f"K = {state.shape[2]}, V = {state.shape[3]}; needs multiples of {MULTIPLE} up to {LARGEST}: "
            "to fill the state up would be to copy it"
        )
    if not isinstance(scale, (int, float)):
        raise NotImplementedError(f"scale {scale}; needs a number")
