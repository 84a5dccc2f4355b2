"""The neural memory of Titans with its projections and gates: what the four Titans layers share."""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.l2_norm import l2_norm
from effattn_jax.layers.projection import Projection
from effattn_jax.layers.short_qkv import QKVTails, ShortQKV
from effattn_jax.linear import TitansState, titans_memory
from effattn_jax.linear.memory_network import Network, matrices, read
from effattn_jax.linear.recurrence import select
from effattn_jax.linear.titans_recurrent import fresh_state
from effattn_jax.typing import Array, Float, Hidden, Int, SegmentIds


class MemoryState(NamedTuple):
    """Zeros are a memory that has seen nothing."""

    memory: TitansState
    begun: Int[Array, " B"]  # 0: the weights are not these but the learned start
    tails: QKVTails
    document: Int[Array, " B"]


class NeuralMemory(nnx.Module):
    """q, k, v = unit(silu(conv(W_q x))), unit(silu(conv(W_k x))), silu(conv(W_v x)), and for every head

        theta = max_step / K * sigmoid(w_theta . x + b)    eta, alpha = sigmoid(w_eta . x + b), sigmoid(w_alpha . x + b)
        S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2    M_t = (1 - alpha_t) M_{t-1} + S_t    y_t = M_t(q_t)

    with gradients at the start of each chunk (`effattn_jax.linear.titans_memory`). M is a network of `depth` matrices
    whose hidden width is `expand` times that of a head; 1 is a linear memory. The paper says that the gates depend on
    the token and no more: sigmoids of one number per head are our choice, with biases under which the steps start
    small, the momentum at half and the memory nearly without forgetting. A deep memory's descent can overshoot where a
    chunk's keys are much alike: `max_step` bounds it. Its start M_0 is learned.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        depth: int,
        expand: int,
        activation: str,
        chunk: int,
        max_step: float,
        conv_width: int,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        for name, size in (("heads", heads), ("head_dim", head_dim), ("depth", depth), ("expand", expand)):
            if size < 1:
                checks.fail(name, size, "at least 1")
        if max_step <= 0:
            checks.fail("max_step", max_step, "a number above 0")
        self.heads, self.head_dim, self.chunk, self.max_step = heads, head_dim, chunk, max_step
        self.activation, self.dtype, self.implementation = activation, dtype, implementation
        of_heads = (heads, head_dim)
        self.qkv = ShortQKV(dim, q=of_heads, k=of_heads, v=of_heads, conv_width=conv_width, dtype=dtype, rngs=rngs)
        gate = lambda: Projection(dim, heads, ("embed", "heads"), dtype=dtype, rngs=rngs)  # noqa: E731
        bias = lambda start: nnx.Param(jnp.full((heads,), start, jnp.float32), axes=("heads",))  # noqa: E731
        self.theta_proj, self.eta_proj, self.alpha_proj = gate(), gate(), gate()
        self.theta_bias, self.eta_bias, self.alpha_bias = bias(-3.0), bias(0.0), bias(-4.0)
        widths = [head_dim, *[expand * head_dim] * (depth - 1), head_dim]
        start = nnx.initializers.glorot_normal(in_axis=1, out_axis=2, batch_axis=0)
        self.weights = nnx.List(
            nnx.Param(start(rngs.params(), (heads, i, o), jnp.float32), axes=("heads", "state", "state"))
            for i, o in pairwise(widths)
        )

    def start(self) -> Network:
        """M_0."""
        return tuple(w[...] for w in self.weights)

    def init_state(self, batch_size: int) -> MemoryState:
        zeros = lambda: tuple(jnp.zeros((batch_size, *w.shape), jnp.float32) for w in self.weights)  # noqa: E731
        none = jnp.zeros(batch_size, jnp.int32)
        memory = TitansState(zeros(), zeros(), zeros(), none)
        return MemoryState(memory, none, self.qkv.init_state(batch_size), no_document(batch_size))

    def mixing_flops(self) -> float:
        """Floating-point operations a token needs beside the projections: what it says at the chunk's start and the
        gradient of that, two reads, the end of the chunk, and the products of queries and keys inside it."""
        matrices = [w.shape[1] * w.shape[2] for w in self.weights]
        channels = [w.shape[1] + w.shape[2] for w in self.weights]
        return self.heads * (12 * sum(matrices) + 2 * self.chunk * sum(channels))

    def __call__(
        self, x: Hidden, state: MemoryState | None = None, *, segment_ids: SegmentIds | None = None
    ) -> tuple[Float[Array, "B T H V"], MemoryState | None]:
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        q, k, v, tails = self.qkv(x, None if state is None else state.tails, segment_ids=segment_ids)
        number = lambda project, bias: jax.nn.sigmoid(project(x).astype(jnp.float32) + bias[...])  # noqa: E731
        start, initial = self.start(), None
        if state is not None:
            initial = select(state.begun > 0, state.memory, fresh_state(start, len(x)))
        y, memory = titans_memory(
            l2_norm(q.astype(jnp.float32)),
            l2_norm(k.astype(jnp.float32)),
            v.astype(jnp.float32),
            self.max_step / self.head_dim * number(self.theta_proj, self.theta_bias),
            number(self.eta_proj, self.eta_bias),
            number(self.alpha_proj, self.alpha_bias),
            start,
            chunk=self.chunk,
            activation=self.activation,
            initial_state=initial,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        if state is None or tails is None:
            return y, None
        met = jnp.full(len(x), x.shape[1] > 0) if segment_ids is None else jnp.any(segment_ids >= 0, axis=1)
        begun = jnp.maximum(state.begun, met.astype(jnp.int32))
        return y, MemoryState(memory, begun, tails, new_document(state.document, segment_ids))

    def ask(self, q: Float[Array, "B T H K"], weights: Network) -> Float[Array, "B T H V"]:
        """M(q) without learning, at weights [B, H, I, O] or [H, I, O]."""
        y = read(matrices(weights), jnp.moveaxis(q.astype(jnp.float32), 2, 1), self.activation)
        return jnp.moveaxis(y, 1, 2)
