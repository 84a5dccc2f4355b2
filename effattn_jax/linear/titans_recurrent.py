"""The neural memory of Titans, token by token: the equation, and what one token does when decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.linear.memory_network import Loss, Network, loss_gradients, matrices, read
from effattn_jax.linear.recurrence import recurrence, select
from effattn_jax.precision import zeros_varying
from effattn_jax.typing import Array, Float, Int, SegmentIds


class TitansState(NamedTuple):
    """The memory, and what is open of its chunk."""

    memory: Network  # M, [B, H, I, O] of every layer, float32
    momentum: Network  # S
    start: Network  # M at the start of the open chunk, where gradients are taken; M itself where place is 0
    place: Int[Array, " B"]  # of the next token in the chunk, from 0


class Tokens(NamedTuple):
    """Rows of tokens, or windows of them with heads in front: [B, H, C, ...]. `keep` is 1 - alpha."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    theta: Float[Array, "B T H"]
    eta: Float[Array, "B T H"]
    keep: Float[Array, "B T H"]


NEUTRAL = (0, 0, 0, 0, 1, 1)  # q, k, v, theta, eta and keep of a token that changes nothing


def tokens_of(
    q: Array, k: Array, v: Array, theta: Array, eta: Array, alpha: Array, segment_ids: SegmentIds | None
) -> Tokens:
    """Tokens with their gates, padding made neutral: it may hold anything."""
    tokens = Tokens(q, k, v, theta, eta, 1 - alpha)
    if segment_ids is None:
        return tokens
    real = lambda x: (segment_ids >= 0).reshape(*segment_ids.shape, *(1,) * (x.ndim - 2))  # noqa: E731
    return Tokens(*(jnp.where(real(x), x, neutral) for x, neutral in zip(tokens, NEUTRAL, strict=True)))


def fresh_state(weights: Network, batch: int) -> TitansState:
    """What a document that begins finds: the learned start and no momentum."""
    memory = jax.tree.map(lambda w: jnp.broadcast_to(w, (batch, *w.shape)), weights)
    return TitansState(memory, jax.tree.map(jnp.zeros_like, memory), memory, jnp.zeros(batch, jnp.int32))


def varying(state: TitansState, tokens: Tokens, segment_ids: SegmentIds | None) -> TitansState:
    """The state, varying over the manual mesh axes that the inputs vary over."""
    zero = zeros_varying((), tokens.q.dtype, *tokens, *jax.tree.leaves(state[:3]))
    weights = jax.tree.map(lambda x: x + zero, state[:3])
    place = state.place if segment_ids is None else state.place + zeros_varying((), state.place.dtype, segment_ids)
    memory, momentum, start = weights
    return TitansState(memory, momentum, start, place)


def recurrent(
    tokens: Tokens,
    weights: Network,
    loss: Loss,
    chunk: int,
    initial_state: TitansState | None,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T H V"], TitansState]:
    """The gradient of one token at the weights of the chunk's start, the two recurrences, the read."""
    fresh = fresh_state(weights, tokens.q.shape[0])

    def step(state: TitansState, token: Tokens) -> tuple[TitansState, Array]:
        q, k, v = (x[:, :, None] for x in token[:3])
        gradients = loss_gradients(state.start, loss, k, v)
        eta, keep = (gate[:, :, None, None] for gate in (token.eta, token.keep))
        momentum = tuple(
            eta * s - g.total(token.theta[..., None]) for s, g in zip(state.momentum, gradients, strict=True)
        )
        memory = tuple(keep * m + s for m, s in zip(state.memory, momentum, strict=True))
        closed = state.place + 1 == chunk
        start = select(closed, memory, state.start)
        following = TitansState(memory, momentum, start, jnp.where(closed, 0, state.place + 1))
        return following, read(matrices(memory), q, loss.activation)[:, :, 0]

    state = varying(fresh if initial_state is None else initial_state, tokens, segment_ids)
    return recurrence(step, state, tokens, segment_ids, fresh)
