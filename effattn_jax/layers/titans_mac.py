"""Titans, memory as a context (MAC; Behrouz et al. 2025, arXiv:2501.00663), read causally."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.neural_memory import MemoryState, NeuralMemory
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.rms_norm import RMSNorm
from effattn_jax.layers.rope import rope
from effattn_jax.layers.short_convolution import ShortConvolution
from effattn_jax.layers.titans import width_of_head
from effattn_jax.layers.window_attention import persistent_tokens
from effattn_jax.linear.chunks import from_chunks, to_chunks
from effattn_jax.linear.memory_network import Network
from effattn_jax.linear.mini_batches import MiniBatches, mini_batches
from effattn_jax.linear.recurrence import scan_checkpointed, select
from effattn_jax.linear.titans_chunkwise import spread
from effattn_jax.precision import contract
from effattn_jax.typing import Array, Bool, Float, Hidden, Int, Positions, SegmentIds


class Context(NamedTuple):
    """Keys or values of the open segment by place: of what the memory said of each token, and of the token."""

    keys: Float[Array, "B C 2 H K"]
    values: Float[Array, "B C 2 H K"]


class MACState(NamedTuple):
    """Zeros are a layer that has seen nothing."""

    memory: MemoryState
    start: Network  # the memory's weights at the start of the open segment
    context: Context
    q_tail: Float[Array, "B W-1 HK"]
    place: Int[Array, " B"]  # of the next token in the segment, from 0
    document: Int[Array, " B"]


class Carry(NamedTuple):
    """From window to window; without a context where windows are segments."""

    memory: MemoryState
    start: Network
    context: Context | None
    place: Int[Array, " B"]


class Window(NamedTuple):
    """Consecutive tokens, no more than a segment, of the kinds that `mini_batches` tells apart."""

    asks: Float[Array, "B T H K"]  # the memory
    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H K"]
    ids: SegmentIds
    kinds: MiniBatches


class TitansMAC(nnx.Module):
    """A document is cut into segments of C tokens. Token i of a segment that begins with memory M_s reads

        h_i = M_s(unit(silu(conv(W_Q x_i))))                    what the memory says of it, before the segment
        y_i = Attention(x_i; p, h_1 .. h_i, x_1 .. x_i)         in the segment, with N_p persistent tokens p
        M_i = the memory after learning y_1 .. y_i, too         `NeuralMemory` on y
        output = W_out (RMSNorm(y) * sigmoid(RMSNorm(M_i(y))) * silu(W_gate x))

    Read to the letter, a whole segment at a time, the paper's equations let token i see h_j of later tokens and a
    memory that has learned all of the segment. Here token i sees h and x up to its own and reads the memory as of then,
    so nothing of the future reaches it. Rotary positions are places in the segment, alike for h_i and x_i; p has none.

    Args:
      segment: C. Windows of at most C tokens are worked off one after the other.
      persistent: N_p.
      rope_theta: base of the rotary positions; None is none.
      heads, head_dim, depth, expand, activation, chunk, max_step, conv_width: see `Titans`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        segment: int = 64,
        persistent: int = 4,
        rope_theta: float | None = 10_000.0,
        depth: int = 2,
        expand: int = 4,
        activation: str = "gelu",
        chunk: int = 16,
        max_step: float = 1.0,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        head_dim = width_of_head(dim, heads, head_dim)
        if segment < 1:
            checks.fail("segment", segment, "at least 1 token")
        if persistent < 0:
            checks.fail("persistent", persistent, "at least 0 tokens")
        if rope_theta is not None and head_dim % 2:
            checks.fail("head_dim", head_dim, "an even number of channels, or rope_theta None")
        inner = heads * head_dim
        self.heads, self.head_dim, self.segment, self.rope_theta = heads, head_dim, segment, rope_theta
        self.dtype = dtype
        self.ask_proj, self.q_proj, self.k_proj, self.v_proj, self.gate_proj = (
            Projection(dim, inner, ("embed", "heads"), dtype=dtype, rngs=rngs) for _ in range(5)
        )
        self.ask_conv = ShortConvolution(inner, conv_width, bias=False, dtype=dtype, rngs=rngs)
        self.persistent = persistent_tokens(persistent, dim, rngs)
        self.said_norm = RMSNorm(inner, eps=norm_eps, axis="heads", dtype=dtype)
        self.said_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)
        self.memory = NeuralMemory(
            inner,
            heads=heads,
            head_dim=head_dim,
            depth=depth,
            expand=expand,
            activation=activation,
            chunk=chunk,
            max_step=max_step,
            conv_width=conv_width,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
        self.attention_norm = RMSNorm(inner, eps=norm_eps, axis="heads", dtype=dtype)
        self.memory_norm = RMSNorm(inner, eps=norm_eps, axis="heads", dtype=dtype)
        self.out_proj = Projection(inner, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> MACState:
        """`max_length` is of no consequence here: the state has one size."""
        memory = self.memory.init_state(batch_size)
        shape = (batch_size, self.segment, 2, self.heads, self.head_dim)
        return MACState(
            memory=memory,
            start=memory.memory.memory,
            context=Context(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)),
            q_tail=self.ask_conv.init_state(batch_size),
            place=jnp.zeros(batch_size, jnp.int32),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections, on average over a segment."""
        persistent = 0 if self.persistent is None else self.persistent.shape[0]
        keys = persistent + 2 * (min(self.segment, length) + 1) / 2
        asks = 2 * self.heads * sum(w.shape[1] * w.shape[2] for w in self.memory.weights)
        return self.memory.mixing_flops() + asks + 4 * self.heads * self.head_dim * keys

    def __call__(
        self,
        x: Hidden,
        state: MACState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, MACState | None]:
        """`positions` is of no consequence here: a token's position is its place in the segment."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        batch, length, _ = x.shape
        if length == 0:
            return jnp.zeros_like(x, dtype=self.dtype), state
        known = self.init_state(batch, length) if state is None else forget_other_documents(state, segment_ids)
        document = new_document(known.document, segment_ids)
        ids = jnp.broadcast_to(document[:, None], (batch, length)) if segment_ids is None else segment_ids
        aligned = state is None and segment_ids is None

        asks, tail = self.ask_conv(self.ask_proj(x), None if state is None else known.q_tail, segment_ids=segment_ids)
        size = min(self.segment, length)
        kinds, place = mini_batches(ids, known.place, self.segment, size)
        asks, q, k, v = (to_chunks(y, size) for y in (asks, self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        asks, q, k, v = (y.reshape(*y.shape[:3], self.heads, self.head_dim) for y in (asks, q, k, v))
        windows = Window(l2_norm(asks.astype(jnp.float32)), q, k, v, to_chunks(ids, size, fill=-1), kinds)
        windows = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), windows)

        def step(carry: Carry, window: Window) -> tuple[Carry, tuple[Array, Array]]:
            return self._window(carry, window, aligned=aligned, full=aligned and length % size == 0)

        start = select(known.memory.begun > 0, known.start, spread(self.memory.start(), batch))
        carry = Carry(known.memory, start, None if aligned else known.context, known.place)
        carry, (y, m) = scan_checkpointed(step, carry, windows)
        y, m = (from_chunks(jnp.moveaxis(part, 0, 1), length) for part in (y, m))
        gate = jax.nn.sigmoid(self.memory_norm(m)) * jax.nn.silu(self.gate_proj(x))
        out = self.out_proj(self.attention_norm(y) * gate)
        if state is None or carry.context is None or tail is None:
            return out, None
        return out, MACState(carry.memory, carry.start, carry.context, tail, place, document)

    def _window(
        self, carry: Carry, window: Window, *, aligned: bool, full: bool
    ) -> tuple[Carry, tuple[Float[Array, "B T HK"], Float[Array, "B T HK"]]]:
        """The window of one segment (`aligned`, `full` without padding); or of the rest of one, the beginning of the
        next, and documents that begin: three kinds of tokens, which ask the memory as it is at three places."""
        memory, start, context, place = carry
        kinds = window.kinds
        fresh = self.memory.start()
        said, following = self.memory.ask(window.asks, start), start
        if not aligned:
            said = jnp.where(kinds.fresh[..., None, None], self.memory.ask(window.asks, fresh), said)
        y, own = self._attend(window, said, context, place)
        if not aligned:
            # What the open segment leaves to the next one, which it learns from what it attends to.
            _, left = self.memory(y, memory, segment_ids=jnp.where(kinds.open, window.ids, -1))
            following = left.memory.memory  # type: ignore[union-attr]
            said = jnp.where(kinds.next[..., None, None], self.memory.ask(window.asks, following), said)
            y, own = self._attend(window, said, context, place)
        m, memory = self.memory(y, memory, segment_ids=None if full else window.ids)  # type: ignore[assignment]

        ends = lambda kind: jnp.any(kinds.leaves & kind, axis=-1)  # noqa: E731
        start = select(ends(kinds.next), following, start)
        start = select(ends(kinds.fresh), spread(fresh, len(place)), start)
        start = select(kinds.closes, memory.memory.memory, start)
        if context is not None:
            context = Context(*(put(kept, new, kinds) for kept, new in zip(context, own, strict=True)))
        reached = jnp.max(jnp.where(kinds.leaves, kinds.place + 1, 0), axis=-1)
        place = jnp.where(reached > 0, reached % self.segment, place)
        return Carry(memory, start, context, place.astype(jnp.int32)), (y, m.reshape(y.shape))

    def _attend(
        self, window: Window, said: Float[Array, "B T H K"], context: Context | None, place: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T HK"], Context]:
        """Softmax over persistent tokens, the open segment before the window (for tokens that go on with it), and the
        window up to each token; and the window's own keys and values."""
        batch, length = window.ids.shape
        by_head = lambda x: x.reshape(*x.shape[:-1], self.heads, self.head_dim)  # noqa: E731
        turn = lambda x: x if self.rope_theta is None else rope(x, window.kinds.place, theta=self.rope_theta)  # noqa: E731
        h = self.said_proj(self.said_norm(said.reshape(batch, length, -1)))
        pair = lambda a, b: jnp.stack([a, b], axis=2)  # noqa: E731
        own = Context(pair(turn(by_head(self.k_proj(h))), turn(window.k)), pair(by_head(self.v_proj(h)), window.v))
        parts = [(own, window.kinds.reads)]
        if context is not None:
            filled = jnp.arange(self.segment) < place[:, None]
            parts.append((context, window.kinds.open[:, :, None] & filled[:, None, :]))
        q, scale = turn(window.q), self.head_dim**-0.5
        scores, masks, values = [], [], []
        for (k, v), mask in parts:
            scores.append(contract("bthk,bjphk->bhtjp", q, k).reshape(batch, self.heads, length, -1))
            masks.append(jnp.repeat(mask, 2, axis=-1))
            values.append(v.reshape(batch, -1, self.heads, self.head_dim))
        if self.persistent is not None:
            p = self.persistent[...]
            scores.append(contract("bthk,nhk->bhtn", window.q, by_head(self.k_proj(p))))
            masks.append(jnp.ones((batch, length, len(p)), bool))
            values.append(jnp.broadcast_to(by_head(self.v_proj(p)), (batch, len(p), self.heads, self.head_dim)))
        weights = masked_softmax(scale * jnp.concatenate(scores, -1), jnp.concatenate(masks, -1)[:, None])
        y = contract("bhtj,bjhk->bthk", weights, jnp.concatenate(values, 1).astype(weights.dtype))
        return y.reshape(batch, length, -1), own


def masked_softmax(scores: Float[Array, "*batch J"], mask: Bool[Array, "*batch J"]) -> Float[Array, "*batch J"]:
    """Zeros in a row without keys."""
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(scores.dtype).min / 2)
    p = jnp.exp(scores - jax.lax.stop_gradient(top))
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p / jnp.where(total == 0, 1, total)


def put(kept: Float[Array, "B C ..."], new: Float[Array, "B T ..."], kinds: MiniBatches) -> Float[Array, "B C ..."]:
    """Tokens of the segment that is open after the window, at their places."""
    places = jnp.where(kinds.leaves, kinds.place, kept.shape[1])  # beyond the end: dropped
    return kept.at[jnp.arange(len(kept))[:, None], places].set(new.astype(kept.dtype), mode="drop")
