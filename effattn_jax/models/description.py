"""What a model is made of, what it remembers and what it costs, by the length of the context; nothing is allocated."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from effattn_jax.layers import FEED_FORWARDS, MIXERS
from effattn_jax.layers.moe import MoE
from effattn_jax.models.block import Block
from effattn_jax.models.blueprint import Blueprint
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.sizes import used_numbers


class AtContext(NamedTuple):
    """Of one sequence that is `context` tokens long; floating-point operations are counted as products, 2 per weight.

    Args:
      state_bytes: of memories that are as large for any context: recurrent states, windows.
      cache_bytes: of those that grow with it.
      decode_flops: of the next token.
      prefill_flops: of a token of the prompt on average, without the head.
    """

    context: int
    state_bytes: int
    cache_bytes: int
    decode_flops: float
    prefill_flops: float

    @property
    def bytes(self) -> int:
        return self.state_bytes + self.cache_bytes


class Description(NamedTuple):
    """Args:
    layers: kinds of blocks, and how many there are of each.
    parameters: all of them.
    embedding_parameters: of them the embedding's, and those of a head of its own.
    idle_parameters: of them those a token does not meet: of experts it does not go to, and rows of an embedding that
      is not the head too.
    dtype: of computation, keys and values.
    """

    layers: tuple[tuple[str, int], ...]
    parameters: int
    embedding_parameters: int
    idle_parameters: int
    dtype: str
    contexts: tuple[AtContext, ...]

    @property
    def active_parameters(self) -> int:
        return self.parameters - self.idle_parameters


def describe(plan: Blueprint[LanguageModel], contexts: Sequence[int]) -> Description:
    """From a model without its parameters, see `blueprint`."""
    model = plan.model(plan.shapes)  # type: ignore[arg-type]
    blocks = [block for _, block in model.parts()]
    layers: dict[str, int] = {}
    for times, block in model.parts():
        layers[kind(block)] = layers.get(kind(block), 0) + times
    parameters = _count(nnx.state(model, nnx.Param))
    table = math.prod(model.embedding.shape)
    idle = sum(_count(nnx.state(block, nnx.Param)) - used_numbers(block) for block in blocks)
    return Description(
        layers=tuple(layers.items()),
        parameters=parameters,
        embedding_parameters=table * (1 if model.head is None else 2),
        idle_parameters=round(idle) + (0 if model.head is None else table),
        dtype=jax.numpy.dtype(model.dtype).name,
        contexts=tuple(at_context(plan, model, context) for context in contexts),
    )


def at_context(plan: Blueprint[LanguageModel], model: LanguageModel, context: int) -> AtContext:
    """A token with n keys in view is taken to cost what the mean token of a causal row of 2n - 1 does."""
    state = lambda length: jax.tree.leaves(  # noqa: E731
        jax.eval_shape(lambda parameters: plan.model(parameters).init_state(1, length), plan.shapes)
    )
    now, later = state(context), state(2 * context)
    fixed = [x for x, y in zip(now, later, strict=True) if x.shape == y.shape]
    matrices = sum(used_numbers(block, "kernel") for _, block in model.parts())
    mixing = lambda length: sum(times * block.mixer.mixing_flops(length) for times, block in model.parts())  # noqa: E731
    return AtContext(
        context=context,
        state_bytes=_bytes(fixed),
        cache_bytes=_bytes(now) - _bytes(fixed),
        decode_flops=2 * (matrices + math.prod(model.embedding.shape)) + mixing(2 * context - 1),
        prefill_flops=2 * matrices + mixing(context),
    )


def kind(block: Block) -> str:
    """A block in words: "attention, window 1,024 + swiglu"."""
    words = _name(block.mixer, MIXERS)
    window, source = getattr(block.mixer, "window", None), getattr(block, "kv_from", None)
    words += "" if window is None else f", window {window:,}"
    words += "" if source is None else f", keys of {source}"
    if block.mlp is None:
        return words
    if isinstance(block.mlp, MoE):
        return f"{words} + {block.mlp.top_k} of {block.mlp.experts} experts"
    activation = getattr(block.mlp, "activation", "silu")
    return f"{words} + {_name(block.mlp, FEED_FORWARDS) if activation == 'silu' else f'gated {activation}'}"


def _name(layer: Any, known: Mapping[str, Any]) -> str:
    return next((name for name, kind in known.items() if type(layer) is kind), type(layer).__name__)


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes(leaves: Sequence[Any]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
