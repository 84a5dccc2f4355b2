"""Softmax attention of a trained model, read sparsely: a prompt by one mechanism, what comes after it by another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.layers.attention import Attention
from effattn_jax.sparse.decoders import decoder_of
from effattn_jax.sparse.prefills import prefill_of
from effattn_jax.typing import Array, Hidden, Int, Positions, SegmentIds

LAYER = {"window": None, "sinks": False, "logits_soft_cap": None, "own_keys": True, "cache_dtype": None}
"""Options that a layer must have."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class EmptyState:
    """Of no token yet, and without arrays: the prompt decides what a cache holds."""

    batch_size: int
    max_length: int


class AttachedState(NamedTuple):
    """After a prompt."""

    cache: Any  # of the decoder
    length: Int[Array, ""]  # tokens so far


class AttachedAttention(Attention):
    """An `Attention` without a window whose rows are read by `prefill` and `decode`; the parameters are its own.

    Without a state `prefill` reads the row. With one the first call takes the whole prompt: `prefill` reads it, and
    `decode` keeps of it what it needs. Every token after that is read by `decode`, as if it came alone, in calls of any
    number of tokens; under `jax.jit` the caller must see to it that no more come than the state has room for. Not for
    training.

    Args:
      layer: its parameters are shared.
      prefill: a name in `effattn_jax.sparse.prefills.PREFILLS`, or a function (q, k, v, *, scale, **options) -> out of
        rotated q: [B, T, H, K], k: [B, T, G, K] and of v: [B, T, G, V]; None reads everything.
      decode: a name in `effattn_jax.sparse.decoders.DECODERS`; None keeps and reads everything.
      prefill_options, decode_options: options of the function, fields of the decoder.

    Raises:
      ValueError: a layer with other options than `LAYER`; names or options that do not exist. On a call:
        segment ids, since rows are one document without padding, and a prompt that the state has no room for.
    """

    def __init__(
        self,
        layer: Attention,
        *,
        prefill: str | Callable[..., Array] | None = None,
        decode: str | None = None,
        prefill_options: Mapping[str, Any] | None = None,
        decode_options: Mapping[str, Any] | None = None,
    ):
        has = {"sinks": layer.sinks is not None, "own_keys": layer.own_keys}
        has |= {name: getattr(layer, name) for name in ("window", "logits_soft_cap", "cache_dtype")}
        for name, without in LAYER.items():
            if has[name] != without:
                checks.fail(name, has[name], f"{without}: attached mechanisms do not combine with it")
        for name, value in vars(layer).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.prefill = prefill_of(prefill, prefill_options or {}, layer.implementation)
        self.decode = decoder_of(decode, decode_options or {})

    def init_state(self, batch_size: int, max_length: int) -> EmptyState:  # type: ignore[override]
        return EmptyState(batch_size, max_length)

    def __call__(  # type: ignore[override]
        self,
        x: Hidden,
        state: EmptyState | AttachedState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, AttachedState | None]:
        """`positions` [B, T] turn queries and keys; "streaming" has places of its own instead."""
        if segment_ids is not None:
            checks.fail("segment_ids", "ids", "None: attached mechanisms read one document a row, without padding")
        length = x.shape[1]
        before = state.length if isinstance(state, AttachedState) else jnp.zeros((), jnp.int32)
        if positions is None:
            positions = before + jnp.arange(length)[None]
        q, k, v = self.queries(x), self.keys(x), self.values(x)
        rotated = self.rotated(q, positions), self.rotated(k, positions), v

        def given_to(function: Callable[..., Any], is_rotated: bool, *more: Any) -> Any:
            if is_rotated:
                return function(*rotated, *more, scale=self.scale)
            return function(q, k, v, *more, scale=self.scale, rotate=self.rotated)

        if isinstance(state, AttachedState):
            out, cache = given_to(self.decode.steps, self.decode.rotated, state.cache)
            return self.joined(self.gated(out, x)), AttachedState(cache, before + length)
        if state is not None:
            self._check_prompt(x, state)
        out = self.joined(self.gated(given_to(self.prefill, self.prefill.rotated), x))
        if state is None:
            return out, None
        cache = given_to(self.decode.begin, self.decode.rotated, state.max_length)
        return out, AttachedState(cache, before + length)

    def _check_prompt(self, x: Array, state: EmptyState) -> None:
        checks.check_shape("x", x, (state.batch_size, None, None), "[B, T, D] of the state")
        if not 1 <= x.shape[1] <= state.max_length:
            checks.fail("x", f"{x.shape[1]} tokens", f"a prompt of 1 to {state.max_length}, the room of the state")
