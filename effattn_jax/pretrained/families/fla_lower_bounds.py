"""The lower bounds of the forget gates of HGRN and HGRN2: one tensor [L, D] for all L blocks, which our mixers each
have a copy of."""

from collections.abc import Sequence

import numpy as np

from effattn_jax import checks
from effattn_jax.pretrained.entry import Entry
from effattn_jax.pretrained.families import fla
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.layout import Arrays, Layout, Shape


def _split(tensor: np.ndarray, shapes: Sequence[Shape]) -> Arrays:
    return [np.broadcast_to(tensor, shape) for shape in shapes]


def _join(arrays: Arrays) -> np.ndarray:
    first: np.ndarray = arrays[0].reshape(-1, *arrays[0].shape[-2:])[0]
    if any((x != first).any() for x in arrays):
        checks.fail("bound_logits", "other numbers in other blocks", "the same in all, since the file has one tensor")
    return first


COPIES = Layout(shape=lambda shapes: shapes[0][-2:], split=_split, join=_join)
"""The same numbers in every parameter, and at every index of its leading axes."""


def lower_bounds(config: Config, kind: str) -> Sequence[Entry]:
    if not config["use_lower_bound"]:
        return []
    names, places = fla.blocks(config, kind), fla.pattern(config, kind)
    own = dict.fromkeys(places.place(i)[0] for i, name in enumerate(names) if name == kind)
    return [Entry("model.lower_bounds", tuple(f"{below}.mixer.bound_logits" for below in own), COPIES)]
