"""Reading a prompt, one interface for all mechanisms: a function of queries, keys and values, and its options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.sparse.attention import attention
from effattn_jax.sparse.flexprefill import flexprefill
from effattn_jax.sparse.minference import minference
from effattn_jax.sparse.options import check_options
from effattn_jax.sparse.spargeattn import spargeattn
from effattn_jax.sparse.streaming import streaming_attention
from effattn_jax.sparse.xattention import xattention
from effattn_jax.typing import Array

PREFILLS: dict[str, Callable[..., Array]] = {
    "minference": minference,
    "flexprefill": flexprefill,
    "xattention": xattention,
    "spargeattn": spargeattn,
    "streaming": streaming_attention,
}
"""`f(q, k, v, *, scale, **options) -> out` for q: [B, T, H, K], k: [B, T, G, K] and v: [B, T, G, V]."""

UNROTATED = (streaming_attention,)
"""Those that take queries and keys before their rotation, and `rotate`."""


@dataclass(frozen=True)
class Prefill:
    """A mechanism with its options, which compares by value."""

    function: Callable[..., Array]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def rotated(self) -> bool:
        return self.function not in UNROTATED

    def __call__(self, q: Array, k: Array, v: Array, **how: Any) -> Array:
        return self.function(q, k, v, **how, **dict(self.options))


def prefill_of(
    prefill: str | Callable[..., Array] | None, options: Mapping[str, Any], implementation: Implementation = None
) -> Prefill:
    """Of a name or a function; None reads everything, in this implementation of `attention`.

    Raises:
      ValueError: a name or an option that does not exist.
    """
    if prefill is None:
        if options:
            checks.fail("prefill_options", sorted(options), "none without a mechanism")
        return Prefill(attention, (("implementation", _fixed(implementation)),))
    if isinstance(prefill, str):
        if prefill not in PREFILLS:
            checks.fail("prefill", repr(prefill), f"None, a function or one of {', '.join(PREFILLS)}")
        prefill = PREFILLS[prefill]
    check_options("prefill_options", options, prefill, given=3)
    return Prefill(prefill, tuple((name, _fixed(value)) for name, value in sorted(options.items())))


def _fixed(value: Any) -> Any:
    """What can be hashed, as the structure of a model must be."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_fixed, value)) if isinstance(value, list) else value
