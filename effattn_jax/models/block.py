"""A block of the residual stream: a mixer over tokens, then a feed-forward layer over channels."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import MIXERS, RMSNorm, SwiGLU
from effattn_jax.typing import Hidden, Positions, SegmentIds


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); without the second half where `mlp_dim` is 0."""

    def __init__(
        self,
        dim: int,
        mixer: str,
        options: Mapping[str, Any],
        *,
        mlp_dim: int,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if mixer not in MIXERS:
            checks.fail("mixer", repr(mixer), f"one of {', '.join(sorted(MIXERS))}")
        self.norm = RMSNorm(dim, eps=norm_eps, dtype=dtype)
        try:
            self.mixer = MIXERS[mixer](dim, **options, dtype=dtype, rngs=rngs)
        except TypeError as error:  # an option the mixer does not have
            raise checks.ArgumentError(f"mixer {mixer!r}: {error}") from error
        self.mlp_norm = RMSNorm(dim, eps=norm_eps, dtype=dtype) if mlp_dim else None
        self.mlp = SwiGLU(dim, mlp_dim, dtype=dtype, rngs=rngs) if mlp_dim else None

    def init_state(self, batch_size: int, max_length: int) -> Any:
        return self.mixer.init_state(batch_size, max_length)

    def __call__(
        self,
        x: Hidden,
        state: Any = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Any]:
        y, state = self.mixer(self.norm(x), state, segment_ids=segment_ids, positions=positions)
        x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state
