"""Loads a checkpoint onto a mesh of eight emulated devices and prints, as JSON, what the host held at most.

    python -m tests.pretrained.memory_of_loading DIRECTORY

Memory of the emulated devices is the host's too, but only what Python and numpy allocate is traced. The second load
counts: the first has compiled.
"""

import gc
import json
import sys
import tracemalloc

import jax

jax.config.update("jax_num_cpu_devices", 8)

from effattn_jax.pretrained import load  # noqa: E402


def main(directory: str) -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    load(directory, mesh=mesh)
    gc.collect()
    tracemalloc.start()
    model = load(directory, mesh=mesh)
    peak = tracemalloc.get_traced_memory()[1]
    leaves = jax.tree.leaves(model)
    on_first = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards if shard.device.id == 0)
    print(json.dumps({"peak": peak, "parameters": sum(x.nbytes for x in leaves), "on_first_device": on_first}))


if __name__ == "__main__":
    main(sys.argv[1])
