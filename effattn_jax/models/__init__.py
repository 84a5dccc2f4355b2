"""Language models from patterns of mixers, their loss, their sizes and generation."""

from effattn_jax.models.block import Block
from effattn_jax.models.generation import cut, generate
from effattn_jax.models.language_model import LanguageModel
from effattn_jax.models.loss import token_losses
from effattn_jax.models.sampling import Sampling
from effattn_jax.models.session import Session
from effattn_jax.models.sizes import Sizes, sizes, training_flops_per_token
from effattn_jax.models.streaming import stream

__all__ = [
    "Block",
    "LanguageModel",
    "Sampling",
    "Session",
    "Sizes",
    "cut",
    "generate",
    "sizes",
    "stream",
    "token_losses",
    "training_flops_per_token",
]
