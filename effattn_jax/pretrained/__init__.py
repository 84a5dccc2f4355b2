"""Published models in and out, in Hugging Face's format.

model = load("mistralai/Mistral-7B-v0.1")
logits, state = model(tokens)
save(model, "somewhere")
"""

from effattn_jax.pretrained.build import from_config
from effattn_jax.pretrained.loading import load
from effattn_jax.pretrained.saving import save
from effattn_jax.pretrained.tokenizer import load_tokenizer

__all__ = ["from_config", "load", "load_tokenizer", "save"]
