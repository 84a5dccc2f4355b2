"""Do the TPU kernels compile, and what do they take? Ahead of time for four generations, on a machine without any.

    make tpu-compile        # brings libtpu, which is then not importable: JAX would look for a TPU
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_LIBRARY_PATH=.venv/libtpu/libtpu/libtpu.so \
        python -m experiments.tpu_compile [--all] [mechanism ...]

compiles the backward pass, which has the forward one before it, of the first shape for all chips and of every other
shape for one chip, in turn; with --all both passes of everything for every chip. It prints, per mechanism, shape, chip
and pass: seconds to compile, the VMEM of each kernel, forward ones first (0: XLA put all there by itself), HBM of the
arguments, the outputs and what is temporary. It says nothing of speed or of numbers: tests/pallas_kernels runs the
kernels in interpret mode.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from effattn_jax.sparse.splash import splash
from pallas_kernels.mosaic_tpu.scalar_decay import scalar_decay
from pallas_kernels.mosaic_tpu.step import step
from pallas_kernels.mosaic_tpu.vector_decay import vector_decay

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SHAPES = {  # B, T, H, heads of q and k, K, V, dtype
    "H16 D128": (4, 8192, 16, 16, 128, 128, jnp.bfloat16),
    "H32 D64": (4, 8192, 32, 32, 64, 64, jnp.bfloat16),
    "H16/2 D128": (4, 8192, 16, 2, 128, 128, jnp.bfloat16),
    "H8 D256": (4, 8192, 8, 8, 256, 256, jnp.bfloat16),
    "H8 D256 f32": (1, 8192, 8, 8, 256, 256, jnp.float32),
    "ragged": (1, 8000, 4, 4, 100, 50, jnp.bfloat16),
}
MECHANISMS: dict[str, Callable[..., Any]] = {
    "scalar_decay": scalar_decay,
    "vector_decay": vector_decay,
    "vector_decay_bonus": lambda *inputs, scale: vector_decay(*inputs, bonus=inputs[3][0, 0], scale=scale),
    "scalar_decay_step": step,
    "vector_decay_step": step,
    "vector_decay_bonus_step": lambda *inputs, scale: step(*inputs, bonus=inputs[3][0, 0], scale=scale),
    "attention": lambda q, k, v, g, state, ids, scale: windowed(q, k, v, ids, None, scale),
    "attention_window": lambda q, k, v, g, state, ids, scale: windowed(q, k, v, ids, 1024, scale),
}


def windowed(q: Any, k: Any, v: Any, ids: Any, window: int | None, scale: float) -> Any:
    """Causal softmax attention of packed rows."""
    options: dict[str, Any] = {"offset": 0, "causal": True, "sinks": None, "logits_soft_cap": None, "return_lse": False}
    return splash(q, k, v, window=window, query_segments=ids, key_segments=ids, scale=scale, interpret=False, **options)


def arguments(mechanism: str, shape: tuple[Any, ...]) -> list[jax.ShapeDtypeStruct]:
    """q, k, v, log_decay, initial_state and segment_ids."""
    batch, length, heads, key_heads, key_dim, value_dim, dtype = shape
    if mechanism.endswith("step"):
        batch, length = 16, 1  # of 64, XLA takes a minute to plan the copies of the states
    keys = jax.ShapeDtypeStruct((batch, length, key_heads, key_dim), dtype)
    value_heads = key_heads if mechanism.startswith("attention") else heads
    values = jax.ShapeDtypeStruct((batch, length, value_heads, value_dim), dtype)
    channels = (key_dim,) if mechanism.startswith("vector") else ()
    gates = jax.ShapeDtypeStruct((batch, length, heads, *channels), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), jnp.float32)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return [keys, keys, values, gates, state, ids]


def forward_and_backward(kernel: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    def forward(*inputs: jax.Array) -> Any:
        return kernel(*inputs, scale=0.1)

    def backward(*inputs: jax.Array) -> Any:
        (out, state), pull = jax.vjp(forward, *inputs[:-1], inputs[-1])
        return out, state, pull((out, state))[:-1]

    return {"forward": forward, "backward": backward}


def vmem(program: str) -> list[int]:
    """Bytes of the largest scoped allocation of each kernel of a compiled program."""
    kernels = program.split('custom_call_target="tpu_custom_call"')[1:]
    configs = [re.search(r'"used_scoped_memory_configs":\[(.*?)\]', kernel) for kernel in kernels]
    sizes = [re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', config[1]) for config in configs if config]
    return [max((int(size) for size in found), default=0) for found in sizes]


class Case(NamedTuple):
    mechanism: str
    label: str
    chip: str
    name: str  # of the pass


def cases(mechanisms: list[str], everything: bool) -> Iterator[Case]:
    for mechanism in mechanisms:
        for number, label in enumerate(SHAPES):
            if mechanism.endswith("step") and label == "ragged":  # refused: its state would have to be filled up
                continue
            chips = list(TOPOLOGIES)
            for chip in chips if everything or number == 0 else [chips[number % len(chips)]]:
                passes = ("forward", "backward") if everything else ("backward",)
                yield from (Case(mechanism, label, chip, name) for name in passes)


def one_chip(topology: str) -> Mesh:
    return Mesh(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1], ("data",))


def report(meshes: dict[str, Mesh], case: Case) -> tuple[bool, str]:
    """Whether it compiles, and a line of figures or of the error."""
    title = f"{case.mechanism} {case.label:12s} {case.chip:5s} {case.name:8s}"
    mesh = meshes[case.chip]
    function = forward_and_backward(MECHANISMS[case.mechanism])[case.name]
    began = time.perf_counter()
    traced = jax.jit(function, in_shardings=NamedSharding(mesh, PartitionSpec()))
    try:
        with use_abstract_mesh(mesh.abstract_mesh):
            compiled = traced.lower(*arguments(case.mechanism, SHAPES[case.label])).compile()
    except Exception as error:
        return False, f"{title} FAILED {str(error)[:300]}"
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    assert memory is not None
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    hbm = " ".join(f"{size / 2**20:7.1f}" for size in sizes)
    scoped = " ".join(f"{size / 2**20:.2f}" for size in vmem(compiled.as_text() or ""))
    figures = f"{seconds:5.1f} s  VMEM {scoped} MiB  HBM arguments, outputs, temporary {hbm} MiB"
    return True, f"{title} {figures}"


def main(names: list[str]) -> int:
    """The number of failures."""
    mechanisms = [name for name in names if name != "--all"] or list(MECHANISMS)
    failures = 0
    meshes = {chip: one_chip(topology) for chip, topology in TOPOLOGIES.items()}  # two threads would load libtpu twice
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler is not Python
        for compiles, line in pool.map(partial(report, meshes), cases(mechanisms, "--all" in names)):
            failures += not compiles
            print(line, flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
