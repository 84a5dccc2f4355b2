"""Softmax attention with grouped key heads, rotary positions, an optional window, learned sinks and query-key norms."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.heads import Heads
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.shared_keys import SharedKeys
from effattn_jax.sparse import KVCache, init_cache
from effattn_jax.sparse.cache import append
from effattn_jax.sparse.readable import Readable, Row
from effattn_jax.typing import Array, Float, Hidden, Positions, SegmentIds


class Attention(Heads):
    """softmax(scale * rope(norm(q)) rope(norm(k))^T + mask) v, with H query heads that share G key/value heads.

    Window: each token sees the last `window` tokens, itself included (Mistral, arXiv:2310.06825). Sinks: one learned
    logit per head in the denominator (gpt-oss).

    Args:
      dim, heads, kv_heads, head_dim, qk_norm, rope_theta, rope_fraction, rope_scaling, bias, out_bias, norm_eps, dtype:
        see `Heads`.
      scale: of the scores; None is K^-1/2.
      gate: the output is multiplied by sigmoid(W_gate x), channel by channel, before its projection (Qwen3-Next).
      logits_soft_cap: c, the scores are c tanh(scores / c) (Gemma 2).
      own_keys: False: it reads the keys and values of a layer below, see `with_keys`, and has no state.
      cache_dtype: "int8" rounds the keys and values of a state, see `init_cache`; None keeps them as they are computed.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int | None = None,
        sinks: bool = False,
        scale: float | None = None,
        gate: bool = False,
        logits_soft_cap: float | None = None,
        own_keys: bool = True,
        cache_dtype: str | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **heads: Any,
    ):
        super().__init__(dim, own_keys=own_keys, rngs=rngs, **heads)
        if window is not None and window < 1:
            checks.fail("window", window, "None or at least 1 key")
        if cache_dtype not in (None, "int8"):
            checks.fail("cache_dtype", repr(cache_dtype), "None or 'int8'")
        self.own_keys, self.cache_dtype = own_keys, cache_dtype
        self.window, self.scale, self.logits_soft_cap = window, scale, logits_soft_cap
        self.implementation = implementation
        into: dict[str, Any] = {"bias": self.q_proj.bias is not None, "dtype": self.dtype, "rngs": rngs}
        size = self.heads * self.head_dim
        self.gate_proj = Projection(dim, size, ("embed", "heads"), **into) if gate else None
        self.sinks = nnx.Param(jnp.zeros((self.heads,), jnp.float32), axes=("heads",)) if sinks else None

    def init_state(self, batch_size: int, max_length: int) -> KVCache | tuple[()]:
        """A cache of `max_length` tokens; with a window, a ring of that many. Nothing without keys of its own."""
        if not self.own_keys:
            return ()
        capacity = max_length if self.window is None else self.window
        dtype = jnp.int8 if self.cache_dtype == "int8" else self.dtype
        return init_cache(batch_size, capacity, self.kv_heads, self.head_dim, dtype=dtype)

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a causal row."""
        keys = (length + 1) / 2 if self.window is None else min(self.window, (length + 1) / 2)
        return 4 * self.heads * self.head_dim * keys

    def __call__(
        self,
        x: Hidden,
        state: KVCache | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, KVCache | None]:
        """`positions` [B, T] turn queries and keys; None counts on from the tokens in the cache."""
        y, state, _ = self.with_keys(x, state, None, segment_ids=segment_ids, positions=positions)
        return y, state

    def with_keys(
        self,
        x: Hidden,
        state: Any,
        given: SharedKeys | None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Any, SharedKeys]:
        """The same, and what it reads, which a layer above without keys of its own is `given`."""
        if self.own_keys:
            given, state = self._own(x, state, segment_ids, positions)
        elif given is None:
            checks.fail("own_keys", False, "keys of a layer below: `kv_from` in a pattern, or `with_keys`")
        out = given.readable.read(
            self.rotated(self.queries(x), given.positions),
            window=self.window,
            sinks=None if self.sinks is None else self.sinks[...],
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            implementation=self.implementation,
        )
        return self.joined(self.gated(out, x)), state, given

    def _own(
        self, x: Hidden, state: Any, segment_ids: SegmentIds | None, positions: Positions | None
    ) -> tuple[SharedKeys, Any]:
        if positions is None:
            positions = (0 if state is None else state.length) + jnp.arange(x.shape[1])[None]
        k, v = self.rotated(self.keys(x), positions), self.values(x)
        readable: Readable = Row(k, v, segment_ids)
        if state is not None:
            readable, state = append(k, v, state, window=self.window, segment_ids=segment_ids)
        return SharedKeys(readable, positions), state

    def gated(self, out: Float[Array, "B T H V"], x: Hidden) -> Float[Array, "B T H V"]:
        return out if self.gate_proj is None else out * jax.nn.sigmoid(self.by_head(self.gate_proj(x)))
