"""A language model: a pattern of mixers, repeated, between an embedding and a head."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import MIXERS, Projection, RMSNorm
from effattn_jax.layers.first_value import FirstValue, no_first_value
from effattn_jax.models.activations import shard_batch
from effattn_jax.models.block import Block
from effattn_jax.typing import Array, Float, Hidden, Logits, Positions, SegmentIds, Tokens


class Unit(nnx.Module):
    """One repetition of the pattern: blocks one after the other."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = nnx.List(blocks)

    def __call__(
        self, x: Hidden, first: FirstValue | None, states: Any, remat: bool, **where: Any
    ) -> tuple[Hidden, FirstValue | None, Any]:
        new_states = []
        for block, state in zip(self.blocks, states, strict=True):
            call = lambda block, x, state, first: block.with_first_value(x, state, first, **where)  # noqa: E731
            x, state, first = (jax.checkpoint(call) if remat else call)(block, shard_batch(x), state, first)
            new_states.append(state)
        return x, first, tuple(new_states)

    def first_value(self, x: Hidden) -> FirstValue | None:
        """What the first layer finds; None where no mixer of the pattern passes its values up."""
        mixers = [block.mixer for block in self.blocks if hasattr(block.mixer, "with_first_value")]
        return no_first_value(x, mixers[0].value_dim, x.dtype) if mixers else None


class LanguageModel(nnx.Module):
    """`logits, state = model(tokens, state=None, segment_ids=None, positions=None)`: the contract of a layer.

    The pattern is a sequence of names. A name stands for the options under it in `mixers`: those of the mixer, `kind`,
    a mixer of `effattn_jax.layers.MIXERS` (the name itself where it is left out), and `mlp_dim`, the size of its
    block's feed-forward layer. A mixer that is not there takes its defaults. The pattern repeats `repeats` times, its
    parameters stacked along a leading axis: one `lax.scan` runs them, so compile time does not grow with depth.

        LanguageModel(vocab_size=258, dim=256, mlp_dim=704, pattern=("mamba2", "mamba2", "local"), repeats=2,
                      mixers={"mamba2": {"state_dim": 64}, "local": {"kind": "attention", "heads": 4, "window": 128}},
                      rngs=nnx.Rngs(0))

    Args:
      vocab_size: rows of the embedding.
      dim: size D of the residual stream.
      mlp_dim: hidden size of the feed-forward layers; 0 for none.
      mlp: their kind, a name of `effattn_jax.layers.FEED_FORWARDS`.
      tie_embeddings: the head is the transposed embedding.
      remat: recompute each block in the backward pass instead of keeping what is inside.
      dtype: of computation; parameters are float32.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        mlp_dim: int,
        pattern: Sequence[str],
        repeats: int,
        mixers: Mapping[str, Mapping[str, Any]],
        mlp: str = "swiglu",
        tie_embeddings: bool = True,
        norm_eps: float = 1e-6,
        remat: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not pattern or repeats < 1:
            checks.fail("pattern", f"{tuple(pattern)!r} x {repeats}", "at least one mixer, repeated at least once")
        for name in pattern:
            if name not in mixers and name not in MIXERS:
                known = ", ".join(sorted({*mixers, *MIXERS}))
                checks.fail("pattern", repr(name), f"a name under mixers, or of a mixer: {known}")
        self.vocab_size, self.repeats, self.remat, self.dtype = vocab_size, repeats, remat, dtype
        options = [dict(mixers.get(name, {})) for name in pattern]
        mlp_dims = [given.pop("mlp_dim", mlp_dim) for given in options]
        kinds = [given.pop("kind", name) for name, given in zip(pattern, options, strict=True)]

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap(in_axes=(0, 0), out_axes=0)
        def stack(rngs: nnx.Rngs, first_layer: Array) -> Unit:
            return Unit(
                [
                    Block(
                        dim,
                        kind,
                        given,
                        mlp_dim=size,
                        mlp=mlp,
                        layer_index=first_layer + i,
                        layer_count=repeats * len(kinds),
                        norm_eps=norm_eps,
                        dtype=dtype,
                        rngs=rngs,
                    )
                    for i, (kind, given, size) in enumerate(zip(kinds, options, mlp_dims, strict=True))
                ]
            )

        embedding = nnx.initializers.normal(0.02)(rngs.params(), (vocab_size, dim), jnp.float32)
        self.embedding = nnx.Param(embedding, axes=("vocab", "embed"))
        self.units = stack(rngs, len(kinds) * jnp.arange(repeats))
        self.final_norm = RMSNorm(dim, eps=norm_eps, dtype=dtype)
        self.head = None if tie_embeddings else Projection(dim, vocab_size, ("embed", "vocab"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> Any:
        """The state of every block, stacked over repetitions like the parameters."""
        graph, parameters = nnx.split(self.units)

        def start(parameters: Any) -> Any:  # of one repetition: a layer may look at its own parameters
            blocks = nnx.merge(graph, parameters).blocks
            return tuple(block.init_state(batch_size, max_length) for block in blocks)

        return jax.vmap(start)(parameters)

    def hidden(
        self,
        tokens: Tokens,
        state: Any = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Any]:
        """The residual stream after the last norm: what the head reads."""
        x = shard_batch(jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype))
        graph, parameters = nnx.split(self.units)
        if state is None:
            state = (None,) * len(self.units.blocks)

        def repetition(carry: tuple[Hidden, Any], layer: tuple[Any, Any]) -> tuple[tuple[Hidden, Any], Any]:
            parameters, states = layer
            unit = nnx.merge(graph, parameters)
            x, first, states = unit(*carry, states, self.remat, segment_ids=segment_ids, positions=positions)
            return (x, first), states

        (x, _), state = jax.lax.scan(repetition, (x, self.units.first_value(x)), (parameters, state))
        if all(part is None for part in state):
            state = None
        return self.final_norm(x), state

    def head_weights(self) -> Float[Array, "vocab D"]:
        """The rows whose products with the hidden state are the logits, in the dtype of computation."""
        weights = self.embedding[...] if self.head is None else self.head.kernel[...].T
        return weights.astype(self.dtype)

    def __call__(
        self,
        tokens: Tokens,
        state: Any = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Logits, Any]:
        hidden, state = self.hidden(tokens, state, segment_ids=segment_ids, positions=positions)
        return self.logits(hidden), state

    def logits(self, hidden: Hidden) -> Logits:
        """Scores over the vocabulary in float32."""
        return jnp.einsum("btd,vd->btv", hidden, self.head_weights(), preferred_element_type=jnp.float32)
