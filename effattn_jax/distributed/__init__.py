"""Many devices and many machines: joining the processes of a run."""

from effattn_jax.distributed.runtime import initialize

__all__ = ["initialize"]
