"""The lower bounds of the forget gates of HGRN and HGRN2: one tensor [L, D] for all L blocks, as in our models."""

from collections.abc import Sequence

from effattn_jax.pretrained.entry import Entry, same
from effattn_jax.pretrained.family import Config


def lower_bounds(config: Config, kind: str) -> Sequence[Entry]:
    return same("model.lower_bounds", f"bounds.{kind}") if config["use_lower_bound"] else []
