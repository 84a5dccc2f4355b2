"""Time each mechanism, each form and implementation, with its error against the oracle beside it.

    python -m experiments.benchmark [--shape=4,8192,16,128 ...] [--only=delta_rule ...] [--dtype=bfloat16]
        [--output=table.json]

A shape is B,T,H,D. The floor is the larger of the bytes that must move (inputs and outputs once) over the memory
bandwidth and the products over the peak rate of the device, where the device is known. Errors are taken at the shape
[1, min(T, 1024), 2, D] with the oracle in float32 on the same rounded inputs.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from effattn_jax.sparse import attention
from effattn_jax.training.hardware import memory_bandwidth, peak_flops
from experiments.engine_cases import Inputs, engine_cases
from experiments.timing import milliseconds

FLAGS = flags.FlagValues()
SHAPES = flags.DEFINE_multi_string("shape", None, "B,T,H,D; default: by device", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "default: bfloat16 on accelerators", flag_values=FLAGS
)
ONLY = flags.DEFINE_multi_string(
    "only", None, "names of mechanisms begin with one of these; default: all", flag_values=FLAGS
)
OUTPUT = flags.DEFINE_string("output", None, "also write the table as JSON", flag_values=FLAGS)

Shape = tuple[int, int, int, int]


class Case(NamedTuple):
    """A mechanism as called, and its oracle, on inputs of one shape."""

    call: Callable[[Inputs], Any]  # inputs -> out
    oracle: Callable[[Inputs], Any]
    inputs: Inputs
    flops: float  # of the forward pass


def cases(shape: Shape, dtype: Any) -> dict[str, Case]:
    def of_form(engine: Callable[..., Any], form: str) -> Callable[[Inputs], Any]:
        return lambda inputs: engine(**inputs, form=form)[0]

    def softmax(implementation: str, window: int | None) -> Callable[[Inputs], Any]:
        return lambda inputs: attention(**inputs, window=window, implementation=implementation)

    found = {}
    for name, (engine, inputs, flops) in engine_cases(*shape, dtype).items():
        found[f"{name} xla"] = Case(of_form(engine, "chunkwise"), of_form(engine, "recurrent"), inputs, flops)
    batch, length, heads, dim = shape
    qkv = {name: found["scalar_decay xla"].inputs[name] for name in "qkv"}
    for window in (None, 1024):
        name = "attention" if window is None else f"attention window={window}"
        flops = 4 * batch * heads * dim * length * min(window or length, (length + 1) / 2)
        for implementation in ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",):
            call, oracle = softmax(implementation, window), softmax("dense", window)
            found[f"{name} {implementation}"] = Case(call, oracle, qkv, flops)
    wanted = tuple(ONLY.value or ("",))
    return {name: case for name, case in found.items() if name.startswith(wanted)}


def gradients(call: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """Out and the gradients of all inputs for a fixed random cotangent."""

    def both(inputs: Inputs) -> Any:
        out, pull = jax.vjp(call, inputs)
        cotangent = jax.random.normal(jax.random.key(1), out.shape, jnp.bfloat16)  # the same for every dtype of out
        return out, pull(cotangent.astype(out.dtype))

    return both


def error(case: Case) -> tuple[float, float]:
    """Error ratio of the output, and the largest of the gradients."""
    got = jax.jit(gradients(case.call))(case.inputs)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), case.inputs)
    want = jax.jit(gradients(case.oracle))(exact)
    ratios = [
        float(jnp.sqrt(jnp.mean((w - x.astype(jnp.float32)) ** 2)) / (jnp.sqrt(jnp.mean(w**2)) + 1e-8))
        for w, x in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True)
    ]
    return ratios[0], max(ratios[1:])


def floor(case: Case) -> float | None:
    device = jax.devices()[0]
    rate, bandwidth = peak_flops(device), memory_bandwidth(device)
    if rate is None or bandwidth is None:
        return None
    out = jax.eval_shape(case.call, case.inputs)
    moved = sum(x.size * x.dtype.itemsize for x in (*jax.tree.leaves(case.inputs), out))
    return 1e3 * max(moved / bandwidth, case.flops / rate)


def main() -> None:
    FLAGS(sys.argv)
    accelerator = jax.default_backend() != "cpu"
    default = ["4,8192,16,128", "8,2048,16,128", "1,65536,16,128"] if accelerator else ["2,1024,4,64"]
    dtype = jnp.dtype(DTYPE.value or ("bfloat16" if accelerator else "float32"))
    device = jax.devices()[0].device_kind
    rows = []
    print(f"{device}, jax {jax.__version__}, {dtype.name}")
    print(f"{'mechanism':34}{'B,T,H,D':>16}{'floor':>9}{'forward':>10}{'+backward':>11}{'error':>10}{'of grads':>10}")
    for text in SHAPES.value or default:
        shape: Any = tuple(map(int, text.split(",")))
        small = cases((1, min(shape[1], 1024), 2, shape[3]), dtype)
        errors = {name: error(case) for name, case in small.items()}
        for name, case in cases(shape, dtype).items():
            row: dict[str, Any] = {"mechanism": name, "shape": text, "floor_ms": floor(case)}
            row["error"], row["gradient_error"] = errors[name]
            row["forward_ms"] = milliseconds(jax.jit(case.call), case.inputs)
            row["forward_backward_ms"] = milliseconds(jax.jit(gradients(case.call)), case.inputs)
            rows.append(row)
            least = "" if row["floor_ms"] is None else f"{row['floor_ms']:.3f}"
            print(
                f"{name:34}{text:>16}{least:>9}{row['forward_ms']:>10.3f}{row['forward_backward_ms']:>11.3f}"
                f"{row['error']:>10.1e}{row['gradient_error']:>10.1e}",
                flush=True,
            )
    if OUTPUT.value:
        command = "python -m experiments.benchmark " + " ".join(sys.argv[1:])
        table = {"device": device, "jax": jax.__version__, "dtype": dtype.name, "command": command, "rows": rows}
        with open(OUTPUT.value, "w") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
