"""Our kernels on this GPU: each case checked against the float32 oracle, then timed by loops under one jit.

    python -m experiments.bench_ops [--baseline] [--triton] [--peers] [--op=scalar_decay ...]
        [--shape=4,8192,16,128 ...] [--minutes=8] [--output=DIR]

The cases are in `bench_cases.py`. A shape is B,T,H,D; one with T = 1 is for the steps of decoding, any other for the
rest. The kernels of Mosaic GPU come first, then what `--baseline` adds (XLA; for attention cuDNN too and, forward and
in float16, the example for Mosaic GPU that comes with JAX), then `--triton`. Attention of 65,536 tokens and more, which
XLA takes seconds for, is left out where no shape is named.

Milliseconds are the median of loops whose every pass depends on the one before; steps carry their state. The spread is
the range over the median. First calls are seconds of tracing, compiling and one pass. TB/s counts each input and output
once, with the backward pass the inputs once more, what a gradient comes from and what it goes to; a step counts its
state, read and written. TFLOP/s counts the products of the chunked form, or of the pairs that a query sees. The floor
is the larger of the bytes over the bandwidth that a copy reached (4.25 TB/s on an H200, 2.9 on an H100, else that of
the data sheet) and the products over the peak rate of the data sheet.

Errors are the largest ratios to the oracle over hard inputs: for decays a row of 1024 tokens and 66 of 200, gates weak,
mild and strong; for attention 1000 tokens, grouped heads, then sinks and documents. XLA and cuDNN have tests of their
own.

Peers are flash-linear-attention's kernels, and cuDNN for attention: figures marked * were recorded on one H200
(`results/peers_h200.json`), all others come from the same run with `--peers`, which needs the packages and the minutes
that `bench_peers.py` names. Torch needs memory too: `--peers` sets XLA_PYTHON_CLIENT_PREALLOCATE=false where it is not
set.

Writes bench_ops.json to --output, anew after every row, and bench_ops.png. Ends with status 1 if a case failed.
"""

import functools
import os
import sys
import time
from typing import Any

import jax
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from effattn_jax.training.hardware import memory_bandwidth, peak_flops
from experiments import bench_peers
from experiments.bench_cases import (
    OPERATIONS,
    Op,
    Work,
    error_of_example,
    errors,
    forward,
    gradients,
    with_cotangent,
    work,
)
from experiments.report import write_report
from experiments.timing import Time, only_on_a_gpu, timed

FLAGS = flags.FlagValues()
OPS = flags.DEFINE_multi_string("op", None, "names begin with one of these; default: all", flag_values=FLAGS)
SHAPES = flags.DEFINE_multi_string("shape", None, "B,T,H,D; default: all of the table", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", "runs/bench_ops", "where the table and the plot go", flag_values=FLAGS)
BASELINE = flags.DEFINE_bool("baseline", False, "time XLA too, and cuDNN", flag_values=FLAGS)
TRITON = flags.DEFINE_bool("triton", False, "time the Triton kernels too", flag_values=FLAGS)
PEERS_TOO = flags.DEFINE_bool("peers", False, "time flash-linear-attention and cuDNN in this run", flag_values=FLAGS)
MINUTES = flags.DEFINE_float("minutes", None, "begin no case after this many", flag_values=FLAGS)

TOKENS = ("4,8192,16,128", "1,65536,16,128", "8,2048,16,128", "4,8192,32,64")
STEPS = ("64,1,16,128", "8,1,16,128", "1,1,16,128")
TOO_LONG = 65536  # for attention by XLA
GATE = 2.0
COPY = {"NVIDIA H200": 4.25e12, "NVIDIA H100": 2.9e12}  # bytes per second, read and written
PASSES = ("forward", "forward_backward")
Shape = tuple[int, ...]


def cases() -> list[tuple[str, Shape, str]]:
    """Name, shape and implementation of all that was asked for, the kernels first."""
    found: list[list[tuple[str, Shape, str]]] = [[], [], []]
    for name, op in OPERATIONS.items():
        if not name.startswith(tuple(OPS.value or ("",))):
            continue
        for text in SHAPES.value or TOKENS + STEPS:
            shape = tuple(map(int, text.split(",")))
            if (shape[1] == 1) != bool(op.carried):
                continue
            if SHAPES.value is None and name.startswith("attention") and shape[1] >= TOO_LONG:
                print(f"left out: {name} at {text}, too slow for XLA; --shape={text} asks for it")
                continue
            found[0].append((name, shape, "mosaic_gpu"))
            found[1] += [(name, shape, baseline) for baseline in (*op.baselines, *op.examples) if BASELINE.value]
            found[2] += [(name, shape, "triton")] if TRITON.value and op.triton else []
    return [case for group in found for case in group]


@functools.cache
def times(op: Op, shape: Shape, implementation: str) -> dict[str, Time]:
    inputs = op.inputs(*shape, GATE)
    if implementation in op.examples:
        example = op.examples[implementation]
        return {"forward": timed(example.call, example.prepare(inputs))}
    call = forward(op, implementation=implementation)
    if op.carried:
        return {"forward": timed(call, inputs, carried=op.carried)}
    found = {"forward": timed(call, inputs)}
    both = gradients(call, op.constant)
    return found | {"forward_backward": timed(both, with_cotangent(call, inputs))}


def peer(op: Op, shape: Shape, *, same_run: bool) -> dict[str, Any]:
    """The fields of a row that tell what a peer takes."""
    name = op.peers[0] if op.peers else None
    figures, source = bench_peers.recorded(op.peers, shape), os.path.basename(bench_peers.RECORDED)
    if same_run and name is not None:
        source = "same run"
        if "cudnn" in op.baselines:
            alone, both = times(op, shape, "cudnn").values()
            figures = alone.milliseconds, both.milliseconds
        else:
            figures = bench_peers.milliseconds(name.removeprefix("fla."), shape)
    fields = dict(zip((f"peer_{part}_ms" for part in PASSES), figures, strict=True))
    return {"peer": name, **fields, "peer_source": source if any(figures) else None}


def floor(done: Work, device: Any) -> float | None:
    """Milliseconds; None where the device is not known."""
    copy = next((rate for kind, rate in COPY.items() if device.device_kind.startswith(kind)), memory_bandwidth(device))
    peak = peak_flops(device)
    return None if copy is None or peak is None else 1e3 * max(done.moved / copy, done.products / peak)


def measured(name: str, shape: Shape, implementation: str) -> dict[str, Any]:
    op, device = OPERATIONS[name], jax.devices()[0]
    found = None
    if implementation in ("mosaic_gpu", "triton"):
        found = errors(op, implementation, shape[3])
    elif implementation in op.examples:
        found = error_of_example(op, implementation, shape[3])
    row: dict[str, Any] = {
        "op": name,
        "shape": ",".join(map(str, shape)),
        "implementation": implementation,
        "device": device.device_kind,
        "errors": found,
    }
    done = work(op, jax.eval_shape(lambda: op.inputs(*shape, GATE)))
    for part, taken in times(op, shape, implementation).items():
        least = floor(done[part], device)
        row |= {
            f"{part}_ms": taken.milliseconds,
            f"{part}_spread": taken.spread,
            f"{part}_TBps": done[part].moved / taken.milliseconds / 1e9,
            f"{part}_TFLOPs": done[part].products / taken.milliseconds / 1e9,
            f"{part}_floor_ms": least,
            f"{part}_share_of_floor": None if least is None else least / taken.milliseconds,
            f"{part}_first_call_s": taken.first_call,
        }
    return row


def show_head() -> None:
    print(
        f"{'op':30}{'B,T,H,D':>15}{'':>12}{'':>10}{'ms':>9}{'peer':>9}{'spread':>8}{'TB/s':>7}{'TFLOP/s':>9}"
        f"{'floor':>8}{'share':>7}{'first s':>9}  errors"
    )


def show(row: dict[str, Any]) -> None:
    number = lambda x, form: "" if x is None else format(x, form)  # noqa: E731
    star = "" if row["peer_source"] == "same run" else "*"
    for part, label in zip(PASSES, ("step" if "step" in row["op"] else "forward", "+backward"), strict=True):
        if f"{part}_ms" not in row:
            continue
        theirs = row[f"peer_{part}_ms"]
        tail = " ".join(f"{kind} {x:.1e}" for kind, x in (row["errors"] or {}).items()) if part == "forward" else ""
        print(
            f"{row['op']:30}{row['shape']:>15}{row['implementation']:>12}{label:>10}{row[f'{part}_ms']:9.4f}"
            f"{'' if theirs is None else f'{theirs:.3f}{star}':>9}{100 * row[f'{part}_spread']:7.1f}%"
            f"{row[f'{part}_TBps']:7.2f}{row[f'{part}_TFLOPs']:9.1f}{number(row[f'{part}_floor_ms'], '.4f'):>8}"
            f"{number(row[f'{part}_share_of_floor'], '.1%'):>7}{row[f'{part}_first_call_s']:9.1f}  {tail}",
            flush=True,
        )


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    """Bars of ours and of the peer, a mark at the floor: a panel for each pass, milliseconds on a logarithmic axis."""
    figure = Figure(figsize=(12, 0.5 * len(rows) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    for axes, part in zip(panels, PASSES, strict=True):
        value = lambda row, key: row.get(key) or float("nan")  # noqa: E731
        axes.barh([y - 0.2 for y in places], [value(row, f"{part}_ms") for row in rows], 0.4, label="ours")
        axes.barh([y + 0.2 for y in places], [value(row, f"peer_{part}_ms") for row in rows], 0.4, label="peer")
        floors = [value(row, f"{part}_floor_ms") for row in rows]
        axes.plot(floors, [y - 0.2 for y in places], "k|", label="floor", markersize=12)
        names = [f"{row['op']}\n{row['shape']}, {row['implementation']}" for row in rows]
        axes.set(xlabel=f"{part.replace('_', ' and ')}, ms", xscale="log", yticks=list(places), yticklabels=names)
        axes.tick_params(axis="y", labelsize=7)
    panels[0].invert_yaxis()
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    if "--help" in sys.argv:
        print(__doc__, FLAGS.get_help())
        return 0
    try:
        FLAGS(sys.argv)
    except flags.Error as error:
        raise SystemExit(f"bench_ops: {error}; --help shows all flags") from None
    if PEERS_TOO.value:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when JAX first looks for devices
        absent = bench_peers.missing()
        if absent:
            raise SystemExit(f"--peers needs packages that are not installed: {absent}")
    only_on_a_gpu("bench_ops")
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16; ms; *: recorded on an H200")
    wanted = cases()
    show_head()
    for at, (name, shape, implementation) in enumerate(wanted):
        if MINUTES.value is not None and time.perf_counter() - began > 60 * MINUTES.value:
            print(f"{MINUTES.value:g} minutes are over; not begun: {len(wanted) - at} of {len(wanted)} cases")
            break
        label = f"{name}, {','.join(map(str, shape))}, {implementation}"
        try:
            row = measured(name, shape, implementation)
            rows.append(row | peers_of(label, OPERATIONS[name], shape, failures))
            show(rows[-1])
        except Exception as error:
            failures.append(failed(label, error))
        table = os.path.join(OUTPUT.value, "bench_ops.json")
        write_report(table, "experiments.bench_ops", rows, failures=failures)
    if rows:
        plot(os.path.join(OUTPUT.value, "bench_ops.png"), rows)
    print(f"{len(rows)} cases, {len(failures)} failures, {time.perf_counter() - began:.0f} s; {OUTPUT.value}")
    return int(bool(failures))


def peers_of(label: str, op: Op, shape: Shape, failures: list[str]) -> dict[str, Any]:
    """`peer` as asked for, or what was recorded where that fails."""
    try:
        return peer(op, shape, same_run=PEERS_TOO.value)
    except Exception as error:
        failures.append(failed(f"peer of {label}", error))
        return peer(op, shape, same_run=False)


def failed(label: str, error: Exception) -> str:
    line = f"FAILED {label}: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    print(line, flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main())
