"""What new tokens may read, as a layer and those that share its keys and values see it."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from effattn_jax.sparse.attention import AttentionOut, attend, attention
from effattn_jax.sparse.documents import real_only
from effattn_jax.sparse.mask import Band, same_document
from effattn_jax.sparse.single_token import read
from effattn_jax.typing import Array, Bool, Float, Int, Queries


class Row(NamedTuple):
    """Without a cache: the row itself."""

    k: Float[Array, "B T G K"]
    v: Float[Array, "B T G V"]
    segment_ids: Int[Array, "B T"] | None

    def read(self, q: Queries, **options: Any) -> AttentionOut:
        return attention(q, self.k, self.v, segment_ids=self.segment_ids, **options)


class Prefix(NamedTuple):
    """The past and T new tokens in order of position; slots after the last of these are not looked at."""

    k: Float[Array, "B M G K"]
    v: Float[Array, "B M G V"]
    segment_ids: Int[Array, "B M"]
    query_segments: Int[Array, "B T"]
    offset: Int[Array, ""] | None  # where the new tokens begin; None: they are the last

    def read(self, q: Queries, **options: Any) -> AttentionOut:
        out, _ = attend(
            real_only(q, self.query_segments),
            self.k,
            self.v,
            offset=self.k.shape[1] - q.shape[1] if self.offset is None else self.offset,
            causal=True,
            query_segments=self.query_segments,
            key_segments=self.segment_ids,
            return_lse=False,
            **options,
        )
        return out


class Slots(NamedTuple):
    """A cache for one new token, the last that is in it."""

    k: Float[Array, "B S G K"] | Int[Array, "B S G K"]
    v: Float[Array, "B S G V"] | Int[Array, "B S G V"]
    segment_ids: Int[Array, "B S"]
    query_segments: Int[Array, "B 1"]
    last: Int[Array, ""]  # its position: it is in slot `last` mod S
    k_scale: Float[Array, "B S G"] | None
    v_scale: Float[Array, "B S G"] | None

    def read(self, q: Queries, *, window: int | None = None, **options: Any) -> AttentionOut:
        q, mask = real_only(q, self.query_segments), self._mask(window)
        return read(q, self.k, self.v, mask, k_scale=self.k_scale, v_scale=self.v_scale, **options)

    def _mask(self, window: int | None) -> Bool[Array, "B S"]:
        slots = self.k.shape[1]
        age = (self.last - jnp.arange(slots)) % slots  # tokens since the slot was written
        return Band(True, window)(self.last, self.last - age) & same_document(self.query_segments, self.segment_ids)


Readable = Row | Prefix | Slots
