"""How large a model is: parameters, what it remembers per sequence, and the arithmetic of a training token."""

import math
from typing import NamedTuple

import jax
from flax import nnx

from effattn_jax.layers.moe import MoE
from effattn_jax.models.block import Block
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.sparse import ForgettingCache, KVCache, LatentCache, PathCache

EXPERTS = (["mlp", "gate"], ["mlp", "up"], ["mlp", "down"])
CACHES = (KVCache, LatentCache, ForgettingCache, PathCache)


class Sizes(NamedTuple):
    parameters: int
    embedding_parameters: int
    state_bytes: int  # fixed-size memories, per sequence
    cache_bytes: int  # keys and values, per sequence of `max_length` tokens
    max_length: int

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters ({self.embedding_parameters:,} in embeddings); per sequence: "
            f"{format_bytes(self.state_bytes)} of recurrent state, {format_bytes(self.cache_bytes)} of keys and values "
            f"at {self.max_length:,} tokens"
        )


def sizes(model: LanguageModel, max_length: int) -> Sizes:
    """Counted from the shapes of the parameters and of the state of one sequence; nothing is allocated."""
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    nbytes = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    state = jax.eval_shape(lambda: model.init_state(1, max_length))
    is_cache = lambda part: isinstance(part, CACHES)  # noqa: E731
    caches = [part for part in jax.tree.leaves(state, is_leaf=is_cache) if is_cache(part)]
    embeddings = math.prod(model.embedding.shape) * (1 if model.head is None else 2)
    return Sizes(
        parameters=count(nnx.state(model, nnx.Param)),
        embedding_parameters=embeddings,
        state_bytes=nbytes(state) - nbytes(caches),
        cache_bytes=nbytes(caches),
        max_length=max_length,
    )


def training_flops_per_token(model: LanguageModel, length: int) -> float:
    """Forward and backward (twice the forward), counted as products: 2 per weight of every matrix, and the mixing.

    Recomputation (remat) is not counted, so that utilisation compares models by useful work.
    """
    matrices = sum(used_numbers(block, "kernel") for _, block in model.parts())  # of a repeated block the stack of all
    matrices += math.prod(model.embedding.shape)  # the head, tied or not
    mixing = sum(times * block.mixer.mixing_flops(length) for times, block in model.parts())
    return 3 * (2 * matrices + mixing)


def used_numbers(block: Block, name: str | None = None) -> float:
    """Numbers in the parameters, of that name, that a token meets: of an expert's the part of the tokens that it gets.

    Of a block that is repeated those of all repetitions.
    """
    experts = [m for m in (block.mlp,) if isinstance(m, MoE)]
    total = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(block, nnx.Param)))[0]:
        names = [getattr(part, "key", None) for part in path]
        if name in (None, names[-1]):
            share = experts[0].top_k / experts[0].experts if experts and names[:2] in EXPERTS else 1
            total += share * math.prod(leaf.shape)
    return total


def format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
