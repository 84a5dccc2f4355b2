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

from experiments.engine_cases import Inputs, engine_cases
from experiments.timing import milliseconds

FLAGS = flags.FlagValues()
LENGTH = flags.DEFINE_integer("length", 4096, "tokens", flag_values=FLAGS)
SIZE = flags.DEFINE_integer("dim", 64, "of keys and values", flag_values=FLAGS)
HEADS = flags.DEFINE_integer("heads", 4, "heads", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "also write the table as JSON", flag_values=FLAGS)
ONLY = flags.DEFINE_multi_string("only", None, "names of cases; default: all", flag_values=FLAGS)

TOLERANCE = 1e-4  # float32 forms over thousands of tokens


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
    FLAGS(sys.argv)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, float32, T {LENGTH.value}, {HEADS.value} heads of {SIZE.value}")
    print(f"{'':26}{'forward':>21}{'':>9}{'forward and backward':>23}")
    print(f"{'engine':26}{'recurrent':>11}{'chunkwise':>10}{'ratio':>9}{'recurrent':>12}{'chunkwise':>11}", end="")
    print(f"{'ratio':>9}{'error':>10}")
    rows = []
    for name, (engine, inputs, _) in engine_cases(1, LENGTH.value, HEADS.value, SIZE.value).items():
        if ONLY.value and name not in ONLY.value:
            continue
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
