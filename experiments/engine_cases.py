"""Every engine of `effattn_jax.linear` with hard inputs of a given size: what the timing scripts run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import linear

Inputs = dict[str, Any]


class EngineCase(NamedTuple):
    engine: Callable[..., Any]  # (**inputs, form) -> (out, state)
    inputs: Inputs
    flops: float  # of the recurrence, token by token: what no form does without


def engine_cases(batch: int, length: int, heads: int, dim: int, dtype: Any = jnp.float32) -> dict[str, EngineCase]:
    """By name: randn, keys of length one where the mechanism wants them. Gates, steps and weights stay float32."""
    keys = iter(jax.random.split(jax.random.key(0), 64))
    randn = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    tokens = lambda *shape: randn(batch, length, *shape)  # noqa: E731
    gate = lambda *shape: jax.nn.log_sigmoid(2 + tokens(*shape))  # noqa: E731
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    weights = lambda *shape: randn(heads, *shape) * shape[0] ** -0.5  # noqa: E731
    cast = lambda inputs: {name: x.astype(dtype) for name, x in inputs.items()}  # noqa: E731

    qkv = cast({name: tokens(heads, dim) for name in "qkv"})
    unit_qk = cast({name: unit(tokens(heads, dim)) for name in "qk"})
    delta = qkv | unit_qk | {"beta": 2 * jax.nn.sigmoid(tokens(heads))}
    kappa = unit(tokens(heads, dim))
    replace = cast({"a": -kappa, "b": kappa * jax.nn.sigmoid(tokens(heads, dim))})
    channels, states = heads * dim, 16
    scan = cast({"x": tokens(channels), "B": tokens(states), "C": tokens(states)}) | {
        "dt": jax.nn.softplus(tokens(channels) - 1),
        "A": -jnp.broadcast_to(jnp.arange(1.0, states + 1), (channels, states)),
        "D": jnp.ones(channels),
    }
    inner = qkv | {
        "lr": jax.nn.sigmoid(tokens(heads)) / dim,
        "token_scale": 1 / jnp.arange(1.0, 17),
        "ln_scale": jnp.ones((heads, dim)),
        "ln_bias": jnp.zeros((heads, dim)),
    }
    zeros = lambda *shape: jnp.zeros((heads, *shape))  # noqa: E731
    mlp = {"W1": weights(dim, 4 * dim), "b1": zeros(4 * dim), "W2": weights(4 * dim, dim), "b2": zeros(dim)}
    titans = (
        qkv
        | unit_qk
        | {
            "theta": 0.1 * jax.nn.sigmoid(tokens(heads)),
            "eta": jax.nn.sigmoid(tokens(heads)),
            "alpha": 0.1 * jax.nn.sigmoid(tokens(heads)),
        }
    )
    levels = length.bit_length()
    square = float(batch * length * heads * dim * dim)  # tokens x heads x entries of a memory
    return {
        "scalar_decay": EngineCase(linear.scalar_decay, qkv | {"log_decay": gate(heads)}, 4 * square),
        "vector_decay": EngineCase(linear.vector_decay, qkv | {"log_decay": gate(heads, dim)}, 4 * square),
        "vector_decay, bonus": EngineCase(
            linear.vector_decay, qkv | {"log_decay": gate(heads, dim), "bonus": randn(heads, dim)}, 4 * square
        ),
        "delta_rule": EngineCase(linear.delta_rule, delta, 6 * square),
        "delta_rule, scalar gate": EngineCase(linear.delta_rule, delta | {"log_decay": gate(heads)}, 6 * square),
        "delta_rule, vector gate": EngineCase(linear.delta_rule, delta | {"log_decay": gate(heads, dim)}, 6 * square),
        "dplr": EngineCase(linear.dplr, qkv | replace | {"log_decay": gate(heads, dim)}, 8 * square),
        "selective_scan": EngineCase(linear.selective_scan, scan, 6.0 * batch * length * channels * states),
        "diagonal_scan": EngineCase(
            linear.diagonal_scan,
            cast({"x": tokens(channels)}) | {"log_decay": gate(channels)},
            2.0 * batch * length * channels,
        ),
        "gated_slot_attention": EngineCase(  # as many slots as channels
            linear.gated_slot_attention,
            qkv | {"s": jax.nn.sigmoid(tokens(heads, dim)), "log_decay": gate(heads, dim)},
            8 * square,
        ),
        "log_linear_attention": EngineCase(
            linear.log_linear_attention,
            qkv | {"log_decay": gate(heads), "level_scales": jax.nn.softplus(tokens(heads, levels))},
            (2 + 2 * levels) * square,
        ),
        "mamba3": EngineCase(
            linear.mamba3,
            qkv
            | {
                "log_decay": gate(heads),
                "dt": jax.nn.softplus(tokens(heads) - 1),
                "mix": jax.nn.sigmoid(tokens(heads)),
                "angle": tokens(heads, dim // 4),
            },
            6 * square,
        ),
        "mesa": EngineCase(
            linear.mesa,
            qkv
            | unit_qk
            | {"beta": jax.nn.sigmoid(tokens(heads)), "log_decay": gate(heads), "ridge": jnp.ones((heads, dim))},
            66 * square,
        ),
        "rwkv4": EngineCase(
            linear.rwkv4,
            cast({"k": tokens(channels), "v": tokens(channels)})
            | {"log_decay": jax.nn.log_sigmoid(2 + randn(channels)), "bonus": randn(channels)},
            12.0 * batch * length * channels,
        ),
        "ttt_linear": EngineCase(linear.ttt_linear, inner | {"W": weights(dim, dim), "b": zeros(dim)}, 6 * square),
        "ttt_mlp": EngineCase(linear.ttt_mlp, inner | mlp, 48 * square),
        "titans_memory, linear": EngineCase(
            linear.titans_memory, titans | {"weights": (weights(dim, dim),)}, 8 * square
        ),
        "titans_memory, deep": EngineCase(
            linear.titans_memory, titans | {"weights": (weights(dim, dim), weights(dim, dim))}, 18 * square
        ),
    }
