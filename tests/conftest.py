"""Eight emulated CPU devices for every test: what a mesh does can be proved without an accelerator."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
