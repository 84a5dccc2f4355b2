"""Checkpoints whose language model is a part: its config and its tensors, as if it had been published alone."""

import re
from typing import Any

from effattn_jax.pretrained.family import Config

ALONE = {"gemma3": ("gemma3_text", "Gemma3ForCausalLM")}
"""`model_type` of the whole, and of its language model: `model_type` and class in transformers."""

OTHERS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
MODEL = re.compile(r"(model\.language_model|language_model\.model)\.")
HEAD = re.compile(r"language_model\.lm_head\.")
SHARED = ("dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def is_multimodal(config: Config) -> bool:
    return config.get("model_type") in ALONE


def text_config(config: Config) -> dict[str, Any]:
    """The config of the language model: `text_config`, with what only the whole says of it."""
    model_type, architecture = ALONE[config["model_type"]]
    text = {key: value for key, value in config["text_config"].items() if value is not None or key not in SHARED}
    of_all = {key: config[key] for key in SHARED if key in config}
    return of_all | text | {"model_type": model_type, "architectures": [architecture]}


def text_name(name: str) -> str | None:
    """The name of a tensor in a checkpoint of the language model; None: it is no part of it."""
    if OTHERS.fullmatch(name):
        return None
    return HEAD.sub("lm_head.", MODEL.sub("model.", name, count=1), count=1)
