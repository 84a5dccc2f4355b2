"""The operations that `bench_ops` times: their inputs and calls, what they must move and multiply, their errors.

Errors are ratios to the oracle in float32 on the same rounded inputs: rms(oracle - x) / rms(oracle).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import linear
from effattn_jax.sparse import attention

Arrays = dict[str, jax.Array]
Hard = Iterator[tuple[dict[str, Any], dict[str, Arrays]]]  # options of the call, and inputs by label

LIMITS = {"out": 0.005, "state": 1e-5, "gradients": 0.008, "gates": 0.02}
WINDOW = 1024
RECURRENCE = {"form": "recurrent", "implementation": "xla"}
DENSE = {"implementation": "dense"}


class Example(NamedTuple):
    prepare: Callable[[Arrays], Arrays]  # of the inputs, not timed
    call: Callable[[Arrays], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    call: Callable[..., Any]  # (**inputs, implementation) -> out, or out and the final state
    inputs: Callable[..., Arrays]  # (B, T, H, D, gate) -> arrays; the gate is the mean of its logit
    products: Callable[..., float]  # (B, T, H, D) -> FLOP of the forward pass
    hard: Callable[["Op", int], Hard]  # (op, D)
    oracle: Mapping[str, Any]  # options of the call
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gates: tuple[str, ...] = ("log_decay",)  # inputs whose gradients have the limit of gates
    constant: tuple[str, ...] = ()  # inputs without a gradient
    with_backward: float = 3.0  # products forward and backward over those of the forward pass
    carried: str | None = None  # the state of a step, which has no backward pass here
    baselines: tuple[str, ...] = ("xla",)
    triton: bool = False
    peers: tuple[str, ...] = ()  # names in peers_h200.json, the best first
    examples: Mapping[str, Example] = dataclasses.field(default_factory=dict)  # kernels of others, forward alone


def qkv(batch: int, length: int, heads: int, dim: int, gate: float = 0.0) -> Arrays:
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key: jax.random.normal(key, (batch, length, heads, dim), jnp.bfloat16)  # noqa: E731
    return dict(zip("qkv", map(draw, keys), strict=True))


def per_token(batch: int, length: int, heads: int, dim: int, gate: float) -> Arrays:
    noise = jax.random.normal(jax.random.key(1), (batch, length, heads))
    return qkv(batch, length, heads, dim) | {"log_decay": jax.nn.log_sigmoid(gate + noise)}


def per_head(batch: int, length: int, heads: int, dim: int, gate: float) -> Arrays:
    slopes = jax.nn.log_sigmoid(gate + jnp.linspace(-2.0, 2.0, heads))
    return qkv(batch, length, heads, dim) | {"log_decay": slopes}


def per_channel(batch: int, length: int, heads: int, dim: int, gate: float) -> Arrays:
    noise = jax.random.normal(jax.random.key(1), (batch, length, heads, dim))
    return qkv(batch, length, heads, dim) | {"log_decay": jax.nn.log_sigmoid(gate + noise)}


def with_bonus(batch: int, length: int, heads: int, dim: int, gate: float) -> Arrays:
    bonus = jax.random.normal(jax.random.key(3), (heads, dim))
    return per_channel(batch, length, heads, dim, gate) | {"bonus": bonus}


def with_state(inputs: Callable[..., Arrays]) -> Callable[..., Arrays]:
    def one_token(batch: int, length: int, heads: int, dim: int, gate: float) -> Arrays:
        state = jax.random.normal(jax.random.key(4), (batch, heads, dim, dim))
        return inputs(batch, length, heads, dim, gate) | {"initial_state": state}

    return one_token


def chunked(chunk: int) -> Callable[..., float]:
    """Half of the scores of a chunk, twice, and the state written and read."""
    return lambda batch, length, heads, dim: float(batch * length * heads * (2 * chunk * dim + 4 * dim * dim))


def visible_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key that a causal row of attention has to make."""
    window = min(window or length, length)
    return window * (window + 1) // 2 + (length - window) * window


def softmax(window: int | None) -> Callable[..., float]:
    return lambda batch, length, heads, dim: 4.0 * batch * heads * dim * visible_pairs(length, window)


def hard_gates(op: Op, dim: int) -> Hard:
    """Weak, mild and strong gates, for one long row and for many short ones."""
    rows = [(rows, length, gate) for rows, length in ((1, 1024), (66, 200)) for gate in (6.0, 2.0, -4.0)]
    yield {}, {f"{b} x {t}, gate {gate}": op.inputs(b, t, 2, dim, gate) for b, t, gate in rows}


def hard_steps(op: Op, dim: int) -> Hard:
    yield {}, {f"gate {gate}": op.inputs(3, 1, 4, dim, gate) for gate in (6.0, 2.0, -4.0)}


def hard_masks(op: Op, dim: int) -> Hard:
    """A row that fills no tile, with grouped heads; then sinks and documents with padding between them too."""
    options = {"window": 200} if op.options else {}
    inputs = op.inputs(1, 1000, 4, dim)
    inputs |= {name: inputs[name][:, :, :2] for name in "kv"}
    yield options, {"1000 tokens": inputs}
    ids = np.repeat(np.array([-1, 0, 1, 2, -1, 3, 4, -1], np.int32), [3, 200, 1, 300, 20, 130, 336, 10])[None]
    yield options | {"segment_ids": ids}, {"sinks, documents": inputs | {"sinks": jnp.asarray([-2.0, 0.0, 1.0, 5.0])}}


def halves(inputs: Arrays) -> Arrays:
    """In float16, which JAX's example takes, with queries scaled, which it does not."""
    scaled = inputs | {"q": inputs["q"].astype(jnp.float32) * inputs["q"].shape[-1] ** -0.5}
    return {name: x.astype(jnp.float16) for name, x in scaled.items()}


def jax_example(inputs: Arrays) -> jax.Array:
    """Causal attention by the example for Mosaic GPU that comes with JAX, at its best sizes."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    return attention_mgpu.attention(*(inputs[name] for name in "qkv"), config)


SCALAR = Op(linear.scalar_decay, per_token, chunked(64), hard_gates, RECURRENCE, triton=True, peers=("fla.simple_gla",))
VECTOR = Op(linear.vector_decay, per_channel, chunked(64), hard_gates, RECURRENCE, peers=("fla.gla",))
SOFTMAX = Op(
    attention,
    qkv,
    softmax(None),
    hard_masks,
    DENSE,
    gates=("sinks",),
    with_backward=3.5,
    baselines=("xla", "cudnn"),
    peers=("jax.cudnn_attention(causal)", "sdpa.cudnn"),
    examples={"jax_example": Example(halves, jax_example)},
)
OPERATIONS = {
    "scalar_decay, gate per token": SCALAR,
    "scalar_decay, gate per head": dataclasses.replace(
        SCALAR, inputs=per_head, constant=("log_decay",), peers=("fla.retention",)
    ),
    "vector_decay": VECTOR,
    "vector_decay, bonus": dataclasses.replace(
        VECTOR, inputs=with_bonus, gates=("log_decay", "bonus"), peers=("fla.rwkv6",)
    ),
    "attention, causal": SOFTMAX,
    f"attention, window {WINDOW}": dataclasses.replace(
        SOFTMAX,
        options={"window": WINDOW},
        products=softmax(WINDOW),
        peers=(f"jax.cudnn_attention(window={WINDOW})",),
        examples={},
    ),
    **{
        f"step, {name}": dataclasses.replace(
            op,
            inputs=with_state(op.inputs),
            products=lambda batch, length, heads, dim: 4.0 * batch * heads * dim * dim,
            hard=hard_steps,
            carried="initial_state",
            triton=False,
            peers=(),
        )
        for name, op in (("scalar_decay", SCALAR), ("vector_decay", VECTOR))
    },
}


def forward(op: Op, **options: Any) -> Callable[[Arrays], Any]:
    """The call as it is timed: its output, and the state only where the next step takes it."""
    run = lambda inputs: op.call(**inputs, **{**op.options, **options})  # noqa: E731
    return run if op.carried else lambda inputs: jax.tree.leaves(run(inputs))[0]


def gradients(call: Callable[[Arrays], Any], constant: tuple[str, ...] = ()) -> Callable[[Arrays], Any]:
    """Of the inputs and the cotangent "d_out": the output, and the gradients by name of all that is not constant."""

    def both(inputs: Arrays) -> tuple[jax.Array, Arrays]:
        fixed = {name: inputs[name] for name in constant}
        free = {name: x for name, x in inputs.items() if name not in (*constant, "d_out")}
        out, pull = jax.vjp(lambda free: jax.tree.leaves(call(free | fixed))[0], free)
        return out, pull(inputs["d_out"].astype(out.dtype))[0]

    return both


def with_cotangent(call: Callable[[Arrays], Any], inputs: Arrays) -> Arrays:
    """A random "d_out" beside the inputs, so that no pass has to draw it."""
    out = jax.tree.leaves(jax.eval_shape(call, inputs))[0]
    return inputs | {"d_out": jax.random.normal(jax.random.key(2), out.shape, jnp.bfloat16)}


class Work(NamedTuple):
    moved: int  # bytes, each array once a pass
    products: float  # FLOP


def work(op: Op, inputs: Arrays) -> dict[str, Work]:
    """Of the forward pass, and of it with the backward pass, which reads the inputs again and what a gradient needs."""
    size = lambda x: x.size * x.dtype.itemsize  # noqa: E731
    products = op.products(*inputs["q"].shape)
    if op.carried:
        return {"forward": Work(2 * size(inputs[op.carried]), products)}
    out = size(jax.eval_shape(forward(op, implementation="xla"), inputs))
    read = sum(map(size, inputs.values()))
    written = sum(size(x) for name, x in inputs.items() if name not in op.constant)
    return {
        "forward": Work(read + out, products),
        "forward_backward": Work(2 * (read + out) + written, op.with_backward * products),
    }


@functools.cache
def errors(op: Op, implementation: str, dim: int) -> dict[str, float]:
    """The largest of each kind over the hard inputs.

    Raises:
      ValueError: one above its limit.
    """
    worst: dict[str, float] = {}
    for options, cases in op.hard(op, dim):
        calls = [forward(op, **options, **named) for named in (op.oracle, {"implementation": implementation})]
        oracle, call = (jax.jit(run if op.carried else gradients(run, op.constant)) for run in calls)
        for label, inputs in cases.items():
            if not op.carried:
                inputs = with_cotangent(calls[0], inputs)
            want, got = oracle({name: x.astype(jnp.float32) for name, x in inputs.items()}), call(inputs)
            for kind, a, b in results_by_kind(op, want, got):
                found = ratio(a, b)
                if not found <= LIMITS[kind]:
                    raise ValueError(f"{label}, {kind}: error {found:.1e}; limit {LIMITS[kind]}")
                worst[kind] = max(worst.get(kind, 0.0), found)
    return worst


@functools.cache
def error_of_example(op: Op, name: str, dim: int) -> dict[str, float]:
    """Of its output, for two rows of 1024 tokens.

    Raises:
      ValueError: above the limit.
    """
    inputs, example = op.inputs(2, 1024, 4, dim, 0.0), op.examples[name]
    want = forward(op, **op.oracle)({name: x.astype(jnp.float32) for name, x in inputs.items()})
    found = ratio(want, jax.jit(example.call)(example.prepare(inputs)))
    if not found <= LIMITS["out"]:
        raise ValueError(f"out: error {found:.1e}; limit {LIMITS['out']}")
    return {"out": found}


def results_by_kind(op: Op, want: Any, got: Any) -> Iterator[tuple[str, jax.Array, jax.Array]]:
    yield "out", want[0], got[0]
    if op.carried:
        yield "state", want[1], got[1]
        return
    for name, x in want[1].items():
        yield "gates" if name in op.gates else "gradients", x, got[1][name]


def ratio(want: jax.Array, x: jax.Array) -> float:
    rms = lambda a: jnp.sqrt(jnp.mean(a**2))  # noqa: E731
    return float(rms(want - x.astype(jnp.float32)) / (rms(want) + 1e-8))
