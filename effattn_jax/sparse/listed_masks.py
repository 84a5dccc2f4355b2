"""Masks that hold a list or a table: positions, documents, blocks."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import checks
from effattn_jax.sparse.mask import same_document
from effattn_jax.sparse.masks import PARTIAL, Mask, check_count, for_all, like, static, tile_class
from effattn_jax.typing import Array, Bool, Int


@static
class GlobalKeys(Mask):
    """j is one of `positions`: every query reads these keys."""

    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", _ascending(self.positions))

    def __call__(self, query: Array, key: Array) -> Array:
        return for_all(query, _is_one_of(self.positions, key))

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        return like(first_query, _hits(self.positions, first_key, last_key))


@static
class GlobalQueries(Mask):
    """p is one of `positions`: these queries read every key."""

    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", _ascending(self.positions))

    def __call__(self, query: Array, key: Array) -> Array:
        return for_all(key, _is_one_of(self.positions, query))

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        return like(first_key, _hits(self.positions, first_query, last_query))


def _ascending(positions: Iterable[int]) -> tuple[int, ...]:
    positions = tuple(positions)
    for position in positions:
        check_count("positions", position, 0)
    return tuple(sorted({int(position) for position in positions}))


def _is_one_of(positions: tuple[int, ...], x: Int[Array, "*x"]) -> Bool[Array, "*x"]:
    end = max(positions, default=-1) + 1
    table = np.zeros(end + 1, bool)
    table[list(positions)] = True
    return jnp.asarray(table)[jnp.clip(x, 0, end)] & (x >= 0)


def _hits(positions: tuple[int, ...], first: Any, last: Any) -> np.ndarray:
    hits = np.searchsorted(positions, last, "right") - np.searchsorted(positions, first, "left")
    return tile_class(hits > 0, hits == last - first + 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Mask):
    """ids[p] = key_ids[j] >= 0: queries read their own document; negative ids are padding.

    ids: [M] by position, and key_ids by the keys' positions where they are others; None: the same. Tiles are known
    where the ids are known at trace time and never decrease, padding apart; else all are called partial.
    """

    ids: Int[Array, " M"]
    key_ids: Int[Array, " M"] | None = None

    def __call__(self, query: Array, key: Array) -> Array:
        key_ids = self.ids if self.key_ids is None else self.key_ids
        return same_document(_look_up(self.ids, query), _look_up(key_ids, key))

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        key_ids = self.ids if self.key_ids is None else self.key_ids
        tile = (first_query, last_query, first_key, last_key)
        if any(isinstance(x, jax.core.Tracer) or not _ordered(np.asarray(x)) for x in (self.ids, key_ids)):
            return np.full(np.broadcast_shapes(*map(np.shape, tile)), PARTIAL, np.int8)
        own, other = _extent(np.asarray(self.ids), *tile[:2]), _extent(np.asarray(key_ids), *tile[2:])
        meet = (own.reals > 0) & (other.reals > 0) & (own.least <= other.most) & (other.least <= own.most)
        whole = own.whole & other.whole & (own.least == other.most) & (other.least == own.most)
        return tile_class(meet, meet & whole)


@dataclasses.dataclass(frozen=True)
class _Extent:
    """Of tokens first..last."""

    least: np.ndarray  # id, of the first real token
    most: np.ndarray
    reals: np.ndarray  # number of tokens that are no padding
    whole: np.ndarray  # all are real


def _extent(ids: np.ndarray, first: Any, last: Any) -> _Extent:
    real = ids >= 0
    until = np.concatenate([[0], np.cumsum(real)])
    which = np.flatnonzero(real)
    which = ids[which] if len(which) else np.zeros(1, ids.dtype)
    reals = until[np.minimum(last + 1, len(ids))] - until[np.minimum(first, len(ids))]
    least = which[np.minimum(until[np.minimum(first, len(ids))], len(which) - 1)]
    most = which[np.maximum(until[np.minimum(last + 1, len(ids))] - 1, 0)]
    return _Extent(least, most, reals, reals == last - first + 1)


def _ordered(ids: np.ndarray) -> bool:
    return bool(np.all(np.diff(ids[ids >= 0]) >= 0))


def _look_up(ids: Int[Array, " M"], position: Int[Array, "*x"]) -> Int[Array, "*x"]:
    inside = (position >= 0) & (position < len(ids))
    return jnp.where(inside, jnp.asarray(ids)[jnp.clip(position, 0, len(ids) - 1)], -1)


class Table:
    """A matrix of booleans that is hashable, so that it can be static."""

    def __init__(self, entries: Any):
        self.entries = np.array(entries, bool)
        self.entries.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and np.array_equal(self.entries, other.entries)

    def __hash__(self) -> int:
        return hash((self.entries.shape, self.entries.tobytes()))


@static
class BlockList(Mask):
    """table[floor(p / query_size), floor(j / key_size)]; nothing is read outside of the table.

    table: booleans, blocks of queries by blocks of keys, known at trace time.
    """

    table: Any
    query_size: int
    key_size: int

    def __post_init__(self) -> None:
        check_count("query_size", self.query_size)
        check_count("key_size", self.key_size)
        if not isinstance(self.table, Table):
            checks.check_rank("table", np.asarray(self.table), 2, "[blocks of queries, blocks of keys]")
            object.__setattr__(self, "table", Table(self.table))

    def __call__(self, query: Array, key: Array) -> Array:
        padded = jnp.asarray(np.pad(self.table.entries, ((0, 1), (0, 1))))
        row, column = (
            jnp.where(x < 0, end, jnp.clip(x // size, 0, end))
            for x, size, end in zip((query, key), self._sizes(), self.table.entries.shape, strict=True)
        )
        return padded[row, column]

    def _sizes(self) -> tuple[int, int]:
        return self.query_size, self.key_size

    def tiles(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> np.ndarray:
        rows, columns = self.table.entries.shape
        total = np.pad(np.cumsum(np.cumsum(self.table.entries, 0, np.int64), 1), ((1, 0), (1, 0)))  # summed areas
        top, bottom = first_query // self.query_size, last_query // self.query_size + 1
        left, right = first_key // self.key_size, last_key // self.key_size + 1
        area = (bottom - top) * (right - left)
        top, bottom = np.minimum(top, rows), np.minimum(bottom, rows)
        left, right = np.minimum(left, columns), np.minimum(right, columns)
        hits = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
        return tile_class(hits > 0, hits == area)
