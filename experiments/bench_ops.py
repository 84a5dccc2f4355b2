"""Our kernels on this GPU: each case checked against the float32 oracle, then timed by loops under one jit.

    python -m experiments.bench_ops [--op=scalar_decay ...] [--shape=4,8192,16,128 ...] [--output=DIR]

A shape is B,T,H,D. Milliseconds are the median of loops whose every pass depends on the one before; the spread is the
range over the median. The floor is inputs and outputs moved once, forward, and with the gradients, over the bandwidth
that a copy reached on an H200 (4.25 TB/s; 2.9 TB/s is assumed of an H100). Peers are those of peers_h200.json beside
the results, measured on one H200. Errors are the largest ratios to the oracle over one row of 1024 tokens and 66 of
200, gates weak, mild and strong.
Writes bench_ops.json and bench_ops.png to --output.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from effattn_jax import linear

FLAGS = flags.FlagValues()
OPS = flags.DEFINE_multi_string("op", None, "names begin with one of these; default: all", flag_values=FLAGS)
SHAPES = flags.DEFINE_multi_string(
    "shape", ["4,8192,16,128", "1,65536,16,128", "8,2048,16,128", "4,8192,32,64"], "B,T,H,D", flag_values=FLAGS
)
OUTPUT = flags.DEFINE_string("output", "runs/bench_ops", "where the table and the plot go", flag_values=FLAGS)
BASELINE = flags.DEFINE_bool("baseline", False, "time the XLA form too", flag_values=FLAGS)

PEERS = os.path.join(os.path.dirname(__file__), "results", "peers_h200.json")
LIMITS = {"out": 0.005, "gradients": 0.008, "gates": 0.02}
Arrays = dict[str, jax.Array]


class Op(NamedTuple):
    call: Callable[..., Any]  # (**inputs, implementation) -> (out, state)
    inputs: Callable[..., Arrays]  # (B, T, H, D, gate) -> arrays; the gate is the mean of its logit
    gates: tuple[str, ...]
    peer: str
    kernel: str = "mosaic_gpu"


def qkv(batch: int, length: int, heads: int, dim: int) -> Arrays:
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key: jax.random.normal(key, (batch, length, heads, dim), jnp.bfloat16)  # noqa: E731
    return dict(zip("qkv", map(draw, keys), strict=True))


def per_token(batch: int, length: int, heads: int, dim: int, gate: float) -> Arrays:
    noise = jax.random.normal(jax.random.key(1), (batch, length, heads))
    return qkv(batch, length, heads, dim) | {"log_decay": jax.nn.log_sigmoid(gate + noise)}


def per_head(batch: int, length: int, heads: int, dim: int, gate: float) -> Arrays:
    slopes = jax.nn.log_sigmoid(gate + jnp.linspace(-2.0, 2.0, heads))
    return qkv(batch, length, heads, dim) | {"log_decay": slopes}


OPERATIONS = {
    "scalar_decay, gate per token": Op(linear.scalar_decay, per_token, ("log_decay",), "fla.simple_gla"),
    "scalar_decay, gate per head": Op(linear.scalar_decay, per_head, ("log_decay",), "fla.retention"),
}


def gradients(call: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
    def both(inputs: Arrays) -> Any:
        out, pull = jax.vjp(lambda inputs: call(inputs)[0], inputs)
        cotangent = jax.random.normal(jax.random.key(2), out.shape[1:], jnp.bfloat16)
        return out, *pull(jnp.broadcast_to(cotangent, out.shape).astype(out.dtype))

    return both


@functools.cache
def errors(op: Op, dim: int) -> dict[str, float]:
    """The largest of each kind over weak, mild and strong gates, for one long row and for many short ones."""
    worst = dict.fromkeys(LIMITS, 0.0)
    oracle = jax.jit(gradients(lambda x: op.call(**x, form="recurrent", implementation="xla")))
    kernel = jax.jit(gradients(lambda x: op.call(**x, implementation=op.kernel)))
    ratio = lambda w, x: float(  # noqa: E731
        jnp.sqrt(jnp.mean((w - x.astype(jnp.float32)) ** 2)) / (jnp.sqrt(jnp.mean(w**2)) + 1e-8)
    )
    for rows, length, gate in [(r, t, g) for r, t in ((1, 1024), (66, 200)) for g in (6.0, 2.0, -4.0)]:
        inputs = op.inputs(rows, length, 2, dim, gate)
        want = oracle({name: x.astype(jnp.float32) for name, x in inputs.items()})
        got = kernel(inputs)
        found = [("out", ratio(want[0], got[0]))]
        for name, x in want[1].items():
            found.append(("gates" if name in op.gates else "gradients", ratio(x, got[1][name])))
        for kind, value in found:
            if not value <= LIMITS[kind]:
                raise SystemExit(f"{rows} x {length}, gate {gate}, {kind}: error {value:.1e}; limit {LIMITS[kind]}")
            worst[kind] = max(worst[kind], value)
    return worst


class Time(NamedTuple):
    milliseconds: float
    spread: float  # (longest - shortest) / median
    first_call: float  # seconds, of tracing, compiling and running


def timed(call: Callable[[Arrays], Any], inputs: Arrays, repetitions: int = 7, seconds: float = 0.03) -> Time:
    def loop(inputs: Arrays, passes: jax.Array) -> Any:
        def step(_: Any, carry: Any) -> Any:
            inputs, _ = jax.lax.optimization_barrier(carry)
            return inputs, call(inputs)

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(call, inputs))
        return jax.lax.fori_loop(0, passes, step, (inputs, start))[1]

    began = time.perf_counter()
    jax.block_until_ready(jax.jit(call)(inputs))
    first = time.perf_counter() - began
    compiled = jax.jit(loop)

    def once(passes: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(compiled(inputs, jnp.int32(passes)))
        return time.perf_counter() - began

    once(3)
    few = 2
    passes = few + max(4, int(seconds / max((once(13) - once(3)) / 10, 1e-6)))
    times = [1e3 * (once(passes) - once(few)) / (passes - few) for _ in range(repetitions)]
    middle = statistics.median(times)
    return Time(middle, (max(times) - min(times)) / middle, first)


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.6 * len(rows) + 1.6), sharey=True)
    for axis, part in zip(axes, ("forward", "forward_backward"), strict=True):
        names = [f"{row['op']}\n{row['shape']}, {row['implementation']}" for row in rows]
        places = range(len(rows))
        axis.barh([y + 0.2 for y in places], [row[f"{part}_ms"] for row in rows], 0.4, label="ours")
        axis.barh(
            [y - 0.2 for y in places], [row[f"peer_{part}_ms"] or 0 for row in rows], 0.4, label="peer on an H200"
        )
        axis.plot([row[f"{part}_floor_ms"] for row in rows], [y + 0.2 for y in places], "k|", label="floor", ms=12)
        axis.set(xlabel=f"{part.replace('_', ' and ')}, ms", yticks=list(places), yticklabels=names)
        axis.tick_params(axis="y", labelsize=7)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    FLAGS(sys.argv)
    device = jax.devices()[0].device_kind
    bandwidth = 4.25e12 if "H200" in device else 2.9e12
    with open(PEERS) as file:
        peers = {(r["name"], *(r[x] for x in "BTHD")): r for r in json.load(file)["rows"]}
    print(f"{device}, jax {jax.__version__}, bfloat16; times and floors in ms")
    print(
        f"{'op':30}{'B,T,H,D':>16}{'':12}{'forward':>9}{'floor':>7}{'peer':>7}{'+backward':>11}{'floor':>7}{'peer':>7}",
        end="",
    )
    print(f"{'spread':>8}{'TB/s':>7}{'TFLOP/s':>9}{'first s':>9}  errors: out, gradients, gates")
    rows = []
    for name, op in OPERATIONS.items():
        if OPS.value and not name.startswith(tuple(OPS.value)):
            continue
        for text in SHAPES.value:
            shape = tuple(map(int, text.split(",")))
            inputs = op.inputs(*shape, 2.0)
            error = errors(op, shape[3])
            peer = peers.get((op.peer, *shape), {})
            out_bytes = inputs["v"].nbytes
            read = sum(x.nbytes for x in inputs.values())
            forward_bytes, both_bytes = read + out_bytes, 3 * read + 2 * out_bytes
            chunk = 128
            flops = 2 * shape[0] * shape[1] * shape[2] * shape[3] * (2 * chunk / 2 + 2 * shape[3])
            for implementation in (op.kernel, "xla") if BASELINE.value else (op.kernel,):
                call = lambda x, op=op, name=implementation: op.call(**x, implementation=name)  # noqa: E731
                forward, both = timed(call, inputs), timed(gradients(call), inputs)
                row = {
                    "op": name,
                    "shape": text,
                    "implementation": implementation,
                    "forward_ms": forward.milliseconds,
                    "forward_backward_ms": both.milliseconds,
                    "spread": max(forward.spread, both.spread),
                    "forward_floor_ms": 1e3 * forward_bytes / bandwidth,
                    "forward_backward_floor_ms": 1e3 * both_bytes / bandwidth,
                    "forward_TBps": forward_bytes / forward.milliseconds / 1e9,
                    "forward_TFLOPs": flops / forward.milliseconds / 1e9,
                    "first_call_s": forward.first_call + both.first_call,
                    "peer": op.peer,
                    "peer_forward_ms": peer.get("fwd_ms"),
                    "peer_forward_backward_ms": peer.get("fwdbwd_ms"),
                    "errors": error if implementation == op.kernel else None,
                }
                rows.append(row)
                number = lambda x: f"{x:7.2f}" if x else f"{'':7}"  # noqa: E731
                print(
                    f"{name:30}{text:>16}{implementation:>12}{row['forward_ms']:9.3f}{row['forward_floor_ms']:7.2f}"
                    f"{number(row['peer_forward_ms'])}{row['forward_backward_ms']:11.3f}"
                    f"{row['forward_backward_floor_ms']:7.2f}{number(row['peer_forward_backward_ms'])}"
                    f"{100 * row['spread']:7.1f}%{row['forward_TBps']:7.2f}{row['forward_TFLOPs']:9.0f}"
                    f"{row['first_call_s']:9.1f}  " + " ".join(f"{x:.1e}" for x in error.values()),
                    flush=True,
                )
    os.makedirs(OUTPUT.value, exist_ok=True)
    command = " ".join(["python -m experiments.bench_ops", *sys.argv[1:]])
    with open(os.path.join(OUTPUT.value, "bench_ops.json"), "w") as file:
        json.dump({"device": device, "jax": jax.__version__, "command": command, "rows": rows}, file, indent=1)
        file.write("\n")
    plot(os.path.join(OUTPUT.value, "bench_ops.png"), rows)


if __name__ == "__main__":
    main()
