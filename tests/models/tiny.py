"""A small hybrid: a state of fixed size, a window and a cache that grows, twice."""

import functools
import inspect
from typing import Any

import jax
from flax import nnx

from effattn_jax.models import LanguageModel
from tests.layers.catalogue import filled

VOCAB, DIM, MLP, REPEATS = 23, 8, 12, 2
MIXERS = {
    "mamba2": {"head_dim": 4, "state_dim": 4, "groups": 2},
    "local": {"kind": "attention", "heads": 2, "kv_heads": 1, "window": 3, "sinks": True},
    "attention": {"heads": 2, "head_dim": 6, "qk_norm": True},
}
PATTERN = ("mamba2", "local", "attention")


def make(rngs: nnx.Rngs | None = None, **changes: Any) -> LanguageModel:
    options = {
        "vocab_size": VOCAB,
        "dim": DIM,
        "mlp_dim": MLP,
        "pattern": PATTERN,
        "repeats": REPEATS,
        "mixers": MIXERS,
    } | changes
    return LanguageModel(**options, rngs=nnx.Rngs(0) if rngs is None else rngs)


@functools.cache
def hybrid(**changes: Any) -> LanguageModel:
    """Random weights, wide; nothing is initialised."""
    return filled(lambda: make(**changes))


def equations(jaxpr: Any) -> list[Any]:
    """All equations, those of inner jaxprs included."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and not inspect.isclass(inner):
                found += equations(inner)
    return found
