"""Pallas kernels for GPUs (Mosaic GPU) and TPUs (Mosaic TPU): raw functions on arrays that know nothing of Flax."""
