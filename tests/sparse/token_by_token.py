"""A row through a cache, one token at a call."""

import jax
import jax.numpy as jnp


def token_by_token(step, cache, q, k, v):
    """`step(q, k, v, cache)` -> (out, cache), in one loop over the tokens: out [B, T, H, V]."""

    def one(cache, token):
        out, cache = step(*(x[:, None] for x in token), cache)
        return cache, out[:, 0]

    _, outs = jax.lax.scan(one, cache, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v)))
    return jnp.moveaxis(outs, 0, 1)


def after_a_prompt(prefill, step, prompt, q, k, v):
    """`prefill(q, k, v, room)` -> (out, cache) of the first `prompt` tokens at most, then the others one by one."""
    prompt, length = min(prompt, q.shape[1]), q.shape[1]
    out, cache = prefill(*(x[:, :prompt] for x in (q, k, v)), max(1, length - prompt))
    if prompt == length:
        return out
    rest = token_by_token(step, cache, *(x[:, prompt:] for x in (q, k, v)))
    return jnp.concatenate([out, rest], axis=1)
