"""Joining the processes of a run through JAX's own multi-controller runtime."""

import os

import jax

from effattn_jax import checks

VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def initialize() -> None:
    """Make one runtime of all processes; call it before anything else touches JAX.

    On TPU pods, Slurm, Open MPI and Kubernetes jobs JAX finds the other processes by itself. Elsewhere each process is
    told by COORDINATOR_ADDRESS (host:port of the first), NUM_PROCESSES and PROCESS_ID.
    """
    given = [name for name in VARIABLES if name in os.environ]
    if not given:
        jax.distributed.initialize()
        return
    if len(given) < len(VARIABLES):
        checks.fail("environment", ", ".join(given), f"all of {', '.join(VARIABLES)}, or none")
    address, count, index = (os.environ[name] for name in VARIABLES)
    jax.distributed.initialize(address, num_processes=int(count), process_id=int(index))
