"""Titans: a memory that is a small network and learns the sequence while it reads it, by gradient descent with momentum
("past surprise") and weight decay (forgetting). Behrouz et al. 2025, arXiv:2501.00663.

    S_t = eta_t S_{t-1} - theta_t grad l(M_c; k_t, v_t)        l(M; k, v) = |M(k) - v|^2
    M_t = (1 - alpha_t) M_{t-1} + S_t                          y_t = M_t(q_t)

M_c are the weights at the start of t's chunk. With chunks of one token, a linear memory and eta = 0 it is DPLR with
g = log(1 - alpha), a = -k, b = 2 theta k and 2 theta v for v: the error is measured on the memory before its decay.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.arguments import check_gate, choose_form
from effattn_jax.linear.inner_loss import InnerNorm
from effattn_jax.linear.memory_network import ACTIVATIONS, Loss, Network
from effattn_jax.linear.titans_chunkwise import chunkwise
from effattn_jax.linear.titans_recurrent import TitansState, Tokens, recurrent, tokens_of
from effattn_jax.precision import accumulation_dtype
from effattn_jax.typing import Array, Float, Keys, Queries, SegmentIds, Values

__all__ = ["FORMS", "TitansState", "titans_memory"]

FORMS = ("recurrent", "chunkwise", "associative")


def titans_memory(
    q: Queries,
    k: Keys,
    v: Values,
    theta: Float[Array, "B T H"],
    eta: Float[Array, "B T H"],
    alpha: Float[Array, "B T H"],
    weights: Sequence[Float[Array, "H I O"]],
    *,
    chunk: int = 16,
    loss_scale: float = 2.0,
    activation: str = "gelu",
    norm: tuple[Float[Array, "H V"], Float[Array, "H V"]] | None = None,
    initial_state: TitansState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, TitansState]:
    """S_t = eta_t S_{t-1} - theta_t grad l(M_c), M_t = (1 - alpha_t) M_{t-1} + S_t and y_t = M_t(q_t), for every head.

    The gates are numbers, not logarithms, and may be exactly 0 or 1: decays along a chunk are products, so eta = 0 cuts
    the surprise before it and alpha = 1 the memory before it, with exact gradients.

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, H, K] keys. Descent is stable while a chunk's theta loss_scale |k|^2 / (1 - eta) stay small: use keys of
        norm one.
      v: [B, T, H, V] values.
      theta: [B, T, H] steps, >= 0.
      eta: [B, T, H] what is kept of the momentum, in [0, 1].
      alpha: [B, T, H] what is forgotten of the memory, in [0, 1].
      weights: M_0, the learned start: a matrix for every layer of the network, from [H, K, ...] to [H, ..., V]. One is
        a linear memory [H, K, V]; between several there is the activation.
      chunk: tokens of a document whose gradients are taken at the same weights, those at the chunk's start; part of the
        definition, whatever the form. 1 is gradient descent token by token.
      loss_scale: c in l = c/2 |M(k) - v|^2: 2 as in the paper's text, 1 as in its equation 17.
      activation: "gelu" (its tanh form) or "silu".
      norm: scale and bias [H, V] of a LayerNorm in the loss, c/2 |LN(M(k)) - (v - k)|^2 with V = K: for a memory that
        is read as q + LN(M(q)), which is then the caller's to do. None is none.
      initial_state: the memory of the first document of each row; None is that of a document that begins, `weights`
        without momentum.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row; each begins from `weights`, with a
        chunk of its own. Negative ids mark padding, which writes nothing, reads zero and takes no place in a chunk.
      form: "recurrent" (token by token), "chunkwise" (matrix products; no weights per token), "associative" (the
        weights of every token, by `lax.associative_scan` in each chunk): algorithms for one answer. None takes the
        single step for T = 1, else chunkwise.
      implementation: where it runs, see `effattn_jax.dispatch`; "xla" is there.

    Returns:
      y [B, T, H, V] in q's dtype and the state, weights in float32 (float64 for float64 inputs). All forms compute in
      that dtype, and keep weights per window or block of tokens, never per token, for the backward pass.

    Raises:
      ValueError: shapes, dtypes, chunk, activation, form or segment ids that do not fit.
    """
    weights = tuple(weights)
    _check(q, k, v, weights, chunk, activation, norm, initial_state, form)
    batch, length = q.shape[:2]
    checks.check_segment_ids(segment_ids, batch, length)
    for name, gate in (("theta", theta), ("eta", eta), ("alpha", alpha)):
        check_gate(name, gate, (q.shape[:3], "[B, T, H]"))
    accumulate = accumulation_dtype(q.dtype)
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, accumulate), tree)  # noqa: E731
    q_t, k_t, v_t, theta, eta, alpha = cast((q, k, v, theta, eta, alpha))
    tokens = tokens_of(q_t, k_t, v_t, theta, eta, alpha, segment_ids)
    out, state = dispatch(
        "titans_memory",
        {"xla": _xla},
        implementation,
        ("xla",),
        tokens,
        cast(weights),
        Loss(activation, loss_scale, None if norm is None else InnerNorm(*cast(norm))),
        chunk,
        initial_state if initial_state is None else cast_state(initial_state, accumulate),
        segment_ids,
        choose_form(form, length),
    )
    return out.astype(q.dtype), state


def cast_state(state: TitansState, dtype: Any) -> TitansState:
    """The weights in `dtype`."""
    memory, momentum, start = jax.tree.map(lambda x: jnp.asarray(x, dtype), tuple(state[:3]))
    return TitansState(memory, momentum, start, state.place)


def _xla(
    tokens: Tokens,
    weights: Network,
    loss: Loss,
    chunk: int,
    initial_state: TitansState | None,
    segment_ids: Array | None,
    form: str,
) -> tuple[Array, TitansState]:
    if form == "recurrent":
        return recurrent(tokens, weights, loss, chunk, initial_state, segment_ids)
    associative = form == "associative"
    return chunkwise(tokens, weights, loss, chunk, initial_state, segment_ids, associative=associative)


def _check(
    q: Any,
    k: Any,
    v: Any,
    weights: Network,
    chunk: Any,
    activation: str,
    norm: Any,
    initial_state: TitansState | None,
    form: str | None,
) -> None:
    checks.check_choice("form", form, FORMS)
    if activation not in ACTIVATIONS:
        checks.fail("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        checks.fail("chunk", chunk, "an int of at least 1 token")
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_rank(name, x, 4, "[B, T, H, K]")
        checks.check_floating(name, x)
    if not weights:
        checks.fail("weights", "no matrix", "at least 1 layer")
    for i, w in enumerate(weights):
        checks.check_rank(f"weights[{i}]", w, 3, "[H, I, O]")
        checks.check_floating(f"weights[{i}]", w)
    heads, key_dim, value_dim = *weights[0].shape[:2], weights[-1].shape[2]
    batch, length = q.shape[:2]
    for name, x, dim in (("q", q, key_dim), ("k", k, key_dim), ("v", v, value_dim)):
        checks.check_shape(name, x, (batch, length, heads, dim), "[B, T, H, K or V], H and the last as in weights")
    for i, (w, before) in enumerate(zip(weights[1:], weights, strict=False)):
        checks.check_shape(f"weights[{i + 1}]", w, (heads, before.shape[2], None), "[H, I, O]")
    if norm is not None:
        if key_dim != value_dim:
            checks.fail("norm", f"keys of {key_dim} and values of {value_dim} channels", "as many of both")
        for name, x in zip(("norm[0]", "norm[1]"), norm, strict=True):
            check_gate(name, x, ((heads, value_dim), "[H, V]"))
    if initial_state is not None:
        _check_state(initial_state, weights, batch)


def _check_state(state: TitansState, weights: Network, batch: int) -> None:
    for part, layers in zip(state._fields, state[:3], strict=False):
        if len(layers) != len(weights):
            checks.fail(f"initial_state.{part}", f"{len(layers)} layers", f"the {len(weights)} of weights")
        for i, (x, w) in enumerate(zip(layers, weights, strict=True)):
            checks.check_shape(f"initial_state.{part}[{i}]", x, (batch, *w.shape), "[B, H, I, O]")
            checks.check_floating(f"initial_state.{part}[{i}]", x)
    checks.check_shape("initial_state.place", state.place, (batch,), "[B]")
    if not jnp.issubdtype(jnp.result_type(state.place), jnp.integer):
        checks.fail("initial_state.place", f"dtype {jnp.result_type(state.place)}", "an integer dtype")
