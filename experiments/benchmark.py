"""Time each mechanism, each form and implementation, with its error against the oracle beside it.

    python -m experiments.benchmark [--shape=4,8192,16,128 ...] [--dtype=bfloat16] [--output=table.json]

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

from effattn_jax.linear import scalar_decay
from effattn_jax.sparse import attention
from effattn_jax.training.hardware import memory_bandwidth, peak_flops
from experiments.timing import milliseconds

SHAPES = flags.DEFINE_multi_string("shape", None, "B,T,H,D; default: by device")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "default: bfloat16 on accelerators")
OUTPUT = flags.DEFINE_string("output", None, "also write the table as JSON")


class Case(NamedTuple):
    """A mechanism as called, and its oracle."""

    name: str
    call: Callable[..., Any]  # q, k, v, gates -> out
    oracle: Callable[..., Any]
    flops: Callable[[int, int, int, int], float]  # of the forward pass, from B, T, H, D


def cases() -> list[Case]:
    def decay(form: str) -> Callable[..., Any]:
        return lambda q, k, v, g: scalar_decay(q, k, v, g, form=form)[0]

    def softmax(implementation: str, window: int | None) -> Callable[..., Any]:
        return lambda q, k, v, g: attention(q, k, v, window=window, implementation=implementation)

    def softmax_flops(window: int | None) -> Callable[[int, int, int, int], float]:
        return lambda b, t, h, d: 4 * b * h * d * t * min(window or t, (t + 1) / 2)

    decay_flops = lambda b, t, h, d: 4 * b * t * h * d * d  # noqa: E731
    found = [Case("scalar_decay chunkwise xla", decay("chunkwise"), decay("recurrent"), decay_flops)]
    for window in (None, 1024):
        name = "attention" if window is None else f"attention window={window}"
        for implementation in ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",):
            call = softmax(implementation, window)
            found.append(Case(f"{name} {implementation}", call, softmax("dense", window), softmax_flops(window)))
    return found


def inputs(shape: tuple[int, int, int, int], dtype: Any) -> tuple[jax.Array, ...]:
    batch, length, heads, dim = shape
    *qkv, gates = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (batch, length, heads, dim), dtype) for key in qkv)
    return q, k, v, jax.nn.log_sigmoid(jax.random.normal(gates, (batch, length, heads)))


def gradients(call: Callable[..., Any]) -> Callable[..., Any]:
    """Out and the gradients of all inputs for a fixed random cotangent."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        out, pull = jax.vjp(call, q, k, v, g)
        cotangent = jax.random.normal(jax.random.key(1), out.shape, jnp.bfloat16)  # the same for every dtype of out
        return out, pull(cotangent.astype(out.dtype))

    return both


def error(case: Case, shape: tuple[int, int, int, int], dtype: Any) -> tuple[float, float]:
    """Error ratio of the output, and the largest of the gradients."""
    small = (1, min(shape[1], 1024), 2, shape[3])
    arguments = inputs(small, dtype)
    got = jax.jit(gradients(case.call))(*arguments)
    want = jax.jit(gradients(case.oracle))(*(x.astype(jnp.float32) for x in arguments))
    ratios = [
        float(jnp.sqrt(jnp.mean((w - x.astype(jnp.float32)) ** 2)) / (jnp.sqrt(jnp.mean(w**2)) + 1e-8))
        for w, x in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True)
    ]
    return ratios[0], max(ratios[1:])


def floor(case: Case, shape: tuple[int, int, int, int], dtype: Any) -> float | None:
    device = jax.devices()[0]
    rate, bandwidth = peak_flops(device), memory_bandwidth(device)
    if rate is None or bandwidth is None:
        return None
    batch, length, heads, dim = shape
    moved = batch * length * heads * (4 * dim * jnp.dtype(dtype).itemsize + 4)
    return 1e3 * max(moved / bandwidth, case.flops(*shape) / rate)


def main() -> None:
    flags.FLAGS(sys.argv)
    accelerator = jax.default_backend() != "cpu"
    default = ["4,8192,16,128", "8,2048,16,128", "1,65536,16,128"] if accelerator else ["2,1024,4,64"]
    dtype = jnp.dtype(DTYPE.value or ("bfloat16" if accelerator else "float32"))
    device = jax.devices()[0].device_kind
    rows = []
    print(f"{device}, jax {jax.__version__}, {dtype.name}")
    print(f"{'mechanism':34}{'B,T,H,D':>16}{'floor':>9}{'forward':>10}{'+backward':>11}{'error':>10}{'of grads':>10}")
    for text in SHAPES.value or default:
        shape: Any = tuple(map(int, text.split(",")))
        arguments = inputs(shape, dtype)
        for case in cases():
            row: dict[str, Any] = {"mechanism": case.name, "shape": text, "floor_ms": floor(case, shape, dtype)}
            row["error"], row["gradient_error"] = error(case, shape, dtype)
            row["forward_ms"] = milliseconds(jax.jit(case.call), *arguments)
            row["forward_backward_ms"] = milliseconds(jax.jit(gradients(case.call)), *arguments)
            rows.append(row)
            least = "" if row["floor_ms"] is None else f"{row['floor_ms']:.3f}"
            print(
                f"{case.name:34}{text:>16}{least:>9}{row['forward_ms']:>10.3f}{row['forward_backward_ms']:>11.3f}"
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
