"""What the engines of matrix memories have in common before they compute: checks, heads, the state to start from."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.precision import zeros_varying
from effattn_jax.typing import Array, MatrixState, SegmentIds

FORMS = ("recurrent", "parallel", "chunkwise", "associative")


def check_memory(
    q: Any,
    k: Any,
    v: Any,
    initial_state: Any,
    segment_ids: Any,
    form: str | None,
    forms: Sequence[str] = FORMS,
) -> int:
    """Raise ValueError on what does not fit; the number H of heads of the state: the largest among q, k and v."""
    checks.check_choice("form", form, forms)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_rank(name, x, 4, "[B, T, H, K]")
        checks.check_floating(name, x)
    batch, length, _, key_dim = q.shape
    checks.check_shape("k", k, (batch, length, None, key_dim), "[B, T, H, K]")
    checks.check_shape("v", v, (batch, length, None, None), "[B, T, H, V]")
    heads = max(x.shape[2] for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_head_groups(name, x.shape[2], "q, k and v", heads)
    check_state(initial_state, (batch, heads, key_dim, v.shape[-1]), "[B, H, K, V]")
    checks.check_segment_ids(segment_ids, batch, length)
    return heads


def check_state(initial_state: Any, shape: Sequence[int], names: str) -> None:
    if initial_state is not None:
        checks.check_shape("initial_state", initial_state, shape, names)
        checks.check_floating("initial_state", initial_state)


def check_gate(name: str, gate: Any, *shapes: tuple[Sequence[int], str]) -> None:
    """A floating array of one of the shapes, each given with its letters."""
    checks.check_floating(name, gate)
    if jnp.shape(gate) not in [tuple(shape) for shape, _ in shapes]:
        needs = " or ".join(f"{names} = [{', '.join(map(str, shape))}]" for shape, names in shapes)
        checks.fail(name, f"shape {jnp.shape(gate)}", needs)


def choose_form(form: str | None, length: int) -> str:
    """One token takes the step; more take the chunkwise form."""
    return form or ("recurrent" if length == 1 else "chunkwise")


def start_state(initial_state: Array | None, shape: Sequence[int], dtype: Any, *like: Array) -> MatrixState:
    """The state in `dtype` (None: zeros), varying over the manual mesh axes that the inputs vary over."""
    zeros = zeros_varying(tuple(shape), dtype, *like)
    return zeros if initial_state is None else initial_state.astype(dtype) + zeros


def repeat_heads(x: Array, heads: int) -> Array:
    """[B, T, G, ...] -> [B, T, H, ...]: each head serves H / G consecutive ones."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def real_tokens(x: Array, segment_ids: SegmentIds | None) -> Array:
    """`x` [B, T, ...] with zeros at padding."""
    if segment_ids is None:
        return x
    return jnp.where((segment_ids >= 0).reshape(*segment_ids.shape, *(1,) * (x.ndim - 2)), x, 0)
