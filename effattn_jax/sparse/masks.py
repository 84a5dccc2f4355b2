"""Masks of positions: which keys j a query at position p may read. They combine with `&` and `|`.

A mask is a function of positions, and says of a tile of queries and keys without looking into it whether it allows
none, some or all of its pairs; what it says is known at trace time. `effattn_jax.sparse.masked_attention` reads the
tiles that are not empty.
"""

import dataclasses
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.sparse.mask import Band
from effattn_jax.typing import Array, Bool, Int

EMPTY, PARTIAL, FULL = 0, 1, 2  # classes of a tile


class Mask:
    """Frozen and a pytree; equal where the fields are, so that it may be a static argument, too."""

    relative: ClassVar[bool] = False  # a function of p - j alone

    def __call__(self, query: Int[Array, "*q"], key: Int[Array, "*k"]) -> Bool[Array, "*qk"]:
        """Whether the query reads the key; positions broadcast against each other."""
        raise NotImplementedError

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        """The class of the tile queries first..last by keys first..last, both ends included; numpy, broadcasting."""
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)


@dataclass_transform(frozen_default=True)
def static[M: Mask](cls: type[M]) -> type[M]:
    """The decorator of a mask whose fields are all static."""
    dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return jax.tree_util.register_dataclass(cls, [], names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(Mask):
    """What both allow. A tile in which neither is empty may be called partial though no pair is left."""

    first: Mask
    second: Mask

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return self.first.relative and self.second.relative

    def __call__(self, query: Array, key: Array) -> Array:
        return self.first(query, key) & self.second(query, key)

    def tiles(self, *tile: Any) -> np.ndarray:
        return np.minimum(self.first.tiles(*tile), self.second.tiles(*tile))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """What one of both allows. A tile that only both together fill may be called partial."""

    first: Mask
    second: Mask

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return self.first.relative and self.second.relative

    def __call__(self, query: Array, key: Array) -> Array:
        return self.first(query, key) | self.second(query, key)

    def tiles(self, *tile: Any) -> np.ndarray:
        return np.maximum(self.first.tiles(*tile), self.second.tiles(*tile))


@static
class Causal(Mask):
    """j <= p."""

    relative = True

    def __call__(self, query: Array, key: Array) -> Array:
        return Band(True, None)(query, key)

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        return tile_class(first_key <= last_query, last_key <= first_query)


@static
class Window(Mask):
    """0 <= p - j < window: that many keys with the query's own; two-sided |p - j| < window."""

    window: int
    two_sided: bool = False
    relative = True

    def __post_init__(self) -> None:
        check_count("window", self.window)

    def __call__(self, query: Array, key: Array) -> Array:
        return Band(not self.two_sided, self.window)(query, key)

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        least, most = first_query - last_key, last_query - first_key  # p - j takes every value between
        low = 1 - self.window if self.two_sided else 0
        return tile_class((most >= low) & (least < self.window), (least >= low) & (most < self.window))


@static
class Stride(Mask):
    """(p - j) mod step = phase, both ways."""

    step: int
    phase: int = 0
    relative = True

    def __post_init__(self) -> None:
        check_count("step", self.step)
        check_count("phase", self.phase, 0)
        if self.phase >= self.step:
            checks.fail("phase", self.phase, f"an int below {self.step}, the step")

    def __call__(self, query: Array, key: Array) -> Array:
        return (query - key) % self.step == self.phase

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        least, most = first_query - last_key, last_query - first_key
        hits = (most - self.phase) // self.step - (least - 1 - self.phase) // self.step
        return tile_class(hits > 0, hits == most - least + 1)


@static
class Sinks(Mask):
    """j < count: the first keys, for queries before them too; `& Causal()` leaves those out."""

    count: int

    def __post_init__(self) -> None:
        check_count("count", self.count, 0)

    def __call__(self, query: Array, key: Array) -> Array:
        return for_all(query, key < self.count)

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        return like(first_query, tile_class(first_key < self.count, last_key < self.count))


@static
class SameBlock(Mask):
    """floor(p / size) = floor(j / size), both ways."""

    size: int

    def __post_init__(self) -> None:
        check_count("size", self.size)

    def __call__(self, query: Array, key: Array) -> Array:
        return query // self.size == key // self.size

    def tiles(self, *tile: Any) -> np.ndarray:
        first_query, last_query, first_key, last_key = (np.asarray(x) // self.size for x in tile)
        meet = (first_query <= last_key) & (first_key <= last_query)
        return tile_class(meet, (first_query == last_key) & (first_key == last_query))


@static
class Summary(Mask):
    """size - columns <= j mod size + shift < size: of each `size` keys the last few, or those `shift` before them."""

    size: int
    columns: int
    shift: int = 0

    def __post_init__(self) -> None:
        check_count("size", self.size)
        check_count("columns", self.columns)
        check_count("shift", self.shift, 0)
        if self.columns + self.shift > self.size:
            checks.fail("columns", f"{self.columns}, shifted by {self.shift}", f"at most {self.size}, the size, in all")

    def __call__(self, query: Array, key: Array) -> Array:
        place = key % self.size + self.shift
        return for_all(query, (place >= self.size - self.columns) & (place < self.size))

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        begins = self.size - self.columns - self.shift
        before = lambda j: j // self.size * self.columns + np.clip(j % self.size - begins, 0, self.columns)  # noqa: E731
        hits = before(last_key + 1) - before(first_key)
        return like(first_query, tile_class(hits > 0, hits == last_key - first_key + 1))


def check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        checks.fail(name, value, f"an int of at least {least}")


def tile_class(some: Any, every: Any) -> np.ndarray:
    """Whether some of the pairs of a tile are allowed, and whether all are."""
    return np.asarray(some, np.int8) + np.asarray(every, np.int8)


def like(other: Any, classes: np.ndarray) -> np.ndarray:
    """For all entries of the other axis of tiles."""
    return np.broadcast_to(classes, np.broadcast_shapes(np.shape(other), classes.shape))


def for_all(other: Int[Array, "*x"], allowed: Bool[Array, "*y"]) -> Bool[Array, "*xy"]:
    """What one side decides, for all positions of the other."""
    return jnp.broadcast_to(allowed, jnp.broadcast_shapes(other.shape, allowed.shape))
