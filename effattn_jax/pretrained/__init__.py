"""Published models in and out, in Hugging Face's format.

model = load("mistralai/Mistral-7B-v0.1")
logits, state = model(tokens)
save(model, "somewhere")
"""

from effattn_jax.pretrained.build import from_config
from effattn_jax.pretrained.loading import load
from effattn_jax.pretrained.saving import save

__all__ = ["from_config", "load", "save"]
