"""Kernels in plain Triton, called through `jax_triton`: for GPUs before Hopper and for those of AMD."""
