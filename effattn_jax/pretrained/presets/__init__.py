"""Published models by name: the sizes of their config.json, without their weights.

`from_config` builds what `preset("falcon-mamba-7b")` says. The files beside this one hold what describes the model, in
its authors' spelling; Gemma 3's are those of its language model, MiniCPM-4's has the rotary factors and the sparse
attention that they advise for long texts.
"""

import importlib.resources
import json

from effattn_jax import checks
from effattn_jax.pretrained.family import Config

SUFFIX = ".json"


def names() -> tuple[str, ...]:
    """Of all presets."""
    files = (file.name for file in importlib.resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX)))


def preset(name: str) -> Config:
    """The published config.

    Raises:
      ValueError: no such preset.
    """
    if name not in names():
        checks.fail("preset", repr(name), f"one of {', '.join(names())}")
    config: Config = json.loads((importlib.resources.files(__name__) / f"{name}{SUFFIX}").read_text())
    return config
