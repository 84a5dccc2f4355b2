"""Sparse mechanisms for a trained model."""

from collections.abc import Iterable
from typing import Any

from effattn_jax import checks
from effattn_jax.layers.attached import AttachedAttention
from effattn_jax.layers.attention import Attention
from effattn_jax.models.block import Block


def attach(blocks: Iterable[Block], layers: Iterable[int] | None, **mechanisms: Any) -> None:
    """Replace the mixers of the blocks of these indices; None: of all that can be."""
    blocks = list(blocks)
    able = [i for i, block in enumerate(blocks) if _is_able(block)]
    chosen = able if layers is None else list(layers)
    if not chosen or not set(chosen) <= set(able):
        checks.fail("layers", chosen, f"some of {able}: attention without a window, whose keys no other layer reads")
    for i in chosen:
        blocks[i].mixer = AttachedAttention(blocks[i].mixer, **mechanisms)


def reads_prompts_at_once(blocks: Iterable[Block]) -> bool:
    """Whether a prompt must come in one call, in rows of one length."""
    return any(isinstance(block.mixer, AttachedAttention) for block in blocks)


def _is_able(block: Block) -> bool:
    alone = block.kv_from is None and block.kv_name is None
    return alone and type(block.mixer) is Attention and block.mixer.window is None
