"""What every sparse mechanism goes through by being listed in `tests/sparse/records`: the fields of a record."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, eq=False)
class Mechanism:
    """One mechanism with fixed options, small enough for rows of some dozens of tokens.

    `run(q, k, v, segment_ids=None)` is the function of the library, in JAX: q [B, T, H, K], k [B, M, G, K],
    v [B, M, G, V] -> out [B, T, H, V]; its queries are the last T of the M positions.
    `mask(q, k)` is the effective mask [B, H, T, M], by brute force from the equation, in float64 numpy; it shares no
    code with the library. A mechanism that is no single softmax has an `oracle(q, k, v)` -> out instead; one that
    selects at random has neither.
    """

    name: str
    run: Callable
    mask: Callable | None = None
    oracle: Callable | None = None
    decode: Callable | None = None  # (q, k, v) -> out, token by token through its cache
    dense: Callable | None = None  # like `run`, with a budget that reads everything: it must be dense attention
    lengths: tuple[int, ...] = (1, 7, 8, 9, 15, 17, 37)  # around the sizes of its blocks
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 6
    shared: bool = True  # one selection for the heads of a group: repeating key heads may not change it
    causal: bool = True  # strictly: no row depends on a later token, not even through what it selects
    trainable: bool = True  # has gradients in q, k and v: those of the softmax under the mask
    packed: bool = True  # takes segment_ids
    continues: bool = True  # takes M > T: the last rows of one pass
    count: Callable | None = None  # (length) -> the number of keys that the last row reads; None: no fixed number
    limit: float = 1e-5  # error ratio of float32
    slow: bool = False  # every test of it here: it has quick ones of its own
