"""What the layers of test-time training share: all but the network inside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.layer_norm import LayerNorm
from effattn_jax.layers.positions import document_positions
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.query_key import QueryKey, SharedQueryKey, Tail
from effattn_jax.layers.rope import rope
from effattn_jax.linear import TTTState
from effattn_jax.linear.inner_loss import EPSILON, Network
from effattn_jax.typing import Array, Hidden, Int, Positions, SegmentIds

BACKBONES = ("transformer", "mamba")


class TTTLayerState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: TTTState  # its weights less those that the layer has learned
    tail: Tail | None  # of what the convolutions of the Mamba backbone read
    document: Int[Array, " B"]


class TTTLayer(nnx.Module):
    """q, k, v = projections of the input, in heads of K channels, q and k turned by their places in the mini-batch:

        lr = base_lr * sigmoid(W_lr x + c) / K,   token_scale_i = max(1 / i + offset_i, 0),  i = 1 .. mini-batch
        o = learn(q, k, v, lr, token_scale)
        output = W_o LayerNorm(o)                       with the transformer backbone
        output = W_o (gelu(W_gate x) * LayerNorm(o))    with the Mamba backbone

    where the LayerNorm is over all heads. A mechanism adds the network that each document starts from and `learn`.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int,
        mini_batch: int,
        base_lr: float,
        backbone: str,
        conv_width: int,
        rope_theta: float,
        interleaved: bool,
        dtype: Any,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ):
        if head_dim < 1 or dim % head_dim or head_dim % 2:
            checks.fail("head_dim", head_dim, f"an even divisor of dim = {dim}")
        if mini_batch < 1:
            checks.fail("mini_batch", mini_batch, "at least 1 token")
        if backbone not in BACKBONES:
            checks.fail("backbone", repr(backbone), f"one of {', '.join(BACKBONES)}")
        heads, mamba = dim // head_dim, backbone == "mamba"
        self.heads, self.head_dim, self.mini_batch = heads, head_dim, mini_batch
        self.base_lr, self.rope_theta, self.interleaved = base_lr, rope_theta, interleaved
        self.dtype, self.implementation = dtype, implementation

        into: dict[str, Any] = {"axes": ("embed", "heads"), "dtype": dtype, "rngs": rngs}
        self.qk: Any = (
            SharedQueryKey(dim, dim, conv_width=conv_width, dtype=dtype, rngs=rngs)
            if mamba
            else QueryKey(dim, dim, dtype=dtype, rngs=rngs)
        )
        self.v_proj = Projection(dim, dim, **into)
        self.gate_proj = Projection(dim, dim, **into) if mamba else None
        start = nnx.initializers.normal(0.02)
        self.lr_proj = Projection(dim, heads, ("embed", "heads"), bias=True, initializer=start, rngs=rngs)
        self.token_offset = nnx.Param(jnp.zeros((mini_batch,), jnp.float32), axes=("mini_batch",))
        self.ln_scale = nnx.Param(jnp.ones((heads, head_dim), jnp.float32), axes=("heads", "head"))
        self.ln_bias = nnx.Param(jnp.zeros((heads, head_dim), jnp.float32), axes=("heads", "head"))
        self.norm = LayerNorm(dim, eps=EPSILON, axis="heads", dtype=dtype)
        self.out_proj = Projection(dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def network(self) -> Network:
        """What every document starts from."""
        raise NotImplementedError

    def learn(self, q: Array, k: Array, v: Array, lr: Array, token_scale: Array, **call: Any) -> tuple[Array, TTTState]:
        """(o, memory)."""
        raise NotImplementedError

    def init_state(self, batch_size: int, max_length: int) -> TTTLayerState:
        """`max_length` is of no consequence here: the state has one size."""
        zeros = jax.tree.map(lambda x: jnp.zeros((batch_size, *x.shape), jnp.float32), self.network())
        memory = TTTState(zeros, zeros, jnp.zeros((batch_size,), jnp.int32))
        return TTTLayerState(memory, self.qk.init_state(batch_size), no_document(batch_size))

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: each layer of the network reads the key and
        the query and gets a gradient, and all but the first pass one on; then the mini-batch's own b x b products."""
        layers = [(layer.W.shape[1], layer.W.shape[2]) for layer in self.network()]
        weights = sum(3 * i * o for i, o in layers) + sum(i * o for i, o in layers[1:])
        return 2 * self.heads * (weights + self.mini_batch * sum(i + o for i, o in layers))

    def __call__(
        self,
        x: Hidden,
        state: TTTLayerState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, TTTLayerState | None]:
        """`positions` is of no consequence here: what counts is the place in the mini-batch."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        q, k, tail = self.qk(x, None if state is None else state.tail, segment_ids=segment_ids)
        heads = (*x.shape[:2], self.heads, self.head_dim)
        place, _ = document_positions(x.shape[:2], None if state is None else state.memory.place, segment_ids)
        turned: dict[str, Any] = {"theta": self.rope_theta, "interleaved": self.interleaved}
        q, k = (rope(y.reshape(heads), place % self.mini_batch, **turned) for y in (q, k))

        o, memory = self.learn(
            q,
            k,
            self.v_proj(x).reshape(heads),
            self.base_lr / self.head_dim * jax.nn.sigmoid(self.lr_proj(x)),
            jnp.maximum(1 / jnp.arange(1, self.mini_batch + 1) + self.token_offset[...], 0),
            initial_state=None if state is None else self._moved(state.memory, 1),
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = self.norm(o.reshape(x.shape))
        if self.gate_proj is not None:
            y = y * jax.nn.gelu(self.gate_proj(x), approximate=True)
        y = self.out_proj(y)
        if state is None:
            return y, None
        return y, TTTLayerState(self._moved(memory, -1), tail, new_document(state.document, segment_ids))

    def _moved(self, memory: TTTState, sign: int) -> TTTState:
        """The memory with the learned weights added or taken away: zeros in the layer's state are a new document."""
        return memory._replace(weights=jax.tree.map(lambda a, b: a + sign * b, memory.weights, self.network()))
