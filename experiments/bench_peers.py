"""What others' kernels take: flash-linear-attention on this GPU, or what was once recorded on an H200.

`python -m experiments.bench_ops --peers` times them; they need

    pip install torch==2.11.0 triton==3.6.0 fla-core==0.6.0 flash-linear-attention==0.6.0

Their kernels are tuned at their first call, half a minute to two minutes for each of an operation's passes. Where
Triton keeps what it found on disk, which this module asks for, other processes can do that before, all operations at
once:

    for op in simple_gla retention gla rwkv6; do
        python -m experiments.bench_peers $op 4,8192,16,128 1,65536,16,128 8,2048,16,128 4,8192,32,64 &
    done
    wait

calls each once, forward and backward, times nothing and prints the seconds. The processes share the GPU while they
tune, so now and then a configuration is kept that is not quite the fastest; without this, `bench_ops --peers` tunes
alone.

Times are of CUDA events around one call, the median of 30 after 5, with the cache emptied before each as the tuner
does. Gates of `gla` and `rwkv6` are in bfloat16, as its layers have them. Decay by constant gates is `retention`, which
has no gradient for them. Where the gated backward pass is refused because this Triton (before 3.7.1) miscompiles the
gate's gradient on Hopper, the refusal is switched off: the time then is that of a kernel whose gate gradient is wrong.
"""

import functools
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

RECORDED = os.path.join(os.path.dirname(__file__), "results", "peers_h200.json")
NAMES = ("simple_gla", "retention", "gla", "rwkv6")
PACKAGES = {"torch": "torch", "triton": "triton", "fla": "fla-core, flash-linear-attention"}
WARM_UP, REPETITIONS = 5, 30


def recorded(names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[float | None, float | None]:
    """Milliseconds forward, and with the backward pass, of the first of these peers that was timed at this shape."""
    with open(RECORDED) as file:
        rows = {(row["name"], *(row[x] for x in "BTHD")): row for row in json.load(file)["rows"]}
    found: dict[str, Any] = next((rows[name, *shape] for name in names if (name, *shape) in rows), {})
    return found.get("fwd_ms"), found.get("fwdbwd_ms")


def missing() -> str:
    """The packages that are not here, for a message; empty where all are."""
    return ", ".join(package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None)


@functools.cache
def milliseconds(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Of the operation by flash-linear-attention, forward and with the backward pass."""
    import torch

    forward, both = passes(name, shape)
    with torch.no_grad():
        alone = _median(forward)
    times = alone, _median(both)
    torch.cuda.empty_cache()
    return times


def passes(name: str, shape: tuple[int, ...]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The calls: forward, and forward with the backward pass for all inputs."""
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # read when a kernel is defined, on import
    if os.environ.get("TRITON_CACHE_DIR") == "":  # jax_triton's doing, with which Triton finds no place at all
        del os.environ["TRITON_CACHE_DIR"]
    import torch

    if name not in NAMES:
        raise ValueError(f"peer {name!r}; needs one of {', '.join(NAMES)}")
    call: Callable[..., Any] = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
    guarded: Any = importlib.import_module("fla.ops.common.chunk_o")
    if hasattr(guarded, "TRITON_ABOVE_3_7_1"):
        guarded.TRITON_ABOVE_3_7_1 = True  # the refusal, see above
    batch, length, heads, dim = shape
    torch.manual_seed(0)

    def draw(*sizes: int, dtype: Any = torch.bfloat16, logit: float | None = None) -> Any:
        x = torch.randn(*sizes, device="cuda")
        x = x if logit is None else torch.nn.functional.logsigmoid(x + logit)
        return x.to(dtype).requires_grad_()

    tokens = (batch, length, heads)
    inputs = [draw(*tokens, dim) for _ in "qkv"]
    if name == "simple_gla":
        inputs.append(draw(*tokens, dtype=torch.float32, logit=2.0))
    if name in ("gla", "rwkv6"):
        inputs.append(draw(*tokens, dim, logit=2.0))
    if name == "rwkv6":
        inputs.append(draw(heads, dim))
    cotangent = torch.randn(*tokens, dim, device="cuda", dtype=torch.bfloat16)

    def forward() -> Any:
        return call(*inputs)[0]

    def both() -> None:
        for x in inputs:
            x.grad = None
        forward().backward(cotangent)

    return forward, both


def _median(call: Callable[[], Any]) -> float:
    import torch

    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(WARM_UP):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPETITIONS)]
    for start, stop in events:
        cache.zero_()  # and gives the host time to get ahead
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def main(arguments: list[str]) -> int:
    absent = missing()
    if absent:
        print(f"peers need packages that are not installed: {absent}")
        return 1
    import torch

    if not torch.cuda.is_available():
        print("peers need an NVIDIA GPU; torch finds none")
        return 1
    name, *shapes = arguments
    for shape in shapes:
        for label, call in zip(
            ("forward", "with backward"), passes(name, tuple(map(int, shape.split(",")))), strict=True
        ):
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            print(f"{name} {shape} {label}: {time.perf_counter() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m experiments.bench_peers NAME B,T,H,D ...")
    sys.exit(main(sys.argv[1:]))
