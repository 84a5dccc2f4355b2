"""The forms of test-time training: token by token, and mini-batch by mini-batch in matrix products.

The second one never builds the weights of a token. For one layer, with the tokens of a mini-batch as rows of matrices,
G the gradient of their losses at K W + b and eta_ij = token_scale_i lr_j for j <= i, else 0:

    O = Q + LN(Q W + b - (eta * (Q K^T + 1)) G)
    W' = W - token_scale_b sum_j lr_j k_j^T G_j        b' = b - token_scale_b sum_j lr_j G_j

In a deeper network each layer does so, with what it reads in the place of Q and K.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.linear.chunks import from_chunks, to_chunks
from effattn_jax.linear.inner_loss import Gradient, InnerNorm, Network, activations, loss_gradients
from effattn_jax.linear.mini_batches import MiniBatches, mini_batches
from effattn_jax.linear.recurrence import recurrence, scan_checkpointed, select
from effattn_jax.precision import zeros_varying
from effattn_jax.typing import Array, Bool, Float, Int, SegmentIds


class TTTState(NamedTuple):
    """Weights at the start of the open mini-batch, and what it has gathered so far: sum_j lr_j grad l_j."""

    weights: Network  # W [B, H, I, O] and b [B, H, O] of every layer, float32
    gathered: Network
    place: Int[Array, " B"]  # of the next token in the mini-batch, from 0; nothing is gathered where it is 0


class Learner(NamedTuple):
    """What is learned before, and starts anew with every document."""

    network: Network
    norm: InnerNorm
    token_scale: Float[Array, " b"]


class Tokens(NamedTuple):
    """Rows of tokens; or of windows, [B, H, C, ...]."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H K"]
    lr: Float[Array, "B T H"]


def descend(weights: Network, gathered: Network, rate: Float[Array, " B"] | Float[Array, ""]) -> Network:
    """W - rate * sum_j lr_j grad l_j."""
    return jax.tree.map(lambda w, g: w - rate.reshape(-1, *(1,) * (w.ndim - 1)) * g, weights, gathered)


def zeros_like(network: Network) -> Network:
    return jax.tree.map(jnp.zeros_like, network)


def begin(learner: Learner, tokens: Tokens, segment_ids: SegmentIds | None) -> TTTState:
    """The state of rows that begin; it varies over the manual mesh axes that the inputs vary over."""
    batch = tokens.q.shape[0]
    weights = jax.tree.map(lambda x: x + zeros_varying((batch, *x.shape), x.dtype, *tokens), learner.network)
    ids = () if segment_ids is None else (segment_ids,)
    return TTTState(weights, zeros_like(weights), zeros_varying((batch,), jnp.int32, *ids))


def enter(initial_state: TTTState | None, fresh: TTTState) -> TTTState:
    """The state to start from, varying as `fresh` does."""
    if initial_state is None:
        return fresh
    return jax.tree.map(lambda x, like: x + jnp.zeros_like(like), initial_state, fresh)


def recurrent(
    tokens: Tokens, learner: Learner, initial_state: TTTState | None, segment_ids: SegmentIds | None
) -> tuple[Float[Array, "B T H K"], TTTState]:
    """The equation, token by token."""
    size = len(learner.token_scale)

    def step(state: TTTState, token: Tokens) -> tuple[TTTState, Array]:
        q, k, v, lr = (x[:, :, None] for x in token)
        gradients = loss_gradients(state.weights, learner.norm, k, v)
        own = tuple(g.total(lr) for g in gradients)
        gathered = jax.tree.map(jnp.add, state.gathered, own)
        weights = descend(state.weights, gathered, learner.token_scale[state.place])
        out = q + learner.norm(activations(weights, q)[1][-1])
        opened = TTTState(weights, zeros_like(weights), jnp.zeros_like(state.place))
        going_on = TTTState(state.weights, gathered, state.place + 1)
        return select(going_on.place == size, opened, going_on), out[:, :, 0]

    fresh = begin(learner, tokens, segment_ids)
    state = enter(initial_state, fresh)
    return recurrence(step, state, tokens, segment_ids, fresh)


def aligned(tokens: Tokens, learner: Learner) -> tuple[Float[Array, "B T H K"], TTTState]:
    """Rows that begin with a document and hold nothing else: the equations above.

    The backward pass keeps the weights at the start of groups of mini-batches and recomputes the rest.
    """
    token_scale, size, length = learner.token_scale, len(learner.token_scale), tokens.q.shape[1]
    whole = length // size * size
    state = begin(learner, tokens, None)

    def mini_batch(weights: Network, tokens: Tokens) -> tuple[Network, Array]:
        gradients = loss_gradients(weights, learner.norm, tokens.k, tokens.v)
        eta = jnp.tril(token_scale[: tokens.q.shape[2], None] * tokens.lr[:, :, None])
        layers = [
            lambda x, layer=layer, g=g: layer(x) - g.moved(x, eta) for layer, g in zip(weights, gradients, strict=True)
        ]
        out = tokens.q + learner.norm(activations(layers, tokens.q)[1][-1])
        return tuple(g.total(tokens.lr) for g in gradients), out

    def step(weights: Network, tokens: Tokens) -> tuple[Network, Array]:
        gathered, out = mini_batch(weights, tokens)
        return descend(weights, gathered, token_scale[-1]), out

    weights, out = scan_checkpointed(step, state.weights, _windows(tokens, slice(whole), size))
    out, state = _rows(out, whole), state._replace(weights=weights)
    if whole == length:
        return out, state
    tail = jax.tree.map(lambda x: x[0], _windows(tokens, slice(whole, None), length - whole))
    gathered, out_tail = jax.checkpoint(mini_batch)(weights, tail)
    state = TTTState(weights, gathered, state.place + (length - whole))
    return jnp.concatenate([out, jnp.moveaxis(out_tail, 1, 2)], axis=1), state


def chunkwise(
    tokens: Tokens,
    learner: Learner,
    initial_state: TTTState | None,
    segment_ids: SegmentIds | None,
    window: int | None = None,
) -> tuple[Float[Array, "B T H K"], TTTState]:
    """Mini-batches that start anywhere, in windows of `window` tokens, at most a mini-batch.

    The equations above, at three weights for the three kinds of tokens in a window (`mini_batches`): those of the open
    mini-batch, those it leaves to the next one, and the learner's own.
    """
    token_scale, norm, (batch, length) = learner.token_scale, learner.norm, tokens.q.shape[:2]
    size = len(token_scale)
    window = max(1, min(size, length if window is None else window))
    fresh = begin(learner, tokens, segment_ids)
    state = enter(initial_state, fresh)
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    masks, place = mini_batches(ids, state.place, size, window)

    def step(carry: tuple[Network, Network], xs: tuple[Tokens, MiniBatches]) -> tuple[tuple[Network, Network], Array]:
        (weights, gathered), (tokens, own) = carry, xs

        gradients = loss_gradients(weights, norm, tokens.k, tokens.v)
        full = jax.tree.map(jnp.add, gathered, _total(gradients, tokens.lr, own.open))
        kinds = [(own.open, weights), (own.next, descend(weights, full, token_scale[-1]))]
        if segment_ids is not None:
            kinds.append((own.fresh, fresh.weights))
        for kind, start in kinds[1:]:
            gradients = _where(kind, loss_gradients(start, norm, tokens.k, tokens.v), gradients)

        rate = token_scale[own.place][:, None, :, None]
        eta = jnp.where(own.reads[:, None], rate * tokens.lr[:, :, None], 0)

        def layer(i: int, x: Array) -> Array:
            z = kinds[0][1][i](x) - rate * gathered[i](x)
            for kind, start in kinds[1:]:
                z = _where(kind, start[i](x), z)
            return z - gradients[i].moved(x, eta)

        layers = [lambda x, i=i: layer(i, x) for i in range(len(weights))]
        out = tokens.q + norm(activations(layers, tokens.q)[1][-1])

        for kind, start in kinds[1:]:  # in order: the last kind that is there is that of the last token
            there = jnp.any(kind, axis=-1)
            weights, gathered = select(there, (start, zeros_like(start)), (weights, gathered))
        gathered = jax.tree.map(jnp.add, gathered, _total(gradients, tokens.lr, own.leaves))
        closed = (descend(weights, gathered, token_scale[-1]), zeros_like(gathered))
        return select(own.closes, closed, (weights, gathered)), out

    masks = MiniBatches(*(jnp.moveaxis(x, 1, 0) for x in masks))
    xs = (_windows(tokens, slice(None), window), masks)
    (weights, gathered), out = scan_checkpointed(step, (state.weights, state.gathered), xs)
    return _rows(out, length), TTTState(weights, gathered, place)


def _total(gradients: tuple[Gradient, ...], lr: Float[Array, "B H C"], tokens: Bool[Array, "B C"]) -> Network:
    return tuple(g.total(jnp.where(tokens[:, None], lr, 0)) for g in gradients)


def _where[Tree](tokens: Bool[Array, "B C"], a: Tree, b: Tree) -> Tree:
    """`a` for these tokens, else `b`: pytrees of [B, H, C, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(tokens[:, None, :, None], x, y), a, b)


def _windows(tokens: Tokens, which: slice, size: int) -> Tokens:
    """[B, T, H, ...] -> [N, B, H, C, ...]."""
    return Tokens(*(jnp.moveaxis(to_chunks(x[:, which], size), (1, 3), (0, 2)) for x in tokens))


def _rows(out: Float[Array, "N B H C K"], length: int) -> Float[Array, "B T H K"]:
    return from_chunks(jnp.moveaxis(out, (0, 2), (1, 3)), length)
