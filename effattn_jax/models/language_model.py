"""A language model: a pattern of mixers, repeated, between an embedding and a head."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers import MIXERS, LayerNorm, Projection
from effattn_jax.layers.first_value import FirstValue, no_first_value
from effattn_jax.layers.norms import NORMS
from effattn_jax.layers.shared_keys import SharedKeys
from effattn_jax.models.activations import shard_batch
from effattn_jax.models.attachment import attach
from effattn_jax.models.block import Block
from effattn_jax.models.key_sharing import KV_FROM, carried, check_key_sharing, read_names
from effattn_jax.models.lower_bounds import bounds_name, common_bounds
from effattn_jax.models.unit import Carry, Unit
from effattn_jax.typing import Array, Float, Hidden, Logits, Positions, SegmentIds, Tokens


class StackState(NamedTuple):
    """States of the blocks before, in and after the repeated part; those of the repeated part are stacked."""

    before: tuple[Any, ...]
    repeated: tuple[Any, ...]
    after: tuple[Any, ...]


BLOCK_OPTIONS = ("mlp_dim", "mlp", "mlp_options", "residual", "mlp_residual", KV_FROM)


class LanguageModel(nnx.Module):
    """`logits, state = model(tokens, state=None, segment_ids=None, positions=None)`: the contract of a layer.

    The pattern is a sequence of names. A name stands for the options under it in `mixers`: those of the mixer, `kind`,
    a mixer of `effattn_jax.layers.MIXERS` (the name itself where it is left out), and those of its block alone:
    `mlp_dim`, `mlp`, `mlp_options`, `residual`, `mlp_residual`, `kv_from` (see `Block`). A mixer that is not there
    takes its defaults. The pattern repeats `repeats` times, its parameters stacked along a leading axis: one `lax.scan`
    runs them, so compile time does not grow with depth. The blocks of `before` and `after`, names too, run once.

        LanguageModel(vocab_size=258, dim=256, mlp_dim=704, pattern=("mamba2", "mamba2", "local"), repeats=2,
                      mixers={"mamba2": {"state_dim": 64}, "local": {"kind": "attention", "heads": 4, "window": 128}},
                      rngs=nnx.Rngs(0))

    Forget gates whose lower bound rises with depth (HGRN, HGRN2) have its logits once, in `bounds`: blocks of one name
    read the same ones.

    `kv_from` names the layer whose keys and values this one reads: the nearest below it of that name, be it in the same
    repetition, in the one before or in `before`. Of the two only that one has a cache. All global layers of a stack on
    the keys of the first, and a local one in two on those of the other:

        LanguageModel(before=("local", "near", "global"), pattern=("local", "near", "far"), repeats=3, ...,
                      mixers={"local": local, "near": local | {"kv_from": "local"},
                              "global": everywhere, "far": everywhere | {"kv_from": "global"}})

    Args:
      vocab_size: rows of the embedding.
      dim: size D of the residual stream.
      mlp_dim: hidden size of the feed-forward layers; 0 for none.
      mlp, mlp_options: their kind, a name of `effattn_jax.layers.FEED_FORWARDS`, and its options.
      norm, post_norm: see `Block`; the last norm is of this kind too.
      residual, mlp_residual: see `Block`.
      tie_embeddings: the head is the transposed embedding.
      embedding_scale: the embeddings are multiplied by it (Gemma: sqrt(D)), rounded to `dtype` first.
      embedding_norm: a LayerNorm after the embedding (RWKV).
      logits_scale: the hidden state is multiplied by it before the head (MiniCPM).
      logits_soft_cap: c; the logits are c tanh(logits / c) (Gemma 2).
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
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        mlp: str = "swiglu",
        mlp_options: Mapping[str, Any] | None = None,
        norm: str = "rms",
        post_norm: bool = False,
        residual: Mapping[str, Any] | None = None,
        mlp_residual: Mapping[str, Any] | None = None,
        tie_embeddings: bool = True,
        embedding_scale: float = 1.0,
        embedding_norm: bool = False,
        logits_scale: float = 1.0,
        logits_soft_cap: float | None = None,
        norm_eps: float = 1e-6,
        remat: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not pattern or repeats < 1:
            checks.fail("pattern", f"{tuple(pattern)!r} x {repeats}", "at least one mixer, repeated at least once")
        for name in (*before, *pattern, *after):
            if name not in mixers and name not in MIXERS:
                known = ", ".join(sorted({*mixers, *MIXERS}))
                checks.fail("pattern", repr(name), f"a name under mixers, or of a mixer: {known}")
        check_key_sharing(mixers, (*before, *pattern, *pattern, *after))
        if norm not in NORMS:
            checks.fail("norm", repr(norm), f"one of {', '.join(sorted(NORMS))}")
        self.source: Any = None  # a published config, see effattn_jax.pretrained
        self.vocab_size, self.repeats, self.remat, self.dtype = vocab_size, repeats, remat, dtype
        self.embedding_scale, self.logits_scale, self.logits_soft_cap = embedding_scale, logits_scale, logits_soft_cap
        of_all: dict[str, Any] = {"mlp_dim": mlp_dim, "mlp": mlp, "mlp_options": mlp_options}
        of_all |= {"residual": residual, "mlp_residual": mlp_residual}
        layer_count = len(before) + repeats * len(pattern) + len(after)
        read = read_names(mixers, (*before, *pattern, *after))
        self.carried = tuple(sorted(carried(mixers, pattern, after)))

        def unit(names: Sequence[str], first_layer: int | Array, rngs: nnx.Rngs) -> Unit:
            blocks = []
            for i, name in enumerate(names):
                options = dict(mixers.get(name, {}))
                kind = options.pop("kind", name)
                of_block = of_all | {key: options.pop(key) for key in BLOCK_OPTIONS if key in options}
                place: dict[str, Any] = {"layer_index": first_layer + i, "layer_count": layer_count}
                shared: dict[str, Any] = {
                    "kv_name": name if name in read else None,
                    "bounds_name": bounds_name(name, kind, options),
                    "norm": norm,
                    "post_norm": post_norm,
                    "norm_eps": norm_eps,
                    "dtype": dtype,
                    "rngs": rngs,
                }
                blocks.append(Block(dim, kind, options, **of_block, **place, **shared))
            return Unit(blocks)

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap(in_axes=(0, 0), out_axes=0)
        def stack(rngs: nnx.Rngs, first_layer: Array) -> Unit:
            return unit(pattern, first_layer, rngs)

        embedding = nnx.initializers.normal(0.02)(rngs.params(), (vocab_size, dim), jnp.float32)
        self.embedding = nnx.Param(embedding, axes=("vocab", "embed"))
        self.embedding_norm = LayerNorm(dim, eps=norm_eps, dtype=dtype) if embedding_norm else None
        self.before = unit(before, 0, rngs) if before else None
        self.units = stack(rngs, len(before) + len(pattern) * jnp.arange(repeats))
        self.after = unit(after, layer_count - len(after), rngs) if after else None
        self.bounds = nnx.Dict(common_bounds((block for _, block in self.parts()), layer_count))
        self.final_norm: Any = NORMS[norm](dim, eps=norm_eps, dtype=dtype)
        self.head = None if tie_embeddings else Projection(dim, vocab_size, ("embed", "vocab"), dtype=dtype, rngs=rngs)

    def parts(self) -> Iterator[tuple[int, Block]]:
        """Each block with the number of times it is there, in the order in which they run first."""
        for unit, times in ((self.before, 1), (self.units, self.repeats), (self.after, 1)):
            for block in () if unit is None else unit.blocks:
                yield times, block

    def with_attention(
        self,
        *,
        prefill: str | Callable[..., Array] | None = None,
        decode: str | None = None,
        prefill_options: Mapping[str, Any] | None = None,
        decode_options: Mapping[str, Any] | None = None,
        layers: Iterable[int] | None = None,
    ) -> Self:
        """The model whose softmax attention is read sparsely, without training; it shares the parameters.

            sparse = model.with_attention(prefill="xattention", decode="quest", decode_options={"budget": 1024})
            generate(sparse, prompts, max_new_tokens=100, prefill_chunk=4096)

        `AttachedAttention` says what is read when. Prompts of one call have one length and are read at once.

        Args:
          prefill: "minference", "flexprefill", "xattention", "spargeattn", "streaming", a function
            (q, k, v, *, scale, **options) -> out, or None, which reads everything.
          decode: "quest", "double_sparsity", "h2o", "snapkv", "cluster_kv", "retro", "streaming", or None, which reads
            everything.
          prefill_options, decode_options: theirs: arguments of the function in `effattn_jax.sparse` of that name, and
            fields of the class in `effattn_jax.sparse.decoders`.
          layers: indices in `before`, the pattern and `after`, side by side; None: all attention without a window. One
            choice holds for all repetitions of a place in the pattern: layers that stay dense (Quest: the first two)
            need a place of their own, such as `before`. Further calls can give other layers other mechanisms.

        Raises:
          ValueError: layers that are no attention without a window, or share keys with others, or have learned sinks, a
            soft cap or a rounded cache; mechanisms or options that do not exist.
        """
        model = nnx.merge(*nnx.split(self))
        mechanisms = {"prefill": prefill, "decode": decode}
        options = {"prefill_options": prefill_options, "decode_options": decode_options}
        attach([block for _, block in model.parts()], layers, **mechanisms, **options)
        return model

    def init_state(self, batch_size: int, max_length: int) -> StackState:
        """The state of every block, stacked over repetitions like the parameters."""
        graph, parameters = nnx.split(self.units)

        def start(unit: Unit | None) -> tuple[Any, ...]:
            return () if unit is None else tuple(block.init_state(batch_size, max_length) for block in unit.blocks)

        # of one repetition: a layer may look at its own parameters
        repeated = jax.vmap(lambda parameters: start(nnx.merge(graph, parameters)))(parameters)
        return StackState(start(self.before), repeated, start(self.after))

    def hidden(
        self,
        tokens: Tokens,
        state: Any = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, Any]:
        """The residual stream after the last norm, scaled: what the head reads."""
        x = self.embed(tokens)
        empty = lambda unit: () if unit is None else (None,) * len(unit.blocks)  # noqa: E731
        if state is None:
            before, repeated, after = map(empty, (self.before, self.units, self.after))
        else:
            before, repeated, after = state
        graph, parameters = nnx.split(self.units)
        bounds = {name: logits[...] for name, logits in self.bounds.items()}
        where: dict[str, Any] = {"bounds": bounds, "segment_ids": segment_ids, "positions": positions}

        carry = Carry(x, self.first_value(x), {})
        if self.before is not None:
            carry, before = self.before(carry, before, self.remat, **where)
        fixed = {name: keys for name, keys in carry.keys.items() if name not in self.carried}

        def repetition(carry: Carry, layer: tuple[Any, Any]) -> tuple[Carry, Any]:
            parameters, states = layer
            carry = carry._replace(keys=fixed | carry.keys)
            carry, states = nnx.merge(graph, parameters)(carry, states, self.remat, **where)
            return carry._replace(keys={name: carry.keys[name] for name in self.carried}), states

        carry = carry._replace(keys=self._carried_keys(carry, repetition, (parameters, repeated)))
        carry, repeated = jax.lax.scan(repetition, carry, (parameters, repeated))
        if self.after is not None:
            carry = carry._replace(keys=fixed | carry.keys)
            carry, after = self.after(carry, after, self.remat, **where)
        x = self.final_norm(carry.x)
        if self.logits_scale != 1:
            x *= jnp.asarray(self.logits_scale, x.dtype)
        return x, None if state is None else StackState(before, repeated, after)

    def _carried_keys(self, carry: Carry, repetition: Any, layers: Any) -> dict[str, SharedKeys]:
        """What the first repetition finds: keys from before it, zeros for those that only come after it is read."""
        known = {name: keys for name, keys in carry.keys.items() if name in self.carried}
        if len(known) == len(self.carried):
            return known
        one = jax.tree.map(lambda x: x[0], layers)
        made = jax.eval_shape(lambda: repetition(carry._replace(keys=known), one))[0].keys
        return {
            name: known[name] if name in known else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made[name])
            for name in self.carried
        }

    def embed(self, tokens: Tokens) -> Hidden:
        """What enters the first block."""
        x = jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)
        if self.embedding_scale != 1:
            x *= jnp.asarray(self.embedding_scale, self.dtype)
        return shard_batch(x if self.embedding_norm is None else self.embedding_norm(x))

    def first_value(self, x: Hidden) -> FirstValue | None:
        """What the first layer finds; None where no mixer passes its values up."""
        mixers = [block.mixer for _, block in self.parts() if hasattr(block.mixer, "with_first_value")]
        return no_first_value(x, mixers[0].value_dim, x.dtype) if mixers else None

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
        logits = jnp.einsum("btd,vd->btv", hidden, self.head_weights(), preferred_element_type=jnp.float32)
        if self.logits_soft_cap is None:
            return logits
        return self.logits_soft_cap * jnp.tanh(logits / self.logits_soft_cap)
