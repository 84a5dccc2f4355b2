"""Cross entropy in chunks over the vocabulary: [B, T, vocab] scores never exist at once."""

import jax
import jax.numpy as jnp

from effattn_jax.typing import Array, Float, Hidden, Tokens

CHUNK = 8192


def token_losses(
    hidden: Hidden,
    head_weights: Float[Array, "vocab D"],
    targets: Tokens,
    *,
    soft_cap: float | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "B T"]:
    """-log softmax(W h)[target] in nats for every token, with the logarithm of the sum updated chunk by chunk.

    A chunk takes every n-th row of the vocabulary rather than n consecutive ones: where the vocabulary is sharded over
    devices, all of them then work on each chunk. The scores of a chunk are computed again in the backward pass. With a
    soft cap c they are c tanh(scores / c).
    """
    vocab = head_weights.shape[0]
    chunks = -(-vocab // chunk)
    rows = -(-vocab // chunks)
    padded = jnp.pad(head_weights, ((0, rows * chunks - vocab), (0, 0)))
    strided = jnp.moveaxis(padded.reshape(rows, chunks, -1), 1, 0)

    @jax.checkpoint
    def step(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        log_sum, target_score = carry
        index, weights = chunk
        ids = jnp.arange(rows) * chunks + index
        scores = jnp.einsum("btd,vd->btv", hidden, weights, preferred_element_type=jnp.float32)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(ids < vocab, scores, -jnp.inf)
        log_sum = jnp.logaddexp(log_sum, jax.nn.logsumexp(scores, axis=-1))
        hit = ids == targets[..., None]
        return (log_sum, target_score + jnp.sum(jnp.where(hit, scores, 0), axis=-1)), None

    start = jnp.zeros_like(hidden[..., 0], dtype=jnp.float32)
    carry = (start - jnp.inf, start)
    if chunks == 1:
        (log_sum, target_score), _ = step(carry, (jnp.zeros((), jnp.int32), strided[0]))
    else:
        (log_sum, target_score), _ = jax.lax.scan(step, carry, (jnp.arange(chunks), strided))
    return log_sum - target_score
