"""Efficient attention in JAX: one contract for every mechanism, as pure functions and Flax modules."""
