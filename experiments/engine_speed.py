"""Chunkwise against recurrent, for every engine of `effattn_jax.linear`, each checked before it is timed.

    python -m experiments.engine_speed [--length=4096] [--dim=64] [--heads=4] [--output=table.json]

Milliseconds of the forward pass, and of it with the gradients of all inputs; the error is that of the chunkwise form
against the recurrent one on the same inputs, the largest over the output, the state and the gradients.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from effattn_jax import linear
from experiments.timing import milliseconds

LENGTH = flags.DEFINE_integer("length", 4096, "tokens")
SIZE = flags.DEFINE_integer("dim", 64, "of keys and values")
HEADS = flags.DEFINE_integer("heads", 4, "heads")
OUTPUT = flags.DEFINE_string("output", None, "also write the table as JSON")
ONLY = flags.DEFINE_multi_string("only", None, "names of cases; default: all")

Inputs = dict[str, Any]
TOLERANCE = 1e-4  # float32 forms over thousands of tokens


def cases() -> dict[str, tuple[Callable[..., Any], Inputs]]:
    """Each engine with hard inputs: randn, keys of length one where the mechanism wants them."""
    length, dim, heads = LENGTH.value, SIZE.value, HEADS.value
    keys = iter(jax.random.split(jax.random.key(0), 64))
    randn = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    tokens = lambda *shape: randn(1, length, *shape)  # noqa: E731
    gate = lambda *shape: jax.nn.log_sigmoid(2 + tokens(*shape))  # noqa: E731
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    qkv = {name: tokens(heads, dim) for name in "qkv"}
    delta = qkv | {"k": unit(qkv["k"]), "beta": 2 * jax.nn.sigmoid(tokens(heads))}
    rank_one = {"a": -unit(tokens(heads, dim)), "log_decay": gate(heads, dim)}
    channels, state = heads * dim, 16
    scan = {
        "x": tokens(channels),
        "dt": jax.nn.softplus(tokens(channels) - 1),
        "A": -jnp.broadcast_to(jnp.arange(1.0, state + 1), (channels, state)),
        "B": tokens(state),
        "C": tokens(state),
        "D": jnp.ones(channels),
    }
    weights = lambda *shape: randn(heads, *shape) * shape[0] ** -0.5  # noqa: E731
    ttt = qkv | {
        "lr": jax.nn.sigmoid(tokens(heads)) / dim,
        "token_scale": 1 / jnp.arange(1.0, 17),
        "ln_scale": jnp.ones((heads, dim)),
        "ln_bias": jnp.zeros((heads, dim)),
    }
    linear_memory = {"W": weights(dim, dim), "b": jnp.zeros((heads, dim))}
    deep_memory = {
        "W1": weights(dim, 4 * dim),
        "b1": jnp.zeros((heads, 4 * dim)),
        "W2": weights(4 * dim, dim),
        "b2": jnp.zeros((heads, dim)),
    }
    titans = {"q": unit(qkv["q"]), "k": unit(qkv["k"]), "v": qkv["v"]} | {
        "theta": 0.1 * jax.nn.sigmoid(tokens(heads)),
        "eta": jax.nn.sigmoid(tokens(heads)),
        "alpha": 0.1 * jax.nn.sigmoid(tokens(heads)),
    }
    found = {
        "scalar_decay": (linear.scalar_decay, qkv | {"log_decay": gate(heads)}),
        "vector_decay": (linear.vector_decay, qkv | {"log_decay": gate(heads, dim)}),
        "vector_decay, bonus": (linear.vector_decay, qkv | {"log_decay": gate(heads, dim), "bonus": randn(heads, dim)}),
        "delta_rule": (linear.delta_rule, delta),
        "delta_rule, scalar gate": (linear.delta_rule, delta | {"log_decay": gate(heads)}),
        "delta_rule, vector gate": (linear.delta_rule, delta | {"log_decay": gate(heads, dim)}),
        "dplr": (linear.dplr, qkv | rank_one | {"b": -rank_one["a"] * jax.nn.sigmoid(tokens(heads, dim))}),
        "selective_scan": (linear.selective_scan, scan),
        "diagonal_scan": (linear.diagonal_scan, {"x": tokens(channels), "log_decay": gate(channels)}),
        "ttt_linear": (linear.ttt_linear, ttt | linear_memory),
        "ttt_mlp": (linear.ttt_mlp, ttt | deep_memory),
        "titans_memory, linear": (linear.titans_memory, titans | {"weights": (weights(dim, dim),)}),
        "titans_memory, deep": (linear.titans_memory, titans | {"weights": (weights(dim, dim), weights(dim, dim))}),
    }
    return {name: case for name, case in found.items() if not ONLY.value or name in ONLY.value}


def forward(engine: Callable[..., Any], form: str) -> Callable[[Inputs], Any]:
    return jax.jit(lambda inputs: engine(**inputs, form=form))


def gradients(engine: Callable[..., Any], form: str) -> Callable[[Inputs], Any]:
    def loss(inputs: Inputs) -> Any:
        out, state = engine(**inputs, form=form)
        weight = jax.random.normal(jax.random.key(1), out.shape)
        return jnp.sum(out * weight), (out, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def largest_error(want: Any, got: Any) -> float:
    ratio = lambda w, x: jnp.sqrt(jnp.mean((w - x) ** 2)) / (jnp.sqrt(jnp.mean(w**2)) + 1e-8)  # noqa: E731
    leaves = [x for x in jax.tree.leaves(jax.tree.map(ratio, want, got)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return max(float(x) for x in leaves)


def main() -> None:
    flags.FLAGS(sys.argv)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, float32, T {LENGTH.value}, {HEADS.value} heads of {SIZE.value}")
    print(f"{'':26}{'forward':>21}{'':>9}{'forward and backward':>23}")
    print(f"{'engine':26}{'recurrent':>11}{'chunkwise':>10}{'ratio':>9}{'recurrent':>12}{'chunkwise':>11}", end="")
    print(f"{'ratio':>9}{'error':>10}")
    rows = []
    for name, (engine, inputs) in cases().items():
        calls = {form: (forward(engine, form), gradients(engine, form)) for form in ("recurrent", "chunkwise")}
        error = largest_error(*(calls[form][1](inputs) for form in ("recurrent", "chunkwise")))
        if not error <= TOLERANCE:
            raise SystemExit(f"{name}: error {error:.1e} of the chunkwise form; needs at most {TOLERANCE:.0e}")
        times = {form: [milliseconds(call, inputs) for call in pair] for form, pair in calls.items()}
        slow, fast = times["recurrent"], times["chunkwise"]
        rows.append({"engine": name, "recurrent_ms": slow, "chunkwise_ms": fast, "error": error})
        print(
            f"{name:26}{slow[0]:>11.1f}{fast[0]:>10.1f}{slow[0] / fast[0]:>8.1f}x"
            f"{slow[1]:>12.1f}{fast[1]:>11.1f}{slow[1] / fast[1]:>8.1f}x{error:>10.1e}",
            flush=True,
        )
    if OUTPUT.value:
        command = "python -m experiments.engine_speed " + " ".join(sys.argv[1:])
        table = {"device": device, "cores": os.cpu_count(), "jax": jax.__version__, "command": command, "rows": rows}
        with open(OUTPUT.value, "w") as file:
            json.dump(table, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
