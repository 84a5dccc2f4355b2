"""The neural memory of Titans, window by window.

Gradients of a chunk are taken at its start, so inside it the two recurrences are linear. Let D_ts and E_ts be the
products of 1 - alpha and of eta over the tokens after s up to t, d_t and e_t those from the start of the window,
W = D E, f = D e and U_s = -theta_s delta_s, for every layer, which reads x_s and returns with gradient delta_s:

    M_t = d_t M + f_t S + sum_s W_ts x_s^T U_s        S_t = e_t S + sum_s E_ts x_s^T U_s

The chunkwise form needs M_t only at the end of a chunk: what a layer makes of the queries is a product of matrices,

    y_t M_t = d_t (y_t M) + f_t (y_t S) + ((Y X^T * W) U)_t

The associative form computes every M_t, by two scans over the tokens of a window.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.linear.chunks import from_chunks, to_chunks
from effattn_jax.linear.gate_products import gate_products
from effattn_jax.linear.memory_network import Gradient, Layer, Loss, Network, loss_gradients, matrices, read
from effattn_jax.linear.mini_batches import MiniBatches, mini_batches
from effattn_jax.linear.recurrence import select
from effattn_jax.linear.segments import chunk_masks
from effattn_jax.linear.titans_recurrent import NEUTRAL, TitansState, Tokens, fresh_state, varying
from effattn_jax.precision import contract
from effattn_jax.typing import Array, Bool, Float, Int, SegmentIds


class Rates(NamedTuple):
    """What token t keeps of the memory and the momentum that enter the window, and how much of each U reaches it."""

    memory: Float[Array, "B H C"]  # d
    momentum: Float[Array, "B H C"]  # f, 0 where a document begins
    writes: Float[Array, "B H C C"]  # W
    own: Float[Array, "B H C"]  # e, of the momentum itself
    pushes: Float[Array, "B H C C"]  # E

    def at(self, token: Bool[Array, "B C"]) -> "Rates":
        """Those of one token in each row: [B, H] and [B, H, C]."""
        pick = lambda x: jnp.sum(jnp.where(token.reshape(len(token), 1, -1, *(1,) * (x.ndim - 3)), x, 0), axis=2)  # noqa: E731
        return Rates(*(pick(x) for x in self))


class Window(NamedTuple):
    """C tokens of every row: [B, H, C, ...], masks [B, C]."""

    tokens: Tokens
    rates: Rates
    kinds: MiniBatches
    begins: Bool[Array, "B C"]  # the first token of a document


def windows(tokens: Tokens, ids: SegmentIds, place: Int[Array, " B"], chunk: int, size: int) -> tuple[Window, Array]:
    """Windows of `size` tokens, [N, B, ...], and the place in the chunk after the row."""
    kinds, place = mini_batches(ids, place, chunk, size)
    earlier = jnp.tril(chunk_masks(to_chunks(ids, size, fill=-1)).inside)  # [B, N, C, C]
    tokens = Tokens(*(jnp.moveaxis(to_chunks(x, size, fill), 3, 2) for x, fill in zip(tokens, NEUTRAL, strict=True)))
    begins = kinds.fresh & ~jnp.any(jnp.tril(earlier, -1), axis=-1)
    D, E = (gate_products(gate, earlier[:, :, None], begins[:, :, None]) for gate in (tokens.keep, tokens.eta))
    continues = (kinds.open | kinds.next)[:, :, None]
    e = jnp.where(continues, E.whole, 0)
    rates = Rates(
        memory=D.whole,
        momentum=jnp.where(continues, contract("...ts,...s->...t", D.after, E.whole), 0),
        writes=contract("...tr,...rs->...ts", D.after, E.after),
        own=e,
        pushes=E.after,
    )
    window = Window(tokens, rates, kinds, begins)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), window), place


def chunkwise(
    tokens: Tokens,
    weights: Network,
    loss: Loss,
    chunk: int,
    initial_state: TitansState | None,
    segment_ids: SegmentIds | None,
    *,
    window: int | None = None,
    associative: bool = False,
) -> tuple[Float[Array, "B T H V"], TitansState]:
    """A scan over windows of `window` tokens, at most a chunk.

    A window has up to three kinds of tokens, at as many starts: the chunk that was open, the next one, which starts
    from what the open one leaves, and documents that begin, which start from `weights`. Rows without a state and
    documents have only the first kind. The backward pass keeps what enters each window and its rates.
    """
    batch, length = tokens.q.shape[:2]
    size = max(1, min(chunk, length if window is None else window))
    aligned = initial_state is None and segment_ids is None and size == chunk
    state = varying(fresh_state(weights, batch) if initial_state is None else initial_state, tokens, segment_ids)
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    cut, place = windows(tokens, ids, state.place, chunk, size)

    def step(carry: tuple[Network, ...], window: Window) -> tuple[tuple[Network, ...], Array]:
        (memory, momentum, start), (tokens, rates, kinds, _) = carry, window

        def descents(weights: Network) -> list[Gradient]:
            return [
                Gradient(x, -tokens.theta[..., None] * delta)
                for x, delta in loss_gradients(weights, loss, tokens.k, tokens.v)
            ]

        U = descents(start)
        next_start = start
        if not aligned:
            left = moved(rates.at(last(kinds.open)), memory, momentum, U)
            next_start = select(jnp.any(kinds.open, axis=-1), left, memory)
            U = where_kind(kinds.next, descents(next_start), U)
        if segment_ids is not None:
            U = where_kind(kinds.fresh, descents(weights), U)

        end = last(kinds.open | kinds.next | kinds.fresh)
        ends = lambda kind: jnp.any(end & kind, axis=-1)  # noqa: E731
        layers: list[Layer]
        if associative:
            every_memory, every_momentum = every_token(window, memory, momentum, weights, U)
            layers = [functools.partial(contract, "...io,...i->...o", M) for M in every_memory]
            following, push = (tuple(x[:, :, -1] for x in every) for every in (every_memory, every_momentum))
        else:
            layers = [
                layer(rates, base, S, u, kinds.fresh, own if segment_ids is not None else None)
                for base, S, u, own in zip(memory, momentum, U, weights, strict=True)
            ]
            at_end, real = rates.at(end), jnp.any(end, axis=-1)
            base = select(ends(kinds.fresh), spread(weights, batch), memory) if segment_ids is not None else memory
            following = select(real, moved(at_end, base, momentum, U), memory)
            push = select(real, pushed(at_end, momentum, U), momentum)
        out = read(layers, tokens.q, loss.activation)

        start = select(ends(kinds.next), next_start, start)
        if segment_ids is not None:
            start = select(ends(kinds.fresh), spread(weights, batch), start)
        start = select(kinds.closes, following, start)
        return (following, push, start), out

    carry, out = jax.lax.scan(jax.checkpoint(step), (state.memory, state.momentum, state.start), cut)
    return from_chunks(jnp.moveaxis(out, (0, 3), (1, 2)), length), TitansState(*carry, place)


def last(kind: Bool[Array, "B C"]) -> Bool[Array, "B C"]:
    """The last token of the kind, alone."""
    count = jnp.cumsum(kind, axis=-1)
    return kind & (count == count[:, -1:])


def spread(weights: Network, batch: int) -> Network:
    return tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in weights)


def where_kind(kind: Bool[Array, "B C"], ours: list[Gradient], others: list[Gradient]) -> list[Gradient]:
    return jax.tree.map(lambda a, b: jnp.where(kind[:, None, :, None], a, b), ours, others)


def moved(rates: Rates, memory: Network, momentum: Network, U: list[Gradient]) -> Network:
    """d M + f S + sum_s W_s x_s^T U_s at one token of each row."""
    d, f = rates.memory[..., None, None], rates.momentum[..., None, None]
    return tuple(d * m + f * s + u.total(rates.writes) for m, s, u in zip(memory, momentum, U, strict=True))


def pushed(rates: Rates, momentum: Network, U: list[Gradient]) -> Network:
    """e S + sum_s E_s x_s^T U_s."""
    e = rates.own[..., None, None]
    return tuple(e * s + u.total(rates.pushes) for s, u in zip(momentum, U, strict=True))


def layer(rates: Rates, memory: Array, momentum: Array, U: Gradient, fresh: Array, weights: Array | None) -> Layer:
    """y_t -> y_t M_t for the tokens of a window; `weights` in the place of M for those of documents that begin."""
    (kept, push), d, f = matrices((memory, momentum)), rates.memory[..., None], rates.momentum[..., None]

    def read(y: Array) -> Array:
        base = kept(y)
        if weights is not None:
            base = jnp.where(fresh[:, None, :, None], matrices((weights,))[0](y), base)
        return d * base + f * push(y) + U.moved(y, rates.writes)

    return read


def every_token(
    window: Window, memory: Network, momentum: Network, weights: Network, U: list[Gradient]
) -> tuple[list[Array], list[Array]]:
    """M_t and S_t [B, H, C, I, O] of every layer: x_t = a_t x_{t-1} + b_t twice, by `lax.associative_scan`."""
    spread = lambda mask: mask[:, None, :, None, None]  # noqa: E731
    begins, real = spread(window.begins), spread(window.kinds.open | window.kinds.next | window.kinds.fresh)
    eta, keep = window.tokens.eta[..., None, None], window.tokens.keep[..., None, None]
    every_memory, every_momentum = [], []
    for M, S, own, u in zip(memory, momentum, weights, U, strict=True):
        pushed = scan_tokens(jnp.where(begins, 0, eta), u.x[..., :, None] * u.delta[..., None, :], S)
        written = jnp.where(real, pushed, 0) + jnp.where(begins, keep * own[:, None], 0)
        every_momentum.append(pushed)
        every_memory.append(scan_tokens(jnp.where(begins, 0, keep), written, M))
    return every_memory, every_momentum


def scan_tokens(a: Float[Array, "B H C 1 1"], b: Float[Array, "B H C I O"], before: Array) -> Array:
    """x_t = a_t x_{t-1} + b_t from x_0 = `before`."""

    def after(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] * earlier[0], later[0] * earlier[1] + later[1]

    kept, added = jax.lax.associative_scan(after, (a, b), axis=2)
    return kept * before[:, :, None] + added
