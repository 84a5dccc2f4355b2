"""A block of the residual stream: a mixer over tokens, then a feed-forward layer over channels."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import FEED_FORWARDS, MIXERS
from effattn_jax.layers.norms import NORMS
from effattn_jax.models.handed import Handed
from effattn_jax.models.residual import Residual
from effattn_jax.typing import Array, Hidden, Positions, SegmentIds


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); without the second half where `mlp_dim` is 0.

    Layers whose constructor has `layer_index` and `layer_count` are told their place in the stack. The state is the
    mixer's, or a pair where the feed-forward layer has one too.

    Args:
      mixer, options: a name of `effattn_jax.layers.MIXERS` and the options of its layer.
      mlp_dim, mlp, mlp_options: size, name in `FEED_FORWARDS` and options of the feed-forward layer.
      norm: a name of `effattn_jax.layers.norms.NORMS`.
      post_norm: norms after the mixer and the feed-forward layer too, before they join the stream (Gemma 2 and 3).
      residual, mlp_residual: how the two join the stream, see `Residual`.
      kv_from: the mixer has no keys and values of its own: in a stack it reads those of the layer of that name.
      kv_name: the name under which others read this one's.
      bounds_name: the mixer has no lower bounds of its own: a stack hands it those of this name.
    """

    def __init__(
        self,
        dim: int,
        mixer: str,
        options: Mapping[str, Any],
        *,
        mlp_dim: int,
        mlp: str = "swiglu",
        mlp_options: Mapping[str, Any] | None = None,
        norm: str = "rms",
        post_norm: bool = False,
        residual: Residual | Mapping[str, Any] | None = None,
        mlp_residual: Residual | Mapping[str, Any] | None = None,
        kv_from: str | None = None,
        kv_name: str | None = None,
        bounds_name: str | None = None,
        layer_index: int | Array = 0,
        layer_count: int = 1,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        for argument, name, known in (("mixer", mixer, MIXERS), ("mlp", mlp, FEED_FORWARDS), ("norm", norm, NORMS)):
            if name not in known:
                checks.fail(argument, repr(name), f"one of {', '.join(sorted(known))}")
        self.kv_from, self.kv_name, self.bounds_name = kv_from, kv_name, bounds_name
        options = options if kv_from is None else {**options, "own_keys": False}
        options = options if bounds_name is None else {**options, "own_bounds": False}
        place = {"layer_index": layer_index, "layer_count": layer_count}
        make_norm = lambda wanted: NORMS[norm](dim, eps=norm_eps, dtype=dtype) if wanted else None  # noqa: E731
        self.norm: Any = make_norm(True)
        self.mixer = _layer("mixer", mixer, MIXERS[mixer], (dim,), place, options, dtype, rngs)
        self.post_norm = make_norm(post_norm)
        self.mlp_norm = make_norm(mlp_dim)
        feed_forward, mlp_options = FEED_FORWARDS[mlp], mlp_options or {}
        self.mlp: Any = (
            _layer("mlp", mlp, feed_forward, (dim, mlp_dim), place, mlp_options, dtype, rngs) if mlp_dim else None
        )
        self.mlp_post_norm = make_norm(post_norm and mlp_dim)
        self.residual, self.mlp_residual = Residual.of(residual), Residual.of(mlp_residual)

    def init_state(self, batch_size: int, max_length: int) -> Any:
        state = self.mixer.init_state(batch_size, max_length)
        if self.mlp is None or not hasattr(self.mlp, "init_state"):
            return state
        return state, self.mlp.init_state(batch_size, max_length)

    def __call__(
        self,
        x: Hidden,
        state: Any = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Any]:
        x, state, _ = self.in_stack(x, state, Handed(), segment_ids=segment_ids, positions=positions)
        return x, state

    def in_stack(
        self,
        x: Hidden,
        state: Any,
        handed: Handed,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Any, Handed]:
        """The block among others, with what those below and the stack hand to it."""
        where = {"segment_ids": segment_ids, "positions": positions}
        stateful = self.mlp is not None and hasattr(self.mlp, "init_state")
        mixer_state, mlp_state = state if stateful and state is not None else (state, None)
        normed = self.norm(x)
        first, keys = handed.first, None
        if hasattr(self.mixer, "with_first_value"):
            y, mixer_state, first = self.mixer.with_first_value(normed, mixer_state, first, **where)
        elif self.kv_from is not None or self.kv_name is not None:
            y, mixer_state, keys = self.mixer.with_keys(normed, mixer_state, handed.keys, **where)
        elif self.bounds_name is not None:
            y, mixer_state = self.mixer.with_bounds(normed, mixer_state, handed.bounds, **where)
        else:
            y, mixer_state = self.mixer(normed, mixer_state, **where)
        handed = Handed(first, keys if self.kv_name is not None else None)
        x = self.residual(x, normed, y if self.post_norm is None else self.post_norm(y))
        if self.mlp is None or self.mlp_norm is None:
            return x, mixer_state, handed
        normed = self.mlp_norm(x)
        if stateful:
            y, mlp_state = self.mlp(normed, mlp_state, **where)
            mixer_state = None if state is None else (mixer_state, mlp_state)
        else:
            y = self.mlp(normed)
        return (
            self.mlp_residual(x, normed, y if self.mlp_post_norm is None else self.mlp_post_norm(y)),
            mixer_state,
            handed,
        )


def _layer(
    kind: str,
    name: str,
    layer: Any,
    sizes: tuple[int, ...],
    place: Mapping[str, Any],
    options: Mapping[str, Any],
    dtype: Any,
    rngs: nnx.Rngs,
) -> Any:
    known = inspect.signature(layer.__init__).parameters
    place = {key: value for key, value in place.items() if key in known}
    try:
        return layer(*sizes, **place | dict(options), dtype=dtype, rngs=rngs)
    except TypeError as error:  # an option the layer does not have
        raise checks.ArgumentError(f"{kind} {name!r}: {error}") from error
