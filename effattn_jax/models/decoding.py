"""What generation runs on the device: reading tokens in a chunk, drawing them in a loop."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.sampling import Sampling, sample
from effattn_jax.typing import Array, Bool, Float, Int

PADDING, DOCUMENT = -1, 0


class Rows(NamedTuple):
    """Where rows stand between two tokens, beside the state of the model."""

    scores: Float[Array, "B vocab"]  # of the next token
    position: Int[Array, " B"]  # of the next token, padding not counted
    key: Array
    finished: Bool[Array, " B"]  # a stop token has been drawn


class Loop(NamedTuple):
    step: Int[Array, ""]
    rows: Rows
    state: Any
    tokens: Int[Array, "B steps"]


@functools.partial(jax.jit, donate_argnums=(2,))
def read(
    model: LanguageModel,
    tokens: Int[Array, "B T"],
    state: Any,
    padding: Int[Array, " B"] | None,
    start: Int[Array, ""],
) -> tuple[Float[Array, "B vocab"], Any]:
    """Scores after the last of `tokens`, the start-th of their rows and those after it, and the state.

    The first `padding` tokens of a row are neither written nor read; None is no padding, for layers that cannot have
    any. The state's buffers are donated.
    """
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = None
    if padding is not None:
        positions -= padding[:, None]
        segment_ids = jnp.where(positions >= 0, DOCUMENT, PADDING)
    hidden, state = model.hidden(tokens, state, segment_ids=segment_ids, positions=positions)
    return model.logits(hidden[:, -1:])[:, 0], state


@functools.partial(jax.jit, static_argnames=("steps", "sampling"), donate_argnums=(2,))
def draw(
    model: LanguageModel,
    rows: Rows,
    state: Any,
    stop_tokens: Int[Array, " n"],
    limit: Int[Array, ""],
    *,
    steps: int,
    sampling: Sampling,
) -> tuple[Int[Array, "B steps"], Int[Array, ""], Rows, Any]:
    """Draw, feed back, repeat; until every row has drawn a stop token, or `limit` of at most `steps` tokens are there.

    Returns the tokens and how many of them were drawn in each row, then where the rows stand and the state, which has
    seen them all. After its stop token a row goes on, for the others' sake. The state's buffers are donated.
    """

    def step(carry: Loop) -> Loop:
        rows = carry.rows
        key, of_step = jax.random.split(rows.key)
        token = sample(of_step, rows.scores, sampling)
        tokens = jax.lax.dynamic_update_index_in_dim(carry.tokens, token, carry.step, axis=1)
        finished = rows.finished | jnp.isin(token, stop_tokens)
        hidden, state = model.hidden(token[:, None], carry.state, positions=rows.position[:, None])
        rows = Rows(model.logits(hidden)[:, 0], rows.position + 1, key, finished)
        return Loop(carry.step + 1, rows, state, tokens)

    def unfinished(carry: Loop) -> Array:
        return (carry.step < limit) & ~jnp.all(carry.rows.finished)

    tokens = jnp.zeros((rows.scores.shape[0], steps), jnp.int32)
    end = jax.lax.while_loop(unfinished, step, Loop(jnp.zeros((), jnp.int32), rows, state, tokens))
    return end.tokens, end.step, end.rows, end.state
